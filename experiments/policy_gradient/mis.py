"""MIS (standard; as in TRL and verl): rows that the sampler found far less likely are dropped.

loss = -token mean of sg(R 1[R <= 3]) min(r A, clip(r, 0.8, 1.28) A) with the ratio of the row, R =
prod_t pi_old / pi_behavior. What is dropped stays in the denominator. The tokens' variant is
IcePop (arXiv:2510.18855). The mismatch is made by age, as in `tis.py`.
Confidence: CODE.
Card: S15.

    python -m polgrad.train --config=experiments/policy_gradient/mis.py --workdir=runs/mis
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, surrogates, weights
from polgrad.registry import part


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  phase = addition_phase(
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=0.2, eps_high=0.28),
      aggregation=part(aggregation.token_mean),
      weights={'mismatch': part(weights.masked_sequence_importance, low=0.0, high=3.0)},
    ),
    rollouts={'lag': 4, 'recompute_proximal': True},
    minibatches=2,
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
