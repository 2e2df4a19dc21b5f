from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def rloo() -> Method:
  """RLOO (arXiv:2402.14740): leave-one-out baseline, KL in the reward.

  R_i = r_i - beta * sum_t k1_t;  A_i = R_i - mean of the other rows of the group; loss = -mean over
  sequences of A * log pi(y). Unbiased for E[r] - beta KL(pi, reference). The KL enters the reward,
  where k1 has the right gradient.
  Confidence: CODE (formula as in verl and TRL).
  """
  return Method(
    credit=part(credit.outcome, advantage=part(advantages.leave_one_out), kl_coefficient=0.03),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
    anchors={'reference': part(optim.fixed)},
  )
