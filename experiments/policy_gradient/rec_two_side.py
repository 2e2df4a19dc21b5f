"""REC-TwoSide (arXiv:2509.24203): off-policy REINFORCE on the tokens whose ratio is near 1.

loss = -token mean of 1[0.8 <= r <= 1.2] A log pi, r = pi / pi_old, A = R - group mean. Unlike the
one-sided mask it also drops tokens that moved against their advantage. Ours: rollouts are four
batches old, and pi_old is the policy that sampled.
Confidence: CODE (mask and bounds), PAPER (derivation).
Card: 0.

    python -m polgrad.train --config=experiments/policy_gradient/rec_two_side.py \\
      --workdir=runs/rec_two_side
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, surrogates, weights
from polgrad.registry import part


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  phase = addition_phase(
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.token_mean),
      weights={'region': part(weights.two_sided, low=0.8, high=1.2)},
    ),
    minibatches=4,
    rollouts={'lag': 4},
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
