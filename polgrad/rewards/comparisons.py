"""Verifiers that compare two completions of one prompt: the probability that the first is better.

A function of `TABLE` fills the setting `comparison` of a phase. The names of its arguments say what it
reads: `first` and `second` (texts), `record`, `prompt` (the text that was tokenised), and the rewards
that the phase's other verifiers gave, `first_reward` and `second_reward`. It returns a number in [0, 1]:
1 where the first is certainly better, 1/2 for a tie.

A function with the attribute `batched = True` is called once a batch. Its arguments have the same
names, and are lists over the pairs; it returns a list. `scoring.make_comparer` says what is done with
errors.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Annotated

from polgrad.registry import Positive, inputs, table
from polgrad.rewards import judge
from polgrad.rewards.worker import is_batched


def by_reward(first_reward: float, second_reward: float, *, temperature: Positive = 1.0) -> float:
  """sigmoid((R_1 - R_2) / temperature): the Bradley-Terry model of the rewards.

  Args:
    first_reward: of the first completion, from the phase's `reward`.
    second_reward: of the second one.
    temperature: unit of the rewards. A small one makes nearly every difference a sure win.
  """
  z = (first_reward - second_reward) / temperature
  # exp of a negative number only, which does not overflow.
  return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def larger_reward(first_reward: float, second_reward: float) -> float:
  """1 where the first completion has the larger reward, 0 where it has the smaller, 1/2 for a tie."""
  return 0.5 if first_reward == second_reward else float(first_reward > second_reward)


def by_table(first: str, second: str, record: Mapping, *, field: str = 'wins') -> float:
  """record[field][first][second]: a game whose payoffs are written in the data.

  The preference need not be transitive, as in rock, paper, scissors. Texts are compared without the
  white space around them; a pair that is not in the table fails.

  Args:
    first: completion.
    second: the other one.
    record: has the table, a mapping of mappings of numbers in [0, 1].
    field: its name in the record.
  """
  return float(record[field][first.strip()][second.strip()])


def shorter(first: str, second: str) -> float:
  """1 where the first completion has fewer characters, 0 where it has more, 1/2 for equal lengths."""
  return 0.5 if len(first) == len(second) else float(len(first) < len(second))


SIMPLE = table('comparisons', by_reward, larger_reward, by_table, shorter)
# What a comparison reads of the other completion in the place of what it reads of one.
OTHER = {'first': 'second', 'first_reward': 'second_reward'}
OTHER |= {other: one for one, other in OTHER.items()}


def both_orders(*, comparison: Annotated[Callable, SIMPLE]) -> Callable:
  """1/2 + (P(first, second) - P(second, first)) / 2: without the preference for a place.

  Language models that judge prefer the answer that they read first, or last, so each pair is judged in
  both orders (arXiv:2402.04792).

  Args:
    comparison: the one that is asked twice.
  """
  names = inputs(comparison)
  swapped = [names.index(OTHER.get(name, name)) for name in names]
  batched = is_batched(comparison)

  def over(*arrays):
    one, other = comparison(*arrays), comparison(*(arrays[i] for i in swapped))
    if batched:
      return [0.5 + (p - q) / 2 for p, q in zip(one, other, strict=True)]
    return 0.5 + (one - other) / 2

  over.__signature__ = inspect.signature(comparison)  # it reads what `comparison` reads
  over.batched = batched
  return over


TABLE = SIMPLE | table('comparisons', both_orders) | judge.COMPARISONS
Part = Annotated[Callable, TABLE]
