from functools import partial

from polgrad import collect, metric_history, objectives, optim
from polgrad.losses import implicit_rewards, pointwise
from polgrad.methods.base import Method
from polgrad.registry import part


def bco(*, beta: float = 0.01, paired: bool = False, density_ratio: bool = False) -> Method:
  """BCO (arXiv:2404.04656): a classifier of good and bad completions, with a moving threshold.

      loss = mean over rows of w softplus(-s (beta D - delta))
      D = log(pi / reference)(completion),  delta = mean of beta D over all rows so far

  s is 1 for a row that is labelled good, and -1 for a bad one. w is 1. delta counts all rows of earlier
  updates and of the whole present batch, and has no gradient. With paired=True the data are pairs, and
  the loss is the mean over pairs of the sum of both rows.

  With density_ratio=True the w of a bad row is p(prompt | good) / p(prompt | bad), at least 0.5 and at
  most 10, so that bad rows count where good ones are. Every record has this ratio in its field
  `density_ratio`, which `polgrad.prompt_weights` writes.

  Differences: TRL has no delta for pairs; here it is kept. TRL's beta is 0.1 for single rows. TRL fits
  the ratio to embeddings of a separate model, when a run starts.

  Args:
    beta: coefficient of the KL to the reference.
    paired: whether the data are pairs, chosen and rejected.
    density_ratio: whether bad rows have weights; pairs have none, because both of their rows have the
      same prompt.

  Raises:
    ValueError: density_ratio with paired.

  Confidence: CODE.
  """
  if paired and density_ratio:
    raise ValueError(
      'density_ratio weighs prompts of single rows; the rows of a pair have the same one'
    )
  if density_ratio:
    numbers = {'density_ratio': 'density_ratio'}
    collector = partial(collect.Feedback, numbers=numbers, not_negative=('density_ratio',))
  else:
    collector = partial(collect.Preferences if paired else collect.Feedback)
  return Method(
    collect=collector,
    objective=part(
      objectives.Listwise if paired else objectives.Pointwise,
      score=part(implicit_rewards.log_ratio_sum),
      loss=part(pointwise.matched_bco if density_ratio else pointwise.bco),
      beta=beta,
      selections={'reference_point': part(pointwise.running_mean)},
      history={'earlier_scores': part(metric_history.total_of, metric='score')},
    ),
    anchors={'reference': part(optim.fixed)},
  )
