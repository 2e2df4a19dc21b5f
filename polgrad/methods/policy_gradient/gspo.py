from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, ratios, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def gspo() -> Method:
  """GSPO (arXiv:2507.18071): the ratio of a sequence is the geometric mean of its tokens'.

  s_i = exp(mean_t log_ratio); loss = mean over sequences of -min(s A, clip(s, 1 - 3e-4, 1 + 4e-4) A),
  written token by token (GSPO-token), which has the same value and gradient when A is one number a
  sequence. Peers that aggregate by token mean weigh long sequences more.
  Confidence: CODE (formula as in verl and TRL).
  """
  return Method(
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=3e-4, eps_high=4e-4),
      ratio=part(ratios.sequence_geometric),
      aggregation=part(aggregation.sequence_mean),
    ),
    minibatches=4,
  )
