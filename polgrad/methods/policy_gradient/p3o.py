from functools import partial

from polgrad import collect, objectives
from polgrad.losses import implicit_rewards, pointwise
from polgrad.methods.base import Method
from polgrad.registry import part


def p3o(*, delta: float = 0.2) -> Method:
  """P3O-V2 (arXiv:2310.00212): pairwise policy gradient, clipped once for the log-odds of the pair.

      loss = -mean over pairs of min(c l, c clip(l, l_old - delta, l_old + delta))

  l = log pi(y) - log pi(y') for the two answers to a prompt, l_old is its value under pi_old, and c
  is s s' (R - R') / 2, detached, with s = pi(y) / pi_old(y) of the whole answer. Adding a constant
  to the rewards of a prompt changes nothing.

  Differences: The paper has a KL penalty in the reward; here there is none.

  Args:
    delta: largest change of l that is rewarded, in nats.

  Confidence: PAPER (gradient), MEMORY (clip and its bound).
  """
  return Method(
    collect=partial(collect.Rollouts, samples_per_prompt=2),
    objective=part(
      objectives.Pointwise,
      # The score is only a metric: the loss computes its own log-ratios.
      score=part(implicit_rewards.old_log_ratio_sum),
      loss=part(pointwise.paired_joint_clip, delta=delta),
      rows_per_prompt=2,
    ),
    minibatches=4,
  )
