from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, ratios, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part


def vespo() -> Method:
  """VESPO (arXiv:2602.10693): rows fade out smoothly as their sequence ratio leaves 1.

  W = prod_t pi / pi_old of the row; loss = -token mean of sg(W^k exp(lam (1 - W))) A log pi, (k,
  lam) = (2, 3) for A >= 0 and (3, 2) for A < 0. The weight is 1 on-policy and largest at W = k /
  lam, and it decays on both sides of that: a row that the policy has left fades out, a good one that
  has become likelier first. pi_old is the sampler, four batches old.
  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      ratio=part(ratios.sequence_product),
      aggregation=part(aggregation.token_mean),
      weights={
        'gamma': part(
          weights.gamma_shaped,
          power_positive=2.0,
          rate_positive=3.0,
          power_negative=3.0,
          rate_negative=2.0,
        )
      },
    ),
    minibatches=4,
  )
