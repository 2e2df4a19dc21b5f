from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, selections, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def bapo(
  *,
  fraction: float = 0.5,
  low: float = 0.6,
  low_limit: float = 0.8,
  step_low: float = 0.05,
  high: float = 1.2,
  high_limit: float = 2.0,
  step_high: float = 0.05,
  upper_first: bool = False,
  cap: float = 3.0,
) -> Method:
  """BAPO (arXiv:2510.18927): clipping bounds that give good tokens a fixed fraction of the loss.

      loss = -token mean of min(r A, clip(r, low, high) A), but at most -cap A where A < 0

  r = pi / pi_old, with pi_old the policy that sampled, and A is the group-normalised reward. In
  each update the bounds start at `low` and `high`. Then `low` is raised in steps up to `low_limit`,
  and after it `high` up to `high_limit`, until tokens with A > 0 have `fraction` of the sum over
  tokens of |min(r A, clip(r, low, high) A)|. The default of 1/2 means that good and bad tokens have
  equal sums. Bounds that continue from the last update need another selection: one that reads
  metric_history.latest(metrics=('bounds/0', 'bounds/1'), ...).

  Differences: Rollouts are four batches old (lag=4). Order, limits and cap are those of the
  authors' code, which states the fraction as the ratio of both sums, 1. The algorithm of the paper
  raises the upper bound first and has no cap: fraction=0.4, low_limit=0.9, step_low=0.02,
  high_limit=3.0, upper_first=True, cap=inf; its expectations are replaced by sums over the batch.

  Args:
    fraction: fraction of the loss that tokens with A > 0 should have.
    low: first lower bound of the ratio.
    low_limit: last lower bound.
    step_low: step of the lower bound.
    high: first upper bound of the ratio.
    high_limit: last upper bound.
    step_high: step of the upper bound.
    upper_first: whether the upper bound is raised before the lower one.
    cap: largest ratio of tokens with A < 0, as in `dual_clip_ppo`.

  Confidence: CODE.
  """
  bounds = part(
    selections.balanced_bounds,
    share=fraction,
    low=low,
    low_limit=low_limit,
    high=high,
    high_limit=high_limit,
    step_high=step_high,
    step_low=step_low,
    upper_first=upper_first,
  )
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped_between, cap=cap),
      aggregation=part(aggregation.token_mean),
      selections={'bounds': bounds},
    ),
    minibatches=2,
  )
