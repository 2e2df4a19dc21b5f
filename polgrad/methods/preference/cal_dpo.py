from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, pointwise, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def cal_dpo(*, beta: float = 0.001) -> Method:
  """Cal-DPO (arXiv:2412.14516): DPO whose implicit rewards are pulled to fixed values.

      loss = mean over pairs of softplus(-(D_w - D_l)) + ((D_w - t)^2 + (D_l + t)^2) / 2
      D = log(pi / reference)(completion),  t = 1 / (2 beta)

  DPO depends only on the difference of D_w and D_l, so both may fall; here D_w is pulled up to t and D_l
  down to -t. Without the first term this is SPPO with hard labels.

  Differences: The factor 1/2 is in the authors' code and not in the paper. beta is not inside the
  logistic loss, as there.

  Args:
    beta: coefficient of the KL to the reference; it sets t alone.

  Confidence: CODE.
  """
  score = part(implicit_rewards.log_ratio_sum)
  calibration = part(pointwise.squared, target=1 / (2 * beta))
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.WeightedSum,
      streams={
        'preference': weighted(
          1.0, part(objectives.Pairwise, score=score, link=part(preference_losses.logistic))
        ),
        'calibration': weighted(0.5, part(objectives.Listwise, score=score, loss=calibration)),
      },
    ),
    anchors={'reference': part(optim.fixed)},
  )
