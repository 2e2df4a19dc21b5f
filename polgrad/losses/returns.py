"""Returns, advantages and value targets of tokens, from token rewards and values.

The estimators of `credit` use these functions. Their outputs are constants of the policy gradient: the
trainer computes them before it differentiates. The functions themselves do not call stop_gradient.

`reward_to_go` and `gae` assume that the policy itself sampled the tokens. V-trace and Retrace correct
for another sampling policy by clipped ratios rho = exp(log_rho), log_rho = proximal_logp -
behavior_logp.

Masked positions (tool output, padding) are skipped: their reward is not read, no discount is applied
there, and the output is 0. So a row with masked positions gives the same numbers as the row without
them.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from polgrad.losses import turns
from polgrad.losses._common import bounded
from polgrad.registry import table
from polgrad.types import Array


def place_last(rewards: Array, mask: Array) -> Array:
  """Puts the reward of a row on its last valid token, 0 elsewhere (standard).

  Args:
    rewards: [B].
    mask: bool[B, T].

  Returns:
    [B, T]; all 0 in a row without tokens.
  """
  chex.assert_rank([rewards, mask], [1, 2])
  chex.assert_equal(rewards.shape[0], mask.shape[0])
  tokens_left = jnp.cumsum(mask[:, ::-1], axis=-1)[:, ::-1]
  return jnp.where(mask & (tokens_left == 1), rewards[:, None], 0)


def reward_to_go(token_rewards: Array, mask: Array, *, discount: float = 1.0) -> Array:
  """G_t = r_t + discount G_{t+1} over the valid tokens of a row (standard).

  Args:
    token_rewards: [..., T].
    mask: bool[..., T].
    discount: factor per valid token.

  Returns:
    [..., T].
  """
  chex.assert_equal_shape([token_rewards, mask])

  def step(future, now):
    reward, valid = now
    total = jnp.where(valid, reward + discount * future, future)
    return total, jnp.where(valid, total, 0)

  start = jnp.zeros_like(token_rewards[..., 0])
  return _scan_backwards(step, start, token_rewards, mask)


def td_lookahead(scores: Array, mask: Array, *, steps: int = 1, rate: float = 0.5) -> Array:
  """s_t + rate (s_{t + steps} - s_t): early steps are scored with a look ahead (arXiv:2501.07861).

  A model that scores the steps of a solution is unreliable at the first ones; the score of a later step
  corrects it. A step that has no later one at that distance takes the last one. The paper's coefficients
  are not known to us.

  Args:
    scores: [..., T], of the steps of a row.
    mask: bool[..., T], True at the steps; other columns are skipped.
    steps: how many steps ahead, at least 1.
    rate: 0 leaves the scores, 1 takes the later ones.

  Returns:
    [..., T]; 0 outside the mask.
  """
  chex.assert_equal_shape([scores, mask])
  # The k-th step of a row is at column `place[k]`: a stable sort puts the steps before other columns.
  place = jnp.argsort(~mask, axis=-1, stable=True)
  number = jnp.cumsum(mask, axis=-1) - 1  # of a step, from 0
  last = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True) - 1, 0)
  ahead = jnp.clip(number + steps, 0, last)
  later = jnp.take_along_axis(scores, jnp.take_along_axis(place, ahead, axis=-1), axis=-1)
  return jnp.where(mask, scores + rate * (later - scores), 0)


def gae(
  token_rewards: Array,
  values: Array,
  mask: Array,
  *,
  discount: float = 1.0,
  trace: float | Array = 0.95,
) -> Array:
  """A_t = sum_k (discount trace)^k delta_{t+k}, delta_t = r_t + discount V_{t+1} - V_t: generalised
  advantage estimation (arXiv:1506.02438).

  t + 1 is the next *valid* token. The value after the last token is 0, so a truncated row is treated
  like a finished one. Value targets are advantages + values (before any normalisation).
  discount = trace = 1 gives reward_to_go - values; trace = 0 gives the one-step error delta_t.

  Args:
    token_rewards: [..., T].
    values: [..., T], V_t, the value of the state before token t.
    mask: bool[..., T].
    discount: factor per valid token.
    trace: decay of the errors, lambda in the paper: one number, or one for each row, [...].

  Returns:
    [..., T].
  """
  chex.assert_equal_shape([token_rewards, values, mask])
  start = jnp.zeros_like(values[..., 0])
  step = lambda carry, x: _gae_step(discount, trace, carry, x)
  return _scan_backwards(step, (start, start), token_rewards, values, mask)


def length_adaptive_trace(mask: Array, *, scale: float = 0.05) -> Array:
  """lambda = 1 - 1 / (scale L) for a row of L valid tokens: VAPO (arXiv:2504.05118).

  The sum over k of lambda^k is then scale L, so an error reaches the same fraction of a long row and of
  a short one. A fixed lambda of .95 makes the reward at the end of a long row vanish at its beginning.
  Rows of at most 1 / scale tokens get 0.

  Args:
    mask: bool[..., T].
    scale: alpha in the paper, positive.

  Returns:
    [...], in [0, 1).

  Raises:
    ValueError: scale <= 0.
  """
  if scale <= 0:
    raise ValueError(f'scale must be positive, got {scale}')
  length = jnp.sum(mask, axis=-1, dtype=float)
  return jnp.maximum(1 - 1 / jnp.maximum(scale * length, 1), 0)


def vtrace_targets(
  token_rewards: Array,
  values: Array,
  log_rho: Array,
  mask: Array,
  *,
  discount: float = 1.0,
  trace: float = 1.0,
  rho_bar: float = 1.0,
  c_bar: float = 1.0,
) -> Array:
  """V_t + e_t, e_t = min(rho_bar, rho_t) (r_t + discount V_{t+1} - V_t) + discount c_t e_{t+1}, with
  c_t = trace min(c_bar, rho_t): V-trace (arXiv:1802.01561).

  rho_bar determines which policy's value is estimated: that of the policy proportional to
  min(rho_bar mu, pi), with mu the sampling policy; an infinite rho_bar gives pi. c_bar only affects the
  speed of convergence. rho = 1 gives `gae` + V (for rho_bar, c_bar >= 1).

  Args:
    token_rewards: [..., T].
    values: [..., T], V_t, the value of the state before token t.
    log_rho: [..., T], nats; clamped to +-20.
    mask: bool[..., T].
    discount: factor per valid token.
    trace: decay of the errors, lambda in the paper.
    rho_bar: largest weight of a one-step error.
    c_bar: largest weight of the errors of later tokens.

  Returns:
    [..., T], value targets.
  """
  clips = dict(rho_bar=rho_bar, c_bar=c_bar)
  errors, _ = _vtrace(token_rewards, values, log_rho, mask, discount, trace, **clips)
  return jnp.where(mask, values + errors, 0)


def vtrace_advantages(
  token_rewards: Array,
  values: Array,
  log_rho: Array,
  mask: Array,
  *,
  discount: float = 1.0,
  trace: float = 1.0,
  rho_bar: float = 1.0,
  c_bar: float = 1.0,
  rho_pg: float = 1.0,
) -> Array:
  """A_t = min(rho_pg, rho_t) (r_t + discount (trace v_{t+1} + (1 - trace) V_{t+1}) - V_t) with v of
  `vtrace_targets` (arXiv:1802.01561).

  The advantage contains the ratio to the sampling policy already, so use a loss that does not multiply
  by that ratio again.

  Args:
    token_rewards: [..., T].
    values: [..., T], V_t, the value of the state before token t.
    log_rho: [..., T], nats; clamped to +-20.
    mask: bool[..., T].
    discount: factor per valid token.
    trace: decay of the errors, lambda in the paper.
    rho_bar: largest weight of a one-step error.
    c_bar: largest weight of the errors of later tokens.
    rho_pg: largest weight of an advantage.

  Returns:
    [..., T].
  """
  clips = dict(rho_bar=rho_bar, c_bar=c_bar)
  _, following = _vtrace(token_rewards, values, log_rho, mask, discount, trace, **clips)
  gain = token_rewards + discount * following - values
  return jnp.where(mask, _truncated(log_rho, rho_pg) * gain, 0)


def retrace_targets(
  token_rewards: Array,
  values: Array,
  log_rho: Array,
  mask: Array,
  *,
  discount: float = 1.0,
  trace: float = 1.0,
) -> Array:
  """G_t = r_t + discount (V_{t+1} + c_{t+1} (G_{t+1} - Q_{t+1})), c_t = trace min(1, rho_t): Retrace
  (arXiv:1606.02647), with the state value V_t in the place of Q_t.

  G_t is a target for the value of taking token t, so it is not multiplied by rho_t; a V-trace target is
  one for the state before token t. On-policy, trace = 1 gives the reward to go and trace = 0 the
  one-step target.

  Args:
    token_rewards: [..., T].
    values: [..., T], V_t, the value of the state before token t.
    log_rho: [..., T], nats; clamped to +-20.
    mask: bool[..., T].
    discount: factor per valid token.
    trace: decay of the corrections, lambda in the paper.

  Returns:
    [..., T], targets for the value of the sampled token.
  """
  chex.assert_equal_shape([token_rewards, values, log_rho, mask])

  def step(following, now):
    reward, value, c, valid = now
    target = reward + discount * following
    following = jnp.where(valid, value + c * (target - value), following)
    return following, jnp.where(valid, target, 0)

  start = jnp.zeros_like(values[..., 0])
  c = trace * _truncated(log_rho, 1.0)
  return _scan_backwards(step, start, token_rewards, values, c, mask)


def turn_returns(
  token_rewards: Array, turn_ids: Array, mask: Array, *, discount: float = 1.0
) -> Array:
  """R_k = r_k + discount R_{k+1} at every token of turn k, r_k the sum of the rewards of its tokens:
  discounting by turns (standard; AReaL, arXiv:2505.24298, has it for conversations).

  Args:
    token_rewards: [B, T].
    turn_ids: i32[B, T], which turn of its row a token belongs to.
    mask: bool[B, T].
    discount: factor per turn; the tokens of a turn are not discounted against each other.

  Returns:
    [B, T].
  """
  rewards = turns.totals(token_rewards, turn_ids, mask)
  future = reward_to_go(rewards, turns.present(turn_ids, mask), discount=discount)
  return turns.at_tokens(future, turn_ids, mask)


def turn_gae(
  token_rewards: Array,
  values: Array,
  turn_ids: Array,
  mask: Array,
  *,
  discount: float = 1.0,
  trace: float = 0.95,
) -> Array:
  """A_k = sum_j (discount trace)^j delta_{k+j}, delta_k = r_k + discount V_{k+1} - V_k: `gae` in which
  one step is one turn (Turn-PPO, arXiv:2511.20718).

  r_k is the sum of the rewards of the tokens of turn k, and V_k the value before its first token. Turns
  of one token give `gae`; a row of one turn gives its reward minus its first value.

  Args:
    token_rewards: [B, T].
    values: [B, T], the value of the state before each token; only that of first tokens is read.
    turn_ids: i32[B, T], which turn of its row a token belongs to; numbers grow along the row.
    mask: bool[B, T].
    discount: factor per turn.
    trace: decay of the errors per turn, lambda in the paper.

  Returns:
    [B, T], A_k at every token of turn k.
  """
  chex.assert_equal_shape([token_rewards, values, turn_ids, mask])
  rewards, values = (
    turns.totals(token_rewards, turn_ids, mask),
    turns.first(values, turn_ids, mask),
  )
  present = turns.present(turn_ids, mask)
  advantages = gae(rewards, values, present, discount=discount, trace=trace)
  return turns.at_tokens(advantages, turn_ids, mask)


def bilevel_gae(
  token_rewards: Array,
  values: Array,
  turn_ids: Array,
  mask: Array,
  *,
  discount: float = 1.0,
  trace: float = 1.0,
  turn_discount: float = 0.95,
) -> Array:
  """`gae` over turns, and then over the tokens of each turn: bi-level GAE (RAGEN, arXiv:2504.20073).

  The first `gae` has one step a turn, with the reward and the value at the last token of the turn and
  `turn_discount`. Its advantage plus that value is the return R_k of turn k. The second runs over the
  tokens of each turn by itself, with `discount`: the last token of turn k has the reward R_k, and the
  value after it is 0. A row of one turn gives `gae`.

  Ends of turns are those of `turn_ids`. The released code takes tokens with a reward other than 0 for
  them, so that a turn with the reward 0 becomes part of the next one.

  Args:
    token_rewards: [B, T].
    values: [B, T], the value of the state before each token.
    turn_ids: i32[B, T], which turn of its row a token belongs to; numbers grow along the row.
    mask: bool[B, T].
    discount: factor per token of a turn.
    trace: decay of the errors, lambda of both levels.
    turn_discount: factor per turn.

  Returns:
    [B, T].
  """
  chex.assert_equal_shape([token_rewards, values, turn_ids, mask])
  ends = turns.ends(turn_ids, mask)
  returned = gae(token_rewards, values, ends, discount=turn_discount, trace=trace) + values
  rewards = jnp.where(ends, returned, token_rewards)

  def step(carry, now):
    *now, end = now
    # Nothing follows the last token of a turn.
    carry = tuple(jnp.where(end, 0, x) for x in carry)
    return _gae_step(discount, trace, carry, now)

  start = jnp.zeros_like(values[..., 0])
  return _scan_backwards(step, (start, start), rewards, values, mask, ends)


def _gae_step(discount, trace, carry, now):
  """One step of `gae`, which runs backwards; the carry is V and A of the next valid token."""
  next_value, next_advantage = carry
  reward, value, valid = now
  delta = reward + discount * next_value - value
  advantage = jnp.where(valid, delta + discount * trace * next_advantage, next_advantage)
  return (jnp.where(valid, value, next_value), advantage), jnp.where(valid, advantage, 0)


def _vtrace(token_rewards, values, log_rho, mask, discount, trace, *, rho_bar, c_bar):
  """(e_t, V_{t+1} + trace e_{t+1}) of V-trace at every valid token, 0 elsewhere."""
  chex.assert_equal_shape([token_rewards, values, log_rho, mask])

  def step(carry, now):
    next_value, next_error = carry
    reward, value, rho, c, valid = now
    error = rho * (reward + discount * next_value - value) + discount * c * next_error
    following = next_value + trace * next_error
    carry = jnp.where(valid, value, next_value), jnp.where(valid, error, next_error)
    return carry, (jnp.where(valid, error, 0), jnp.where(valid, following, 0))

  start = jnp.zeros_like(values[..., 0])
  rho, c = _truncated(log_rho, rho_bar), trace * _truncated(log_rho, c_bar)
  return _scan_backwards(step, (start, start), token_rewards, values, rho, c, mask)


def _truncated(log_rho: Array, cap: float) -> Array:
  """min(rho, cap)."""
  return jnp.minimum(jnp.exp(bounded(log_rho)), cap)


def _scan_backwards(step: Callable, carry, *arrays: Array):
  """Scans [..., T] arrays from the last position to the first; returns the outputs of `step`, stacked
  to [..., T]."""
  time_major = tuple(jnp.moveaxis(x, -1, 0) for x in arrays)
  _, out = jax.lax.scan(step, carry, time_major, reverse=True)
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), out)


TABLE = table('returns', reward_to_go, gae)
Part = Annotated[Callable, TABLE]

# Of rows with several turns.
OF_TURNS = table('returns', turn_returns, turn_gae, bilevel_gae)

# Corrected for tokens that another policy sampled.
TARGETS = table('returns', vtrace_targets, retrace_targets)
CORRECTED = table('returns', vtrace_advantages)
