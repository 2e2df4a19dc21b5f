from functools import partial

from polgrad import collect, objectives
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part


def simpo(*, beta: float = 2.0, gamma: float = 0.5) -> Method:
  """SimPO (arXiv:2405.14734): mean log-probs as scores, a target margin, no reference.

      loss = mean over pairs of softplus(-(beta (l_w - l_l) - gamma))

  l_w and l_l are the mean log-probs per token of the chosen and the rejected completion. The
  defaults have gamma / beta = 0.25, as in the authors' code.

  Args:
    beta: multiplies the difference of the scores.
    gamma: target margin, in units of beta (l_w - l_l).

  Confidence: CODE (formula as in the authors' code).
  """
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.logp_mean),
      link=part(preference_losses.logistic),
      beta=beta,
      offset=gamma,
    ),
  )
