"""Which rows of a batch an objective sees, where several objectives share one batch.

A function of `TABLE` fills one of the `rows` of `objectives.WeightedSum`. It reads arrays of the batch
and none of the model, so what a loss is divided by is known before the forward pass.
"""

from collections.abc import Callable
from typing import Annotated, Literal

import jax.numpy as jnp

from polgrad.registry import table
from polgrad.types import STREAMS, Array


def all_rows(mask: Array) -> Array:
  """Every row (standard).

  Args:
    mask: bool[B, T].

  Returns:
    bool[B].

  >>> print(row_choices.all_rows(jnp.zeros((2, 3), bool)))
  [ True  True]
  """
  return jnp.ones(mask.shape[:1], bool)


def of_stream(stream: Array, *, kind: Literal[STREAMS]) -> Array:
  """The rows of one stream of a mixed batch (standard).

  Args:
    stream: i32[B], index into `types.STREAMS`.
    kind: the name of the stream.

  Returns:
    bool[B].

  >>> print(row_choices.of_stream(jnp.array([0, 1, 1]), kind='sampled'))
  [False  True  True]
  """
  return stream == STREAMS.index(kind)


TABLE = table('row_choices', all_rows, of_stream)
Part = Annotated[Callable, TABLE]
