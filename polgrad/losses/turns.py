"""The turns of a row: their numbers, sums over their tokens, and functions of turns at tokens.

In a row with several turns the mask is False in what the policy read between them, such as the answer
of a tool. `turn_ids` i32[B, T] has the number of the turn of each token in its row, from 0; it is
ignored outside the mask. Arrays of turns have the shape [B, T] too: column k belongs to turn k of
the row, and columns beyond the last turn are 0. So a function of tokens, such as `returns.gae`, works on
turns with the mask `present`.
"""

import chex
import jax
import jax.numpy as jnp

from polgrad.types import Array


def numbers(mask: Array) -> Array:
  """The number of the turn of each token, where turns are the runs of the mask.

  Args:
    mask: bool[B, T].

  Returns:
    i32[B, T], from 0; -1 outside the mask.
  """
  starts = mask & ~jnp.pad(mask[:, :-1], ((0, 0), (1, 0)))
  return jnp.where(mask, jnp.cumsum(starts, axis=1) - 1, -1)


def totals(x: Array, turn_ids: Array, mask: Array) -> Array:
  """The sum of x over the tokens of every turn: [B, T] of tokens -> [B, T] of turns."""
  chex.assert_equal_shape([x, turn_ids, mask])
  columns = mask.shape[-1]
  x, ids = jnp.where(mask, x, 0), jnp.where(mask, turn_ids, columns)
  add = lambda x, ids: jax.ops.segment_sum(x, ids, columns + 1)[:columns]
  return jax.vmap(add)(x, ids)


def means(x: Array, turn_ids: Array, mask: Array) -> Array:
  """The mean of x over the tokens of every turn: [B, T] of tokens -> [B, T] of turns."""
  lengths = totals(jnp.ones_like(x), turn_ids, mask)
  return totals(x, turn_ids, mask) / jnp.maximum(lengths, 1)


def first(x: Array, turn_ids: Array, mask: Array) -> Array:
  """x at the first token of every turn: [B, T] of tokens -> [B, T] of turns."""
  return totals(x, turn_ids, starts(turn_ids, mask))


def present(turn_ids: Array, mask: Array) -> Array:
  """bool[B, T] of turns: whether the row has a turn of this number."""
  return totals(mask.astype(jnp.int32), turn_ids, mask) > 0


def at_tokens(per_turn: Array, turn_ids: Array, mask: Array) -> Array:
  """Every token gets the number of its turn, and 0 outside the mask: [B, T] of turns -> of tokens."""
  chex.assert_equal_shape([per_turn, turn_ids, mask])
  found = jnp.take_along_axis(per_turn, jnp.where(mask, turn_ids, 0), axis=-1)
  return jnp.where(mask, found, 0)


def starts(turn_ids: Array, mask: Array) -> Array:
  """bool[B, T]: the first token of every turn. Numbers of turns grow along the row."""
  before = jax.lax.cummax(jnp.where(mask, turn_ids, -1), axis=1)
  before = jnp.pad(before[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  return mask & (turn_ids > before)


def ends(turn_ids: Array, mask: Array) -> Array:
  """bool[B, T]: the last token of every turn. Numbers of turns grow along the row."""
  columns = mask.shape[-1]
  after = jax.lax.cummin(jnp.where(mask, turn_ids, columns), axis=1, reverse=True)
  after = jnp.pad(after[:, 1:], ((0, 0), (0, 1)), constant_values=columns)
  return mask & (turn_ids < after)
