from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part


def ipo(*, tau: float = 0.1) -> Method:
  """IPO (arXiv:2310.12036): squared loss, so that a deterministic preference has a finite optimum.

      loss = mean over pairs of (h - 1 / (2 tau))^2
      h = log(pi / reference)(chosen) - log(pi / reference)(rejected)

  The log-ratios are sums over the tokens of a completion, as in the theory.

  Differences: TRL divides the sums by the lengths, which is the score `log_ratio_mean`.

  Args:
    tau: coefficient of the KL to the reference.

  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.squared, target=1 / (2 * tau)),
      beta=1.0,
    ),
    anchors={'reference': part(optim.fixed)},
  )
