from functools import partial

from polgrad import collect, objectives
from polgrad.losses import implicit_rewards, pointwise
from polgrad.methods.base import Method
from polgrad.registry import part


def p3o_separate() -> Method:
  """P3O-V1 (arXiv:2310.00212): pairwise policy gradient with a clip for each answer of the pair.

  loss = -mean over rows of min(dR x, dR clip(x, 0.8, 1.2)), dR the reward above the other answer's, x
  = s s', the ratios of both whole answers, the other's detached. Adding a constant to the rewards of
  a prompt changes nothing. The paper has a KL penalty in the reward; ours has none. The score is only
  reported.
  Confidence: PAPER (gradient), MEMORY (clip and its bound).
  """
  return Method(
    collect=partial(collect.Rollouts, samples_per_prompt=2),
    objective=part(
      objectives.Pointwise,
      score=part(implicit_rewards.old_log_ratio_sum),
      loss=part(pointwise.paired_product_clip, eps=0.2),
      rows_per_prompt=2,
    ),
    minibatches=4,
  )
