from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, selections, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def bapo() -> Method:
  """BAPO (arXiv:2510.18927): clip bounds that give good tokens their share of the loss.

  loss = token mean of -min(r A, clip(r, low, high) A). From (0.6, 1.2) the upper bound is raised by
  0.05 up to 3, then the lower by 0.02 up to 0.9, until tokens with A > 0 have 0.4 of sum |min(r A,
  clip(r) A)|. Each update begins again at (0.6, 1.2), as in the paper. Bounds that are carried on
  instead are a selection of your own that reads them from metric_history.latest(metrics=('bounds/0',
  'bounds/1'), ...). Rows are 4 rollouts old, and r is against the policy that sampled.

  Confidence: PAPER (algorithm, constants); sums of absolute values for its expectations are ours.
  """
  bounds = part(
    selections.balanced_bounds,
    share=0.4,
    low=0.6,
    low_limit=0.9,
    high=1.2,
    high_limit=3.0,
    step_high=0.05,
    step_low=0.02,
  )
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
