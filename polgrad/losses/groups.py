"""Sums, ranks and moments over groups of rows, for the modules that compare the rows of a group.

Rows belong to one group when their `group_ids` are equal. They need not be consecutive, and groups may
differ in size. Time and memory grow with the number of rows B, up to a logarithm; no array has B^2
entries. Arrays may be [B] or [B, ...]: each column is treated separately.

Sums run over the sorted rows in a fixed order, so they are the same in every run on one kind of device.
A mean is subtracted as the mean of differences, so equal numbers give exactly 0 in any precision.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from polgrad.types import Array


class Groups(NamedTuple):
  """How the rows of a batch are grouped, and which of them count.

  Attributes:
    counted: bool[B]; the other rows enter no statistic, and get 0.
    order: i32[B], the rows sorted by group; rows of one group keep their order.
    place: i32[B], in sorted order: the number of rows of its group before a row.
    last: i32[B], for every row the place of the last row of its group in sorted order.
  """

  counted: Array
  order: Array
  place: Array
  last: Array


def same(group_ids: Array) -> Groups:
  """i32[B] -> the groups of equal ids; all rows count."""
  chex.assert_rank(group_ids, 1)
  return members(group_ids, jnp.ones_like(group_ids, bool))


@jax.jit
def members(group_ids: Array, valid: Array) -> Groups:
  """i32[B], bool[B] -> the groups of equal ids, of which only valid rows count."""
  chex.assert_rank(group_ids, 1)
  chex.assert_equal_shape([group_ids, valid])
  order = jnp.argsort(group_ids, stable=True)
  ids = group_ids[order]
  place = jnp.arange(len(ids)) - jnp.searchsorted(ids, ids)
  last = jnp.searchsorted(ids, group_ids, side='right') - 1
  return Groups(valid, order, place, last)


def everyone(valid: Array) -> Groups:
  """bool[B] -> the whole batch as one group, of which only valid rows count."""
  return members(jnp.zeros_like(valid, jnp.int32), valid)


def total(x: Array, groups: Groups) -> Array:
  """The sum of x over the counted rows of the group, at each of them: [B, ...] -> [B, ...]."""
  return _combine(jnp.add, x, groups, 0)


def minimum(x: Array, groups: Groups) -> Array:
  """The least x of the counted rows of the group, at each of them: [B, ...] -> [B, ...]."""
  return _combine(jnp.minimum, x, groups, jnp.inf)


def maximum(x: Array, groups: Groups) -> Array:
  """The largest x of the counted rows of the group, at each of them: [B, ...] -> [B, ...]."""
  return _combine(jnp.maximum, x, groups, -jnp.inf)


def size(groups: Groups) -> Array:
  """The number of counted rows of the group, at each of them, i32[B]."""
  return total(groups.counted.astype(jnp.int32), groups)


def first(groups: Groups) -> Array:
  """bool[B]: the first counted row of each group."""
  return groups.counted & (rank(jnp.zeros(len(groups.counted)), groups) == 0)


def first_best(x: Array, groups: Groups) -> Array:
  """bool[B]: of each group the counted row with the largest x, the first one of equals."""
  return groups.counted & (rank(-x, groups) == 0)


def rank(x: Array, groups: Groups) -> Array:
  """The number of counted rows of the group whose x is smaller: [B] -> i32[B].

  Rows with equal x are ranked by position. Rows that do not count come last in their group.
  """
  chex.assert_equal_shape([x, groups.counted])
  place = jnp.argsort(jnp.lexsort((x, ~groups.counted, groups.last)))
  start = groups.last - groups.place[groups.last]
  return place - start


def ordered(x: Array, groups: Groups) -> Groups:
  """The same groups with the rows of each sorted by x [B], ascending; `running_total` follows the order.

  Rows with equal x are ordered by position. Rows that do not count come last in their group.
  """
  chex.assert_equal_shape([x, groups.counted])
  order = jnp.lexsort((x, ~groups.counted, groups.last))
  return groups._replace(order=order)


def running_total(x: Array, groups: Groups) -> Array:
  """The sum of x over a row and the counted rows before it in its group, [B, ...] -> [B, ...].

  The order is that of `groups.order`: by position, or as `ordered` says.
  """
  return _running_total(x, groups)


@jax.jit
def at_most(x: Array, group_ids: Array, among: Array) -> Array:
  """How many rows of `among` in the group have an x that is at most that of the row: -> i32[B].

  Args:
    x: [B].
    group_ids: i32[B].
    among: bool[B], the rows that are counted.
  """
  chex.assert_equal_shape([x, group_ids, among])
  level = joint(group_ids, x)
  # Sorted by group and then by x; up_to[i] counts the rows of `among` before place i.
  order = jnp.argsort(level)
  up_to = jnp.pad(jnp.cumsum(among[order]), (1, 0))
  start = jnp.searchsorted(group_ids[order], group_ids)
  end = jnp.searchsorted(level[order], level, side='right')
  return up_to[end] - up_to[start]


@jax.jit
def joint(a: Array, b: Array) -> Array:
  """Group ids of rows that are equal in both a and b: [B], [B] -> i32[B].

  The ids grow with a, and among rows of one a with b.
  """
  chex.assert_rank([a, b], 1)
  chex.assert_equal_shape([a, b])
  order = jnp.lexsort((b, a))
  a, b = a[order], b[order]
  differs = (a[1:] != a[:-1]) | (b[1:] != b[:-1])
  ids = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(differs, dtype=jnp.int32)])
  return jnp.zeros(len(order), jnp.int32).at[order].set(ids)


@jax.jit
def center(x: Array, groups: Groups, weights: Array | None = None) -> Array:
  """x_i - sum_j w_j x_j / sum_j w_j over the counted rows j of the group of row i.

  Args:
    x: [B, ...].
    groups: which rows are compared.
    weights: as x, >= 0; None gives all rows the weight 1.

  Returns:
    [B, ...]; 0 where the weights sum to 0.
  """
  weights = jnp.ones_like(x) if weights is None else weights
  chex.assert_equal_shape([x, weights])
  # Differences from one of the rows that are averaged: equal numbers give exactly 0, and so does
  # the only row with a weight.
  origin = minimum(jnp.where(weights > 0, jax.lax.stop_gradient(x), jnp.inf), groups)
  shifted = x - jnp.where(origin == jnp.inf, 0, origin)
  sum_of_weights = total(weights, groups)
  mean = divide(total(jnp.where(weights > 0, weights * shifted, 0), groups), sum_of_weights)
  return jnp.where(_like(groups.counted, x) & (sum_of_weights > 0), shifted - mean, 0)


@jax.jit
def variance(centered: Array, groups: Groups, ddof: int) -> Array:
  """Variance over the counted rows of the group, of numbers whose mean is subtracted already.

  The sum of squares is divided by max(number of rows - ddof, 1): [B] -> [B].
  """
  return total(jnp.square(centered), groups) / jnp.maximum(size(groups) - ddof, 1)


def normalized(x: Array, groups: Groups, ddof: int, eps: float) -> Array:
  """(x - mean) / (std + eps) over the counted rows of the group, [B] -> [B].

  The standard deviation is the root of `variance`. 0 where all counted x of the group are equal.
  """
  centered = center(x, groups)
  return divide(centered, jnp.sqrt(variance(centered, groups, ddof)) + eps)


def kendall_tau(a: Array, b: Array, groups: Groups) -> Array:
  """Kendall's tau between two rankings of the counted rows of a group, [B], [B] -> [B].

  It is the mean over pairs of rows of 1 where a and b order the two alike, and -1 where they do not.
  Equal numbers are ranked by position. 1 in a group of fewer than two rows.
  """
  chex.assert_equal_shape([a, b, groups.counted])
  rows, last = jnp.arange(len(a)), groups.last
  ranks = rank(a, groups), rank(b, groups)

  def agreement(row):
    others = groups.counted & (last == last[row]) & (rows != row)
    signs = [jnp.sign(one[row] - one) for one in ranks]
    return jnp.sum(jnp.where(others, signs[0] * signs[1], 0))

  # A few rows at a time: an array of all pairs would have B^2 entries.
  found = jax.lax.map(agreement, rows, batch_size=64).astype(jnp.float32)
  number = size(groups)
  pairs = number * (number - 1)
  return jnp.where(pairs > 0, total(found, groups) / jnp.maximum(pairs, 1), 1.0)


def partner(groups: Groups) -> Array:
  """The place of the other row of a pair, a group of exactly two rows; else the row's own: i32[B]."""
  paired = groups.place[groups.last] == 1
  first, second = groups.order[groups.last - paired], groups.order[groups.last]
  rows = jnp.arange(len(paired))
  return jnp.where(paired, first + second - rows, rows)


