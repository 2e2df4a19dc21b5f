"""Second-order descent whose damping follows the norm of the gradient (arXiv:2506.13710).

It solves a linear system in all parameters and evaluates the loss again at each trial, so it is for
small convex problems, and no configuration selects it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from polgrad.types import Array


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
