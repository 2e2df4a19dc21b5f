"""Optimizers made for policy gradients: variance-reduced momentum, and steps that know their noise.

Written for minimisation, so `g` is the gradient of the loss. Norms are over all parameters together.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from polgrad.optim.schedules import SchedulePart, constant
from polgrad.optim.standard import StandardPart
from polgrad.optim.wrappers import Oracle, in_float32
from polgrad.types import Array, Params


class TransportState(NamedTuple):
  """Of `normalized_igt`."""

  count: Array  # i32[], updates made
  iterate: Params  # theta_t; the parameters are theta_tilde
  momentum: Params  # d


def normalized_igt(
  *,
  learning_rate: float = 0.01,
  schedule: SchedulePart = constant,
  exponent: float = 0.8,
  normalize: bool = True,
  eps: float = 1e-8,
) -> optax.GradientTransformation:
  """N-PG-IGT: momentum whose gradients are transported to the present iterate (arXiv:2302.01734).

      d_t         = (1 - eta_t) d_{t-1} + eta_t g(theta_tilde_t),      eta_t = (2 / (t + 2))^exponent
      theta_{t+1} = theta_t - learning_rate schedule(t) d_t / (||d_t|| + eps)
      theta_tilde = theta + ((1 - eta) / eta) (theta - theta_before),  both of step t + 1

  Where the gradient is linear in theta, d_t is exactly g(theta_t): extrapolation takes away the lag
  of momentum. The parameters given to the model are theta_tilde, at which trajectories are sampled
  and gradients taken, so they are also what is evaluated and saved; `iterate` finds theta.

  Args:
    normalize: False steps along d itself.
  """
  eta = _averaging(exponent)

  def init(params):
    return TransportState(jnp.int32(0), _copy(params), jax.tree.map(jnp.zeros_like, params))

  def update(grads, state, params):
    count, now, after = state.count, eta(state.count), eta(state.count + 1)
    momentum = jax.tree.map(lambda d, g: (1 - now) * d + now * g, state.momentum, grads)
    size = learning_rate * schedule(count)
    moved = _scale(-size, _direction(momentum, normalize, eps))
    iterate = _add(state.iterate, moved)
    ahead = _add(iterate, _scale((1 - after) / after, moved))
    return _subtract(ahead, params), TransportState(count + 1, iterate, momentum)

  return in_float32(optax.GradientTransformation(init, update))


class HessianState(NamedTuple):
  """Of `harpg`."""

  count: Array  # i32[], updates made: two for each step
  iterate: Params  # theta_t; the parameters are theta_hat while count is odd
  moved: Params  # theta_t - theta_{t-1}
  momentum: Params  # d


def harpg(
  *,
  learning_rate: float = 0.01,
  schedule: SchedulePart = constant,
  exponent: float = 1.0,
  normalize: bool = False,
  eps: float = 1e-8,
  seed: int = 0,
) -> optax.GradientTransformation:
  """HARPG: momentum that a product with the Hessian carries along (arXiv:2302.01734).

      theta_hat   = q theta_t + (1 - q) theta_{t-1},          q ~ U[0, 1]
      v           = H(theta_hat) (theta_t - theta_{t-1}),     so that E v = g(theta_t) - g(theta_{t-1})
      d_t         = (1 - eta_t) (d_{t-1} + v) + eta_t g(theta_t),    eta_t = (2 / (t + 2))^exponent
      theta_{t+1} = theta_t - learning_rate schedule d_t

  One step is two updates, each with a rollout of its own (one minibatch, one epoch): the first
  takes g at theta_t and moves the parameters to theta_hat; the second takes v on what was sampled
  there and moves them to theta_{t+1}. The Hessian is that of the loss of the batch, so the loss must
  be the live sequence-level ratio times the return: its derivatives are those of the expected return
  because theta_hat is also the sampler. `iterate` finds theta_t at all times.

  Args:
    normalize: step along d / (||d|| + eps) instead (N-HARPG).
    seed: of q, which is folded from the number of the step.
  """
  eta = _averaging(exponent)

  def init(params):
    zeros = lambda: jax.tree.map(jnp.zeros_like, params)
    return HessianState(jnp.int32(0), _copy(params), zeros(), zeros())

  def update(grads, state, params, oracle=None):
    oracle = _need(oracle, 'harpg')
    step = state.count // 2
    now = eta(step)

    def look(state):  # the terms of d without v, for which the gradient need not be kept
      q = jax.random.uniform(jax.random.fold_in(jax.random.key(seed), step), dtype=jnp.float32)
      mixed = jax.tree.map(lambda d, g: (1 - now) * d + now * g, state.momentum, grads)
      between = _add(state.iterate, _scale(q - 1, state.moved))
      return between, state._replace(momentum=mixed)

    def move(state):
      carried = _scale(1 - now, oracle.product(state.moved))
      momentum = _add(state.momentum, carried)
      size = learning_rate * schedule(state.count)
      moved = _scale(-size, _direction(momentum, normalize, eps))
      iterate = _add(state.iterate, moved)
      return iterate, HessianState(state.count, iterate, moved, momentum)

    target, state = jax.lax.cond(state.count % 2 == 0, look, move, state)
    return _subtract(target, params), state._replace(count=state.count + 1)

  return in_float32(optax.GradientTransformationExtraArgs(init, update))


def iterate(opt_state: Any) -> Params:
  """theta_t of `normalized_igt` or `harpg`, whose parameters may be another point.

  It is float32, and without the parameters that the optimizer does not train.

  Raises:
    ValueError: an optimizer whose parameters are the iterate.
  """
  found = optax.tree.get(opt_state, 'iterate')
  if found is None:
    raise ValueError('the parameters of this optimizer are its iterate; nothing else is kept')
  return found


class ScaledState(NamedTuple):
  """Of an optimizer, and of what scales its steps."""

  inner: Any
  scale: Any


def signal_to_noise(
  *, optimizer: StandardPart, decay: float = 0.0, eps: float = 1e-12
) -> optax.GradientTransformation:
  """Steps times SNR / (1 + SNR), which is 1 for a gradient without noise (OBLR-PO).

  The step that descends most in expectation, for gradient g, noise sigma^2 / N and smoothness L, is
  (1 / L) SNR / (1 + SNR) with SNR = ||g||^2 / (sigma^2 / N). With g1, g2 of independent halves of
  the batch, g1 . g2 is an unbiased estimate of ||g||^2, and ||g1 - g2||^2 / 4 of sigma^2 / N:

      SNR = max(0, 4 g1 . g2 / ||g1 - g2||^2)

  The inner optimizer's whole step is scaled, since a scaled gradient would not change Adam's.

  Args:
    decay: of running means of the two estimates, whose common bias cancels; 0 for this batch alone.
    eps: the smallest noise ||g1 - g2||^2 that is told from none.
  """
  if not 0 <= decay < 1:
    raise ValueError(f'decay must lie in [0, 1), got {decay}')

  def factor(oracle, params, running):
    del params
    first, second = oracle.halves()
    dot = optax.tree.vdot(first, second)
    apart = optax.tree.norm(_subtract(first, second), squared=True)
    signal, noise = decay * running + (1 - decay) * jnp.stack([dot, apart])
    power, noise = 4 * jnp.maximum(signal, 0), jnp.maximum(noise, eps)
    return power / (power + noise), jnp.stack([signal, noise])

  return _scaled(optimizer, lambda: jnp.zeros(2, jnp.float32), factor, 'signal_to_noise')


def bias_scaled(
  *, optimizer: StandardPart, probe: str = 'probe/clipping_bias', max_scale: float = 10.0
) -> optax.GradientTransformation:
  """Steps divided by the norm of the clipping bias C, within [1 / max_scale, 1] (ST-PPO).

      step / clip(||C||, 1, max_scale),   C = -E[1/|y| sum_t 1{t clipped} r_t A_t grad logp_t]

  C is what clipping adds to the gradient with importance weights. Bounds are ours, so that a small
  bias does not lengthen steps, and none leaves them alone. The inner optimizer's step is divided,
  since Adam would not feel a divided gradient.

  Args:
    probe: the objective's term whose gradient is C.
  """
  if max_scale < 1:
    raise ValueError(f'max_scale must be at least 1, got {max_scale}')

  def factor(oracle, params, state):
    bias = optax.tree.norm(oracle.gradient(params, probe))
    return 1 / jnp.clip(bias, 1, max_scale), state

  return _scaled(optimizer, tuple, factor, 'bias_scaled')


def _scaled(
  optimizer, start: Callable, factor: Callable, name: str
) -> optax.GradientTransformation:
  """Multiplies the steps of an optimizer by factor(oracle, params, state) -> (number, state).

  `start` gives the first state. Master copies are kept around all of it: those of the inner optimizer
  would make the whole step, whatever is done to what it returns.
  """

  def init(params):
    return ScaledState(optimizer.init(params), start())

  def update(grads, state, params, oracle=None):
    by, scale = factor(_need(oracle, name), params, state.scale)
    steps, inner = optimizer.update(grads, state.inner, params)
    return _scale(by, steps), ScaledState(inner, scale)

  return in_float32(optax.GradientTransformationExtraArgs(init, update))


def _averaging(exponent: float) -> Callable[[Array], Array]:
  """eta_t = (2 / (t + 2))^exponent, so that the first gradient counts whole."""
  if exponent < 0:
    raise ValueError(f'exponent must not be negative, got {exponent}')
  return lambda step: (2 / (step + 2.0)) ** exponent  # 2.0: in the precision of the parameters


def _need(oracle: Oracle | None, name: str) -> Oracle:
  if oracle is None:
    raise ValueError(f'{name} asks for more than a gradient: update(..., oracle=Oracle(...))')
  return oracle


def _direction(tree: Params, normalize: bool, eps: float) -> Params:
  return _scale(1 / (optax.tree.norm(tree) + eps), tree) if normalize else tree


def _scale(by: Array, tree: Params) -> Params:
  return jax.tree.map(lambda x: by * x, tree)


def _add(a: Params, b: Params) -> Params:
  return jax.tree.map(jnp.add, a, b)


def _subtract(a: Params, b: Params) -> Params:
  return jax.tree.map(jnp.subtract, a, b)


def _copy(tree: Params) -> Params:
  """Arrays of its own, since an update may donate the parameters' and the state's."""
  return jax.tree.map(jnp.copy, tree)
