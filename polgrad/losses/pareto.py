"""Volumes that sets of points dominate, to compare policies by several rewards at once.

A point dominates another one if it is at least as large in every coordinate.
"""

import chex
import jax
import jax.numpy as jnp

from polgrad.types import Array


def hypervolume(points: Array, counted: Array, reference: Array) -> Array:
  """The volume of all places above the reference that some counted point dominates: -> [].

  It is exact: the coordinates of the points cut the space into (C + 1)^K boxes, each of which is
  dominated as a whole or not at all.

  Args:
    points: [C, K].
    counted: bool[C]; the other points are ignored.
    reference: [K], the corner from which volumes are measured.
  """
  chex.assert_rank([points, counted, reference], [2, 1, 1])
  chex.assert_equal_shape_prefix([points, counted], 1)
  chex.assert_equal(points.shape[1:], reference.shape)
  points = jnp.where(counted[:, None], jnp.maximum(points, reference[None]), reference[None])
  rows, axes = points.shape
  volume, dominated = jnp.ones((1,) * axes, points.dtype), jnp.ones((1,) * (axes + 1), bool)
  for axis in range(axes):
    ordered = jnp.sort(points[:, axis])
    edges = jnp.concatenate([reference[axis : axis + 1], ordered])
    along = [1] * axes
    along[axis] = rows
    volume = volume * (edges[1:] - edges[:-1]).reshape(along)
    # Whether a point reaches the upper edge of a box, with the points along the first axis.
    reaches = points[:, axis, None] >= ordered[None]
    dominated = dominated & reaches.reshape(rows, *along)
  return jnp.sum(jnp.where(jnp.any(dominated, axis=0), volume, 0))


def influence_weights(log_weights: Array, influences: Array, *, rate: float = 0.1) -> Array:
  """log w_k + rate I_k, normalised, with I_k = sum_j g_k . g_j: weights of rewards by the influence of
  the gradient of each on all of them (arXiv:2509.11452).

  A reward whose gradient agrees with the others gains weight. Equal gradients leave the weights
  unchanged.

  Args:
    log_weights: [K], logarithms of weights that add up to 1.
    influences: [K], of K rewards.
    rate: of the change; the authors divide the learning rate, 1e-6, by 1e-5.

  Returns:
    [K], logarithms of weights that add up to 1.
  """
  chex.assert_rank([log_weights, influences], 1)
  chex.assert_equal_shape([log_weights, influences])
  moved = log_weights + rate * influences
  return moved - jax.nn.logsumexp(moved)
