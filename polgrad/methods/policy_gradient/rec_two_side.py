from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part


def rec_two_side(*, low: float = 0.8, high: float = 1.2) -> Method:
  """REC-TwoSide (arXiv:2509.24203): off-policy REINFORCE on the tokens whose ratio is near 1.

      loss = -token mean of 1[low <= r <= high] A log pi

  A = R - group mean and r = pi / pi_old. Unlike the one-sided mask (`rec_one_side`), this one also
  drops tokens that moved against their advantage.

  Differences: Rollouts are four batches old (lag=4), and pi_old is the policy that sampled them.

  Args:
    low: smallest ratio of a token that is kept.
    high: largest ratio of a token that is kept.

  Confidence: CODE (mask and bounds), PAPER (derivation).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.token_mean),
      weights={'region': part(weights.two_sided, low=low, high=high)},
    ),
    minibatches=4,
  )
