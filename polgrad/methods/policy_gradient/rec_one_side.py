from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part


def rec_one_side(*, low: float = 0.4, high: float = 3.0) -> Method:
  """REC-OneSide (arXiv:2509.24203): REINFORCE with a trust region and no importance weights.

      loss = -token mean of 1[(A >= 0 and r <= high) or (A <= 0 and r >= low)] A log pi

  A = R - group mean and r = pi / pi_old. The bounds are the wide ones of the paper (eps 0.6 and 2);
  its narrow ones are 0.8 and 1.2.

  Differences: Rollouts are four batches old (lag=4), and pi_old is the policy that sampled them. A
  rollout is cut into four minibatches.

  Args:
    low: smallest ratio of a token with A < 0 that is kept.
    high: largest ratio of a token with A > 0 that is kept.

  Confidence: CODE (mask and bounds), PAPER (derivation).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.token_mean),
      weights={'region': part(weights.one_sided, low=low, high=high)},
    ),
    minibatches=4,
  )
