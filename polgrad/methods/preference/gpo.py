from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import find, part


def gpo(*, beta: float = 0.1, link: str = 'exponential') -> Method:
  """GPO (arXiv:2402.05749): DPO with any loss of binary classification in the place of the logistic.

      loss = mean over pairs of l(beta h)
      h = log(pi / reference)(chosen) - log(pi / reference)(rejected)

  Around h = 0 the loss is l(0) + l'(0) beta h + l''(0) (beta h)^2 / 2, whose last term regularises. So
  two links are about as strong if beta l''(0) / |l'(0)| is the same: beta / 2 for the logistic one, beta
  for the square and the exponential one, and 0 for the hinge. On pairs of the reference E[h^2] / 4 is
  KL(pi, reference) up to third order in log(pi / reference). So the last term regularises like a KL near
  the reference; far from it E[h^2] is much larger, and on pairs of another policy it is another number.

  Args:
    beta: multiplies the difference of the log-ratios.
    link: a function of `losses.preference_losses`: logistic, squared, hinge, exponential,
      truncated_square, savage, sigmoid, ...

  Raises:
    ValueError: an unknown link; the message lists those that there are.

  Confidence: PAPER (formula), MEMORY (beta).
  """
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(find(link, preference_losses.TABLE, 'link')),
      beta=beta,
    ),
    anchors={'reference': part(optim.fixed)},
  )
