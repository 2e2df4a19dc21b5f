from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, log_partition, logit_stats
from polgrad.methods.base import Method
from polgrad.registry import part


def tbrm(*, beta: float = 0.02) -> Method:
  """TBRM (arXiv:2505.15311): a Bellman residual over the whole answer, with the logits as Q values.

      loss = mean over rows of (V_1 + log(pi / reference) - R / beta)^2

  V_1 is the logsumexp of the logits that score the first token, and carries gradient. There is no
  critic, and a single answer per prompt is sampled. At the optimum pi = reference exp(R / beta) / Z
  and V_1 = log Z.

  Differences: The paper has a beta of about 0.002. R / beta must be large compared with the
  logsumexp of the model's logits, which is the first value of V_1.

  Args:
    beta: coefficient of the KL to the reference, in units of the reward.

  Confidence: PAPER (structure), DERIVED (fixed point), MEMORY (beta).
  """
  return Method(
    collect=partial(collect.Rollouts, samples_per_prompt=1),
    objective=part(
      objectives.Regression,
      score=part(implicit_rewards.bellman_sum),
      center=part(log_partition.zero),
      beta=beta,
      scale=2.0,
      stats={'log_normalizer': part(logit_stats.log_normalizer)},
    ),
    anchors={'reference': part(optim.fixed)},
    minibatches=2,
  )