def divide(x: Array, scale: Array) -> Array:
  """x / scale, and 0 where scale <= 0, as for a group without members or a standard deviation of 0.

  NaN stays NaN: a reward that is none must not look like a group without signal.
  """
  empty = scale <= 0
  return jnp.where(empty, 0, x / jnp.where(empty, 1, scale))


def _reduce(operation: Callable, x: Array, groups: Groups, empty: float) -> Array:
  """An associative operation over the counted rows of each group: [B, ...] -> [B, ...]."""
  x = _prefixes(operation, x, groups, empty)[groups.last]
  return jnp.where(_like(groups.counted, x), x, 0)


def _prefixes(operation: Callable, x: Array, groups: Groups, empty: float) -> Array:
  """The operation over a row and the counted rows before it in its group; rows in sorted order."""
  chex.assert_equal_shape_prefix([x, groups.counted], 1)
  counted = _like(groups.counted, x)
  rows = jnp.arange(len(x))

  # Each row holds the result of the 1, 2, 4, ... rows of its group that end with it.
  def double(x, distance):
    before = x[jnp.maximum(rows - distance, 0)]
    return jnp.where(_like(groups.place >= distance, x), operation(before, x), x), None

  x = jnp.where(counted, x, jnp.asarray(empty, x.dtype))[groups.order]
  distances = jnp.array([2**k for k in range((len(x) - 1).bit_length())], rows.dtype)
  return jax.lax.scan(double, x, distances)[0]


@jax.jit
def _running_total(x: Array, groups: Groups) -> Array:
  prefixes = _prefixes(jnp.add, x, groups, 0)
  found = jnp.zeros_like(prefixes).at[groups.order].set(prefixes)
  return jnp.where(_like(groups.counted, x), found, 0)


_combine = jax.jit(_reduce, static_argnums=0)  # quick also where a caller compiles nothing


def _like(rows: Array, x: Array) -> Array:
  """[B] -> [B, 1, ...], so that it broadcasts over the columns of x."""
  return rows.reshape(rows.shape + (1,) * (x.ndim - 1))
