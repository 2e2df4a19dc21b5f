from polgrad import credit, objectives
from polgrad.losses import aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def reinforce(*, decay: float = 0.9) -> Method:
  """REINFORCE (Williams 1992): the score-function estimator with a moving baseline.

      loss = -mean over sequences of A log pi(y),   A = R - b

  b is the moving average of the mean rewards of earlier batches. It does not depend on the batch,
  so the estimate of the gradient is exactly unbiased.

  Args:
    decay: of the moving average, per batch.

  Confidence: CODE.
  """
  return Method(
    credit=part(credit.moving_baseline, decay=decay),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
  )
