from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses, score_shapes
from polgrad.methods.base import Method
from polgrad.registry import part


def dpop(*, beta: float = 0.3, penalty: float = 50.0) -> Method:
  """DPOP (arXiv:2402.13228): DPO that keeps the chosen completion as likely as under the reference.

      loss = mean over pairs of softplus(-beta (h - penalty max(0, -D_w)))
      h = D_w - D_l

  D = log(pi / reference) is summed over the tokens of a completion. While the chosen completion is less
  likely than under the reference, its gradient is 1 + penalty times that of DPO.

  Args:
    beta: coefficient of the KL to the reference.
    penalty: lambda in the paper; 0 is DPO.

  Confidence: CODE (formula and penalty as in the code of SamPO), MEMORY (beta).
  """
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.logistic),
      shape=part(score_shapes.anchored, penalty=penalty),
      beta=beta,
    ),
    anchors={'reference': part(optim.fixed)},
  )
