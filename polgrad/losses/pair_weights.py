"""Weights of preference pairs: factors of the loss of a pair, without gradient.

A function of `TABLE` fills one of the `weights` of `objectives.Pairwise`. It returns one number a pair,
[B / 2], and reads arrays of all rows: rows 2i and 2i + 1 are a pair, `preferred` [B] says which of them
is the preferred one, and `gap` [B] is the difference of their scores, the same in both rows. A pair of
weight 0 still counts in the number of pairs.
"""

from collections.abc import Callable
from typing import Annotated

from polgrad.losses import pairs
from polgrad.registry import table
from polgrad.types import Array


def given(weights: Array) -> Array:
  """The weights that the data give, `Batch.weights` (standard).

  Args:
    weights: [B], the same in both rows of a pair.

  Returns:
    [B / 2].
  """
  return pairs.first(weights)


TABLE = table('pair_weights', given)
Part = Annotated[Callable, TABLE]
