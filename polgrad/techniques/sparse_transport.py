"""Optimal transport with a squared penalty and at most k entries in each column (arXiv:2209.15466)."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from polgrad.types import Array


class Transport(NamedTuple):
  """A plan and what is known of it."""

  plan: Array  # [m, n]; columns have their sums exactly, and at most k entries above 0
  value: Array  # [], the dual value; its gradient by the cost is the plan
  error: Array  # [], largest difference of a row's sum from what it should be


def conjugate(x: Array, *, k: int | Array, gamma: float) -> Array:
  """sum over the k largest of max(x, 0)^2 / (2 gamma), the conjugate of gamma |y|^2 / 2 for y >= 0 with
  at most k entries above 0: [m] -> [].

  >>> print(conjugate(jnp.array([0.5, -0.2, 0.3, 0.1]), k=2, gamma=2.0).round(4))
  0.085
  """
  largest = jnp.where(jnp.arange(x.size) < k, jnp.sort(x, descending=True), 0)
  return jnp.sum(jnp.maximum(largest, 0) ** 2) / (2 * gamma)


def sparse_projection(x: Array, *, k: int | Array) -> Array:
  """The point of the simplex with at most k entries above 0 that is nearest to x: [m] -> [m].

  It is the projection onto the simplex of the k largest entries; all others become 0.

  >>> print(sparse_projection(jnp.array([0.0, 0.75, 0.25]), k=2))
  [0.   0.75 0.25]
  """
  order = jnp.argsort(x, descending=True)
  largest, place = x[order], jnp.arange(x.size)
  # The first entries, as long as each exceeds the threshold that makes them add up to 1.
  threshold = (jnp.cumsum(largest) - 1) / (place + 1)
  above = (largest > threshold) & (place < k)
  last = jnp.sum(above) - 1
  return jnp.zeros_like(x).at[order].set(jnp.where(above, largest - threshold[last], 0))


def _columns(potential: Array, cost: Array, columns: Array, *, k: int | Array, gamma: float):
  """Each column's best plan for the potential of the rows, and the value that it gives."""

  def best(prices, total):
    # Detached: the best y does not enter the gradient of the maximum.
    y = jax.lax.stop_gradient(sparse_projection(prices / (gamma * total), k=k))
    return y, jnp.dot(prices, y) - gamma * total * jnp.dot(y, y) / 2

  y, value = jax.vmap(best, in_axes=(1, 0), out_axes=(1, 0))(potential[:, None] - cost, columns)
  return y * columns[None], value


def solve(
  cost: Array,
  rows: Array,
  columns: Array,
  *,
  k: int | Array,
  gamma: float,
  tolerance: float = 1e-6,
  max_steps: int = 500,
) -> Transport:
  """Minimises <C, P> + gamma |P|^2 / 2 over plans whose columns have at most k entries above 0.

  The sums of P are `rows` and `columns`. The problem is not convex; what is solved is its dual, which
  is, by L-BFGS from 0 on the semi-dual of the potentials of the rows:

      max over alpha  <alpha, a> - sum_j b_j max_y [ (alpha - C_j) y - gamma b_j |y|^2 / 2 ]

  y in the simplex with at most k entries above 0. The plan satisfies the sums of the rows, and is then
  optimal, if the k largest entries of alpha - C_j are unique at the optimum; `error` says if it does.

  k = m is transport with a squared penalty (arXiv:1710.06276), and gamma -> 0 transport without one.
  The value does not increase with k. One use is to assign tokens (columns) to k of m experts (rows) with
  given loads.

  The plan has no gradient. The value has the plan as its gradient by the cost, by the envelope theorem.

  Confidence: CODE.

  Args:
    cost: [m, n].
    rows: [m], sums of the rows, above 0.
    columns: [n], sums of the columns, above 0, with the same total.
    k: 1 to m; an array may be traced, and is not checked.
    gamma: > 0.
    tolerance: of the norm of the gradient, at which L-BFGS stops.
    max_steps: at which it stops in any case.

  Raises:
    ValueError: k or gamma is out of range.

  >>> pair = jnp.full((2,), 0.5)
  >>> print(solve(jnp.array([[0.0, 1.0], [1.0, 0.0]]), pair, pair, k=1, gamma=1.0).plan)
  [[0.5 0. ]
   [0.  0.5]]
  """
  chex.assert_rank([cost, rows, columns], [2, 1, 1])
  chex.assert_equal(cost.shape, rows.shape + columns.shape)
  if isinstance(k, int) and not 1 <= k <= cost.shape[0]:
    raise ValueError(f'k is {k}, and must be from 1 to the number of rows, {cost.shape[0]}')
  if not gamma > 0:
    raise ValueError(f'gamma is {gamma}, and must be positive')
  detached = jax.lax.stop_gradient(cost)

  def negative(alpha):
    _, value = _columns(alpha, detached, columns, k=k, gamma=gamma)
    return jnp.dot(columns, value) - jnp.dot(alpha, rows)

  solver = optax.lbfgs()
  evaluate = optax.value_and_grad_from_state(negative)

  def step(carry):
    alpha, state, _ = carry
    value, slope = evaluate(alpha, state=state)
    move, state = solver.update(slope, state, alpha, value=value, grad=slope, value_fn=negative)
    return optax.apply_updates(alpha, move), state, jnp.linalg.norm(slope)

  def running(carry):
    _, state, norm = carry
    count = optax.tree.get(state, 'count')
    return (count < max_steps) & (norm > tolerance)

  start = jnp.zeros_like(rows)
  alpha, _, _ = jax.lax.while_loop(
    running, step, (start, solver.init(start), jnp.asarray(jnp.inf, rows.dtype))
  )
  alpha = jax.lax.stop_gradient(alpha)
  plan, _ = _columns(alpha, detached, columns, k=k, gamma=gamma)
  plan = jax.lax.stop_gradient(plan)
  # Linear in the cost at the fixed plan, so the gradient is the plan itself.
  value = (
    jnp.dot(alpha, rows) + jnp.sum((cost - alpha[:, None]) * plan) + gamma * jnp.sum(plan**2) / 2
  )
  return Transport(plan, value, jnp.max(jnp.abs(jnp.sum(plan, axis=1) - rows)))
