from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, selections, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def bapo(*, fraction: float = 0.4, low: float = 0.6, high: float = 1.2) -> Method:
  """BAPO (arXiv:2510.18927): clipping bounds that give good tokens a fixed fraction of the loss.

      loss = -token mean of min(r A, clip(r, low, high) A)

  r = pi / pi_old, with pi_old the policy that sampled, and A is the group-normalised reward. In
  each update the bounds start at `low` and `high`. Then `high` is raised in steps of 0.05 up to 3,
  and after it `low` in steps of 0.02 up to 0.9, until tokens with A > 0 have `fraction` of the sum
  over tokens of |min(r A, clip(r, low, high) A)|. Bounds that continue from the last update, which
  are not the paper's, need another selection: one that reads
  metric_history.latest(metrics=('bounds/0', 'bounds/1'), ...).

  Differences: Rollouts are four batches old (lag=4). The fraction is computed from sums of absolute
  values over the batch, in the place of the paper's expectations.

  Args:
    fraction: fraction of the loss that tokens with A > 0 should have.
    low: first lower bound of the ratio, at most 0.9.
    high: first upper bound of the ratio, at most 3.

  Confidence: PAPER (algorithm, constants); sums of absolute values for its expectations are ours.
  """
  bounds = part(
    selections.balanced_bounds,
    share=fraction,
    low=low,
    low_limit=0.9,
    high=high,
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
