from functools import partial

from polgrad import collect, objectives
from polgrad.losses import implicit_rewards, preference_losses, score_shapes
from polgrad.methods.base import Method
from polgrad.registry import part


def alphapo(*, beta: float = 2.5, gamma: float = 0.1, alpha: float = 0.25) -> Method:
  """AlphaPO (arXiv:2501.03884): SimPO with a power of the likelihood as reward.

      loss = mean over pairs of softplus(-(beta (r_w - r_l) - gamma))
      r = (1 - exp(-alpha l)) / alpha

  l is the mean log-prob per token of a completion. alpha -> 0 is SimPO.

  Args:
    beta: multiplies the difference of the rewards.
    gamma: target margin, in units of beta (r_w - r_l).
    alpha: shape of the reward; above 0 an unlikely completion has more gradient.

  Confidence: CODE (formula and constants as in TRL).
  """
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.logp_mean),
      link=part(preference_losses.logistic),
      shape=part(score_shapes.power, alpha=alpha),
      beta=beta,
      offset=gamma,
    ),
  )
