"""Numbers by which rows of a group are chosen; the rows with the largest ones are kept.

A function of `TABLE` fills the slot `score` of `credit.filtered`.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax.numpy as jnp

from polgrad.registry import table
from polgrad.types import Array


def brevity(mask: Array) -> Array:
  """-L, with L the number of tokens: the shortest rows are kept (arXiv:2508.09726).

  Args:
    mask: bool[B, T].

  Returns:
    f32[B].
  """
  chex.assert_rank(mask, 2)
  return -jnp.sum(mask, axis=-1).astype(jnp.float32)


def efficiency(rewards: Array, mask: Array) -> Array:
  """R / L, the reward of a token: rows that earn much with few tokens are kept (arXiv:2508.09726).

  Args:
    rewards: [B].
    mask: bool[B, T].

  Returns:
    [B].
  """
  chex.assert_rank([rewards, mask], [1, 2])
  chex.assert_equal_shape_prefix([rewards, mask], 1)
  return rewards / jnp.maximum(jnp.sum(mask, axis=-1), 1)


TABLE = table('row_scores', brevity, efficiency)
Part = Annotated[Callable, TABLE]
