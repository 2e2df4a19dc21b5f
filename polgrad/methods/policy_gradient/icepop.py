from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part


def icepop() -> Method:
  """IcePop (arXiv:2510.18855): tokens on which sampler and trainer disagree are dropped.

  loss = -token mean of sg(rho 1[0.5 <= rho <= 5]) min(r A, clip(r, 0.8, 1.2) A), rho = pi_old /
  pi_behavior: outside the band a token is silenced, not truncated, and it stays in the denominator.
  The mismatch is made by age, as in `tis.py`.
  Confidence: CODE (formula), MEMORY (bounds).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4, recompute_proximal=True),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=0.2, eps_high=0.2),
      aggregation=part(aggregation.token_mean),
      weights={'mismatch': part(weights.masked_importance, low=0.5, high=5.0)},
    ),
    minibatches=2,
  )
