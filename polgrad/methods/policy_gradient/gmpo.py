from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, ratios, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def gmpo(*, eps_low: float = 0.4, eps_high: float = 0.4) -> Method:
  """GMPO (arXiv:2507.20673): the geometric mean of one-sidedly clipped token ratios.

      loss = -mean over sequences of s A
      s = exp(mean_t min(d_t, eps_high)) if A >= 0, otherwise exp(mean_t max(d_t, -eps_low))

  d = log pi - log pi_old, and A is the group-normalised reward. The gradient of log pi has the
  weight s A / L in a row of L tokens, and 0 at a clipped token, which still counts in s. The loss
  is computed token by token, with the same value and gradient.

  Args:
    eps_low: lower bound of the log-ratio of a token, in nats below 0.
    eps_high: upper bound of the log-ratio of a token, in nats.

  Confidence: CODE.
  """
  return Method(
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.importance_weighted),
      ratio=part(ratios.sequence_geometric_clipped, eps_low=eps_low, eps_high=eps_high),
      aggregation=part(aggregation.sequence_mean),
    ),
    minibatches=4,
  )
