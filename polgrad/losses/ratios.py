"""Log importance ratios at the level at which a method compares two policies: token, turn or sequence.

A function of `TABLE` fills the slot `ratio` of `objectives.PolicyGradient`. Its input `log_ratio` is
log pi_theta - log pi_old of the sampled tokens, in nats. Its output has the same shape and is clamped
to +-20 nats, so a surrogate or weight can exponentiate it without overflow. An entry beyond that
limit has gradient 0.

A function of `PROXIMALS` fills the slot `proximal`: it gives the log-probabilities of pi_old.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from polgrad.losses import turns
from polgrad.losses._common import bounded, kept, row_mean, row_sum, within
from polgrad.registry import table
from polgrad.types import Array


def token(log_ratio: Array, mask: Array) -> Array:
  """The log-ratio of each token by itself: PPO (arXiv:1707.06347).

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

  log s_t = d_t - sg(d_t) + sg(mean_k d_k), with d = log_ratio and sg = stop_gradient. The value is the
  log of the length-normalised sequence ratio; the gradient passes through the token's own log-ratio
  only. With one advantage per row and the `sequence_mean` aggregation, value and gradient are those
  of the paper's sequence-level GSPO. Other aggregations weight long rows more than the paper does.

  Args:
    log_ratio: [..., T], nats.
    mask: bool[..., T].

  Returns:
    [..., T], clamped; 0 where `mask` is False.
  """
  chex.assert_equal_shape([log_ratio, mask])
  log_ratio = jnp.where(mask, log_ratio, 0)
  return _straight_through(log_ratio, row_mean(log_ratio, mask), mask)


def sequence_geometric_clipped(
  log_ratio: Array, advantages: Array, mask: Array, *, eps_low: float = 0.4, eps_high: float = 0.4
) -> Array:
  """The row's mean of one-sidedly clipped log-ratios: GMPO (arXiv:2507.20673).

  log s_t = c_t - sg(c_t) + sg(mean_k c_k), with c = min(d, eps_high) for A > 0, max(d, -eps_low) for
  A < 0, and c = d = log_ratio for A = 0. A clipped token still enters the mean of its row, but its own
  gradient is 0. With one advantage per row, `surrogates.importance_weighted` and the `sequence_mean`
  aggregation, value and gradient are the paper's, in which both bounds are one number. Infinite bounds
  give `sequence_geometric`.

  Args:
    log_ratio: [..., T], nats.
    advantages: [..., T]; only the sign is read.
    mask: bool[..., T].
    eps_low: clip bound of the log-ratio downwards, for A < 0, nats.
    eps_high: clip bound of the log-ratio upwards, for A > 0, nats.

  Returns:
    [..., T], clamped; 0 where `mask` is False.
  """
  chex.assert_equal_shape([log_ratio, advantages, mask])
  log_ratio, advantages = (jnp.where(mask, x, 0) for x in (log_ratio, advantages))
  bound = jnp.where(advantages >= 0, eps_high, -eps_low).astype(log_ratio.dtype)
  clipped = jnp.where(kept(log_ratio, advantages, -eps_low, eps_high), log_ratio, bound)
  return _straight_through(clipped, row_mean(clipped, mask), mask)


def sequence_product(log_ratio: Array, mask: Array) -> Array:
  """The summed log-ratio of the row at each of its tokens: the ratio of trajectories (standard).

  Every entry carries the gradient of the whole sum, so derivatives of any order are those of the
  ratio of two trajectories (HARPG, arXiv:2302.01734, differentiates twice). Use the `sequence_mean`
  aggregation, in which each row counts once.

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

  Within a turn, value and gradient are computed as `sequence_geometric` computes them within a row.
  For rows of a single turn the result is `sequence_geometric`; for turns of one token it is `token`.

  Args:
    log_ratio: [B, T], nats.
    turn_ids: i32[B, T], which turn of its row a token belongs to, in 0..T-1 where `mask` is True.
    mask: bool[B, T].

  Returns:
    [B, T], clamped; 0 where `mask` is False.
  """
  chex.assert_equal_shape([log_ratio, turn_ids, mask])
  log_ratio = jnp.where(mask, log_ratio, 0)
  means = turns.means(log_ratio, turn_ids, mask)
  return _straight_through(log_ratio, turns.at_tokens(means, turn_ids, mask), mask)


def clamped(log_ratio: Array, mask: Array, *, low: float = -1.0, high: float = 1.5) -> Array:
  """clip(d, low, high) of every token: Humanline (arXiv:2509.24207).

  A token with d = log_ratio outside [low, high] has gradient 0, whatever its advantage. A token
  exactly on a bound keeps its gradient. Infinite bounds give `token`.

  Args:
    log_ratio: [..., T], nats.
    mask: bool[..., T].
    low: smallest log-ratio, nats.
    high: largest log-ratio, nats.

  Returns:
    [..., T]; 0 where `mask` is False.

  Raises:
    ValueError: 0 is outside [low, high], so on-policy tokens would have gradient 0.
  """
  chex.assert_equal_shape([log_ratio, mask])
  if not low <= 0 <= high:
    raise ValueError(f'low <= 0 <= high must hold for bounds in nats, got {low} and {high}')
  log_ratio = token(log_ratio, mask)
  return jnp.where(within(log_ratio, low, high), log_ratio, jnp.clip(log_ratio, low, high))


def centered(log_ratio: Array, old_kl: Array, mask: Array, *, scale: float = 1.0) -> Array:
  """scale * (d + sg(KL(pi_old, pi_theta))): a general form of GRPO-Guard (arXiv:2510.22319).

  The mean of d = log_ratio under the old policy is -KL(pi_old, pi_theta) <= 0, so a clip range that is
  symmetric around 0 binds on the lower side more often than on the upper side. Adding the exact
  divergence at each position makes that mean 0. The paper derives this for flow matching, where KL
  and scale have closed forms; this function works for any policy.

  Args:
    log_ratio: [..., T], nats.
    old_kl: [..., T], KL(pi_old, pi_theta) over the vocabulary, nats; detached here.
    mask: bool[..., T].
    scale: factor of the centred log-ratio.

  Returns:
    [..., T], clamped; 0 where `mask` is False.
  """
  chex.assert_equal_shape([log_ratio, old_kl, mask])
  return token(scale * (log_ratio + jax.lax.stop_gradient(old_kl)), mask)


def recorded(proximal_logp: Array) -> Array:
  """Log-probabilities of the policy at the start of the update phase: PPO (arXiv:1707.06347).

  Args:
    proximal_logp: [..., T], nats.

  Returns:
    [..., T], nats, detached.
  """
  return jax.lax.stop_gradient(proximal_logp)


def behavior(behavior_logp: Array) -> Array:
  """Log-probabilities that the sampler recorded: no forward pass for a proximal policy (standard).

  The ratio then also contains the mismatch between sampler and trainer, so no weight corrects for it.

  Args:
    behavior_logp: [..., T], nats.

  Returns:
    [..., T], nats, detached.
  """
  return jax.lax.stop_gradient(behavior_logp)


def interpolated(logp: Array, behavior_logp: Array, staleness: Array) -> Array:
  """sg(alpha log pi_behavior + (1 - alpha) log pi), alpha = 1 / max(staleness, 1).

  A-3PO (arXiv:2512.06547). The centre of the trust region is a policy between the sampling policy and
  the live one, which needs no forward pass. A fresh row (staleness <= 1) is compared with the policy
  that sampled it; the staler a row, the closer its ratio is to 1 and the fewer of its tokens are
  clipped.

  Args:
    logp: [B, T], nats.
    behavior_logp: [B, T], nats.
    staleness: f32[B], number of updates since the row was sampled.

  Returns:
    [B, T], nats, detached.
  """
  chex.assert_equal_shape([logp, behavior_logp])
  chex.assert_shape(staleness, logp.shape[:1])
  alpha = 1 / jnp.maximum(staleness, 1)[:, None]
  return jax.lax.stop_gradient(alpha * behavior_logp + (1 - alpha) * logp)


def interpolated_by_token(logp: Array, behavior_logp: Array, token_staleness: Array) -> Array:
  """`interpolated` with the age of each token, for rows that continue over updates (arXiv:2512.06547).

  Args:
    logp: [B, T], nats.
    behavior_logp: [B, T], nats.
    token_staleness: f32[B, T], batches used for training since the weights that drew the token.

  Returns:
    [B, T], nats, detached.
  """
  chex.assert_equal_shape([logp, behavior_logp, token_staleness])
  alpha = 1 / jnp.maximum(token_staleness, 1)
  return jax.lax.stop_gradient(alpha * behavior_logp + (1 - alpha) * logp)


def _straight_through(log_ratio: Array, value: Array, mask: Array) -> Array:
  """`value` in the forward pass, with the gradient of the token's own log-ratio."""
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

# log_ratio = logp - proximal(...), where `proximal` is one of these.
PROXIMALS = table('ratios', recorded, behavior, interpolated, interpolated_by_token)
ProximalPart = Annotated[Callable, PROXIMALS]
