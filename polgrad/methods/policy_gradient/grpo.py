from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def grpo(*, eps: float = 0.2, kl_coefficient: float = 0.04) -> Method:
  """GRPO (arXiv:2402.03300): group-normalised rewards, clipped ratio, k3 to a reference.

      loss = mean over sequences of token means of
             -min(r A, clip(r, 1 - eps, 1 + eps) A) + kl_coefficient k3
      A_i = (R_i - mean_g) / (std_g + 1e-6)

  r = pi / pi_old, std_g is unbiased, and k3 = q - 1 - log q with q = reference / pi. As in the
  paper, k3 is part of the loss. Its expected gradient is that of KL(reference || pi) per token,
  exactly so if all answers have the same length.

  Args:
    eps: distance of the clipping bounds from 1.
    kl_coefficient: of the KL to the reference.

  Confidence: CODE (formula as in verl and TRL).
  """
  return Method(
    credit=part(credit.outcome, advantage=part(advantages.group_normalized, ddof=1, eps=1e-6)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.sequence_mean),
      penalties={'kl': weighted(kl_coefficient, part(penalties.k3))},
    ),
    anchors={'reference': part(optim.fixed)},
    minibatches=2,
  )
