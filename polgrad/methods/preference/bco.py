from functools import partial

from polgrad import collect, metric_history, objectives, optim
from polgrad.losses import implicit_rewards, pointwise
from polgrad.methods.base import Method
from polgrad.registry import part


def bco(*, beta: float = 0.01, paired: bool = False) -> Method:
  """BCO (arXiv:2404.04656): a classifier of good and bad completions, with a moving threshold.

      loss = mean over rows of softplus(-s (beta D - delta))
      D = log(pi / reference)(completion),  delta = mean of beta D over all rows so far

  s is 1 for a row that is labelled good, and -1 for a bad one. delta counts all rows of earlier updates
  and of the whole present batch, and has no gradient. With paired=True the data are pairs, and the loss
  is the mean over pairs of the sum of both rows.

  Differences: The weights of bad rows by which the paper corrects for prompts that differ between good
  and bad rows are all 1. TRL has no delta for pairs; here it is kept. TRL's beta is 0.1 for single rows.

  Args:
    beta: coefficient of the KL to the reference.
    paired: whether the data are pairs, chosen and rejected.

  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Preferences if paired else collect.Feedback),
    objective=part(
      objectives.Listwise if paired else objectives.Pointwise,
      score=part(implicit_rewards.log_ratio_sum),
      loss=part(pointwise.bco),
      beta=beta,
      selections={'reference_point': part(pointwise.running_mean)},
      history={'earlier_scores': part(metric_history.total_of, metric='score')},
    ),
    anchors={'reference': part(optim.fixed)},
  )
