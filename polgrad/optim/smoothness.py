"""Second-order descent whose damping follows the norm of the gradient (arXiv:2506.13710).

`smooth_step` solves a linear system in all parameters, for small problems. `smooth_descent` is the same
descent as an optimizer of a run: it solves by products with the Hessian, or leaves the Hessian out.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from polgrad.optim.wrappers import Oracle, in_float32, rated
from polgrad.registry import Count, Positive
from polgrad.types import Array, Params


class Descent(NamedTuple):
  """A point of the descent."""

  x: Array  # [d]
  gamma: Array  # f[], radius in which the gradient is trusted to be smooth
  accepted: Array  # bool[], whether the last trial was taken


def start(x: Array, gamma: float = 1.0) -> Descent:
  """The descent at its first point."""
  return Descent(x, jnp.asarray(gamma, x.dtype), jnp.asarray(False))


def smooth_step(
  state: Descent, loss: Callable[[Array], Array], hessian: Callable[[Array], Array]
) -> Descent:
  """One trial of gradient-normalised smoothness.

      x+ = x - (H + (||g|| / gamma) I)^(-1) g

  It is taken if f(x) - f(x+) >= gamma ||g(x+)||^2 / (8 ||g(x)||), and gamma is then doubled; else x
  does not change and gamma is halved. With H = 0 a trial is a step of length gamma against the
  gradient, and for gamma -> infinity it is Newton's. Where the gradient is 0, nothing changes.

  Differences: released code takes the last of 40 trials that fail in a row; here it is never taken.

  Confidence: CODE.

  Args:
    state: where the descent is.
    loss: [d] -> f[], f.
    hessian: [d] -> [d, d], any positive semidefinite approximation H of the Hessian.
  """
  value, grad = jax.value_and_grad(loss)(state.x)
  length = jnp.linalg.norm(grad)
  still = length == 0
  damping = jnp.where(still, 1, length / state.gamma)
  system = hessian(state.x) + damping * jnp.eye(state.x.size, dtype=state.x.dtype)
  moved = state.x - jnp.linalg.solve(system, grad)
  new, after = jax.value_and_grad(loss)(moved)
  needed = state.gamma * jnp.sum(after**2) / (8 * jnp.where(still, 1, length))
  accepted = (value - new >= needed) & ~still
  gamma = jnp.where(still, 1, jnp.where(accepted, 2, 0.5)) * state.gamma
  return Descent(jnp.where(accepted, moved, state.x), gamma, accepted)


class RadiusState(NamedTuple):
  """State of `smooth_descent`."""

  gamma: Array  # f32[], radius in which the gradient is trusted to be smooth
  accepted: Array  # bool[], whether the last trial was taken


def smooth_descent(
  *, radius: Positive = 1.0, products: Count = 0
) -> optax.GradientTransformationExtraArgs:
  """Gradient-normalised smoothness as an optimizer, one trial an update (arXiv:2506.13710).

      step = -(H + (||g|| / gamma) I)^(-1) g

  It is taken if f(x) - f(x+) >= gamma ||g(x+)||^2 / (8 ||g(x)||), and gamma is then doubled; else the
  parameters do not change and gamma is halved. f is the loss of the update's minibatch, which is
  evaluated again behind each trial: an update costs two gradients, and the products. Without products
  H is 0, so a trial is a step of length gamma against the gradient. Otherwise H is the Hessian of the
  loss, and the system is solved by conjugate gradients, which stop where the curvature is not positive.
  The metric `learning_rate` is gamma.

  Differences: The released code solves exactly, for problems with few parameters and a positive
  semidefinite H, on the loss of all data, and takes the last of 40 trials that fail in a row; here
  a trial that fails is never taken.

  Confidence: CODE (steps and test), DERIVED (conjugate gradients, minibatches).

  Args:
    radius: gamma at the start, in the units of the parameters' norm.
    products: iterations of conjugate gradients, each a product with the Hessian; 0 leaves it out.

  Raises:
    ValueError: from update, there is no oracle.
  """

  def init(params):
    del params
    return RadiusState(jnp.float32(radius), jnp.asarray(False))

  def update(grads, state, params, oracle=None):
    if oracle is None:
      raise ValueError(
        'smooth_descent asks for more than a gradient: update(..., oracle=Oracle(...))'
      )
    length = optax.tree.norm(grads)
    still = length == 0
    size = jnp.where(still, 1, length)
    damping = size / state.gamma
    steps = optax.tree.scale(-1, _solve(oracle, grads, damping, products))
    after, slope = oracle.value_and_gradient(optax.apply_updates(params, steps))
    needed = state.gamma * optax.tree.norm(slope, squared=True) / (8 * size)
    accepted = (oracle.value() - after >= needed) & ~still
    steps = jax.tree.map(lambda s: jnp.where(accepted, s, 0), steps)
    gamma = jnp.where(still, 1, jnp.where(accepted, 2, 0.5)) * state.gamma
    return steps, RadiusState(gamma, accepted)

  made = in_float32(optax.GradientTransformationExtraArgs(init, update))
  return rated(made, lambda state: optax.tree.get(state, 'gamma'))


def _solve(oracle: Oracle, grads: Params, damping: Array, products: int) -> Params:
  """(H + damping I)^(-1) grads by conjugate gradients of at most `products` iterations."""
  if not products:
    return optax.tree.scale(1 / damping, grads)
  add = lambda a, by, b: jax.tree.map(lambda x, y: x + by * y, a, b)
  squared = lambda tree: optax.tree.norm(tree, squared=True)

  def iterate(i, carry):
    x, rest, direction, going = carry
    image = add(oracle.product(direction), damping, direction)
    curvature, before = optax.tree.vdot(direction, image), squared(rest)
    # Where the curvature of the first direction is not positive, the step is that without H.
    fallback = jnp.where(i == 0, 1 / damping, 0.0)
    up = going & (curvature > 0) & (before > 0)
    by = jnp.where(up, before / jnp.where(up, curvature, 1), jnp.where(going, fallback, 0))
    x = add(x, by, direction)
    rest = add(rest, jnp.where(up, -by, 0), image)
    turned = add(rest, squared(rest) / jnp.where(before > 0, before, 1), direction)
    return x, rest, turned, up

  start = (optax.tree.zeros_like(grads), grads, grads, jnp.asarray(True))
  return jax.lax.fori_loop(0, products, iterate, start)[0]
