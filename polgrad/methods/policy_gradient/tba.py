from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, log_partition
from polgrad.methods.base import Method
from polgrad.registry import part


def tba(
  *,
  steps: int,
  samples_per_prompt: int = 8,
  beta: float = 0.014,
  last_beta: float = 0.004,
  replay_fraction: float = 0.5,
) -> Method:
  """TBA (arXiv:2503.18929): trajectory balance on samples of any age, with log Z from the group.

      loss = mean over rows of (zeta - group mean)^2,   zeta = R / beta - log(pi / reference)

  The group mean is detached. At the optimum pi = reference exp(R / beta) / Z, whichever policy
  sampled, so a fraction of the groups of a batch is drawn from the last four batches. beta falls
  linearly from its first to its last value over the run.

  Differences: The code has 20 samples per prompt.

  Args:
    steps: batches of the run; the run fills it in.
    samples_per_prompt: size of a group; the run fills it in.
    beta: coefficient of the KL to the reference at first, in units of the reward.
    last_beta: coefficient at the end of the run; equal to `beta` it is constant.
    replay_fraction: fraction of the groups that are replayed.

  Confidence: CODE (formula, beta), MEMORY (fraction of replayed groups).
  """
  minibatches = 2
  return Method(
    collect=partial(collect.Rollouts, replay=4, replay_fraction=replay_fraction),
    objective=part(
      objectives.Regression,
      score=part(implicit_rewards.log_ratio_sum),
      center=part(log_partition.group_mean_detached),
      beta=beta,
      schedule=part(optim.linear, steps=steps * minibatches, end=last_beta / beta),
      scale=2.0,
      rows_per_prompt=samples_per_prompt,
    ),
    anchors={'reference': part(optim.fixed)},
    minibatches=minibatches,
  )
