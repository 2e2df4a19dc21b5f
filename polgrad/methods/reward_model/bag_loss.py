from functools import partial

from polgrad import collect, objectives
from polgrad.losses import implicit_rewards, listwise
from polgrad.methods.base import Method
from polgrad.registry import part


def bag_loss(*, candidates: int, instance: float = 0.5) -> Method:
  """Bag and instance losses (arXiv:2401.11081): a reward model of which only mean rewards are known.

      loss = mean over prompts of (1 - r) (y - mean_k s_k)^2 + r mean_k (y - s_k)^2

  s_k is the scalar head on the state at the last token of completion k, r = `instance`, and y the mean
  reward of the completions of the prompt, which are the bag. Where single rewards are not known, each
  completion of a record gets the mean as its reward. r = 0 is unbiased and noisy for large bags; r = 1
  shrinks the scores within a bag to one value. Choose r on held-out bags.

  Args:
    candidates: completions of a record; the run fills it in.
    instance: r in [0, 1].

  Confidence: PAPER. Its formula for the best r is not transcribed.
  """
  return Method(
    collect=partial(collect.Lists),
    objective=part(
      objectives.Listwise,
      score=part(implicit_rewards.last_value),
      loss=part(listwise.bag, instance=instance),
      rows_per_prompt=candidates,
    ),
    learns='preference',
    warm_start=False,
  )
