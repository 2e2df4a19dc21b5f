from functools import partial

from polgrad import collect, objectives
from polgrad.losses import implicit_rewards, pointwise
from polgrad.methods.base import Method
from polgrad.registry import part


def p3o_separate(*, eps: float = 0.2) -> Method:
  """P3O-V1 (arXiv:2310.00212): pairwise policy gradient, clipped for each answer of the pair.

      loss = -mean over rows of min(dR x, dR clip(x, 1 - eps, 1 + eps)),   x = s s'

  dR is the reward of the row minus that of the other answer to the prompt, s = pi(y) / pi_old(y)
  the ratio of the whole answer, and s' that of the other one, detached. Adding a constant to the
  rewards of a prompt changes nothing.

  Differences: The paper has a KL penalty in the reward; here there is none.

  Args:
    eps: distance of the clipping bounds from 1.

  Confidence: PAPER (gradient), MEMORY (clip and its bound).
  """
  return Method(
    collect=partial(collect.Rollouts, samples_per_prompt=2),
    objective=part(
      objectives.Pointwise,
      # The score is only a metric: the loss computes its own log-ratios.
      score=part(implicit_rewards.old_log_ratio_sum),
      loss=part(pointwise.paired_product_clip, eps=eps),
      rows_per_prompt=2,
    ),
    minibatches=4,
  )
