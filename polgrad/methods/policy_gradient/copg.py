from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, log_partition
from polgrad.methods.base import Method
from polgrad.registry import part


def copg() -> Method:
  """CoPG (arXiv:2406.19185): pairs of answers, each the other's baseline, on data of any policy.

  loss = -mean over pairs of (R - R') (D - D') - beta / 2 (D - D')^2, D = log(pi(y) / reference(y)):
  up to a constant beta / 2 times the squared difference of R / beta - D, and so it is written here.
  At rest pi = reference exp(R / beta) / Z. beta = 0.06, the paper's best. Ours: the pairs are
  sampled, four batches ago.
  Confidence: PAPER.
  """
  return Method(
    collect=partial(collect.Rollouts, samples_per_prompt=2, lag=4),
    objective=part(
      objectives.Regression,
      score=part(implicit_rewards.log_ratio_sum),
      center=part(log_partition.leave_one_out),
      beta=0.06,
      scale=0.06,
      rows_per_prompt=2,
    ),
    anchors={'reference': part(optim.fixed)},
    minibatches=2,
  )
