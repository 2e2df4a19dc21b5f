from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, ratios, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def gmpo() -> Method:
  """GMPO (arXiv:2507.20673): the geometric mean of one-sidedly clipped token ratios.

  s_i = exp(mean_t min(d_t, 0.4)) for A >= 0 and exp(mean_t max(d_t, -0.4)) for A < 0, d the
  log-ratio; loss = -mean over sequences of s A. A clipped token still counts in s but has no
  gradient of its own: w = s A 1[not clipped] / L. We write it token by token, with the same value
  and gradient.
  Confidence: CODE.
  """
  return Method(
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.importance_weighted),
      ratio=part(ratios.sequence_geometric_clipped, eps=0.4),
      aggregation=part(aggregation.sequence_mean),
    ),
    minibatches=4,
  )
