from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def reinforce_plus_plus(
  *, eps: float = 0.2, discount: float = 1.0, kl_coefficient: float = 0.01
) -> Method:
  """REINFORCE++ (arXiv:2501.03262): no groups; advantages are whitened over the batch.

      loss = -token mean of min(r A, clip(r, 1 - eps, 1 + eps) A),   r = pi / pi_old
      A_t = whiten(sum_{k >= t} discount^(k - t) (r_k - kl_coefficient k1_k))

  r_k is the reward of the row on its last token and 0 elsewhere, and k1 = log pi_old - log
  reference. Without discount, the KL penalty to go has the gradient of KL(pi || reference) of whole
  sequences. Every token counts the same in the whitening, so long rows have more influence.

  Differences: The default of `kl_coefficient` is our choice.

  Args:
    eps: distance of the clipping bounds from 1.
    discount: of rewards and KL penalties, per token.
    kl_coefficient: of the KL penalty in the reward.

  Confidence: CODE (formula), MEMORY (kl_coefficient).
  """
  return Method(
    credit=part(
      credit.reward_to_go,
      discount=discount,
      normalizer=part(advantages.whiten, eps=1e-8),
      kl_coefficient=kl_coefficient,
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.token_mean),
    ),
    anchors={'reference': part(optim.fixed)},
    minibatches=2,
  )
