from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, pointwise
from polgrad.methods.base import Method
from polgrad.registry import part


def aot_unpaired(*, beta: float = 0.01, label_smoothing: float = 0.0) -> Method:
  """AOT without pairs (arXiv:2406.05882): sorted scores of good rows against those of bad rows.

      loss = mean over k of softplus(-beta (D_good(k) - D_bad(k)))

  D is the log-ratio to the reference, and the scores of the good and of the bad rows of a batch are each
  sorted: those of good rows are to dominate the others as a distribution. A batch of one pair has the
  loss of DPO.

  Differences: A rank is a constant, so a row keeps its own score, with its gradient, and gets the score
  of its rank from the whole batch. Value and gradient are those of the sorted loss, for any number of
  micro-batches. If there are more rows of one kind, ranks are scaled to the number of the other.

  Args:
    beta: coefficient of the KL to the reference.
    label_smoothing: probability that a label is wrong, in [0, 1/2].

  Confidence: CODE (TRL).
  """
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Pointwise,
      score=part(implicit_rewards.log_ratio_sum),
      loss=part(pointwise.matched, label_smoothing=label_smoothing),
      beta=beta,
      selections={'matched_score': part(pointwise.sorted_partners)},
    ),
    anchors={'reference': part(optim.fixed)},
  )
