from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, pointwise
from polgrad.methods.base import Method
from polgrad.registry import part


def humanline_kto(
  *,
  beta: float = 0.1,
  low: float = -1.0,
  high: float = 1.5,
  every: int = 1,
  desirable: float = 1.1,
  undesirable: float = 1.0,
) -> Method:
  """Humanline KTO (arXiv:2509.24207): clipped token log-ratios to a reference one update behind.

      loss = mean over rows of w (1 - sigmoid(s (beta D - z0)))
      D = sum over tokens of clip(log(pi / reference), low, high)

  s, w and z0 are those of `kto`. A token outside the bounds has no gradient. The reference becomes the
  policy right before every `every`-th update. With infinite bounds and a fixed reference this is KTO.

  Differences: The authors clip the tokens in z0, too.

  Args:
    beta: coefficient of the KL to the reference; an argument of every run of the authors.
    low: smallest log-ratio of a token, nats.
    high: largest log-ratio of a token, nats.
    every: updates between two copies of the policy.
    desirable: weight of good rows.
    undesirable: weight of bad rows.

  Confidence: CODE, MEMORY (beta).
  """
  return Method(
    collect=partial(collect.Feedback, mismatched=True),
    objective=part(
      objectives.Pointwise,
      score=part(implicit_rewards.clipped_log_ratio_sum, low=low, high=high),
      loss=part(pointwise.kto, desirable=desirable, undesirable=undesirable),
      beta=beta,
      selections={'reference_point': part(pointwise.mismatched_mean)},
    ),
    anchors={'reference': part(optim.sync_before, every=every)},
  )
