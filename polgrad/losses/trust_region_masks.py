"""Keep-masks: 1 where a token lies in a trust region, else 0. They are weights of the token loss.

r = exp(log_ratio) compares the live policy with the proximal one. Bounds are ratios themselves, not
distances from 1. `weights.TABLE` lists these functions.
"""

import chex
import jax
import jax.numpy as jnp

from polgrad.losses.ratios import bounded, kept, row_mean, within
from polgrad.types import Array


def one_sided(log_ratio: Array, advantages: Array, *, low: float = 0.8, high: float = 1.2) -> Array:
  """1[(A >= 0 and r <= high) or (A <= 0 and r >= low)]: REC-OneSide (arXiv:2509.24203).

  With `surrogates.reinforce` it is REINFORCE with clipping, without importance sampling; with
  `surrogates.truncated` and an infinite cap it has the gradient of `surrogates.clipped`. The
  paper's wide bounds are low=0.4, high=3.

  Args:
    log_ratio: [..., T], nats.
    advantages: [..., T].
    low: the least ratio for A <= 0.
    high: the largest ratio for A >= 0.

  Returns:
    [..., T].
  """
  chex.assert_equal_shape([log_ratio, advantages])
  return kept(jnp.exp(log_ratio), advantages, low, high).astype(log_ratio.dtype)


def two_sided(log_ratio: Array, *, low: float = 0.8, high: float = 1.2) -> Array:
  """1[low <= r <= high]: REC-TwoSide (arXiv:2509.24203); low = 1 / high is sPPO (arXiv:2108.05828).

  Args:
    log_ratio: [..., T], nats.
    low: the least ratio.
    high: the largest ratio.

  Returns:
    [..., T].
  """
  return within(jnp.exp(log_ratio), low, high).astype(log_ratio.dtype)


def ring(
  log_ratio: Array,
  advantages: Array,
  *,
  low: float = 0.8,
  high: float = 1.2,
  outer_low: float = 0.4,
  outer_high: float = 3.0,
) -> Array:
  """`two_sided`, and what lies far on the side that its advantage opposes: REC-Ring.

  1[low <= r <= high, or (A >= 0 and r <= outer_low), or (A <= 0 and r >= outer_high)]
  (arXiv:2509.24203): tokens that went far the wrong way are pulled back.

  Args:
    log_ratio: [..., T], nats.
    advantages: [..., T].
    low: the least ratio of the inner band.
    high: the largest ratio of the inner band.
    outer_low: the largest ratio from which good tokens are pulled back up.
    outer_high: the least ratio from which bad tokens are pulled back down.

  Returns:
    [..., T].
  """
  chex.assert_equal_shape([log_ratio, advantages])
  ratio = jnp.exp(log_ratio)
  good = (advantages >= 0) & (ratio <= outer_low)
  bad = (advantages <= 0) & (ratio >= outer_high)
  return (within(ratio, low, high) | good | bad).astype(log_ratio.dtype)


def probability_one_sided(
  logp: Array, behavior_logp: Array, advantages: Array, *, low: float = 0.2, high: float = 0.2
) -> Array:
  """1[A >= 0 and pi - mu <= high, or A <= 0 and pi - mu >= -low]: DPPO-TV (arXiv:2602.04879).

  The trust region is one of probabilities, so a rare token is free to change by a large factor and
  a likely one is not.

  Args:
    logp: [..., T], nats; detached here.
    behavior_logp: [..., T], nats.
    advantages: [..., T].
    low: the largest fall of a probability, for A <= 0.
    high: the largest rise of a probability, for A >= 0.

  Returns:
    [..., T].
  """
  chex.assert_equal_shape([logp, behavior_logp, advantages])
  gap = jnp.exp(logp) - jnp.exp(behavior_logp)
  return kept(gap, advantages, -low, high).astype(logp.dtype)


def near_or_positive(
  logp: Array, proximal_logp: Array, advantages: Array, mask: Array, *, limit: float = 0.5
) -> Array:
  """1[A >= 0 or mean_t(log pi_old - log pi) <= limit]: DeepSeek-V3.2 (arXiv:2512.02556).

  Off-policy sequence masking: of rows that the policy has left, only the good ones teach.

  Args:
    logp: [..., T], nats; detached here.
    proximal_logp: [..., T], nats.
    advantages: [..., T].
    mask: bool[..., T].
    limit: the largest mean distance, nats per token.

  Returns:
    [..., T].
  """
  chex.assert_equal_shape([logp, proximal_logp, advantages, mask])
  near = row_mean(jax.lax.stop_gradient(proximal_logp - logp), mask) <= limit
  return ((jnp.where(mask, advantages, 0) >= 0) | near).astype(logp.dtype)


def geometric_band(
  proximal_logp: Array,
  behavior_logp: Array,
  mask: Array,
  *,
  low: float = 0.999,
  high: float = 1.001,
) -> Array:
  """1 in rows with low <= (prod_t rho_t)^(1/L) <= high, else 0 (standard).

  Unlike that of the product, the band does not narrow with the length L of the row. Multiply it by
  a token weight to correct what is kept.

  Args:
    proximal_logp: [..., T], nats.
    behavior_logp: [..., T], nats.
    mask: bool[..., T].
    low: smallest geometric mean that is kept.
    high: largest geometric mean that is kept.

  Returns:
    [..., T], one value per row; a row without tokens is kept.
  """
  chex.assert_equal_shape([proximal_logp, behavior_logp, mask])
  mean = row_mean(jax.lax.stop_gradient(proximal_logp - behavior_logp), mask)
  keep = within(jnp.exp(bounded(mean)), low, high).astype(proximal_logp.dtype)
  return jnp.broadcast_to(keep, mask.shape)


def selected(selected: Array) -> Array:
  """1 where the selection of this name holds, else 0 (standard).

  Args:
    selected: bool[...].

  Returns:
    f32[...].
  """
  return selected.astype(float)


def unselected(selected: Array) -> Array:
  """0 where the selection `selected` holds, else 1: Clip-Cov drops those (arXiv:2505.22617).

  Args:
    selected: bool[...].

  Returns:
    f32[...].
  """
  return 1 - selected.astype(float)
