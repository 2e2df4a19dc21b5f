from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, log_partition
from polgrad.methods.base import Method
from polgrad.registry import part


def tba(*, samples_per_prompt: int = 8, beta: float = 0.1, replay_fraction: float = 0.5) -> Method:
  """TBA (arXiv:2503.18929): trajectory balance on samples of any age, with log Z from the group.

      loss = mean over rows of (zeta - group mean)^2,   zeta = R / beta - log(pi / reference)

  The group mean is detached. At the optimum pi = reference exp(R / beta) / Z, whichever policy
  sampled, so a fraction of the groups of a batch is drawn from the last four batches.

  Differences: The paper has beta = 0.014 with 20 samples per prompt.

  Args:
    samples_per_prompt: size of a group; the run fills it in.
    beta: coefficient of the KL to the reference, in units of the reward.
    replay_fraction: fraction of the groups that are replayed.

  Confidence: CODE (formula), MEMORY (fraction of replayed groups).
  """
  return Method(
    collect=partial(collect.Rollouts, replay=4, replay_fraction=replay_fraction),
    objective=part(
      objectives.Regression,
      score=part(implicit_rewards.log_ratio_sum),
      center=part(log_partition.group_mean_detached),
      beta=beta,
      scale=2.0,
      rows_per_prompt=samples_per_prompt,
    ),
    anchors={'reference': part(optim.fixed)},
    minibatches=2,
  )
