from functools import partial

from polgrad import collect, objectives
from polgrad.losses import implicit_rewards, log_partition
from polgrad.methods.base import Method
from polgrad.registry import part


def opmd(*, samples_per_prompt: int = 8) -> Method:
  """OPMD (arXiv:2509.24203): a step of mirror descent as a regression inside the group.

  At the optimum of E[R] - tau KL(pi, pi_old) the number a = R - tau log(pi / pi_old) is the same for
  all samples of a prompt, whoever drew them. loss = mean over rows of (a - group mean of a)^2 / (2
  tau^2), which is the sum over pairs of squared differences; the first step is REINFORCE with the
  group mean as baseline. tau = 1. Ours: rollouts are four batches old, and pi_old is the policy that
  sampled.
  Confidence: PAPER (derivation), CODE (tau), DERIVED (fixed point).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    objective=part(
      objectives.Regression,
      score=part(implicit_rewards.old_log_ratio_sum),
      center=part(log_partition.group_mean),
      beta=1.0,
      scale=1.0,
      rows_per_prompt=samples_per_prompt,
    ),
    minibatches=4,
  )
