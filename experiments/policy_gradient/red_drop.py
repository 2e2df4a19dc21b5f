"""RED-Drop (arXiv:2509.24203): REINFORCE on as many bad rows as there are good ones.

loss = -token mean of A log pi. In each group rows with R >= group mean stay, of the others equally
many, chosen at random; A = R - mean of the rows that stayed, and 0 for the rest, which still count
in the denominator. No ratio is read. Ours: rollouts are four batches old, and the rate is 3e-5:
nothing bounds a step, and at 1e-4 accuracy fell from 0.43 to 0.29 in 24 batches.
Confidence: CODE (selection), PAPER (derivation).
Card: 0.

    python -m polgrad.train --config=experiments/policy_gradient/red_drop.py --workdir=runs/red_drop
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives
from polgrad.losses import aggregation, baselines, surrogates
from polgrad.registry import part


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  phase = addition_phase(
    credit=part(credit.outcome, advantage=part(baselines.balanced_group_mean, standardized=False)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.token_mean),
    ),
    learning_rate=3e-5,
    minibatches=4,
    rollouts={'lag': 4},
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
