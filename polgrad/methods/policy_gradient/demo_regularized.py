from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def demo_regularized() -> Method:
  """Demonstration-regularised RL (arXiv:2310.17303): reinforce with a KL to the imitator.

  R_i = r_i - 0.1 sum_t k1_t to the policy that the demonstrations taught; A_i = R_i - mean of the
  other rows of the group; loss = mean over sequences of -A log pi(y). The optimum is worth at least
  V(expert) - 0.1 KL(expert || imitator), and better the better the imitator is. Ours: KL of sampled
  rows in the reward, where it has the right gradient; the imitator is the warm start.

  Confidence: PAPER (method), DERIVED (bound).
  """
  return Method(
    credit=part(credit.outcome, advantage=part(advantages.leave_one_out), kl_coefficient=0.1),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
    anchors={'reference': part(optim.fixed)},
  )
