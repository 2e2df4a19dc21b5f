from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, log_partition, logit_stats
from polgrad.methods.base import Method
from polgrad.registry import part


def tbrm() -> Method:
  """TBRM (arXiv:2505.15311): a Bellman residual over the whole answer, with logits read as Q.

  loss = mean over rows of (V_1 + log(pi / reference) - R / beta)^2, V_1 = logsumexp of the logits
  that score the first token, which carry gradient: no critic, one answer a prompt. At rest pi =
  reference exp(R / beta) / Z and V_1 = log Z. beta = 0.02 here and about 0.002 in the paper: R / beta
  must be large next to the logits' own logsumexp, where V_1 begins (with 0.2 accuracy fell).
  Confidence: PAPER (structure), DERIVED (fixed point), MEMORY (beta).
  """
  return Method(
    collect=partial(collect.Rollouts, samples_per_prompt=1),
    objective=part(
      objectives.Regression,
      score=part(implicit_rewards.bellman_sum),
      center=part(log_partition.zero),
      beta=0.02,
      scale=2.0,
      stats={'log_normalizer': part(logit_stats.log_normalizer)},
    ),
    anchors={'reference': part(optim.fixed)},
    minibatches=2,
  )
