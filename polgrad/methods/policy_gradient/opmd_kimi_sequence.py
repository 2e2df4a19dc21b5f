from functools import partial

from polgrad import collect, objectives
from polgrad.losses import implicit_rewards, log_partition
from polgrad.methods.base import Method
from polgrad.registry import part


def opmd_kimi_sequence(*, samples_per_prompt: int = 8, tau: float = 0.1) -> Method:
  """Kimi k1.5 (arXiv:2501.12599): REINFORCE with a squared log-ratio of the whole answer.

      loss = mean over rows of (R - group mean - tau log(pi / pi_old))^2 / (2 tau)

  It has the gradient of the paper, -(R - group mean) grad log pi + tau / 2 grad
  (log(pi / pi_old))^2. The mean reward takes the place of tau log Z, so the optimum is not the
  tilted old policy, proportional to pi_old exp(R / tau).

  Differences: No tau is published, so 0.1 is our choice. Rollouts are four batches old (lag=4), and
  pi_old is the policy that sampled them.

  Args:
    samples_per_prompt: size of a group; the run fills it in.
    tau: coefficient of the squared log-ratio, in units of the reward.

  Confidence: PAPER (formula), DERIVED (fixed point).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    objective=part(
      objectives.Regression,
      score=part(implicit_rewards.old_log_ratio_sum),
      center=part(log_partition.reward_mean),
      beta=tau,
      scale=tau,
      rows_per_prompt=samples_per_prompt,
    ),
    minibatches=4,
  )
