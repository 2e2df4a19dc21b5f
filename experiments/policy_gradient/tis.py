"""TIS (arXiv:2505.24034): truncated importance weights for the mismatch of sampler and trainer.

loss = -token mean of sg(min(rho, 2)) min(r A, clip(r, 0.8, 1.28) A), rho = pi_old / pi_behavior.
The weight multiplies the loss, never the reward. Here sampler and trainer compute alike, so the
mismatch is made by age: rollouts are trained on four batches after they were sampled.
Confidence: CODE.
Card: S15.

    python -m polgrad.train --config=experiments/policy_gradient/tis.py --workdir=runs/tis
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
      weights={'mismatch': part(weights.truncated_importance, cap=2.0)},
    ),
    rollouts={'lag': 4, 'recompute_proximal': True},
    minibatches=2,
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
