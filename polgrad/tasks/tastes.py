from polgrad.data import sources
from polgrad.registry import part
from polgrad.tasks.base import Task


def tastes(*, users: int = 8, data_seed: int = 0) -> Task:
  """Preference pairs of users with opposite tastes, for reward models such as those of `methods.vpl`.

  Half of the users prefer warm colours, the others cold ones, so no score of a completion alone is right
  about more than half of the pairs. Held-out pairs are of the same users.

  Args:
    users: number of users.
    data_seed: seed of the users and colours.
  """
  pairs = lambda first, size: part(
    sources.tastes, first=first, size=size, users=users, seed=data_seed
  )
  return Task(
    pairs=pairs(400, 4000),
    held_out_pairs=pairs(0, 400),
    alphabet='0123456789:abdeghilnortuvwy',
    prompt_length=5,
    max_new_tokens=7,
    pairs_per_batch=16,
    steps=300,
    evaluate_every=100,
    held_out_problems=256,
  )
