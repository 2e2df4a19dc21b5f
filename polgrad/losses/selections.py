"""Selections: which tokens of a whole minibatch a loss treats apart, bool[B, T].

A rank, a covariance or a share is a statement about all tokens together. So a selection is
evaluated once an update on the whole minibatch, before micro-batches are cut, and without gradient;
weights and penalties then read it by its name in the configuration. One of them gives the bounds of
a trust region instead, f32[2]. No token outside the mask is ever selected. Equal scores are ranked
in the order of rows and positions.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from polgrad.losses.ratios import bounded, kept
from polgrad.registry import table
from polgrad.types import Array


def second_moment(
  log_ratio: Array, advantages: Array, mask: Array, *, limit: float = 0.04
) -> Array:
  """Kept tokens: the second moment of the log-ratio stays below a limit: M2PO (arXiv:2510.01161).

  Only tokens that moved with their advantage (A d > 0) can be dropped: of them the longest prefix,
  in the order of growing d^2, is kept whose mean d^2 is at most `limit`.

  Args:
    log_ratio: [B, T], nats.
    advantages: [B, T].
    mask: bool[B, T].
    limit: the largest mean of d^2 over the kept tokens, nats^2.

  Returns:
    bool[B, T], True where a token is kept.
  """
  chex.assert_equal_shape([log_ratio, advantages, mask])
  moved = mask & (advantages * log_ratio > 0)
  moment = jnp.where(moved, log_ratio, 0) ** 2
  rank = _rank(moment, moved)
  ordered = jnp.zeros(mask.size, moment.dtype).at[rank.ravel()].set(moment.ravel())
  # Squares in growing order have a growing mean, so the kept ones are a prefix.
  mean = jnp.cumsum(ordered) / jnp.arange(1, mask.size + 1)
  return mask & (~moved | (mean <= limit)[rank])


def top_covariance(logp: Array, advantages: Array, mask: Array, *, share: float = 0.0002) -> Array:
  """The tokens with the largest (A - mean A)(log pi - mean log pi): KL-Cov (arXiv:2505.22617).

  To first order their updates are what lowers the entropy. max(int(share n), 1) of the n valid
  tokens are selected.

  Args:
    logp: [B, T], nats.
    advantages: [B, T].
    mask: bool[B, T].
    share: of the valid tokens.

  Returns:
    bool[B, T].
  """
  covariance = _covariance(logp, advantages, mask)
  return mask & (_rank(-covariance, mask) < jnp.maximum(_part(share, mask), 1))


def random_covariance(
  logp: Array,
  log_ratio: Array,
  advantages: Array,
  mask: Array,
  noise: Array,
  *,
  share: float = 0.0002,
  low: float = 1.0,
  high: float = 5.0,
  eps_low: float = 1.0,
  eps_high: float = 1.0,
) -> Array:
  """Random tokens out of those with a high covariance: Clip-Cov (arXiv:2505.22617).

  Candidates have low < (A - mean A)(log pi - mean log pi) < high and are not clipped already; the
  max(int(share n), 1) with the least noise are selected, n being the number of valid tokens.

  Args:
    logp: [B, T], nats.
    log_ratio: [B, T], nats.
    advantages: [B, T].
    mask: bool[B, T].
    noise: f32[B, T], uniform numbers.
    share: of the valid tokens.
    low: the covariance above which a token is a candidate.
    high: the covariance below which it is one.
    eps_low: distance of the surrogate's lower clip bound from 1.
    eps_high: distance of the surrogate's upper clip bound from 1.

  Returns:
    bool[B, T].
  """
  chex.assert_equal_shape([logp, log_ratio, noise])
  covariance = _covariance(logp, advantages, mask)
  live = kept(jnp.exp(bounded(log_ratio)), advantages, 1 - eps_low, 1 + eps_high)
  candidates = mask & live & (covariance > low) & (covariance < high)
  return candidates & (_rank(noise, candidates) < jnp.maximum(_part(share, mask), 1))


def unlikely(
  logp: Array, proxy_logp: Array, advantages: Array, mask: Array, *, share: float = 0.01
) -> Array:
  """Bad tokens of low probability that deserve protection: Lp-Reg (arXiv:2510.03222).

  Of the n tokens with A < 0 the int(share n) least likely ones, and of them those that the proxy
  finds more likely than the policy. None is selected while int(share n) < 2, as published.

  Args:
    logp: [B, T], nats.
    proxy_logp: [B, T], log-prob of the token under the proxy, nats.
    advantages: [B, T].
    mask: bool[B, T].
    share: of the valid tokens with A < 0.

  Returns:
    bool[B, T].
  """
  chex.assert_equal_shape([logp, proxy_logp, advantages, mask])
  bad = mask & (advantages < 0)
  count = _part(share, bad)
  lowest = bad & (_rank(logp, bad) < count) & (count > 1)
  return lowest & (logp < proxy_logp)


def balanced_bounds(
  log_ratio: Array,
  advantages: Array,
  mask: Array,
  *,
  share: float = 0.4,
  low: float = 0.6,
  low_limit: float = 0.9,
  high: float = 1.2,
  high_limit: float = 3.0,
  step_high: float = 0.05,
  step_low: float = 0.02,
) -> Array:
  """Clip bounds that give good tokens their share of the loss: BAPO (arXiv:2510.18927).

  While sum_{A > 0} |c| < share * sum |c|, c = min(r A, clip(r, low, high) A), the upper bound is
  raised by a step; once it has reached its limit, the lower bound is. Sums of absolute values stand
  for the paper's expectations under the sampler, whose samples these are. Each update begins again
  at (low, high).

  Args:
    log_ratio: [B, T], nats.
    advantages: [B, T].
    mask: bool[B, T].
    share: the share to be reached by tokens with A > 0.
    low: where the lower bound starts.
    low_limit: its largest value.
    high: where the upper bound starts.
    high_limit: its largest value.
    step_high: the step of the upper bound.
    step_low: the step of the lower bound.

  Returns:
    f32[2], the ratios (low, high); the starting ones if no token is valid.

  Raises:
    ValueError: a limit that is infinite or below its start, or a step that is not positive.
  """
  chex.assert_equal_shape([log_ratio, advantages, mask])
  if not (low <= low_limit < jnp.inf and high <= high_limit < jnp.inf):
    raise ValueError(
      f'low = {low} <= low_limit = {low_limit} and high = {high} <= high_limit = {high_limit} '
      'must hold, all of them finite'
    )
  if step_high <= 0 or step_low <= 0:
    raise ValueError(f'steps must be positive, got {step_high=} and {step_low=}')
  log_ratio, advantages = (
    jax.lax.stop_gradient(jnp.where(mask, x, 0)) for x in (log_ratio, advantages)
  )
  ratio = jnp.exp(bounded(log_ratio))
  good, bad = jnp.maximum(advantages, 0), jnp.maximum(-advantages, 0)
  # Steps are counted, not added up: a bound is reached exactly, whatever the precision.
  raises, lifts = (
    int((limit - start) / step + 1e-6)
    for start, limit, step in ((high, high_limit, step_high), (low, low_limit, step_low))
  )

  def bounds(steps):
    up = jnp.minimum(steps, raises)
    return jnp.stack([low + step_low * (steps - up), high + step_high * up]).astype(ratio.dtype)

  def short(steps):
    floor, cap = bounds(steps)
    gain = jnp.sum(good * jnp.minimum(ratio, cap))
    total = gain + jnp.sum(bad * jnp.maximum(ratio, floor))
    return (steps < raises + lifts) & (gain < share * total * (1 - 1e-6))  # equal up to rounding

  return bounds(jax.lax.while_loop(short, lambda steps: steps + 1, 0))


def curvature(
  score_norm: Array,
  score_fisher: Array,
  hidden_norm: Array,
  advantages: Array,
  mask: Array,
  *,
  learning_rate: float = 1.5e-5,
  limit_objective: float = 0.01,
  limit_divergence: float = 1e-4,
) -> Array:
  """Kept tokens: those whose own step would neither jump nor leave the policy: CAPO.

  arXiv:2510.00819, in the last layer and with the step of gradient descent: a token's gradient is
  G = A v h', so the logits move by eta A |h|^2 v, and to second order

      change of the objective = eta A^2 |v|^2 |h|^2 + eta^2 A^3 |h|^4 (|v|^4 - v'Fv) / 2
      KL of the step          = eta^2 A^2 |h|^4 |v|^4 / 2,  a one-sample estimate.

  A token is kept if both are below their limits, the first in absolute value.

  Args:
    score_norm: [B, T], |v|^2 with v = e_token - pi.
    score_fisher: [B, T], v'Fv with F = diag(pi) - pi pi'.
    hidden_norm: [B, T], |h|^2 of the last hidden state.
    advantages: [B, T].
    mask: bool[B, T].
    learning_rate: eta.
    limit_objective: the largest change of the objective.
    limit_divergence: the largest KL of the step, nats.

  Returns:
    bool[B, T], True where a token is kept.
  """
  chex.assert_equal_shape([score_norm, score_fisher, hidden_norm, advantages, mask])
  move = learning_rate * advantages * hidden_norm  # the logits move by this times v
  along = move * score_norm
  objective = advantages * (along + (along**2 - move**2 * score_fisher) / 2)
  divergence = along**2 / 2
  return mask & (jnp.abs(objective) < limit_objective) & (divergence < limit_divergence)


def _rank(score: Array, among: Array) -> Array:
  """The place of every entry in growing order over the whole array; first those of `among`."""
  order = jnp.argsort(jnp.where(among, score, jnp.inf), axis=None, stable=True)
  rank = jnp.zeros(order.size, jnp.int32).at[order].set(jnp.arange(order.size, dtype=jnp.int32))
  return rank.reshape(among.shape)


def _part(share: float, where: Array) -> Array:
  """int(share n): the product may fall a rounding error short of a whole number."""
  return jnp.floor(share * jnp.sum(where) * (1 + 1e-6)).astype(jnp.int32)


def _covariance(logp: Array, advantages: Array, mask: Array) -> Array:
  chex.assert_equal_shape([logp, advantages, mask])
  return _centered(logp, mask) * _centered(advantages, mask)


def _centered(x: Array, mask: Array) -> Array:
  x = jnp.where(mask, x, 0)
  return x - jnp.sum(x) / jnp.maximum(jnp.sum(mask), 1)


TABLE = table(
  'selections',
  second_moment,
  top_covariance,
  random_covariance,
  unlikely,
  balanced_bounds,
  curvature,
)
Part = Annotated[Callable, TABLE]
