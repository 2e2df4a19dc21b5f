from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, selections, surrogates, trust_region_masks
from polgrad.methods.base import Method
from polgrad.registry import part


def m2po() -> Method:
  """M2PO (arXiv:2510.01161): a trust region by the second moment of the log-ratios of stale data.

  loss = token mean of -r A over kept tokens, divided by all of them. Of the tokens that moved with
  their advantage, those with the largest d^2 = (log r)^2 are dropped until the mean of d^2 over the
  rest is at most 0.04; all others are kept. Rows are 4 rollouts old, and r is against the policy
  that sampled. The paper's repository, AReaL and Trinity-RFT differ in the rule; this is algorithm 1
  as in Trinity-RFT.

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
      selections={'selected': part(selections.second_moment, limit=0.04)},
    ),
    minibatches=2,
  )
