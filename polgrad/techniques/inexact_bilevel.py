"""MAID: hyperparameters by bilevel descent, as accurate as it has to be (arXiv:2308.10098).

An upper problem min_theta g(x*(theta)) needs the minimiser x*(theta) of a lower loss h(x, theta). MAID
solves the lower problem only so far that the hypergradient still points downhill, and a line search that
counts the remaining error accepts the step.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from polgrad.types import Array

Upper = Callable[[Array], Array]  # g: x [D] -> []
Lower = Callable[[Array, Array], Array]  # h: (x [D], theta [H]) -> [], strongly convex in x


class Constants(NamedTuple):
  """What the error bound needs to know at (x, theta), all [] and positive or 0.

  A is the Hessian of h in x, and B its derivative in x and theta. `upper_smoothness` is used by the line
  search, the others by `error_bound`.
  """

  convexity: Array  # mu, the least eigenvalue of A
  coupling: Array  # |B|
  coupling_lipschitz: Array  # L_B, Lipschitz constant of B in x
  inverse_lipschitz: Array  # Lipschitz constant of A^-1 in x
  upper_smoothness: Array  # L_g, Lipschitz constant of the gradient of g


class State(NamedTuple):
  """State of the descent."""

  theta: Array  # [H]
  x: Array  # [D], approximate minimiser of the lower loss
  epsilon: Array  # [], accuracy of x: |x - x*(theta)| <= epsilon
  delta: Array  # [], residual of the linear system
  step: Array  # [], first step size of the next line search
  gradients: Array  # i32[], gradients of the lower loss that were computed so far


def init(
  theta: Array, x: Array, *, epsilon: float = 0.1, delta: float = 0.1, step: float = 0.1
) -> State:
  """The state before the first update; any x will do."""
  chex.assert_rank([theta, x], 1)
  scalar = lambda value: jnp.asarray(value, x.dtype)
  return State(theta, x, scalar(epsilon), scalar(delta), scalar(step), jnp.zeros((), jnp.int32))


def solve_lower(
  lower: Lower, x: Array, theta: Array, tolerance: Array, *, step: float, limit: int = 2000
) -> tuple[Array, Array]:
  """Gradient descent on h(., theta) until |grad h| <= tolerance.

  With tolerance mu epsilon the result is within epsilon of the minimiser.

  Args:
    lower: h.
    x: [D], the start.
    theta: [H].
    tolerance: [].
    step: step size, at most 2 over the largest eigenvalue of the Hessian.
    limit: number of gradients after which it stops in any case.

  Returns:
    x [D], and the number of gradients.
  """
  slope = jax.grad(lower)

  def unsolved(carry):
    _, gradient, count = carry
    return (jnp.linalg.norm(gradient) > tolerance) & (count < limit)

  def descend(carry):
    x, gradient, count = carry
    x = x - step * gradient
    return x, slope(x, theta), count + 1

  x, _, count = jax.lax.while_loop(unsolved, descend, (x, slope(x, theta), jnp.ones((), jnp.int32)))
  return x, count


def conjugate_gradient(
  product: Callable[[Array], Array], b: Array, tolerance: Array, *, limit: int = 2000
) -> Array:
  """Solves A q = b for a positive definite A, from 0 until |b - A q| <= tolerance: [D] -> [D].

  Args:
    product: q -> A q.
    b: [D].
    tolerance: [].
    limit: number of products after which it stops in any case.
  """

  def unsolved(carry):
    _, residual, _, count = carry
    return (jnp.linalg.norm(residual) > tolerance) & (count < limit)

  def advance(carry):
    q, residual, direction, count = carry
    moved = product(direction)
    size = residual @ residual / (direction @ moved)
    left = residual - size * moved
    turned = left + (left @ left) / (residual @ residual) * direction
    return q + size * direction, left, turned, count + 1

  start = (jnp.zeros_like(b), b, b, jnp.zeros((), jnp.int32))
  return jax.lax.while_loop(unsolved, advance, start)[0]


def hypergradient(upper: Upper, lower: Lower, x: Array, theta: Array, delta: Array) -> Array:
  """-B^T q with A q = grad g(x): the gradient of g(x*(theta)), if x is x*(theta): -> [H].

  Args:
    upper: g.
    lower: h.
    x: [D], approximate minimiser.
    theta: [H].
    delta: [], allowed residual |A q - grad g(x)|.

  >>> lower = lambda x, theta: ((1 + jnp.exp(theta)) * x**2 / 2 - x)[0]
  >>> upper = lambda x: (x[0] - 0.3) ** 2 / 2
  >>> print(hypergradient(upper, lower, jnp.array([0.5]), jnp.zeros(1), 0.0).round(4))
  [-0.05]
  """
  slope = jax.grad(lower)
  product = lambda v: jax.jvp(lambda x: slope(x, theta), (x,), (v,))[1]
  q = conjugate_gradient(product, jax.grad(upper)(x), delta)
  _, pull = jax.vjp(lambda theta: slope(x, theta), theta)
  return -pull(q)[0]


def error_bound(constants: Constants, slope: Array, epsilon: Array, delta: Array) -> Array:
  """Bound of the error of `hypergradient`, if x is within epsilon of the minimiser: -> [].

      (|B| / mu + L_{A^-1} |grad g| |B| + L_B |grad g| / mu) epsilon
        + (|B| / mu) delta + (L_B / mu) epsilon^2

  Args:
    constants: at x and theta.
    slope: [], |grad g(x)|.
    epsilon: [].
    delta: [].
  """
  mu, b, lb, la, _ = constants
  return (
    (b / mu + la * slope * b + lb * slope / mu) * epsilon + b / mu * delta + lb / mu * epsilon**2
  )


def update(
  state: State,
  upper: Upper,
  lower: Lower,
  constants: Callable[[Array, Array], Constants],
  *,
  lower_step: float,
  eta: float = 1e-4,
  shrink: float = 0.9,
  grow: float = 10 / 9,
  tighten: float = 0.5,
  relax: float = 1.05,
  tries: int = 10,
  attempts: int = 3,
  refinements: int = 60,
  limit: int = 2000,
) -> State:
  """One step of theta.

  1. Solve the lower problem to epsilon, and compute the hypergradient p with residual delta. While its
     `error_bound` is above (1 - eta) |p|, multiply epsilon and delta by `tighten` and repeat.
  2. For a = step shrink^i, i = 0, 1, ...: accept theta - a p if, with x' the lower solution there,

         g(x') + |grad g(x')| epsilon + L_g epsilon^2 / 2  <=  g(x) - |grad g(x)| epsilon - a eta^2 |p|^2

     Then the next step size is a grow, and epsilon and delta are multiplied by `relax`.
  3. If no a is accepted, tighten epsilon and delta and start again at 1, with one more try.

  With epsilon = delta = 0 it is gradient descent with Armijo's rule.

  Differences: the released code compares with g of the x that was accepted last, also after x was
  solved more accurately; then it may reject every later step. Here g is evaluated at the present x, as
  in the paper. The released code estimates the constants by random probes; here they are an argument.
  The factor eta^2 is the code's.

  Args:
    state: from `init` or the last update.
    upper: g.
    lower: h.
    constants: (x, theta) -> Constants.
    lower_step: step size of the lower solver, for example 1 over the largest eigenvalue of A.
    eta: how far the error of p may be below |p|.
    shrink: factor of the step size between tries.
    grow: factor of the accepted step size.
    tighten: factor of epsilon and delta where they are too large.
    relax: factor of them after an accepted step. The authors' quadratic experiment has shrink=0.5,
      relax=1.25 and a first step size of 0.01.
    tries: number of step sizes in the first line search of an update.
    attempts: number of line searches; if all fail, theta stays.
    refinements: number of times that step 1 may tighten; at a stationary point it would never end.
    limit: number of gradients of one lower problem.

  Confidence: CODE.
  """
  if not (0 < shrink < 1 and 0 < tighten < 1 and 0 < eta < 1 and grow >= 1 and relax >= 1):
    raise ValueError(
      f'{shrink=}, {tighten=} and {eta=} must be between 0 and 1, {grow=} and {relax=} at least 1'
    )
  norm = lambda x: jnp.linalg.norm(jax.grad(upper)(x))

  def solve(x, theta, epsilon):
    tolerance = constants(x, theta).convexity * epsilon
    return solve_lower(lower, x, theta, tolerance, step=lower_step, limit=limit)

  def tightened(state):
    return state._replace(epsilon=tighten * state.epsilon, delta=tighten * state.delta)

  def evaluate(state):
    x, count = solve(state.x, state.theta, state.epsilon)
    p = hypergradient(upper, lower, x, state.theta, state.delta)
    bound = error_bound(constants(x, state.theta), norm(x), state.epsilon, state.delta)
    bad = bound > (1 - eta) * jnp.linalg.norm(p)
    return state._replace(x=x, gradients=state.gradients + count), p, bad

  def refine(state):
    def again(carry):
      (state, _, _), count = carry
      return evaluate(tightened(state)), count + 1

    unfinished = lambda carry: carry[0][2] & (carry[1] < refinements)
    (state, p, _), _ = jax.lax.while_loop(unfinished, again, (evaluate(state), 0))
    return state, p

  def search(state, p, tries):
    smooth = constants(state.x, state.theta).upper_smoothness
    floor = upper(state.x) - norm(state.x) * state.epsilon

    def attempt(carry):
      i, *_, count = carry
      size = state.step * shrink**i
      theta = state.theta - size * p
      x, more = solve(state.x, theta, state.epsilon)
      ceiling = upper(x) + norm(x) * state.epsilon + smooth * state.epsilon**2 / 2
      accepted = ceiling <= floor - size * eta**2 * (p @ p)
      return i + 1, accepted, theta, x, size, count + more

    unfinished = lambda carry: ~carry[1] & (carry[0] < tries)
    start = (0, jnp.zeros((), bool), state.theta, state.x, state.step, state.gradients)
    _, accepted, theta, x, size, count = jax.lax.while_loop(unfinished, attempt, start)
    moved = State(theta, x, relax * state.epsilon, relax * state.delta, grow * size, count)
    failed = tightened(state)._replace(gradients=count)
    return accepted, jax.tree.map(lambda a, b: jnp.where(accepted, a, b), moved, failed)

  def attempt(carry):
    state, _, j = carry
    state, p = refine(state)
    accepted, state = search(state, p, tries + j)
    return state, accepted, j + 1

  unfinished = lambda carry: ~carry[1] & (carry[2] < attempts)
  return jax.lax.while_loop(unfinished, attempt, (state, jnp.zeros((), bool), 0))[0]
