from functools import partial

from polgrad import collect, objectives
from polgrad.data import sources
from polgrad.losses import implicit_rewards, listwise
from polgrad.methods.base import Method
from polgrad.registry import NotNegative, part


def bag_loss(
  *,
  candidates: int,
  instance: float = 0.5,
  epsilon: NotNegative = 0.0,
  least_reward: float = 0.0,
  largest_reward: float = 1.0,
  noise_seed: int = 0,
) -> Method:
  """Bag and instance losses (arXiv:2401.11081): a reward model of which only mean rewards are known.

      loss = mean over prompts of (1 - r) (y - mean_k s_k)^2 + r mean_k (y - s_k)^2

  s_k is the scalar head on the state at the last token of completion k, r = `instance`, and y the mean
  reward of the completions of the prompt, which are the bag. Where single rewards are not known, each
  completion of a record gets the mean as its reward. r = 0 is unbiased and noisy for large bags; r = 1
  shrinks the scores within a bag to one value. Choose r on held-out bags, beginning with
  `techniques.noisy_labels.best_instance`, which is the best r of a linear model.

  With `epsilon` > 0 labels are private: rewards are truncated to
  [least_reward, largest_reward], and the mean of m of them gets Laplace noise of the scale
  (largest_reward - least_reward) / (m epsilon), drawn once for each record.

  Args:
    candidates: completions of a record; the run fills it in.
    instance: r in [0, 1].
    epsilon: privacy budget of a record; 0 adds no noise.
    least_reward, largest_reward: bounds of a reward, of private labels alone.
    noise_seed: of the noise; whoever knows it can undo the noise.

  Raises:
    ValueError: `least_reward` is not below `largest_reward`.

  Confidence: PAPER. Its own formula for the best r could not be read; ours is DERIVED.
  """
  if not least_reward < largest_reward:
    raise ValueError(
      f'bag_loss: least_reward={least_reward:g} must be below largest_reward={largest_reward:g}'
    )
  bounds = dict(epsilon=epsilon, low=least_reward, high=largest_reward, seed=noise_seed)
  return Method(
    source=partial(sources.private_bags, **bounds) if epsilon else None,
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
