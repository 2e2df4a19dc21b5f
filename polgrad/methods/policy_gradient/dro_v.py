from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, log_partition
from polgrad.methods.base import Method
from polgrad.registry import part


def dro_v(*, beta: float = 0.2) -> Method:
  """DRO-V (arXiv:2405.19107): a regression on single answers with a learned log Z.

      loss = mean over rows of (R - V - beta log(pi / reference))^2 / 2

  The loss is minimised by the policy and the value V together; the value head predicts V / beta. At
  the optimum pi = reference exp(R / beta) / Z and V = beta log Z, whichever policy sampled, so one
  answer per prompt is enough.

  Differences: The paper has beta = 1, a separate network for the value with another learning rate, a
  gradient of the policy that is divided by beta, and a fixed set of data. Here the data are rollouts
  that are four batches old (lag=4).

  Args:
    beta: coefficient of the KL to the reference, in units of the reward.

  Confidence: MEMORY (practice), DERIVED (loss and fixed point).
  """
  return Method(
    collect=partial(collect.Rollouts, samples_per_prompt=1, lag=4),
    objective=part(
      objectives.Regression,
      score=part(implicit_rewards.log_ratio_sum),
      center=part(log_partition.value),
      beta=beta,
      scale=beta**2,
    ),
    anchors={'reference': part(optim.fixed)},
    minibatches=2,
  )
