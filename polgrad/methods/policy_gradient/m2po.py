from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, selections, surrogates, trust_region_masks
from polgrad.methods.base import Method
from polgrad.registry import part


def m2po(*, limit: float = 0.04) -> Method:
  """M2PO (arXiv:2510.01161): a trust region by the second moment of the log-ratios of stale data.

      loss = token mean of -r A over the kept tokens,   r = pi / pi_old

  A is the group-normalised reward. Only tokens that moved in the direction of their advantage, with
  A log r > 0, can be dropped. Those with the largest (log r)^2 are dropped until the mean of
  (log r)^2 over the rest of them is at most `limit`. Dropped tokens still count in the denominator.

  Differences: Rollouts are four batches old (lag=4), and pi_old is the policy that sampled them.
  The paper's repository, AReaL and Trinity-RFT use different rules for dropping; this is algorithm
  1 of the paper as in Trinity-RFT.

  Args:
    limit: largest mean of (log r)^2, in nats^2.

  Confidence: CODE (Trinity-RFT).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.importance_weighted),
      aggregation=part(aggregation.token_mean),
      weights={'kept': part(trust_region_masks.selected)},
      selections={'selected': part(selections.second_moment, limit=limit)},
    ),
    minibatches=2,
  )
