"""Rewards of tokens: from scores of the parts of a completion, or of every token.

`span_ids` i32[B, T] has the number of the part that a token is in, -1 where it is in none, and
`span_scores` f32[B, T] the score of that part at each of its tokens. Parts are numbered along the row. A
token outside the mask is in no part.
"""

import chex
import jax.numpy as jnp

from polgrad.losses import turns
from polgrad.losses.groups import divide, members, size, total
from polgrad.losses.returns import reward_to_go
from polgrad.types import Array


def min_form(
  span_scores: Array, span_ids: Array, mask: Array, *, temperature: float = 0.1
) -> Array:
  """w_s p_s at the last token of step s, w = softmax over the steps of -p / temperature: PURE
  (arXiv:2504.15275).

  Their sum, the value of a row, is near its worst score where the temperature is small, so a row cannot
  earn more by having more good steps. A large temperature gives the mean score.

  Args:
    span_scores: [B, T], p, such as P(right) - P(wrong).
    span_ids: i32[B, T].
    mask: bool[B, T].
    temperature: unit of the scores, positive.

  Returns:
    [B, T], 0 elsewhere, and everywhere in a row without steps.

  Raises:
    ValueError: temperature <= 0.
  """
  chex.assert_equal_shape([span_scores, span_ids, mask])
  if temperature <= 0:
    raise ValueError(f'temperature must be positive, got {temperature}')
  ends = _ends(span_ids, mask)
  least = jnp.min(jnp.where(ends, span_scores, jnp.inf), axis=1, keepdims=True)
  gap = jnp.where(ends, span_scores - least, 0)
  weight = jnp.where(ends, jnp.exp(-gap / temperature), 0)
  weight = divide(weight, jnp.sum(weight, axis=1, keepdims=True))
  return jnp.where(ends, weight * span_scores, 0)


def without_step_baseline(
  rewards: Array, span_ids: Array, mask: Array, group_ids: Array, valid: Array
) -> Array:
  """At the end of every step, its reward minus the mean over the other rows of the group of their
  reward per step: the baseline "step" of PURE (arXiv:2504.15275).

  Args:
    rewards: [B, T], of steps, at their last tokens.
    span_ids: i32[B, T].
    mask: bool[B, T].
    group_ids: i32[B].
    valid: bool[B].

  Returns:
    [B, T], 0 outside of the ends of steps. A row that is alone in its group has no baseline.
  """
  ends = _ends(span_ids, mask)
  steps = jnp.sum(ends, axis=1, dtype=rewards.dtype)
  per_step = divide(jnp.sum(jnp.where(ends, rewards, 0), axis=1), steps)
  groups = members(group_ids, valid)
  others = divide(total(per_step, groups) - per_step, size(groups) - 1.0)
  return jnp.where(ends & valid[:, None], rewards - others[:, None], 0)


def without_token_baseline(
  rewards: Array, span_ids: Array, mask: Array, group_ids: Array, valid: Array
) -> Array:
  """At the end of every step, its reward minus (reward per token of the other rows of the group) times
  the tokens of the step: the baseline "token" of PURE (arXiv:2504.15275).

  The reward per token is the sum of the rewards of the other rows over the number of their tokens in
  steps, so long steps have a larger baseline than short ones.

  Args, Returns: as `without_step_baseline`.
  """
  inside = mask & (span_ids >= 0)
  ends = _ends(span_ids, mask)
  lengths = turns.totals(jnp.ones_like(rewards), span_ids, inside)
  lengths = turns.at_tokens(lengths, span_ids, inside)
  groups = members(group_ids, valid)
  earned = jnp.sum(jnp.where(ends, rewards, 0), axis=1)
  tokens = jnp.sum(inside, axis=1, dtype=rewards.dtype)
  per_token = divide(total(earned, groups) - earned, total(tokens, groups) - tokens)
  return jnp.where(ends & valid[:, None], rewards - per_token[:, None] * lengths, 0)


def bounded(token_rewards: Array, mask: Array, *, eps: float = 1e-6) -> Array:
  """Rewards divided by the largest |sum from a token on| of the batch, plus eps: no return of a token
  exceeds 1 (PRIME, arXiv:2502.01456).

  Args:
    token_rewards: [B, T].
    mask: bool[B, T].
    eps: in units of the rewards.

  Returns:
    [B, T], 0 outside the mask.
  """
  chex.assert_equal_shape([token_rewards, mask])
  rewards = jnp.where(mask, token_rewards, 0)
  largest = jnp.max(jnp.abs(reward_to_go(rewards, mask)), initial=0)
  return rewards / (largest + eps)


def leave_one_out(token_rewards: Array, mask: Array, group_ids: Array, valid: Array) -> Array:
  """n / (n - 1) r_t - (sum over the n rows of the group of their mean r) / (n - 1): PRIME
  (arXiv:2502.01456).

  For the row itself the mean of this is its mean r less that of the other rows. Rows count the same,
  however long they are.

  Args:
    token_rewards: [B, T].
    mask: bool[B, T].
    group_ids: i32[B].
    valid: bool[B].

  Returns:
    [B, T], 0 outside the mask, in rows that are not valid, and in groups of one.
  """
  chex.assert_equal_shape([token_rewards, mask])
  rewards = jnp.where(mask, token_rewards, 0)
  means = jnp.sum(rewards, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)
  groups = members(group_ids, valid)
  number = size(groups)
  others = jnp.maximum(number - 1, 1)
  centred = (number / others)[:, None] * rewards - (total(means, groups) / others)[:, None]
  return jnp.where(mask & (valid & (number > 1))[:, None], centred, 0)


def _ends(span_ids: Array, mask: Array) -> Array:
  """bool[B, T]: the last token of every part."""
  return turns.ends(span_ids, mask & (span_ids >= 0))
