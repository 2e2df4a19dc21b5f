"""Token rewards and values to returns. All outputs are data for the policy.

Masked positions (tool output, padding) are holes: no reward is read there, nothing is discounted
there, and the output is 0. So a row with holes gives what the same row without them gives.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from polgrad.registry import table
from polgrad.types import Array


def place_last(rewards: Array, mask: Array) -> Array:
  """Puts the reward of a row on its last valid token, 0 elsewhere (standard).

  Args:
    rewards: [B].
    mask: bool[B, T].

  Returns:
    [B, T]; a row without tokens loses its reward.
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
    discount: per valid token.

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


def gae(
  token_rewards: Array, values: Array, mask: Array, *, discount: float = 1.0, trace: float = 0.95
) -> Array:
  """A_t = sum_k (discount trace)^k delta_{t+k}, delta_t = r_t + discount V_{t+1} - V_t: generalised
  advantage estimation (arXiv:1506.02438).

  t + 1 is the next *valid* token, and the value after the last one is 0: a truncated row is treated
  as a finished one. Value targets are advantages + values (before any normalisation).
  discount = trace = 1 gives reward_to_go - values; trace = 0 the one-step error.

  Args:
    token_rewards: [..., T].
    values: [..., T].
    mask: bool[..., T].
    discount: per valid token.
    trace: the decay, lambda in the paper.

  Returns:
    [..., T].
  """
  chex.assert_equal_shape([token_rewards, values, mask])

  def step(carry, now):
    next_value, next_advantage = carry
    reward, value, valid = now
    delta = reward + discount * next_value - value
    advantage = jnp.where(valid, delta + discount * trace * next_advantage, next_advantage)
    return (jnp.where(valid, value, next_value), advantage), jnp.where(valid, advantage, 0)

  start = jnp.zeros_like(values[..., 0])
  return _scan_backwards(step, (start, start), token_rewards, values, mask)


def _scan_backwards(step: Callable, carry, *arrays: Array) -> Array:
  """Scans [..., T] arrays from the last position to the first."""
  time_major = tuple(jnp.moveaxis(x, -1, 0) for x in arrays)
  _, out = jax.lax.scan(step, carry, time_major, reverse=True)
  return jnp.moveaxis(out, 0, -1)


TABLE = table(reward_to_go, gae)
Part = Annotated[Callable, TABLE]
