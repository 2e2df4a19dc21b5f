from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def sapo() -> Method:
  """SAPO (arXiv:2511.20347): a trust region without an edge.

  loss = -mean over sequences of token means of (4 / tau) sigmoid(tau (r - 1)) A, tau = 1 for A > 0
  and 1.05 otherwise; w = 4 p (1 - p) r A with p the sigmoid. The weight is A on-policy and decays
  smoothly where PPO cuts, faster for bad tokens.
  Confidence: CODE.
  """
  return Method(
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.soft_gated, tau_positive=1.0, tau_negative=1.05),
      aggregation=part(aggregation.sequence_mean),
    ),
    minibatches=4,
  )
