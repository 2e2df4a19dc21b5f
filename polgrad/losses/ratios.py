"""Log importance ratios at the level at which a method compares two policies.

`log_ratio` is log pi_theta - log pi_old of the sampled tokens, 0 where the mask is False. This is
the one place where it is clamped (to +-20 nats), so nothing downstream overflows when it
exponentiates; a clamped entry has gradient 0.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from polgrad.registry import table
from polgrad.types import Array

LIMIT = 20.0  # nats; exp(20) is 5e8, far outside every trust region


def bounded(log_ratio: Array) -> Array:
  """Clamps log-ratios to what can be exponentiated safely: [...] -> [...]."""
  return jnp.clip(log_ratio, -LIMIT, LIMIT)


def kept(ratio: Array, advantages: Array, low: Array | float, high: Array | float) -> Array:
  """PPO's one-sided trust region: (A >= 0 and r <= high) or (A <= 0 and r >= low), bool[...].

  A token is dropped only if it moved too far in the direction of its own advantage; one on the
  bound is kept, and so is one with A = 0. Ratio and bounds may all be logarithms.
  """
  return ((advantages >= 0) & (ratio <= high)) | ((advantages <= 0) & (ratio >= low))


def soft_gate(ratio: Array, advantages: Array, tau_positive: float, tau_negative: float) -> Array:
  """(4 / tau) sigmoid(tau (r - 1)), tau by the sign of A: SAPO's gate, of slope 1 at r = 1.

  Raises:
    ValueError: a steepness that is not positive.
  """
  if tau_positive <= 0 or tau_negative <= 0:
    raise ValueError(f'tau must be positive, got {tau_positive} and {tau_negative}')
  tau = jnp.where(advantages > 0, tau_positive, tau_negative).astype(ratio.dtype)
  return 4 / tau * jax.nn.sigmoid(tau * (ratio - 1))


def within(ratio: Array, low: float, high: float) -> Array:
  """low <= r <= high, bool[...]."""
  return (ratio >= low) & (ratio <= high)


def row_sum(log_ratio: Array, mask: Array) -> Array:
  """The log-ratio of the row: [..., T] -> [..., 1]."""
  return jnp.sum(jnp.where(mask, log_ratio, 0), axis=-1, keepdims=True)


def row_mean(log_ratio: Array, mask: Array) -> Array:
  """The log-ratio of the row for each of its tokens: [..., T] -> [..., 1], 0 without tokens."""
  return row_sum(log_ratio, mask) / jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)


def token(log_ratio: Array, mask: Array) -> Array:
  """Every token by itself, as in PPO (arXiv:1707.06347).

  Args:
    log_ratio: [..., T], nats.
    mask: bool[..., T].

  Returns:
    [..., T], clamped; 0 where `mask` is False.
  """
  chex.assert_equal_shape([log_ratio, mask])
  return jnp.where(mask, bounded(log_ratio), 0)


def sequence_geometric(log_ratio: Array, mask: Array) -> Array:
  """The mean log-ratio of the row at each of its tokens: GSPO-token (arXiv:2507.18071).

  log s_t = d_t - sg(d_t) + sg(mean_k d_k): the value is the length-normalised sequence ratio, and
  the gradient passes through the token itself only. With one advantage per row and the
  `sequence_mean` aggregation, value and gradient are those of the paper's sequence-level GSPO.
  Other aggregations weight long rows more than the paper does.

  Args:
    log_ratio: [..., T], nats.
    mask: bool[..., T].

  Returns:
    [..., T], clamped; 0 where `mask` is False, so also in a row without tokens.
  """
  chex.assert_equal_shape([log_ratio, mask])
  log_ratio = jnp.where(mask, log_ratio, 0)
  return _straight_through(log_ratio, row_mean(log_ratio, mask), mask)


def sequence_geometric_clipped(
  log_ratio: Array, advantages: Array, mask: Array, *, eps: float = 0.4
) -> Array:
  """The row's mean of one-sidedly clipped log-ratios: GMPO (arXiv:2507.20673).

  log s_t = c_t - sg(c_t) + sg(mean_k c_k), with c = min(d, eps) for A >= 0 and max(d, -eps) for
  A < 0. A clipped token still counts in the value of its row but has no gradient of its own. With
  one advantage per row, `surrogates.importance_weighted` and the `sequence_mean` aggregation,
  value and gradient are the paper's; eps = inf gives `sequence_geometric`.

  Args:
    log_ratio: [..., T], nats.
    advantages: [..., T]; only the sign is read.
    mask: bool[..., T].
    eps: the bound in log space, nats.

  Returns:
    [..., T], clamped; 0 where `mask` is False.
  """
  chex.assert_equal_shape([log_ratio, advantages, mask])
  log_ratio, advantages = (jnp.where(mask, x, 0) for x in (log_ratio, advantages))
  bound = jnp.where(advantages >= 0, eps, -eps).astype(log_ratio.dtype)
  clipped = jnp.where(kept(log_ratio, advantages, -eps, eps), log_ratio, bound)
  return _straight_through(clipped, row_mean(clipped, mask), mask)


def sequence_product(log_ratio: Array, mask: Array) -> Array:
  """The summed log-ratio of the row at each of its tokens: the trajectory's ratio (standard).

  Every entry carries the gradient of the whole sum, so derivatives of any order are those of the
  ratio of two trajectories (HARPG, arXiv:2302.01734, differentiates twice). Aggregate by
  `sequence_mean`, in which a row counts once.

  Args:
    log_ratio: [..., T], nats.
    mask: bool[..., T].

  Returns:
    [..., T], one value per row, clamped; 0 where `mask` is False.
  """
  chex.assert_equal_shape([log_ratio, mask])
  return jnp.where(mask, bounded(row_sum(log_ratio, mask)), 0)


def turn_geometric(log_ratio: Array, turn_ids: Array, mask: Array) -> Array:
  """The mean log-ratio of the turn at each of its tokens: Turn-PPO (arXiv:2511.20718).

  Value and gradient inside a turn are as in `sequence_geometric`, which this is for rows of one
  turn; turns of one token give `token`.

  Args:
    log_ratio: [B, T], nats.
    turn_ids: i32[B, T], in 0..T-1 where `mask` is True.
    mask: bool[B, T].

  Returns:
    [B, T], clamped; 0 where `mask` is False.
  """
  chex.assert_equal_shape([log_ratio, turn_ids, mask])
  log_ratio = jnp.where(mask, log_ratio, 0)
  turns = mask.shape[-1]
  ids = jnp.where(mask, turn_ids, turns)  # what is masked shares a turn of its own

  def row(log_ratio, ids):
    total = jax.ops.segment_sum(log_ratio, ids, turns + 1)
    length = jax.ops.segment_sum(jnp.ones_like(log_ratio), ids, turns + 1)
    return (total / jnp.maximum(length, 1))[ids]

  return _straight_through(log_ratio, jax.vmap(row)(log_ratio, ids), mask)


def clamped(log_ratio: Array, mask: Array, *, low: float = -1.0, high: float = 1.5) -> Array:
  """clip(d, low, high) of every token: Humanline (arXiv:2509.24207).

  Outside the interval a token has gradient 0, whatever its advantage; a token on the bound keeps
  it. Infinite bounds give `token`.

  Args:
    log_ratio: [..., T], nats.
    mask: bool[..., T].
    low: the least log-ratio, nats.
    high: the largest log-ratio, nats.

  Returns:
    [..., T]; 0 where `mask` is False.

  Raises:
    ValueError: 0 outside [low, high], which would silence on-policy tokens.
  """
  chex.assert_equal_shape([log_ratio, mask])
  if not low <= 0 <= high:
    raise ValueError(f'low <= 0 <= high must hold for bounds in nats, got {low} and {high}')
  log_ratio = token(log_ratio, mask)
  return jnp.where(within(log_ratio, low, high), log_ratio, jnp.clip(log_ratio, low, high))


def centered(log_ratio: Array, old_kl: Array, mask: Array, *, scale: float = 1.0) -> Array:
  """scale * (d + sg(KL(pi_old, pi_theta))): a general form of GRPO-Guard (arXiv:2510.22319).

  E_old[d] = -KL is negative, so a clip range that is symmetric around 0 rarely binds on the upper
  side; with the exact divergence of the position added, the mean is 0. The paper states it for
  flow matching, where KL and scale are known in closed form; this is its form for any policy.

  Args:
    log_ratio: [..., T], nats.
    old_kl: [..., T], KL(pi_old, pi_theta) over the vocabulary, nats; detached here.
    mask: bool[..., T].
    scale: multiplies the centred log-ratio.

  Returns:
    [..., T], clamped; 0 where `mask` is False.
  """
  chex.assert_equal_shape([log_ratio, old_kl, mask])
  return token(scale * (log_ratio + jax.lax.stop_gradient(old_kl)), mask)


def recorded(proximal_logp: Array) -> Array:
  """The policy at the start of the update phase, as PPO compares (arXiv:1707.06347).

  Args:
    proximal_logp: [..., T], nats.

  Returns:
    [..., T], nats, detached.
  """
  return jax.lax.stop_gradient(proximal_logp)


def behavior(behavior_logp: Array) -> Array:
  """The policy that sampled: one forward pass less, and no correction of the sampler (standard).

  Args:
    behavior_logp: [..., T], nats.

  Returns:
    [..., T], nats, detached.
  """
  return jax.lax.stop_gradient(behavior_logp)


def interpolated(logp: Array, behavior_logp: Array, staleness: Array) -> Array:
  """sg(alpha log pi_behavior + (1 - alpha) log pi), alpha = 1 / max(staleness, 1).

  A-3PO (arXiv:2512.06547): a trust region around a policy between the one that sampled and the
  live one, without a forward pass for it. Fresh rows (staleness <= 1) are compared with the policy
  that sampled them; the older a row is, the less of it is clipped.

  Args:
    logp: [B, T], nats.
    behavior_logp: [B, T], nats.
    staleness: f32[B], updates since the row was sampled.

  Returns:
    [B, T], nats, detached.
  """
  chex.assert_equal_shape([logp, behavior_logp])
  chex.assert_shape(staleness, logp.shape[:1])
  alpha = 1 / jnp.maximum(staleness, 1)[:, None]
  return jax.lax.stop_gradient(alpha * behavior_logp + (1 - alpha) * logp)


def _straight_through(log_ratio: Array, value: Array, mask: Array) -> Array:
  """The given value, with the gradient of the token's own log-ratio."""
  own = log_ratio - jax.lax.stop_gradient(log_ratio)
  return jnp.where(mask, bounded(own + jax.lax.stop_gradient(value)), 0)


TABLE = table(
  'ratios',
  token,
  sequence_geometric,
  sequence_geometric_clipped,
  sequence_product,
  turn_geometric,
  clamped,
  centered,
)
Part = Annotated[Callable, TABLE]

# What the log-ratio is taken against: logp minus one of these.
PROXIMALS = table('ratios', recorded, behavior, interpolated)
ProximalPart = Annotated[Callable, PROXIMALS]
