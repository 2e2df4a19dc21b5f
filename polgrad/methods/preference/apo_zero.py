from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, pointwise
from polgrad.methods.base import Method
from polgrad.registry import part


def apo_zero(*, beta: float = 0.1, paired: bool = True) -> Method:
  """APO-zero (arXiv:2408.06266): the chosen completion gets likelier, the rejected one less likely.

      loss = mean over pairs of (1 - sigmoid(beta D_w)) + sigmoid(beta D_l)
      D = log(pi / reference)(completion)

  Each completion is compared with what the reference says of it, not with the other one. This suits
  pairs whose chosen completion is better than what the model writes; `apo_down` suits others. With
  paired=False the data are single rows with labels, and the loss is the mean over rows of its half:
  KTO with the reference point 0.

  Args:
    beta: coefficient of the KL to the reference.
    paired: whether the data are pairs, chosen and rejected.

  Confidence: CODE (TRL).
  """
  return Method(
    collect=partial(collect.Preferences if paired else collect.Feedback),
    objective=part(
      objectives.Listwise if paired else objectives.Pointwise,
      score=part(implicit_rewards.log_ratio_sum),
      loss=part(pointwise.sigmoid),
      beta=beta,
    ),
    anchors={'reference': part(optim.fixed)},
  )
