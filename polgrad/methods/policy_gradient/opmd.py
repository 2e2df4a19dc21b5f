from functools import partial

from polgrad import collect, objectives
from polgrad.losses import implicit_rewards, log_partition
from polgrad.methods.base import Method
from polgrad.registry import part


def opmd(*, samples_per_prompt: int = 8, tau: float = 1.0) -> Method:
  """OPMD (arXiv:2509.24203): a step of mirror descent as a regression inside the group.

      loss = mean over rows of (a - group mean of a)^2 / (2 tau^2),   a = R - tau log(pi / pi_old)

  At the optimum of E[R] - tau KL(pi || pi_old), a has the same value for all samples of a prompt,
  whichever policy drew them. The loss is proportional to the sum of squared differences over all
  pairs of a group. The first update is REINFORCE with the group mean as baseline.

  Differences: Rollouts are four batches old (lag=4), and pi_old is the policy that sampled them.

  Args:
    samples_per_prompt: size of a group; the run fills it in.
    tau: coefficient of the KL, in units of the reward.

  Confidence: PAPER (derivation), CODE (tau), DERIVED (fixed point).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    objective=part(
      objectives.Regression,
      score=part(implicit_rewards.old_log_ratio_sum),
      center=part(log_partition.group_mean),
      beta=tau,
      scale=1.0,
      rows_per_prompt=samples_per_prompt,
    ),
    minibatches=4,
  )
