from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part


def rec_ring(
  *, low: float = 0.8, high: float = 1.2, outer_low: float = 0.4, outer_high: float = 3.0
) -> Method:
  """REC-Ring (arXiv:2509.24203): tokens near the old policy, and those that went far the wrong way.

      loss = -token mean of K A log pi
      K = 1[low <= r <= high, or (A >= 0 and r <= outer_low), or (A <= 0 and r >= outer_high)]

  A = R - group mean and r = pi / pi_old. The outer tokens are good ones that became unlikely and
  are pulled up again, and bad ones that became likely and are pulled down again.

  Differences: Rollouts are four batches old (lag=4), and pi_old is the policy that sampled them.

  Args:
    low: smallest ratio of the inner band.
    high: largest ratio of the inner band.
    outer_low: largest ratio at which good tokens are kept again.
    outer_high: smallest ratio at which bad tokens are kept again.

  Confidence: CODE (mask and bounds), PAPER (derivation).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.token_mean),
      weights={
        'region': part(weights.ring, low=low, high=high, outer_low=outer_low, outer_high=outer_high)
      },
    ),
    minibatches=4,
  )
