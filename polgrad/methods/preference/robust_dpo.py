from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part


def robust_dpo(*, beta: float = 0.1, flips: float = 0.1) -> Method:
  """Robust DPO (arXiv:2403.00409): the DPO loss that is unbiased if labels are flipped at random.

      loss = mean over pairs of ((1 - e) softplus(-beta h) - e softplus(beta h)) / (1 - 2 e)
      h = log(pi / reference)(chosen) - log(pi / reference)(rejected)

  e is the rate of flipped labels. The expectation over flips is the DPO loss on the right labels. This
  is a soft label (1 - e) / (1 - 2 e), which is larger than 1, or the label smoothing -e / (1 - 2 e). The
  loss is not bounded below: a pair with a large h has the gradient -e beta / (1 - 2 e), so it is never
  satisfied.

  Args:
    beta: coefficient of the KL to the reference.
    flips: probability e that a label is wrong, in [0, 1/2); 0 is DPO.

  Raises:
    ValueError: a probability outside [0, 1/2).

  Confidence: CODE (formula and constants as in TRL).
  """
  if not 0 <= flips < 0.5:
    raise ValueError(f'flips is a probability in [0, 1/2), got {flips}')
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.logistic),
      beta=beta,
      label_smoothing=-flips / (1 - 2 * flips),
    ),
    anchors={'reference': part(optim.fixed)},
  )
