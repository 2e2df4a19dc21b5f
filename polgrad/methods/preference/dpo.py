from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part


def dpo(*, beta: float = 0.1, label_smoothing: float = 0.0) -> Method:
  """DPO (arXiv:2305.18290): logistic loss on the difference of summed log-ratios.

      loss = mean over pairs of softplus(-beta h)
      h = log(pi / reference)(chosen) - log(pi / reference)(rejected)

  The log-ratios are sums over the tokens of a completion. With label_smoothing = s the loss is
  (1 - s) softplus(-beta h) + s softplus(beta h), which is cDPO.

  Args:
    beta: coefficient of the KL to the reference.
    label_smoothing: probability that a label is wrong, in [0, 1/2].

  Confidence: CODE (formula as in the authors' code and TRL).
  """
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.logistic),
      beta=beta,
      label_smoothing=label_smoothing,
    ),
    anchors={'reference': part(optim.fixed)},
  )
