from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part


def mis() -> Method:
  """MIS (standard; as in TRL and verl): rows that the sampler found far less likely are dropped.

  loss = -token mean of sg(R 1[R <= 3]) min(r A, clip(r, 0.8, 1.28) A) with the ratio of the row, R =
  prod_t pi_old / pi_behavior. What is dropped stays in the denominator. The tokens' variant is
  IcePop (arXiv:2510.18855). The mismatch is made by age, as in `tis.py`.
  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4, recompute_proximal=True),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=0.2, eps_high=0.28),
      aggregation=part(aggregation.token_mean),
      weights={'mismatch': part(weights.masked_sequence_importance, low=0.0, high=3.0)},
    ),
    minibatches=2,
  )
