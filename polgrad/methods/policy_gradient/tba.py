from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, log_partition
from polgrad.methods.base import Method
from polgrad.registry import part


def tba(*, samples_per_prompt: int = 8) -> Method:
  """TBA (arXiv:2503.18929): trajectory balance on samples of any age, with log Z from the group.

  loss = mean over rows of (zeta - group mean)^2, zeta = R / beta - log(pi / reference), the mean
  detached. At rest pi = reference exp(R / beta) / Z, whoever sampled, so half of the groups come from
  a memory of the last four batches. beta = 0.1 here and 0.014 with 20 samples in the paper.
  Confidence: CODE (formula), MEMORY (share of the memory).
  """
  return Method(
    collect=partial(collect.Rollouts, replay=4, replay_fraction=0.5),
    objective=part(
      objectives.Regression,
      score=part(implicit_rewards.log_ratio_sum),
      center=part(log_partition.group_mean_detached),
      beta=0.1,
      scale=2.0,
      rows_per_prompt=samples_per_prompt,
    ),
    anchors={'reference': part(optim.fixed)},
    minibatches=2,
  )
