from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, reward_maps, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def noisy_backward(*, false_positive: float = 0.1, false_negative: float = 0.1) -> Method:
  """Backward correction of a noisy verifier (arXiv:2510.00915): rewards whose mean is the true one.

      R_i = (r_i - false_positive) / (1 - false_positive - false_negative),   r_i 0 or 1
      A_i = R_i - mean of the other rows of the group
      loss = -mean over sequences of A_i log pi(y_i)

  A verifier accepts a wrong answer with probability `false_positive` and rejects a right one with
  probability `false_negative`. The mean of R_i over its mistakes is 1 for a right answer and 0 for a
  wrong one, so the expected gradient is exactly that of the true rewards.

  Differences: How the paper combines the correction with GRPO is not known to us. Division by the
  standard deviation of the group would undo it, so there is none. What remains is a factor: in
  expectation the uncorrected gradient has the same direction, and with Adam, which does not see factors,
  the correction matters only beside other terms of the loss, such as a KL.

  Args:
    false_positive: share of wrong answers that the verifier accepts.
    false_negative: share of right answers that it rejects.

  Confidence: PAPER (rates, estimator), DERIVED (place of the correction).
  """
  return Method(
    credit=part(
      credit.shaped,
      credit=part(credit.outcome, advantage=part(advantages.leave_one_out)),
      reward=part(
        reward_maps.without_noise, false_positive=false_positive, false_negative=false_negative
      ),
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
  )
