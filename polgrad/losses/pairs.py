"""Rows that lie in pairs: rows 2i and 2i + 1 belong together."""

import chex
import jax.numpy as jnp

from polgrad.types import Array


def preferred(label: Array) -> Array:
  """Whether each row is the preferred one of its pair; the first row is, if the label is one half.

  Args:
    label: [B], `label[2i]` is the probability that row 2i is preferred; that of row 2i + 1 is not read.

  Returns:
    bool[B], one True in each pair.
  """
  first = label[::2] >= 0.5
  return jnp.stack([first, ~first], axis=1).reshape(-1)


def certainty(label: Array) -> Array:
  """The probability that the preferred row of each pair is the better one, at least one half.

  Args:
    label: [B], as for `preferred`.

  Returns:
    [B / 2].
  """
  return jnp.maximum(label[::2], 1 - label[::2])


def split(x: Array, preferred: Array) -> tuple[Array, Array]:
  """The values of the preferred and of the other rows, [B] -> two of [B / 2].

  Args:
    x: [B].
    preferred: bool[B], one True in each pair.
  """
  chex.assert_equal_shape([x, preferred])
  first, second, swap = x[::2], x[1::2], ~preferred[::2]
  return jnp.where(swap, second, first), jnp.where(swap, first, second)


def first(x: Array) -> Array:
  """One value a pair of an array that has the same value in both of its rows, [B] -> [B / 2]."""
  return x[::2]


def complete(mask: Array) -> Array:
  """Pairs of which both rows have tokens, bool[B, T] -> bool[B / 2]."""
  return jnp.any(mask, axis=1).reshape(-1, 2).all(axis=1)


def shared_length(mask: Array) -> Array:
  """The number of tokens of the shorter row of each pair, at both of its rows: bool[B, T] -> i32[B]."""
  shorter = jnp.min(jnp.sum(mask, axis=1).reshape(-1, 2), axis=1)
  return jnp.repeat(shorter, 2)
