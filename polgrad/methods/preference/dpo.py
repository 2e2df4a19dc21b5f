from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part


def dpo() -> Method:
  """DPO (arXiv:2305.18290): logistic link on the difference of summed log-ratios.

  loss = mean over pairs of softplus(-beta h), h = (log pi/ref)(chosen) - (log pi/ref)(rejected), beta
  = 0.1. Pairs are right sums against sums with a wrong digit. Confidence: CODE, formula as in the authors'
  code and TRL.
  """
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.logistic),
      beta=0.1,
    ),
    anchors={'reference': part(optim.fixed)},
  )
