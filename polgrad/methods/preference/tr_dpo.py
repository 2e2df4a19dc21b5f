from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part


def tr_dpo(*, beta: float = 0.05, alpha: float = 0.6, every: int = 512) -> Method:
  """TR-DPO (arXiv:2404.09656): DPO whose reference moves towards the policy.

      loss = mean over pairs of softplus(-beta h)
      h = log(pi / reference)(chosen) - log(pi / reference)(rejected)
      reference <- alpha pi + (1 - alpha) reference, of parameters, after every `every` updates

  every=1 is the paper's soft update, and alpha=1 its hard one.

  Differences: the defaults are TRL's, which has both an alpha and a period.

  Args:
    beta: coefficient of the KL to the reference.
    alpha: weight of the policy's parameters in the new reference, in [0, 1]; 0 is DPO.
    every: updates between two changes of the reference, at least 1.

  Confidence: CODE (rule and constants as in TRL), MEMORY (which constant the paper joins with which).
  """
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.logistic),
      beta=beta,
    ),
    anchors={'reference': part(optim.blend, alpha=alpha, every=every)},
  )
