from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, selections, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def m2po(*, limit: float = 0.04, low: float = 0.7, high: float = 1.5) -> Method:
  """M2PO (arXiv:2510.01161): clipping bounds from the second moment of log-ratios of stale data.

      loss = -token mean of min(r A, clip(r, min(exp(-tau), low), max(exp(tau), high)) A)
      tau: the largest |log r| for which the mean of min((log r)^2, tau^2) is below `limit`

  r = pi / pi_old, and A is the group-normalised reward. tau is found for each minibatch, and its
  mean is over the tokens that moved in the direction of their advantage, A log r > 0. If their mean
  of (log r)^2 is at most `limit`, nothing is clipped.

  Differences: Rollouts are four batches old (lag=4), and pi_old is the policy that sampled them.
  This is the rule of the authors' code. Algorithm 1 of the paper, as in Trinity-RFT, drops the
  tokens with the largest log-ratios until the mean over the rest is at most `limit`: surrogate
  `importance_weighted`, selection `selected` of `selections.second_moment`, and weight
  `trust_region_masks.selected`. AReaL has a third rule.

  Args:
    limit: largest mean of (log r)^2, in nats^2.
    low: the lower bound of r is at most this.
    high: the upper bound of r is at least this.

  Confidence: CODE.
  """
  bounds = part(selections.second_moment_bounds, limit=limit, low=low, high=high)
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped_between),
      aggregation=part(aggregation.token_mean),
      selections={'bounds': bounds},
    ),
    minibatches=2,
  )
