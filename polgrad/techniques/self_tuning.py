"""Hyperparameters that are learned with a model that responds to them (arXiv:1903.03088)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from polgrad.types import Array, Params

Loss = Callable[[Params, Array], Array]  # (params, hyperparameters [B, H]) -> []


def init_linear(key: Array, inputs: int, outputs: int, hyperparameters: int) -> Params:
  """Parameters of `linear`. The response U ~ N(0, 0.01^2) is small, and the scale is 1."""
  keys = jax.random.split(key, 3)
  matrix = lambda k: jax.random.normal(k, (outputs, inputs)) / inputs**0.5
  return {
    'weights': matrix(keys[0]),
    'bias': jnp.zeros(outputs),
    'response_weights': matrix(keys[1]),
    'response_bias': jnp.zeros(outputs),
    'response': 0.01 * jax.random.normal(keys[2], (2, outputs, hyperparameters)),
    'scale': jnp.ones(()),
  }


def linear(params: Params, x: Array, hyper: Array) -> Array:
  """s (W x + b) + (U_w h) * (W_h x) + (U_b h) * b_h: a layer with the best response to h.

  The weights are affine in the hyperparameters, and rows of a batch may have different ones. U = 0 is a
  usual layer.

  Args:
    params: from `init_linear`.
    x: [B, inputs].
    hyper: [B, H], unconstrained: logits, or inverse softplus.

  Returns:
    [B, outputs].
  """
  by_weights, by_bias = (hyper @ u.T for u in params['response'])
  plain = x @ params['weights'].T + params['bias'][None]
  response = by_weights * (x @ params['response_weights'].T)
  return params['scale'] * plain + response + by_bias * params['response_bias'][None]


class Hyper(NamedTuple):
  """The distribution of hyperparameters."""

  mean: Array  # [H], unconstrained
  spread: Array  # [H]; the standard deviation is softplus(spread)


class Tuned(NamedTuple):
  """State of self-tuning."""

  params: Params
  hyper: Hyper
  optimizer: Any
  hyper_optimizer: Any


def sample(key: Array, hyper: Hyper, batch: int, shared: Array | bool = False) -> Array:
  """mean + softplus(spread) xi, xi ~ N(0, 1), for each example: -> [batch, H].

  Args:
    key: a key of jax.random.
    hyper: the distribution.
    batch: number of examples.
    shared: bool[] or bool[H], hyperparameters of which a batch has one value: all examples get the same
      draw.
  """
  noise = jax.random.normal(key, (batch, *hyper.mean.shape), hyper.mean.dtype)
  shared = jnp.broadcast_to(shared, hyper.mean.shape)
  noise = jnp.where(shared[None], noise[:1], noise)
  return hyper.mean[None] + jax.nn.softplus(hyper.spread)[None] * noise


class Range(NamedTuple):
  """The values that hyperparameters may have, [H] each."""

  low: Array  # -inf: no lower bound
  high: Array  # inf: no upper bound
  discrete: Array  # bool: whole numbers, from low to the last one below high


def values(hyper: Array, allowed: Range) -> Array:
  """Hyperparameters as a training loss uses them: [B, H] -> [B, H].

      low + (high - low) sigmoid(h)    with two bounds
      low + softplus(h)                with a lower bound, high - softplus(h) with an upper one
      h                                without bounds
      floor of that                    where `discrete`

  The layers of the model get h, and only the loss gets these values. A floor has no gradient: discrete
  hyperparameters are learned through the layers alone, which respond to the mean over the perturbations
  of `sample`. So their spread should reach the next whole number.

  Confidence: CODE.

  Args:
    hyper: [B, H], unconstrained, from `sample`.
    allowed: their ranges.

  >>> number = Range(jnp.zeros(1), jnp.full(1, 4.0), jnp.ones(1, bool))
  >>> print(values(jnp.array([[-1.0], [0.1]]), number)[:, 0])
  [1. 2.]
  """
  low, high, discrete = (jnp.asarray(x)[None] for x in allowed)
  below, above = jnp.isfinite(low), jnp.isfinite(high)
  # A bound that is not finite would make the gradients of unused cases not finite.
  start, end = jnp.where(below, low, 0), jnp.where(above, high, 0)
  between = start + (end - start) * jax.nn.sigmoid(hyper)
  soft = jax.nn.softplus(hyper)
  one = jnp.where(below, start + soft, jnp.where(above, end - soft, hyper))
  found = jnp.where(below & above, between, one)
  return jnp.where(discrete, jnp.floor(found), found)


def unconstrained(value: Array, allowed: Range) -> Array:
  """The h for which `values` before the floor is `value`: [H] -> [H]; a mean to begin with.

  >>> rate = Range(jnp.zeros(1), jnp.ones(1), jnp.zeros(1, bool))
  >>> print(unconstrained(jnp.full(1, 0.5), rate) + 0.0)
  [0.]
  """
  low, high, _ = allowed
  below, above = jnp.isfinite(low), jnp.isfinite(high)
  start, end = jnp.where(below, low, 0), jnp.where(above, high, 1)
  inverse = lambda x: jnp.log(jnp.expm1(x))
  one = jnp.where(below, inverse(value - start), jnp.where(above, inverse(end - value), value))
  inside = (value - start) / (end - start)
  return jnp.where(below & above, jnp.log(inside) - jnp.log1p(-inside), one)


def entropy(hyper: Hyper) -> Array:
  """sum log( softplus(spread) sqrt(2 pi e) ), of the normal distribution: -> [].

  >>> unit = Hyper(jnp.zeros(1), jnp.log(jnp.expm1(jnp.ones(1))))
  >>> print(entropy(unit).round(4))
  1.4189
  """
  return jnp.sum(jnp.log(jax.nn.softplus(hyper.spread)) + 0.5 * jnp.log(2 * jnp.pi * jnp.e))


def init(
  params: Params,
  hyper: Hyper,
  optimizer: optax.GradientTransformation,
  hyper_optimizer: optax.GradientTransformation,
) -> Tuned:
  """The state before the first step."""
  return Tuned(params, hyper, optimizer.init(params), hyper_optimizer.init(hyper))


def train_step(
  key: Array,
  state: Tuned,
  loss: Loss,
  optimizer: optax.GradientTransformation,
  *,
  batch: int,
  shared: Array | bool = False,
) -> tuple[Tuned, Array]:
  """Steps the parameters on the training loss, under hyperparameters drawn for each example.

  Two such steps for one of `valid_step` are usual, with SGD of 0.01 and momentum 0.9.

  Args:
    key: a key of jax.random.
    state: from `init`.
    loss: (params, hyper [batch, H]) -> [], regularised as `values` of the hyperparameters say.
    optimizer: of the parameters.
    batch: number of examples.
    shared: as in `sample`.
  """
  drawn = sample(key, state.hyper, batch, shared)
  value, slope = jax.value_and_grad(loss)(state.params, drawn)
  steps, inner = optimizer.update(slope, state.optimizer, state.params)
  return state._replace(params=optax.apply_updates(state.params, steps), optimizer=inner), value


def valid_step(
  key: Array,
  state: Tuned,
  loss: Loss,
  optimizer: optax.GradientTransformation,
  *,
  batch: int,
  tau: float = 1e-5,
  tune_spread: bool = False,
  shared: Array | bool = False,
) -> tuple[Tuned, Array]:
  """Steps the hyperparameters on L_valid - tau H, H the entropy of their distribution.

  The gradient reaches them only through the response of the model: `loss` has no regulariser. With
  spread -> 0 and an exact response it is the gradient of bilevel optimisation.

  Args:
    key: a key of jax.random.
    state: from `init`.
    loss: (params, hyper [batch, H]) -> [], on held-out examples.
    optimizer: of the hyperparameters; Adam with 3e-3 is usual.
    batch: number of examples.
    tau: weight of the entropy; the authors' runs that tune the spread have 1e-3.
    tune_spread: otherwise the spread is constant, and all examples get the mean.
    shared: as in `sample`.

  Confidence: CODE.
  """

  def goal(hyper):
    means = jnp.broadcast_to(hyper.mean[None], (batch, *hyper.mean.shape))
    drawn = sample(key, hyper, batch, shared) if tune_spread else means
    return loss(state.params, drawn) - tau * entropy(hyper)

  value, slope = jax.value_and_grad(goal)(state.hyper)
  if not tune_spread:
    slope = slope._replace(spread=jnp.zeros_like(slope.spread))
  steps, inner = optimizer.update(slope, state.hyper_optimizer, state.hyper)
  return state._replace(hyper=optax.apply_updates(state.hyper, steps), hyper_optimizer=inner), value
