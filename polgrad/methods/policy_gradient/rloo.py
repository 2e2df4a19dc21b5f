from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def rloo(*, kl_coefficient: float = 0.03) -> Method:
  """RLOO (arXiv:2402.14740): leave-one-out baseline, KL in the reward.

      R_i = r_i - kl_coefficient sum_t k1_t
      A_i = R_i - mean of the other rows of the group
      loss = -mean over sequences of A_i log pi(y_i)

  k1 = log pi_old - log reference. The estimate of the gradient of E[r] - kl_coefficient
  KL(pi || reference) is unbiased; k1 has the right gradient because it is part of the reward.

  Args:
    kl_coefficient: of the KL penalty in the reward.

  Confidence: CODE (formula as in verl and TRL).
  """
  return Method(
    credit=part(
      credit.outcome, advantage=part(advantages.leave_one_out), kl_coefficient=kl_coefficient
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
    anchors={'reference': part(optim.fixed)},
  )
