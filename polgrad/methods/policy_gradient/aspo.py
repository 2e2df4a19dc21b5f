from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def aspo(*, eps: float = 0.2, cap: float = 3.0, kl_coefficient: float = 0.001) -> Method:
  """ASPO (arXiv:2510.06062): the importance weight of good tokens is the inverse ratio.

      loss = token mean of -w A + kl_coefficient k3
      w = min(1 / r, cap) where A >= 0, min(r, cap) where A < 0

  r = pi / pi_old, A is the group-normalised reward, and k3 the penalty of `grpo`. The gradient weight
  of log pi is w A. As in PPO, tokens with A >= 0 and r > 1 + eps, or A < 0 and r < 1 - eps, have no
  gradient. Beyond the cap tokens keep one, of weight `cap`. A rollout is used for three epochs of four
  minibatches, which let ratios leave 1.

  Differences: The published runs have eps = 0.4 for the fifth of a row's tokens with the largest
  entropy. In the released code a capped token has the value -cap A log pi; its gradient is the same.

  Args:
    eps: distance of the clipping bounds of r from 1.
    cap: largest w itself, above 1.
    kl_coefficient: of the KL to the reference.

  Confidence: CODE (read in a public copy of the authors' repository, Archer2.0).
  """
  return Method(
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.flipped, eps_low=eps, eps_high=eps, cap=cap),
      aggregation=part(aggregation.token_mean),
      penalties={'kl': weighted(kl_coefficient, part(penalties.k3))},
    ),
    anchors={'reference': part(optim.fixed)},
    epochs=3,
    minibatches=4,
  )
