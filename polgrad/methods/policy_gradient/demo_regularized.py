from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def demo_regularized(*, kl_coefficient: float = 0.1) -> Method:
  """Demonstration-regularised RL (arXiv:2310.17303): REINFORCE with a KL to a policy that imitates.

      R_i = r_i - kl_coefficient sum_t k1_t
      A_i = R_i - mean of the other rows of the group
      loss = -mean over sequences of A_i log pi(y_i)

  k1 = log pi_old - log imitator. The imitator is the anchor `reference`, a copy of the policy when
  this phase begins, so the policy must have learned the demonstrations before. The value of the
  optimum is at least V(expert) - kl_coefficient KL(expert || imitator), so a better imitator gives
  a better bound.

  Differences: The KL is estimated on sampled rows and is part of the reward, where k1 has the right
  gradient.

  Args:
    kl_coefficient: of the KL penalty in the reward.

  Confidence: PAPER (method), DERIVED (bound).
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
