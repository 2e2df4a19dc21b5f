"""Weight compander: weights that are a function of what is trained, steep at 0 (arXiv:2306.16993)."""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from polgrad.optim.standard import StandardPart
from polgrad.optim.wrappers import in_float32, rated_like
from polgrad.registry import NotNegative, Positive, Range
from polgrad.types import Array, Params

Number = Array | float


def compressed(v: Array, a: Number, b: Number) -> Array:
  """w = a arctan(v / b): odd, increasing, within +-a pi / 2, with the slope a b / (b^2 + v^2)."""
  return a * jnp.arctan(v / b)


def expanded(w: Array, a: Number, b: Number) -> Array:
  """v = b tan(w / a), the inverse of `compressed` for |w| < a pi / 2."""
  return b * jnp.tan(w / a)


def mu_law(v: Array, a: Number, b: Number) -> Array:
  """w = sign(v) a log(1 + b |v| / a) / log(1 + b), the mu-law with mu = b: odd, increasing, w(a) = a.

  It has no bound. The slope is b / log(1 + b) at 0, above 1, and falls as 1 / |v|.
  """
  sign = jnp.where(v < 0, -1, 1)  # not 0 at 0, where the slope is not 0 either
  return sign * a * jnp.log1p(b * sign * v / a) / jnp.log1p(b)


def mu_law_inverse(w: Array, a: Number, b: Number) -> Array:
  """v = sign(w) (a / b) ((1 + b)^(|w| / a) - 1), the inverse of `mu_law`."""
  return jnp.sign(w) * a / b * jnp.expm1(jnp.abs(w) / a * jnp.log1p(b))


class Curve(NamedTuple):
  """A function w(v) with two parameters that are above 0."""

  forward: Callable[[Array, Number, Number], Array]  # (v, a, b) -> w
  inverse: Callable[[Array, Number, Number], Array]  # (w, a, b) -> v
  # (largest |w|, slope at 0) -> (a, b)
  begin: Callable[[Array, float], tuple[Array, Array]]


def _mu_of(slope: float) -> float:
  """The mu with mu / log(1 + mu) = slope, which is above 1."""
  low, high = 1e-9, 2.0
  while high / math.log1p(high) < slope:
    high *= 2
  for _ in range(200):
    middle = (low + high) / 2
    low, high = (middle, high) if middle / math.log1p(middle) < slope else (low, middle)
  return high


CURVES = {
  'arctan': Curve(
    compressed, expanded, lambda most, slope: (most * 2 / jnp.pi, most * 2 / jnp.pi / slope)
  ),
  'mu_law': Curve(mu_law, mu_law_inverse, lambda most, slope: (most, jnp.float32(_mu_of(slope)))),
}


class CompandedState(NamedTuple):
  """State of `companded`."""

  inner: Any  # state of the optimizer of v
  v: Params
  shape: Params  # (log a, log b) of each array, f32[2]
  shape_inner: Any  # state of the optimizer of `shape`


def companded(
  *,
  optimizer: StandardPart,
  curve: Literal['arctan', 'mu_law'] = 'arctan',
  limit: Annotated[float, Range(above=1)] = 2.0,
  slope: Positive = 1.0,
  shape_rate: NotNegative = 0.0,
) -> optax.GradientTransformation:
  """Weight compander: the optimizer trains v, and weights are w = Psi(v) (arXiv:2306.16993).

      arctan:  w = a arctan(v / b),  a = limit max|w_0| 2 / pi,  b = a / slope
      mu_law:  w = sign(v) a log(1 + b |v| / a) / log(1 + b),  a = limit max|w_0|,
               b with b / log(1 + b) = slope
      dL/dv = dL/dw Psi'(v),   v_0 = Psi^-1(w_0)

  a and b are numbers of each parameter array; at the start the function is unchanged. Small weights
  move more freely than large ones, by the ratio of slopes. Arctan weights stay below `limit` times the
  largest one at the start; the mu-law has no bound, and a is where w = v. For limit -> infinity and
  slope 1 `arctan` is the optimizer itself, and so is `mu_law` for slope -> 1. With `shape_rate` > 0 a
  and b are learned too: Adam moves their logarithms, with dL/da = sum dL/dw dw/da over the array. Weight
  decay of the optimizer pulls v to 0. For an array that starts at 0, max|w_0| counts as 1.

  Differences: The paper's function, and how it learns the shape, could not be read.

  Confidence: MEMORY (low).

  Args:
    optimizer: makes the steps of v.
    curve: Psi.
    limit: bound of an array's weights ('arctan'), or the weight where w = v ('mu_law'), in units of its
      largest weight at the start.
    slope: dw/dv at v = 0; above 1 expands small weights. 'mu_law' needs one above 1; mu = 255, of
      telephony, has the slope 45.99.
    shape_rate: learning rate of log a and log b; 0 does not learn them.

  Raises:
    ValueError: the curve is 'mu_law' and the slope is not above 1.
  """
  if curve == 'mu_law' and slope <= 1:
    raise ValueError(f'companded: slope={slope:g} must be above 1 for the curve mu_law')
  psi = CURVES[curve]
  shapes = optax.adam(shape_rate)
  of = lambda v, shape: psi.forward(v, *jnp.exp(shape))

  def init(params):
    def begin(w):
      largest = jnp.max(jnp.abs(w.astype(jnp.float32)))
      a, b = psi.begin(limit * jnp.where(largest > 0, largest, 1), slope)
      return jnp.log(jnp.stack([a, b]))

    shape = jax.tree.map(begin, params)
    inverse = lambda w, s: psi.inverse(w.astype(jnp.float32), *jnp.exp(s))
    v = jax.tree.map(inverse, params, shape)
    return CompandedState(optimizer.init(v), v, shape, shapes.init(shape))

  def update(grads, state, params, oracle=None):
    del oracle  # standard optimizers ask for nothing but the gradient
    back = lambda g, v, shape: jax.vjp(of, v, shape)[1](g.astype(v.dtype))
    both = jax.tree.map(back, grads, state.v, state.shape)
    of_v, of_shape = (jax.tree.map(lambda _, g, i=i: g[i], grads, both) for i in (0, 1))
    steps, inner = optimizer.update(of_v, state.inner, state.v)
    v = optax.apply_updates(state.v, steps)
    shape, shape_inner = state.shape, state.shape_inner
    if shape_rate:
      moves, shape_inner = shapes.update(of_shape, shape_inner)
      shape = optax.apply_updates(shape, moves)
    steps = jax.tree.map(lambda w, v, s: of(v, s) - w, params, v, shape)
    return steps, CompandedState(inner, v, shape, shape_inner)

  return rated_like(in_float32(optax.GradientTransformationExtraArgs(init, update)), optimizer)
