from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, ratios, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def gspo(*, eps_low: float = 3e-4, eps_high: float = 4e-4) -> Method:
  """GSPO (arXiv:2507.18071): the ratio of a sequence is the geometric mean of its tokens'.

      loss = -mean over sequences of min(s A, clip(s, 1 - eps_low, 1 + eps_high) A)
      s = exp(mean_t(log pi - log pi_old))

  A is the group-normalised reward. The loss is computed token by token (GSPO-token), which has the
  same value and gradient if the tokens of a row have the same advantage. Implementations that
  average over tokens instead of sequences give long sequences more weight.

  Args:
    eps_low: distance of the lower clipping bound from 1.
    eps_high: distance of the upper clipping bound from 1.

  Confidence: CODE (formula as in verl and TRL).
  """
  return Method(
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps_low, eps_high=eps_high),
      ratio=part(ratios.sequence_geometric),
      aggregation=part(aggregation.sequence_mean),
    ),
    minibatches=4,
  )
