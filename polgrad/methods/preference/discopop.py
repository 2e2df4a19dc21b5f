from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part


def discopop(*, beta: float = 0.05, width: float = 0.05) -> Method:
  """DiscoPOP (arXiv:2406.08414): the log-ratio modulated loss, found by a search with a language model.

      loss = mean over pairs of (1 - m) softplus(-z) + m exp(-z)
      z = beta h, m = sigmoid(z / width)

  h is the difference of the summed log-ratios to the reference. The loss is not monotone: it increases
  for z between -0.118 and 0.072.

  Args:
    beta: coefficient of the KL to the reference.
    width: of the change from the logistic to the exponential link, in units of z.

  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.modulated, temperature=width),
      beta=beta,
    ),
    anchors={'reference': part(optim.fixed)},
  )
