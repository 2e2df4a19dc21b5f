"""Helpers that several modules of losses share: precision, ratios, trust regions, row sums, noise."""

import chex
import jax
import jax.numpy as jnp

from polgrad.types import Array

LIMIT = 20.0  # nats; exp(20) is 5e8, far outside every trust region


def single(x: Array) -> Array:
  """The array in float32, if its precision is lower: sums of many terms need it."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def finite_gradient(*arrays: Array) -> tuple[Array, ...]:
  """Arrays of one shape, unchanged in value; where any of them is NaN or infinite, none has a gradient.

  A mean over tokens multiplies the derivative of a masked token by 0. Without this, that is NaN where
  the derivative is NaN or infinite, and one such token makes the whole gradient NaN. A token that
  counts and is NaN still makes the loss NaN.
  """
  chex.assert_equal_shape(arrays)
  finite = jnp.isfinite(arrays[0])
  for x in arrays[1:]:
    finite &= jnp.isfinite(x)
  return tuple(jnp.where(finite, x, jax.lax.stop_gradient(x)) for x in arrays)


def bounded(log_ratio: Array) -> Array:
  """Clamps log-ratios to +-20 nats, so that exp cannot overflow: [...] -> [...].

  A log-ratio beyond the limit has gradient 0.
  """
  return jnp.clip(log_ratio, -LIMIT, LIMIT)


def kept(ratio: Array, advantages: Array, low: Array | float, high: Array | float) -> Array:
  """PPO's one-sided trust region: (A >= 0 and r <= high) or (A <= 0 and r >= low), bool[...].

  A token is dropped only if it moved too far in the direction of its own advantage. A token exactly
  on a bound is kept, and so is a NaN ratio, which a bound in its place would hide. With low <= high,
  a token with A = 0 is always kept. Ratio and bounds may all be logarithms.
  """
  inside = ((advantages >= 0) & (ratio <= high)) | ((advantages <= 0) & (ratio >= low))
  return inside | jnp.isnan(ratio)


def soft_gate(ratio: Array, advantages: Array, tau_positive: float, tau_negative: float) -> Array:
  """(4 / tau) sigmoid(tau (r - 1)), tau by the sign of A: SAPO's gate, of slope 1 at r = 1.

  Raises:
    ValueError: tau_positive <= 0 or tau_negative <= 0.
  """
  if tau_positive <= 0 or tau_negative <= 0:
    raise ValueError(f'tau must be positive, got {tau_positive} and {tau_negative}')
  tau = jnp.where(advantages > 0, tau_positive, tau_negative).astype(ratio.dtype)
  return 4 / tau * jax.nn.sigmoid(tau * (ratio - 1))


def within(ratio: Array, low: float, high: float) -> Array:
  """low <= r <= high, bool[...]."""
  return (ratio >= low) & (ratio <= high)


def row_sum(log_ratio: Array, mask: Array) -> Array:
  """Sum over the valid tokens of each row: [..., T] -> [..., 1]."""
  return jnp.sum(jnp.where(mask, single(log_ratio), 0), axis=-1, keepdims=True)


def row_mean(log_ratio: Array, mask: Array) -> Array:
  """Mean over the valid tokens of each row: [..., T] -> [..., 1]; 0 in a row without tokens."""
  return row_sum(log_ratio, mask) / jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)


def token_ratio(logp: Array, old_logp: Array) -> Array:
  """pi / pi_old of each token, its logarithm clamped to +-20 nats, detached: [..., T] -> [..., T]."""
  chex.assert_equal_shape([logp, old_logp])
  return jnp.exp(bounded(jax.lax.stop_gradient(logp - old_logp)))


def row_ratio(logp: Array, old_logp: Array, mask: Array) -> Array:
  """The product of pi / pi_old over the valid tokens of each row, clamped and detached:
  [..., T] -> [..., 1]."""
  chex.assert_equal_shape([logp, old_logp, mask])
  return jnp.exp(bounded(row_sum(jax.lax.stop_gradient(logp - old_logp), mask)))


def geometric_ratio(logp: Array, old_logp: Array, mask: Array) -> Array:
  """The geometric mean of pi / pi_old over the valid tokens of each row, clamped and detached:
  [..., T] -> [..., 1]."""
  chex.assert_equal_shape([logp, old_logp, mask])
  return jnp.exp(bounded(row_mean(jax.lax.stop_gradient(logp - old_logp), mask)))


def at_next(x: Array, mask: Array) -> tuple[Array, Array]:
  """(values, there): x at the next token of the mask behind each token, and whether there is one.

  Args:
    x: [B, T, ...].
    mask: bool[B, T].

  Returns:
    [B, T, ...], of any value where there is no next token, and bool[B, T].
  """
  length = mask.shape[1]
  places = jnp.broadcast_to(jnp.arange(length), mask.shape)
  nearest = jax.lax.cummin(jnp.where(mask, places, length), axis=1, reverse=True)
  following = jnp.pad(nearest[:, 1:], ((0, 0), (0, 1)), constant_values=length)
  index = jnp.minimum(following, length - 1).reshape(*mask.shape, *[1] * (x.ndim - 2))
  return jnp.take_along_axis(x, index, axis=1), following < length


def gumbel(uniform: Array) -> Array:
  """Standard Gumbel noise from uniform random numbers in [0, 1): [...] -> [...].

  Of logits plus this noise, the n largest are n draws without replacement from softmax(logits)
  (arXiv:1903.06059).
  """
  return -jnp.log(-jnp.log(jnp.clip(uniform, 1e-7, 1 - 1e-7)))


def truncate(ratio: Array, floor: float, cap: float) -> Array:
  """clip(r, floor, cap), [...].

  Raises:
    ValueError: a floor outside [0, cap].
  """
  if not 0 <= floor <= cap:
    raise ValueError(f'floor is an absolute ratio in [0, cap = {cap}], got {floor}')
  return jnp.clip(ratio, floor, cap)
