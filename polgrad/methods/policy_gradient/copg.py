from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, log_partition
from polgrad.methods.base import Method
from polgrad.registry import part


def copg(*, beta: float = 0.06) -> Method:
  """CoPG (arXiv:2406.19185): the answers of a pair are each other's baseline, on any data.

      loss = -mean over pairs of (R - R') (D - D') - (beta / 2) (D - D')^2

  D = log(pi(y) / reference(y)). Up to a constant this is beta / 2 times the square of the
  difference of R / beta - D within the pair, and the method is composed in this form. At the
  optimum pi = reference exp(R / beta) / Z, whichever policy sampled.

  Differences: Pairs are sampled from the policy, four batches ago (lag=4), instead of read from a
  fixed set. The default of beta is the paper's best value.

  Args:
    beta: coefficient of the KL to the reference, in units of the reward.

  Confidence: PAPER.
  """
  return Method(
    collect=partial(collect.Rollouts, samples_per_prompt=2, lag=4),
    objective=part(
      objectives.Regression,
      score=part(implicit_rewards.log_ratio_sum),
      center=part(log_partition.leave_one_out),
      beta=beta,
      scale=beta,
      rows_per_prompt=2,
    ),
    anchors={'reference': part(optim.fixed)},
    minibatches=2,
  )
