from functools import partial

from polgrad import collect, objectives
from polgrad.losses import implicit_rewards, pointwise
from polgrad.methods.base import Method
from polgrad.registry import part


def p3o() -> Method:
  """P3O-V2 (arXiv:2310.00212): pairwise policy gradient with one clip around the log-odds of the pair.

  loss = -mean over pairs of min(c l, c clip(l, l_old - 0.2, l_old + 0.2)), l = log pi(y) - log
  pi(y'), c = s s' (R - R') / 2 detached, s the ratio of a whole answer. Adding a constant to the
  rewards of a prompt changes nothing. The paper has a KL penalty in the reward; ours has none. The
  score is only reported.
  Confidence: PAPER (gradient), MEMORY (clip and its bound).
  """
  return Method(
    collect=partial(collect.Rollouts, samples_per_prompt=2),
    objective=part(
      objectives.Pointwise,
      score=part(implicit_rewards.old_log_ratio_sum),
      loss=part(pointwise.paired_joint_clip, delta=0.2),
      rows_per_prompt=2,
    ),
    minibatches=4,
  )
