from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part


def exo_pref(*, beta: float = 0.5, eps: float = 1e-3) -> Method:
  """EXO on pairs (arXiv:2402.00856): the reverse KL between the policy's and the labels' preference.

      loss = mean over pairs of q log(q / (1 - eps)) + (1 - q) log((1 - q) / eps)
      q = sigmoid(beta h)

  h is the difference of the summed log-ratios to the reference. DPO with label smoothing eps is the
  other direction of this KL; both are minimal at beta h = log((1 - eps) / eps).

  Differences: the authors' code for pairs has log-targets (0, -10) in the place of those of eps.

  Args:
    beta: beta_pi of the paper: the coefficient of the KL to the reference.
    eps: probability that a label is wrong; above 0.

  Raises:
    ValueError: eps outside (0, 1/2).

  Confidence: CODE.
  """
  if not 0 < eps < 0.5:
    raise ValueError(f'eps is a probability in (0, 1/2), got {eps}')
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.reverse_kl),
      beta=beta,
      label_smoothing=eps,
    ),
    anchors={'reference': part(optim.fixed)},
  )
