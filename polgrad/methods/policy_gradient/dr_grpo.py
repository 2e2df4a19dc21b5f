from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def dr_grpo(*, max_new_tokens: int, eps: float = 0.2) -> Method:
  """Dr. GRPO (arXiv:2503.20783): GRPO without its two normalisers.

      loss = -(sum over tokens of min(r A, clip(r, 1 - eps, 1 + eps) A)) / (rows max_new_tokens)
      A_i = R_i - mean_g

  r = pi / pi_old. A is not divided by the standard deviation of the group, and the loss is divided
  by a constant instead of the lengths. There is no KL. On-policy, the gradient is that of RLOO
  without KL times (G - 1) / G with groups of G rows, up to the constant.

  Args:
    max_new_tokens: largest number of tokens of an answer; the run fills it in.
    eps: distance of the clipping bounds from 1.

  Confidence: CODE (the authors').
  """
  return Method(
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.constant_length, length=max_new_tokens),
    ),
    minibatches=2,
  )
