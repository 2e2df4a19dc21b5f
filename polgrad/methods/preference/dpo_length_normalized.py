from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part


def dpo_length_normalized(*, beta: float = 5.0, label_smoothing: float = 0.0) -> Method:
  """Length-normalised DPO (arXiv:2411.15124): log-ratios per token in the place of sums, as in Tulu 3.

      loss = mean over pairs of softplus(-beta (D_w / |w| - D_l / |l|))

  D = log(pi / reference) is summed over the tokens of a completion, and |w|, |l| are their numbers.

  Args:
    beta: multiplies the difference of the mean log-ratios.
    label_smoothing: probability that a label is wrong, in [0, 1/2].

  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_mean),
      link=part(preference_losses.logistic),
      beta=beta,
      label_smoothing=label_smoothing,
    ),
    anchors={'reference': part(optim.fixed)},
  )
