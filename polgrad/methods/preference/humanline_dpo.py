from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part


def humanline_dpo(
  *, beta: float = 0.1, low: float = -1.0, high: float = 1.5, every: int = 1
) -> Method:
  """Humanline DPO (arXiv:2509.24207): clipped token log-ratios to a reference one update behind.

      loss = mean over pairs of softplus(-beta (s_w - s_l))
      s = sum over tokens of clip(log(pi / reference), low, high)

  A token outside the bounds has no gradient. The reference becomes the policy right before every
  `every`-th update, so with every = 1 it is the policy before the last update. With infinite bounds and
  a fixed reference this is DPO.

  Args:
    beta: coefficient of the KL to the reference; an argument of every run of the authors.
    low: smallest log-ratio of a token, nats.
    high: largest log-ratio of a token, nats.
    every: updates between two copies of the policy.

  Confidence: CODE, MEMORY (beta).
  """
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.clipped_log_ratio_sum, low=low, high=high),
      link=part(preference_losses.logistic),
      beta=beta,
    ),
    anchors={'reference': part(optim.sync_before, every=every)},
  )
