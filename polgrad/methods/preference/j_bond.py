from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import aggregation, best_of_n, surrogates
from polgrad.methods.base import Method
from polgrad.registry import Fraction, NotNegative, part
from polgrad.sampling import behavior_policies


def j_bond(*, backward: Fraction = 0.5, kl: NotNegative = 1.0, rate: Fraction = 0.02) -> Method:
  """J-BOND (arXiv:2407.14622): the best of two samples of an anchor that follows the policy.

      loss = -(1 - b) mean of log pi(y*) - b mean of A log pi(y) + g mean of K log pi(y)
      A = q - mean of the other samples,   q = -log 16 if y is worse than both samples, else 0
      K_t = sum over s >= t of log(pi / anchor)(y_s)

  where y ~ pi, and y* is the better one of two samples of the anchor. The anchor moves to the policy by
  the fraction `rate` an update, so the best of two of the best of two ... is learned.

  Args:
    backward: b, the weight of the backward divergence.
    kl: g, the weight of the divergence to the anchor.
    rate: of the anchor.

  Confidence: PAPER (form, b), MEMORY (g, rate; whether a tie is worse).
  """
  return Method(
    collect=partial(
      collect.Rollouts, opponents=2, opponent_policy=part(behavior_policies.reference)
    ),
    credit=part(
      credit.best_of_n,
      reward=part(best_of_n.worse_than_all),
      policy=backward,
      reference=1 - backward,
      kl_coefficient=kl,
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
    anchors={'reference': part(optim.ema, decay=1 - rate)},
  )
