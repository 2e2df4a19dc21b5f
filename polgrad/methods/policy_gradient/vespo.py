from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, ratios, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part


def vespo(
  *,
  power_positive: float = 2.0,
  rate_positive: float = 3.0,
  power_negative: float = 3.0,
  rate_negative: float = 2.0,
) -> Method:
  """VESPO (arXiv:2602.10693): rows fade out smoothly as their sequence ratio moves away from 1.

      loss = -token mean of sg(W^k exp(lam (1 - W))) A log pi,   W = prod_t pi / pi_old of the row

  A is the group-normalised reward. (k, lam) is (power_positive, rate_positive) if A >= 0, otherwise
  (power_negative, rate_negative). The weight is 1 on-policy, largest at W = k / lam, and decays on
  both sides of it. By default the largest weight is at W = 2/3 for good rows and at W = 3/2 for bad
  ones.

  Differences: Rollouts are four batches old (lag=4), and pi_old is the policy that sampled them.

  Args:
    power_positive: k where A >= 0.
    rate_positive: lam where A >= 0.
    power_negative: k where A < 0.
    rate_negative: lam where A < 0.

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
          power_positive=power_positive,
          rate_positive=rate_positive,
          power_negative=power_negative,
          rate_negative=rate_negative,
        )
      },
    ),
    minibatches=4,
  )
