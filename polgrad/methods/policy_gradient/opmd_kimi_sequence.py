from functools import partial

from polgrad import collect, objectives
from polgrad.losses import implicit_rewards, log_partition
from polgrad.methods.base import Method
from polgrad.registry import part


def opmd_kimi_sequence(*, samples_per_prompt: int = 8) -> Method:
  """Kimi k1.5 (arXiv:2501.12599): REINFORCE with a squared log-ratio of the whole answer.

  loss = mean over rows of (R - group mean - tau log(pi / pi_old))^2 / (2 tau): the gradient of the
  paper, (R - group mean) grad log pi - tau / 2 grad (log pi / pi_old)^2. The mean reward stands for
  tau log Z, so the policy at rest is not the tilted old one. tau = 0.1 is ours, none is published.
  Ours also: rollouts are four batches old, and pi_old is the policy that sampled.
  Confidence: PAPER (formula), DERIVED (fixed point).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    objective=part(
      objectives.Regression,
      score=part(implicit_rewards.old_log_ratio_sum),
      center=part(log_partition.reward_mean),
      beta=0.1,
      scale=0.1,
      rows_per_prompt=samples_per_prompt,
    ),
    minibatches=4,
  )
