import dataclasses

from polgrad.data import sources
from polgrad.registry import part
from polgrad.tasks.addition import addition
from polgrad.tasks.base import Task


def mixed_sums(*, digits: int = 3, problems: int = 1000) -> Task:
  """Sums of two numbers of one to `digits` digits; the number of digits is the `category` of a record.

  The categories differ in difficulty, so curricula have something to choose (docs/curricula.md). One
  problem in ten of every category is held out.

  Args:
    digits: of the longest numbers.
    problems: to train on, of every category; of one digit there are 90.
  """
  sums = lambda split: part(
    sources.mixture,
    sources={
      f'digits_{n}': part(sources.arithmetic, digits=n, split=split) for n in range(1, digits + 1)
    },
    most=problems,
  )
  return dataclasses.replace(
    addition(digits=digits),
    problems=sums('train'),
    demonstrations=sums('train'),
    held_out=sums('heldout'),
    pairs=None,
    feedback=None,
    lists=None,
  )
