"""Decoupled PPO (arXiv:2505.24298; idea: 2110.00641): the trust region leaves the stale sampler.

loss = -token mean of sg(min(rho, 5)) min(r A, clip(r, 0.8, 1.2) A), r = pi / pi_prox and rho =
pi_prox / pi_behavior, pi_prox the trainer's policy when the batch arrives: old data are
reweighted, and only steps away from the recent policy are clipped. Advantages are
group-normalised. The formula has no cap; AReaL has one, above which its code drops tokens and ours
truncates.
Confidence: CODE (formula), MEMORY (cap).
Card: S17.

    python -m polgrad.train --config=experiments/policy_gradient/decoupled_ppo.py \\
      --workdir=runs/decoupled_ppo
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
      surrogate=part(surrogates.clipped, eps_low=0.2, eps_high=0.2),
      aggregation=part(aggregation.token_mean),
      weights={'behavior': part(weights.truncated_importance, cap=5.0)},
    ),
    rollouts={'lag': 4, 'recompute_proximal': True},
    minibatches=4,
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
