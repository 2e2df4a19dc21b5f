"""Descent by rankings of candidates: ZO-RankSGD (arXiv:2303.03751), for losses that nobody can compute.

The oracle is a person or a judge who sees m candidates and says which k are best, in order. No value of
the loss and no gradient is needed, so a monotone transform of the loss changes nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from polgrad.types import Array, Params

# Candidates, stacked along a first axis [m, ...] -> indices of the best k, the best first, i32[k].
Rank = Callable[[Params], Array]


def rank_gradient(noise: Array, order: Array) -> Array:
  """An estimate of the direction of the gradient from the ranking of m perturbed points.

      g = 1 / |E| sum over (i -> j) in E of (noise_j - noise_i)

  E has an edge from every ranked point to every point that it beats: all that are ranked lower, and
  all that are not ranked. |E| = k (k - 1) / 2 + k (m - k). Each noise occurs once for each of its edges,
  so g = -sum_i c_i noise_i / |E| with c = m - 1 - 2 r for the ranks r = 0, ..., k - 1 and c = -k for
  points that are not ranked; the c sum to 0.

  Differences: the authors' demo has c = m - 2 r, which is one too many.

  Confidence: CODE (estimator).

  Args:
    noise: [m, d], what was added to the point (without its scale).
    order: i32[k], the best points, the best first, 1 <= k <= m.

  Returns:
    [d]; -g is a direction of descent, and its length says nothing about that of the gradient.
  """
  m, k = noise.shape[0], order.shape[0]
  weights = jnp.full(m, -float(k), noise.dtype)
  weights = weights.at[order].set(m - 1 - 2.0 * jnp.arange(k).astype(noise.dtype))
  return -(weights @ noise) / (k * (k - 1) / 2 + k * (m - k))


def rank_descent(
  params: Params,
  rank: Rank,
  key: Array,
  *,
  steps: int,
  candidates: int = 10,
  scale: float = 0.01,
  step_size: Callable[[int], float] = lambda step: 0.5 / (step + 1) ** 0.5,
  line_search: int = 0,
  shrink: float = 0.5,
) -> Params:
  """Parameters after `steps` rankings; the loop is in Python, because `rank` may be a person.

  Args:
    params: any tree of arrays.
    rank: candidates, as one tree with a leading axis m -> indices of the k best, the best first. Larger
      k use more of each ranking; k is what `rank` returns.
    key: random key of the perturbations.
    steps: number of steps.
    candidates: m.
    scale: standard deviation of the perturbations, in the unit of the parameters.
    step_size: number of the step, from 0 -> length that multiplies the estimate.
    line_search: n > 0 also ranks the point itself and the steps step_size * shrink^i for i < n, and
      takes the best. 0 (default) takes the full step.
    shrink: ratio of neighbouring steps of the line search.

  Returns:
    Parameters shaped like `params`.
  """
  point, unravel = ravel_pytree(params)
  lengths = jnp.array([0.0, *(shrink**i for i in range(line_search))], point.dtype)

  # The oracle may be a person, so it is not compiled, but everything between two of its answers is.
  @jax.jit
  def proposed(point, step):
    noise = jax.random.normal(jax.random.fold_in(key, step), (candidates, point.size), point.dtype)
    return noise, jax.vmap(unravel)(point[None] + scale * noise)

  @jax.jit
  def moved(point, noise, order, rate):
    move = -rate * rank_gradient(noise, order)
    trials = point[None] + lengths[:, None] * move[None]
    return point + move, trials, jax.vmap(unravel)(trials)

  for step in range(steps):
    noise, shown = proposed(point, step)
    point, trials, shown = moved(point, noise, jnp.asarray(rank(shown)), step_size(step))
    if line_search:
      point = trials[int(rank(shown)[0])]
  return unravel(point)


def ranking(loss: Callable[[Params], Any], k: int) -> Rank:
  """An oracle that knows the loss: the k candidates with the smallest loss."""
  return jax.jit(lambda stacked: jax.lax.top_k(-jax.vmap(loss)(stacked), k)[1])
