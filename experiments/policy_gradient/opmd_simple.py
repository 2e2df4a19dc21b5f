"""OPMD-simple (arXiv:2509.24203): REINFORCE with the group mean, and nothing of the old policy.

loss = -token mean of (R - group mean) log pi / (1 + tau): mirror descent to first order. The
published code divides the loss, which Adam would undo; so here the learning rate is divided by 1 +
tau = 2, and this is the whole method. Ours: rollouts are four batches old.
Confidence: CODE (formula and tau), DERIVED (division of the rate).
Card: S22.

    python -m polgrad.train --config=experiments/policy_gradient/opmd_simple.py \\
      --workdir=runs/opmd_simple
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.registry import part


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  phase = addition_phase(
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.token_mean),
    ),
    learning_rate=1e-4 / (1 + 1.0),
    minibatches=4,
    rollouts={'lag': 4},
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
