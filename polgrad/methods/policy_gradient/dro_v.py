from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, log_partition
from polgrad.methods.base import Method
from polgrad.registry import part


def dro_v() -> Method:
  """DRO-V (arXiv:2405.19107): a regression on single answers with a learned log Z.

  loss = mean over rows of (R - V - beta log(pi / reference))^2 / 2, minimised by policy and value
  together; the value head speaks in units of beta. At rest pi = reference exp(R / beta) / Z and V =
  beta log Z, whoever sampled: one answer a prompt is enough. beta = 0.2 here and 1 in the paper,
  whose value has a network and a learning rate of its own. Ours also: the data are samples of four
  batches ago instead of a fixed set.
  Confidence: MEMORY (practice), DERIVED (loss and fixed point).
  """
  return Method(
    collect=partial(collect.Rollouts, samples_per_prompt=1, lag=4),
    objective=part(
      objectives.Regression,
      score=part(implicit_rewards.log_ratio_sum),
      center=part(log_partition.value),
      beta=0.2,
      scale=0.2**2,
    ),
    anchors={'reference': part(optim.fixed)},
    minibatches=2,
  )
