from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, listwise
from polgrad.methods.base import Method
from polgrad.registry import part


def apo_down(*, beta: float = 0.1) -> Method:
  """APO-down (arXiv:2408.06266): both completions get less likely, the rejected one more so.

      loss = mean over pairs of sigmoid(beta D_w) + (1 - sigmoid(beta (D_w - D_l)))
      D = log(pi / reference)(completion)

  It suits pairs whose chosen completion is worse than what the model writes; `apo_zero` suits others.

  Args:
    beta: coefficient of the KL to the reference.

  Confidence: CODE (TRL).
  """
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Listwise,
      score=part(implicit_rewards.log_ratio_sum),
      loss=part(listwise.apo_down),
      beta=beta,
    ),
    anchors={'reference': part(optim.fixed)},
  )
