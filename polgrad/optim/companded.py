"""Weight compander: weights that are a bounded function of what is trained (arXiv:2306.16993)."""

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from polgrad.optim.standard import StandardPart
from polgrad.optim.wrappers import in_float32, rated_like
from polgrad.registry import Positive, Range
from polgrad.types import Array, Params


def compressed(v: Array, a: Array | float, b: Array | float) -> Array:
  """w = a arctan(v / b): odd, increasing, within +-a pi / 2, with the slope a b / (b^2 + v^2)."""
  return a * jnp.arctan(v / b)


def expanded(w: Array, a: Array | float, b: Array | float) -> Array:
  """v = b tan(w / a), the inverse of `compressed` for |w| < a pi / 2."""
  return b * jnp.tan(w / a)


class CompandedState(NamedTuple):
  """State of `companded`."""

  inner: Any  # state of the optimizer of v
  v: Params
  a: Params  # f32[] of each array


def companded(
  *,
  optimizer: StandardPart,
  limit: Annotated[float, Range(above=1)] = 2.0,
  slope: Positive = 1.0,
) -> optax.GradientTransformation:
  """Weight compander: the optimizer trains v, and weights are w = a arctan(v / b) (arXiv:2306.16993).

      dL/dv = dL/dw a b / (b^2 + v^2),   v_0 = b tan(w_0 / a)
      a = limit max|w_0| 2 / pi,   b = a / slope

  a and b are numbers of each parameter array, set at the start, where the function is unchanged.
  Weights stay below `limit` times the largest one at the start; small weights move more freely than
  large ones, by the ratio of slopes. For limit -> infinity and slope 1 this is the optimizer itself.
  Weight decay of the optimizer pulls v to 0. For an array that starts at 0, a is `limit` 2 / pi.

  Differences: The paper's function could not be read. a and b are not learned.

  Confidence: MEMORY (low).

  Args:
    optimizer: makes the steps of v.
    limit: bound of an array's weights, in units of its largest weight at the start.
    slope: dw/dv at v = 0; above 1 expands small weights.
  """

  def init(params):
    def bound(w):
      largest = jnp.max(jnp.abs(w.astype(jnp.float32)))
      return limit * jnp.where(largest > 0, largest, 1) * 2 / jnp.pi

    a = jax.tree.map(bound, params)
    v = jax.tree.map(lambda w, a: expanded(w.astype(jnp.float32), a, a / slope), params, a)
    return CompandedState(optimizer.init(v), v, a)

  def update(grads, state, params, oracle=None):
    del oracle  # standard optimizers ask for nothing but the gradient

    def through(g, v, a):
      b = a / slope
      return g * a * b / (b**2 + v**2)

    grads = jax.tree.map(through, grads, state.v, state.a)
    steps, inner = optimizer.update(grads, state.inner, state.v)
    v = optax.apply_updates(state.v, steps)
    moved = lambda w, v, a: compressed(v, a, a / slope) - w
    return jax.tree.map(moved, params, v, state.a), CompandedState(inner, v, state.a)

  return rated_like(in_float32(optax.GradientTransformationExtraArgs(init, update)), optimizer)
