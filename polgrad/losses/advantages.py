"""Rewards of rows to advantages of rows. Everything here is data for the policy gradient.

A function names the arrays that it reads: rewards, group_ids, valid, and for some baselines the mask,
token statistics or rewards of other samples. A row that is not `valid` enters no statistic and gets
0. Groups are data (see `groups`), and equal rewards give exactly 0 in any precision.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from polgrad.losses import baselines
from polgrad.losses.groups import center, divide, everyone, members, variance
from polgrad.registry import table
from polgrad.types import Array


def raw(rewards: Array, group_ids: Array, valid: Array) -> Array:
  """A = R: REINFORCE without a baseline (Williams 1992; standard).

  Args:
    rewards: [B].
    group_ids: i32[B]; not used.
    valid: bool[B].

  Returns:
    [B].
  """
  _check(rewards, group_ids, valid)
  return jnp.where(valid, rewards, 0)


def group_mean(rewards: Array, group_ids: Array, valid: Array) -> Array:
  """A_i = R_i - mean of its group: Dr. GRPO (arXiv:2503.20783).

  The row is part of its own baseline: the expected gradient is (G - 1)/G of the true one. A group
  of one gets 0.

  Args:
    rewards: [B].
    group_ids: i32[B].
    valid: bool[B].

  Returns:
    [B], summing to 0 in every group.
  """
  _check(rewards, group_ids, valid)
  return center(rewards, members(group_ids, valid))


def group_normalized(
  rewards: Array, group_ids: Array, valid: Array, *, ddof: int = 1, eps: float = 1e-6
) -> Array:
  """A_i = (R_i - mean) / (std + eps) inside the group: GRPO (arXiv:2402.03300).

  Peers differ: verl and TRL take ddof=1, the theory and others ddof=0; eps is 1e-9 to 1e-4. A group
  of equal rewards and a group of one get 0 (verl passes the reward of a single row through).

  Args:
    rewards: [B].
    group_ids: i32[B].
    valid: bool[B].
    ddof: 1 divides the sum of squares by n - 1, 0 by n.
    eps: added to the standard deviation.

  Returns:
    [B], without unit: a positive affine map of the rewards changes nothing but through eps.
  """
  _check(rewards, group_ids, valid)
  group = members(group_ids, valid)
  centered = center(rewards, group)
  return divide(centered, jnp.sqrt(variance(centered, group, ddof)) + eps)


def leave_one_out(rewards: Array, group_ids: Array, valid: Array) -> Array:
  """A_i = R_i - mean of the other rows of its group: RLOO (arXiv:2402.14740).

  Unbiased, since the baseline does not depend on the row. Equal to G/(G - 1) times `group_mean`.
  A group of one has no baseline and gets 0.

  Args:
    rewards: [B].
    group_ids: i32[B].
    valid: bool[B].

  Returns:
    [B].
  """
  _check(rewards, group_ids, valid)
  group = members(group_ids, valid)
  size = jnp.sum(group, axis=-1)
  return center(rewards, group) * size / jnp.maximum(size - 1, 1)


def batch_mean(rewards: Array, group_ids: Array, valid: Array) -> Array:
  """A_i = R_i - mean of the batch: one baseline for all prompts (standard).

  Args:
    rewards: [B].
    group_ids: i32[B]; not used.
    valid: bool[B].

  Returns:
    [B].
  """
  _check(rewards, group_ids, valid)
  return center(rewards, everyone(valid))


def batch_normalized(rewards: Array, group_ids: Array, valid: Array, *, eps: float = 1e-8) -> Array:
  """A_i = (R_i - mean) / sqrt(var + eps) over the batch: REINFORCE++ (arXiv:2501.03262).

  The variance is the unbiased one. Rows count the same here; `whiten` counts tokens.

  Args:
    rewards: [B].
    group_ids: i32[B]; not used.
    valid: bool[B].
    eps: added to the variance.

  Returns:
    [B].
  """
  _check(rewards, group_ids, valid)
  batch = everyone(valid)
  centered = center(rewards, batch)
  return divide(centered, jnp.sqrt(variance(centered, batch, ddof=1) + eps))


def identity(advantages: Array, mask: Array) -> Array:
  """Advantages as they are, 0 outside the mask (standard).

  Args:
    advantages: [B, T].
    mask: bool[B, T].

  Returns:
    [B, T].
  """
  chex.assert_equal_shape([advantages, mask])
  return jnp.where(mask, advantages, 0)


def whiten(advantages: Array, mask: Array, *, eps: float = 1e-8) -> Array:
  """(A - mean) / sqrt(var + eps) over all valid tokens (PPO practice; arXiv:2501.03262).

  The variance is the unbiased one. Tokens count the same, so long rows weigh more. The statistics
  are those of the array given: pass the whole batch, not a micro-batch.

  Args:
    advantages: [B, T].
    mask: bool[B, T].
    eps: added to the variance.

  Returns:
    [B, T]; exactly 0 outside the mask, and everywhere when all valid entries are equal.
  """
  chex.assert_equal_shape([advantages, mask])
  # Measured from one valid entry, equal advantages are exactly 0 before any rounding.
  shifted = jnp.where(mask, advantages - advantages.ravel()[jnp.argmax(mask)], 0)
  count = jnp.sum(mask)
  centered = jnp.where(mask, shifted - jnp.sum(shifted) / jnp.maximum(count, 1), 0)
  variance = jnp.sum(jnp.square(centered)) / jnp.maximum(count - 1, 1)
  return centered * jax.lax.rsqrt(variance + eps)


def _check(rewards: Array, group_ids: Array, valid: Array) -> None:
  chex.assert_rank(rewards, 1)
  chex.assert_equal_shape([rewards, group_ids, valid])


TABLE = baselines.TABLE | table(
  'advantages',
  raw,
  group_mean,
  group_normalized,
  leave_one_out,
  batch_mean,
  batch_normalized,
)
Part = Annotated[Callable, TABLE]

NORMALIZERS = table('advantages', identity, whiten)
NormalizerPart = Annotated[Callable, NORMALIZERS]
