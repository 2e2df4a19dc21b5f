from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def sapo(*, tau_positive: float = 1.0, tau_negative: float = 1.05) -> Method:
  """SAPO (arXiv:2511.20347): a trust region whose weight fades smoothly, without a clipping bound.

      loss = -mean over sequences of token means of (4 / tau) sigmoid(tau (r - 1)) A

  r = pi / pi_old, A is the group-normalised reward, and tau is `tau_positive` if A > 0, otherwise
  `tau_negative`. The gradient of log pi has the weight 4 p (1 - p) r A with p =
  sigmoid(tau (r - 1)). This is A on-policy and decays smoothly where PPO clips, faster for bad
  tokens.

  Args:
    tau_positive: steepness of the gate where A > 0.
    tau_negative: steepness of the gate where A <= 0.

  Confidence: CODE.
  """
  return Method(
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.soft_gated, tau_positive=tau_positive, tau_negative=tau_negative),
      aggregation=part(aggregation.sequence_mean),
    ),
    minibatches=4,
  )
