from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part


def ipo() -> Method:
  """IPO (arXiv:2310.12036): squared link, so that a deterministic preference has a finite optimum.

  loss = mean over pairs of (h - 1/(2 tau))^2, tau = 0.1, h the difference of *summed* log-ratios, as
  the theory has it. TRL divides by the lengths: take `log_ratio_mean` for that. Confidence: formula
  as in code.
  """
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.squared, target=5.0),
      beta=1.0,
    ),
    anchors={'reference': part(optim.fixed)},
  )
