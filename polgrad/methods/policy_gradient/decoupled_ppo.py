from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part


def decoupled_ppo() -> Method:
  """Decoupled PPO (arXiv:2505.24298; idea: 2110.00641): the trust region leaves the stale sampler.

  loss = -token mean of sg(min(rho, 5)) min(r A, clip(r, 0.8, 1.2) A), r = pi / pi_prox and rho =
  pi_prox / pi_behavior, pi_prox the trainer's policy when the batch arrives: old data are
  reweighted, and only steps away from the recent policy are clipped. Advantages are
  group-normalised. The formula has no cap; AReaL has one, above which its code drops tokens and ours
  truncates.
  Confidence: CODE (formula), MEMORY (cap).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4, recompute_proximal=True),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=0.2, eps_high=0.2),
      aggregation=part(aggregation.token_mean),
      weights={'behavior': part(weights.truncated_importance, cap=5.0)},
    ),
    minibatches=4,
  )
