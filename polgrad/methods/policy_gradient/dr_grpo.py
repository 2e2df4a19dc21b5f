from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def dr_grpo(*, max_new_tokens: int) -> Method:
  """Dr. GRPO (arXiv:2503.20783): GRPO without its two normalisers.

  A_i = R_i - mean_g (no std); loss = sum over tokens / (rows * budget), a constant in place of the
  lengths; no KL. Equal to RLOO times (G - 1) / G but for the constant.
  Confidence: CODE (the authors').
  """
  return Method(
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=0.2, eps_high=0.2),
      aggregation=part(aggregation.constant_length, length=max_new_tokens),
    ),
    minibatches=2,
  )
