from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses, score_shapes
from polgrad.methods.base import Method
from polgrad.registry import part


def chipo(*, beta: float = 0.1, reward_range: float = 5.0, chi: float = 1.0) -> Method:
  """chiPO (arXiv:2407.13399): DPO with a chi-square divergence beside the KL.

      loss = mean over pairs of softplus(-clip(beta (phi(D_w) - phi(D_l)), -2 R, 2 R))
      phi(D) = D + chi exp(D)

  D = log(pi / reference) is summed over the tokens of a completion. Its optimum keeps pi / reference
  bounded where data are scarce, so the error depends only on how well the data cover the policy that it
  is compared with. D is clamped to 20 nats in the exponential.

  Differences: the paper has chi = 1. It gives no numbers for beta and R; the defaults are our choice.

  Args:
    beta: coefficient of the divergence from the reference.
    reward_range: R, the largest difference of two rewards in the units of the Bradley-Terry model. A
      pair whose margin is beyond 2 R has no gradient.
    chi: weight of the chi-square divergence; 0 is DPO with a clipped margin.

  Confidence: PAPER (formula).
  """
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.clipped_logistic, bound=2 * reward_range),
      shape=part(score_shapes.chi_square_kl, chi=chi),
      beta=beta,
    ),
    anchors={'reference': part(optim.fixed)},
  )
