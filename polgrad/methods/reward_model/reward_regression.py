from functools import partial

from polgrad import collect, objectives
from polgrad.losses import implicit_rewards, pointwise
from polgrad.methods.base import Method
from polgrad.registry import part


def reward_regression(*, target_field: str = '') -> Method:
  """Regression reward model (standard): the score of a completion is a number that the data give.

      loss = mean over rows of (s - target)^2 / 2

  s is the scalar head on the state at the last token of prompt + completion, its stop token.

  Args:
    target_field: field of the records with the number, beside `answer`, the completion that it judges.
      '' learns from pairs instead: the chosen completion should get 1 and the rejected one -1, with
      (s - target)^2 as the loss.

  Confidence: DERIVED (least squares).
  """
  collector = partial(collect.Demonstrations, numbers={'target': target_field})
  return Method(
    collect=collector if target_field else partial(collect.Preferences),
    objective=part(
      objectives.Pointwise,
      score=part(implicit_rewards.last_value),
      loss=part(pointwise.squared_error if target_field else pointwise.squared),
    ),
    learns='preference',
    warm_start=False,
  )
