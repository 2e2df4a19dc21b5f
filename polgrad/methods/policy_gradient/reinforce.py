from polgrad import credit, objectives
from polgrad.losses import aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def reinforce() -> Method:
  """REINFORCE (Williams 1992): the score-function estimator with a moving baseline.

  loss = -mean over sequences of A * log pi(y), A = R - b, b the moving average of earlier mean
  rewards. The estimator is exactly unbiased.
  Confidence: CODE.
  """
  return Method(
    credit=part(credit.moving_baseline, decay=0.9),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
  )
