"""Which rows and tokens of a batch teach most: the down-sampling of D3S (arXiv:2509.22115)."""

import chex
import jax.numpy as jnp

from polgrad.types import Array


def largest_variance(gains: Array, valid: Array, number: Array | int) -> Array:
  """The `number` valid rows whose gains have the largest variance (D3S, arXiv:2509.22115).

  Such a set always consists of the k smallest and the number - k largest gains, for some k; all k are
  tried. The gradient's norm is bounded by a function that grows with this variance.

  Args:
    gains: [B], such as the advantages of rows.
    valid: bool[B]; others are not chosen.
    number: how many rows; of fewer valid ones all are taken. It may depend on the step.

  Returns:
    bool[B].
  """
  chex.assert_equal_shape([gains, valid])
  rows = len(gains)
  count = jnp.sum(valid)
  number = jnp.minimum(number, count)
  place = jnp.argsort(jnp.argsort(jnp.where(valid, gains, jnp.inf)))
  ordered = jnp.sort(jnp.where(valid, gains, jnp.inf))
  # Differences from the mean, so that squares of large numbers are not subtracted.
  mean = jnp.sum(jnp.where(valid, gains, 0)) / jnp.maximum(count, 1)
  ordered = jnp.where(jnp.arange(rows) < count, ordered - mean, 0)
  first, second = (jnp.pad(jnp.cumsum(x), (1, 0)) for x in (ordered, jnp.square(ordered)))
  low = jnp.arange(rows + 1)  # how many of the smallest
  high = number - low  # how many of the largest
  taken = lambda sums: sums[low] + sums[count] - sums[jnp.clip(count - high, 0, rows)]
  size = jnp.maximum(number, 1)
  variance = taken(second) / size - jnp.square(taken(first) / size)
  best = jnp.argmax(jnp.where(high >= 0, variance, -jnp.inf))
  return valid & ((place < best) | (place >= count - (number - best)))


def largest_scores(scores: Array, mask: Array, share: Array | float) -> Array:
  """The tokens of the mask with the largest scores; of equal ones, the first by row and position.

  Args:
    scores: [B, T].
    mask: bool[B, T].
    share: fraction of the tokens, rounded up; it may depend on the step.

  Returns:
    bool[B, T].
  """
  chex.assert_equal_shape([scores, mask])
  number = jnp.ceil(share * jnp.sum(mask) - 1e-4)
  order = jnp.argsort(jnp.where(mask, -scores, jnp.inf), axis=None, stable=True)
  place = jnp.zeros(order.size, jnp.int32).at[order].set(jnp.arange(order.size, dtype=jnp.int32))
  return mask & (place.reshape(mask.shape) < number)
