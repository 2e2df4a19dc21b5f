from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part


def ipo(*, tau: float = 0.1, per_token: bool = False) -> Method:
  """IPO (arXiv:2310.12036): squared loss, so that a deterministic preference has a finite optimum.

      loss = mean over pairs of (h - 1 / (2 tau))^2
      h = log(pi / reference)(chosen) - log(pi / reference)(rejected)

  The log-ratios are sums over the tokens of a completion, as in the theory. With pairs of independent
  samples of a distribution mu, the optimum is reference exp(P(. > mu) / tau) / Z.

  Differences: TRL and others divide the sums by the lengths: per_token=True. Then 1 / (2 tau) is a
  target per token.

  Args:
    tau: coefficient of the KL to the reference.
    per_token: whether log-ratios are means over the tokens; sums otherwise.

  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_mean if per_token else implicit_rewards.log_ratio_sum),
      link=part(preference_losses.squared, target=1 / (2 * tau)),
      beta=1.0,
    ),
    anchors={'reference': part(optim.fixed)},
  )
