"""Optimizers for policy gradients: variance-reduced momentum, and steps scaled by their noise.

All minimise, so `g` is the gradient of the loss. Norms are over all parameters together. `t` counts
steps from 0, and `theta` are parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from polgrad.optim.schedules import SchedulePart, constant
from polgrad.optim.standard import StandardPart
from polgrad.optim.wrappers import Oracle, in_float32, rated_like, scheduled
from polgrad.registry import NotNegative
from polgrad.types import Array, Params


class TransportState(NamedTuple):
  """State of `normalized_igt`."""

  count: Array  # i32[], updates made, which is t
  iterate: Params  # theta_t, while the model has theta_tilde_t
  momentum: Params  # d of the last update


def normalized_igt(
  *,
  learning_rate: NotNegative = 0.01,
  schedule: SchedulePart = constant,
  exponent: float = 0.8,
  normalize: bool = True,
  eps: float = 1e-8,
) -> optax.GradientTransformation:
  """N-PG-IGT: momentum without the lag of old gradients, by extrapolation (arXiv:2302.01734).

      d_t             = (1 - eta_t) d_{t-1} + eta_t g(theta_tilde_t),    eta_t = (2 / (t + 2))^exponent
      theta_{t+1}     = theta_t - learning_rate schedule(t) d_t / (||d_t|| + eps)
      theta_tilde_t   = theta_t + ((1 - eta_t) / eta_t) (theta_t - theta_{t-1})

  Where the gradient is linear in theta, d_t is exactly g(theta_t). The parameters of the model are
  theta_tilde: trajectories are sampled from them and gradients are taken at them, and they are
  evaluated and saved. `iterate` returns theta.

  Args:
    normalize: False steps along d, without the division by its norm.

  Raises:
    ValueError: `exponent` is negative.
  """
  eta = _averaging(exponent)

  def init(params):
    return TransportState(jnp.int32(0), _copy(params), jax.tree.map(jnp.zeros_like, params))

  def update(grads, state, params):
    # Average the gradient into the momentum, and step along it from theta_t.
    count, now, after = state.count, eta(state.count), eta(state.count + 1)
    momentum = jax.tree.map(lambda d, g: (1 - now) * d + now * g, state.momentum, grads)
    size = learning_rate * schedule(count)
    moved = _scale(-size, _direction(momentum, normalize, eps))
    iterate = _add(state.iterate, moved)
    # The model gets the extrapolated point.
    ahead = _add(iterate, _scale((1 - after) / after, moved))
    return _subtract(ahead, params), TransportState(count + 1, iterate, momentum)

  made = in_float32(optax.GradientTransformation(init, update))
  return scheduled(made, learning_rate, schedule, TransportState)


class HessianState(NamedTuple):
  """State of `harpg`."""

  count: Array  # i32[], updates made, two a step: t = count // 2
  iterate: Params  # theta_t; the model has theta_hat while count is odd, else theta_t
  moved: Params  # theta_t - theta_{t-1}, 0 at first
  momentum: Params  # d_{t-1}; while count is odd, d_t without the term of v


def harpg(
  *,
  learning_rate: NotNegative = 0.01,
  schedule: SchedulePart = constant,
  exponent: float = 1.0,
  normalize: bool = False,
  eps: float = 1e-8,
  seed: int = 0,
) -> optax.GradientTransformation:
  """HARPG: momentum that is moved to the current iterate by a Hessian product (arXiv:2302.01734).

      theta_hat   = q theta_t + (1 - q) theta_{t-1},          q ~ U[0, 1]
      v           = H(theta_hat) (theta_t - theta_{t-1}),     so that E v = g(theta_t) - g(theta_{t-1})
      d_t         = (1 - eta_t) (d_{t-1} + v) + eta_t g(theta_t),    eta_t = (2 / (t + 2))^exponent
      theta_{t+1} = theta_t - learning_rate schedule d_t

  One step takes two updates, and each must get another rollout, so use one minibatch and one epoch.
  The first update takes g at theta_t and moves the parameters to theta_hat. The second takes v on the
  rollout from theta_hat, and moves the parameters to theta_{t+1}.

  H is the Hessian of the minibatch's loss, so that loss must be the sequence-level ratio times the
  return, with a ratio that has a gradient. The derivatives of such a loss are those of the expected
  return, because theta_hat is also the policy that sampled. `iterate` returns theta_t.

  Args:
    schedule: its argument is the number of updates, which are two a step.
    normalize: step along d / (||d|| + eps) instead (N-HARPG).
    seed: with the number of the step, it seeds q.

  Raises:
    ValueError: `exponent` is negative; or from update, there is no oracle.
  """
  eta = _averaging(exponent)

  def init(params):
    zeros = lambda: jax.tree.map(jnp.zeros_like, params)
    return HessianState(jnp.int32(0), _copy(params), zeros(), zeros())

  def update(grads, state, params, oracle=None):
    oracle = _need(oracle, 'harpg')
    step = state.count // 2
    now = eta(step)

    # First update: all terms of d but v, so that the gradient need not be kept. Go to theta_hat.
    def look(state):
      q = jax.random.uniform(jax.random.fold_in(jax.random.key(seed), step), dtype=jnp.float32)
      mixed = jax.tree.map(lambda d, g: (1 - now) * d + now * g, state.momentum, grads)
      between = _add(state.iterate, _scale(q - 1, state.moved))
      return between, state._replace(momentum=mixed)

    # Second update: add the term of v, and go to theta_{t+1}.
    def move(state):
      carried = _scale(1 - now, oracle.product(state.moved))
      momentum = _add(state.momentum, carried)
      size = learning_rate * schedule(state.count)
      moved = _scale(-size, _direction(momentum, normalize, eps))
      iterate = _add(state.iterate, moved)
      return iterate, HessianState(state.count, iterate, moved, momentum)

    target, state = jax.lax.cond(state.count % 2 == 0, look, move, state)
    return _subtract(target, params), state._replace(count=state.count + 1)

  made = in_float32(optax.GradientTransformationExtraArgs(init, update))
  return scheduled(made, learning_rate, schedule, HessianState)


def iterate(opt_state: Any) -> Params:
  """The iterate theta_t of `normalized_igt` or `harpg`, whose model may have other parameters.

  It is float32, and lacks the parameters that the optimizer does not train.

  Args:
    opt_state: state of the optimizer, also within wrappers.

  Raises:
    ValueError: the state is of another optimizer, whose iterate is the parameters of the model.
  """
  found = optax.tree.get(opt_state, 'iterate')
  if found is None:
    raise ValueError('the parameters of this optimizer are its iterate; nothing else is kept')
  return found


class ScaledState(NamedTuple):
  """State of an optimizer whose steps are scaled."""

  inner: Any  # state of the optimizer
  scale: Any  # state from which the scale is computed


def signal_to_noise(
  *, optimizer: StandardPart, decay: float = 0.0, eps: float = 1e-12
) -> optax.GradientTransformation:
  """Steps times SNR / (1 + SNR), which is 1 for a gradient without noise (OBLR-PO, arXiv:2511.23310).

  For a gradient g with variance sigma^2 / N and smoothness L, the step size of the greatest expected
  descent is (1 / L) SNR / (1 + SNR), where SNR = ||g||^2 / (sigma^2 / N). It is estimated from the
  gradients g1, g2 of the two halves of the minibatch (`Oracle.halves`):

      SNR = max(0, 4 g1 . g2 / ||g1 - g2||^2)

  If the halves are independent and equal in size, g1 . g2 is an unbiased estimate of ||g||^2, and
  ||g1 - g2||^2 / 4 of sigma^2 / N. They are dependent if the samples of one prompt are divided between
  them, or if advantages are normalised over the batch. One minibatch of an even number of prompts
  divides no prompt's samples. The optimizer's step is scaled and not its gradient, because AdamW's
  step does not depend on the gradient's scale.

  Args:
    optimizer: makes the steps that are scaled.
    decay: decay of running means of the two estimates, in [0, 1); 0 takes this minibatch alone.
    eps: least value of ||g1 - g2||^2, so that a smaller one does not divide.

  Raises:
    ValueError: `decay` is out of range; or from update, there is no oracle.
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
  """Steps divided by the norm of the bias C that clipping adds to the policy gradient (ST-PPO).

      step / clip(||C||, 1, max_scale),   C = -E[1/|y| sum_t 1{t clipped} r_t A_t grad logp_t]

  The bounds 1 and `max_scale` are not in the paper: with them a small bias does not lengthen steps,
  and no bias leaves them unchanged. The optimizer's step is divided and not its gradient, because
  AdamW's step does not depend on the gradient's scale.

  Args:
    optimizer: makes the steps that are divided.
    probe: name of the objective's term whose gradient is C, see `Objective.probes`.
    max_scale: at least 1.

  Raises:
    ValueError: `max_scale` is below 1; or from update, there is no oracle or no such probe.
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
  """Multiplies the steps of an optimizer by a factor.

  `in_float32` wraps the scaled optimizer, so that master copies move by the scaled step. Those of the
  inner optimizer would move by the whole step.

  Args:
    start: () -> the first state of the factor.
    factor: (oracle, params, state) -> (factor f32[], state).
    name: of the optimizer, for errors.
  """

  def init(params):
    return ScaledState(optimizer.init(params), start())

  def update(grads, state, params, oracle=None):
    by, scale = factor(_need(oracle, name), params, state.scale)
    steps, inner = optimizer.update(grads, state.inner, params)
    return _scale(by, steps), ScaledState(inner, scale)

  return rated_like(in_float32(optax.GradientTransformationExtraArgs(init, update)), optimizer)


def _averaging(exponent: float) -> Callable[[Array], Array]:
  """The weight t -> eta_t = (2 / (t + 2))^exponent of the new gradient, 1 for the first one."""
  if exponent < 0:
    raise ValueError(f'exponent must not be negative, got {exponent}')
  # An integer `step` and a Python float give the default float, which is float64 under x64.
  return lambda step: (2 / (step + 2.0)) ** exponent


def _need(oracle: Oracle | None, name: str) -> Oracle:
  """The oracle, or a ValueError if the caller of the optimizer gave none."""
  if oracle is None:
    raise ValueError(f'{name} asks for more than a gradient: update(..., oracle=Oracle(...))')
  return oracle


def _direction(tree: Params, normalize: bool, eps: float) -> Params:
  """The tree, divided by its norm if `normalize`."""
  return _scale(1 / (optax.tree.norm(tree) + eps), tree) if normalize else tree


def _scale(by: Array, tree: Params) -> Params:
  return jax.tree.map(lambda x: by * x, tree)


def _add(a: Params, b: Params) -> Params:
  return jax.tree.map(jnp.add, a, b)


def _subtract(a: Params, b: Params) -> Params:
  return jax.tree.map(jnp.subtract, a, b)


def _copy(tree: Params) -> Params:
  """Copies of arrays. A state must not hold the parameters' arrays, because an update donates both."""
  return jax.tree.map(jnp.copy, tree)
