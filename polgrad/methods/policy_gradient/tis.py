from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part


def tis() -> Method:
  """TIS (arXiv:2505.24034): truncated importance weights for the mismatch of sampler and trainer.

  loss = -token mean of sg(min(rho, 2)) min(r A, clip(r, 0.8, 1.28) A), rho = pi_old / pi_behavior.
  The weight multiplies the loss, never the reward. Here sampler and trainer compute alike, so the
  mismatch is made by age: rollouts are trained on four batches after they were sampled.
  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4, recompute_proximal=True),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=0.2, eps_high=0.28),
      aggregation=part(aggregation.token_mean),
      weights={'mismatch': part(weights.truncated_importance, cap=2.0)},
    ),
    minibatches=2,
  )
