from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, reward_maps, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def noisy_forward(*, false_negative: float = 0.1) -> Method:
  """Forward correction of a noisy verifier (arXiv:2510.00915): weights that need one rate alone.

      loss = -mean over sequences of (r_i - (1 - false_negative)) log pi(y_i),   r_i 0 or 1

  A verifier rejects a right answer with probability `false_negative`. The mean weight of a right answer
  over its mistakes is 0, that of a wrong one false_positive + false_negative - 1, so the expected
  gradient has the direction of that of the true rewards, and the rate of false positives need not be
  known.

  Differences: The weights are those of a constant baseline, so what they change is the variance. They
  take the place of advantages; a group has no further baseline.

  Args:
    false_negative: share of right answers that the verifier rejects.

  Confidence: PAPER (weights), DERIVED (place of the correction).
  """
  return Method(
    credit=part(
      credit.shaped,
      credit=part(credit.outcome, advantage=part(advantages.raw)),
      reward=part(reward_maps.without_misses, false_negative=false_negative),
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
  )
