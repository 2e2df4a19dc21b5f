from functools import partial

from polgrad import collect, objectives
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part


def simpo() -> Method:
  """SimPO (arXiv:2405.14734): mean log-probs as scores, a target margin, no reference.

  loss = mean over pairs of softplus(-(beta (l_w - l_l) - gamma)), l the mean log-prob of the
  completion, beta = 2, gamma = 0.5 (gamma / beta = 0.25, the class default). Confidence: CODE, formula as
  in the authors' code.
  """
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.logp_mean),
      link=part(preference_losses.logistic),
      beta=2.0,
      offset=0.5,
    ),
  )
