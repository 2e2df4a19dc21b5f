"""How far a map is from moving points at the least cost (arXiv:2302.04953)."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from polgrad.types import Array

Cost = Callable[[Array, Array], Array]  # two points [D] -> []


class Entropic(NamedTuple):
  """Entropic transport between two sets of points."""

  value: Array  # [], min <C, P> - epsilon H(P); differentiable by the cost
  plan: Array  # [n, m], detached
  error: Array  # [], sum over rows of |sum of the plan - a|; the columns have their sums


def squared_distance(x: Array, y: Array) -> Array:
  """|x - y|^2, whose optimal maps are gradients of convex functions: [D], [D] -> []."""
  return jnp.sum((x - y) ** 2)


def cost_matrix(x: Array, y: Array, cost: Cost = squared_distance) -> Array:
  """Costs between all points of two sets: [n, D], [m, D] -> [n, m]."""
  return jax.vmap(lambda a: jax.vmap(lambda b: cost(a, b))(y))(x)


def sinkhorn(
  cost: Array, *, epsilon: float | Array, tolerance: float = 1e-6, max_steps: int = 2000
) -> Entropic:
  """Entropic transport between uniform weights, by Sinkhorn's iterations on logarithms.

      W = min over P of <C, P> - epsilon H(P),  H(P) = -sum P log P

  The gradient of the value by the cost is the plan (envelope theorem): iterations are not
  differentiated, and epsilon is a constant.

  Args:
    cost: [n, m].
    epsilon: > 0, weight of the entropy.
    tolerance: of `Entropic.error`, at which iterations stop.
    max_steps: at which they stop in any case.
  """
  chex.assert_rank(cost, 2)
  epsilon = jax.lax.stop_gradient(epsilon)
  scaled = jax.lax.stop_gradient(cost) / epsilon
  rows, columns = (-jnp.log(jnp.asarray(size, cost.dtype)) for size in cost.shape)
  plan = lambda f, g: jnp.exp(f[:, None] + g[None] - scaled)

  def step(carry):
    f, g, _, count = carry
    f = rows - jax.nn.logsumexp(g[None] - scaled, axis=1)
    g = columns - jax.nn.logsumexp(f[:, None] - scaled, axis=0)
    error = jnp.sum(jnp.abs(jnp.sum(plan(f, g), axis=1) - jnp.exp(rows)))
    return f, g, error, count + 1

  running = lambda carry: (carry[2] > tolerance) & (carry[3] < max_steps)
  zeros = lambda size: jnp.zeros(size, cost.dtype)
  start = (zeros(cost.shape[0]), zeros(cost.shape[1]), jnp.asarray(jnp.inf, cost.dtype), 0)
  f, g, error, _ = jax.lax.while_loop(running, step, start)
  # The dual value: its error is quadratic in that of the potentials, unlike the value of the plan.
  dual = epsilon * (jnp.mean(f) + jnp.mean(g))
  found = plan(f, g)
  moved = jnp.sum((cost - jax.lax.stop_gradient(cost)) * found)  # 0, with the plan as its gradient
  return Entropic(dual + moved, found, error)


def gap(
  points: Array, images: Array, *, epsilon: float | Array, cost: Cost = squared_distance, **settings
) -> Array:
  """mean c(x_i, T x_i) - W(points, images): the Monge gap of a map T, a penalty: -> [].

  Without entropy it is 0 exactly if no other assignment of the points to the images costs less: for
  the identity, translations and positive scalings, for example. W is the entropic cost here, so the
  gap of n points is at least epsilon log n, a constant. With KL(P | ab) in place of the entropy it
  would be 2 epsilon log n smaller, and could be negative; gradients are equal.

  The plan is fixed in the gradient; points move in both terms. The cost must fit the maps that are
  wanted.

  Confidence: CODE.

  Args:
    points: [n, D], of any reference measure, usually of the source.
    images: [n, D], the map at these points.
    epsilon: > 0; 0.01 of the mean cost between points and images is usual.
    cost: between two points.
    **settings: of `sinkhorn`.

  >>> corners = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
  >>> print(gap(corners, corners[jnp.array([1, 0, 2, 3])], epsilon=0.1).round(4))  # two are swapped
  0.6386
  """
  chex.assert_rank([points, images], 2)
  chex.assert_equal_shape([points, images])
  paired = jnp.mean(jax.vmap(cost)(points, images))
  return paired - sinkhorn(cost_matrix(points, images, cost), epsilon=epsilon, **settings).value


def sinkhorn_divergence(
  x: Array, y: Array, *, epsilon: float | Array, cost: Cost = squared_distance, **settings
) -> Array:
  """W(x, y) - (W(x, x) + W(y, y)) / 2, W as in `sinkhorn`: -> [].

  A distance of two sets of points, 0 for equal sets: the usual fit beside the Monge gap. With
  KL(P | ab) in place of the entropy it is the same number, because the constants cancel.

  Args:
    x: [n, D].
    y: [m, D].
    epsilon: > 0; 0.1 of the mean cost between points of y is usual.
    cost: between two points.
    **settings: of `sinkhorn`.
  """

  def value(a: Array, b: Array) -> Array:
    return sinkhorn(cost_matrix(a, b, cost), epsilon=epsilon, **settings).value

  return value(x, y) - (value(x, x) + value(y, y)) / 2
