"""Statistics of rows that belong together: the arithmetic that baselines and centres share.

Groups are data: rows belong together when their `group_ids` are equal, wherever they stand in the
batch, and groups may differ in size. A mean is subtracted as the mean of differences, so equal
numbers give exactly 0 in any precision.
"""

import chex
import jax.numpy as jnp

from polgrad.types import Array


def same(group_ids: Array) -> Array:
  """i32[B] -> bool[B, B]: rows i and j have one prompt."""
  chex.assert_rank(group_ids, 1)
  return group_ids[:, None] == group_ids[None, :]


def members(group_ids: Array, valid: Array) -> Array:
  """i32[B], bool[B] -> bool[B, B]: row j counts in the statistics of row i."""
  chex.assert_equal_shape([group_ids, valid])
  return same(group_ids) & everyone(valid)


def everyone(valid: Array) -> Array:
  """bool[B] -> bool[B, B]: the whole batch is one group."""
  return valid[:, None] & valid[None, :]


def total(x: Array, members: Array) -> Array:
  """sum_j x_j over the members j of row i: [B], bool[B, B] -> [B]."""
  return jnp.sum(jnp.where(members, x[None, :], 0), axis=-1)


def center(x: Array, members: Array, weights: Array | None = None) -> Array:
  """x_i - sum_j w_j x_j / sum_j w_j over the members j of row i.

  Args:
    x: [B].
    members: bool[B, B].
    weights: [B], >= 0; None weighs all members alike.

  Returns:
    [B]; 0 where the weights of the members sum to 0.
  """
  chex.assert_rank(x, 1)
  weight = members if weights is None else jnp.where(members, weights[None, :], 0)
  differences = jnp.where(members, x[:, None] - x[None, :], 0)
  return divide(jnp.sum(weight * differences, axis=-1), jnp.sum(weight, axis=-1))


def variance(centered: Array, members: Array, ddof: int) -> Array:
  """Sum of the squares of centred members over (their number - ddof): [B], bool[B, B] -> [B]."""
  return total(jnp.square(centered), members) / jnp.maximum(jnp.sum(members, axis=-1) - ddof, 1)


def divide(x: Array, scale: Array) -> Array:
  """x / scale, and 0 where the scale is 0: a statistic of nothing, equal rewards with eps = 0."""
  return jnp.where(scale > 0, x / jnp.where(scale > 0, scale, 1), 0)
