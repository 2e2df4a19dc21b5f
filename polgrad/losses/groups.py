"""Means and variances over groups of rows, used by `advantages`, `baselines` and `log_partition`.

Rows belong to one group when their `group_ids` are equal. They need not be consecutive, and groups may
differ in size. A group is passed as a matrix bool[B, B] whose entry (i, j) says whether row j counts
in the statistics of row i. A mean is subtracted as the mean of differences, so equal numbers give
exactly 0 in any precision.
"""

import chex
import jax.numpy as jnp

from polgrad.types import Array


def same(group_ids: Array) -> Array:
  """i32[B] -> bool[B, B]: rows i and j are in one group."""
  chex.assert_rank(group_ids, 1)
  return group_ids[:, None] == group_ids[None, :]


def members(group_ids: Array, valid: Array) -> Array:
  """i32[B], bool[B] -> bool[B, B]: rows i and j are in one group and both valid."""
  chex.assert_equal_shape([group_ids, valid])
  return same(group_ids) & everyone(valid)


def everyone(valid: Array) -> Array:
  """bool[B] -> bool[B, B]: rows i and j are both valid; the whole batch is one group."""
  return valid[:, None] & valid[None, :]


def total(x: Array, members: Array) -> Array:
  """sum_j x_j over the members j of row i: [B], bool[B, B] -> [B]."""
  return jnp.sum(jnp.where(members, x[None, :], 0), axis=-1)


def center(x: Array, members: Array, weights: Array | None = None) -> Array:
  """x_i - sum_j w_j x_j / sum_j w_j over the members j of row i.

  Args:
    x: [B].
    members: bool[B, B].
    weights: [B], >= 0; None gives all members the weight 1.

  Returns:
    [B]; 0 where the weights of the members sum to 0.
  """
  chex.assert_rank(x, 1)
  weight = members if weights is None else jnp.where(members, weights[None, :], 0)
  differences = jnp.where(members, x[:, None] - x[None, :], 0)
  return divide(jnp.sum(weight * differences, axis=-1), jnp.sum(weight, axis=-1))


def variance(centered: Array, members: Array, ddof: int) -> Array:
  """Variance over the members, of numbers whose mean is subtracted already: [B], bool[B, B] -> [B].

  The sum of squares is divided by max(number of members - ddof, 1).
  """
  return total(jnp.square(centered), members) / jnp.maximum(jnp.sum(members, axis=-1) - ddof, 1)


def divide(x: Array, scale: Array) -> Array:
  """x / scale, and 0 where scale <= 0, as for a group without members or a standard deviation of 0.

  NaN stays NaN: a reward that is none must not look like a group without signal.
  """
  empty = scale <= 0
  return jnp.where(empty, 0, x / jnp.where(empty, 1, scale))
