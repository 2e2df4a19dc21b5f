"""Rewards of rows to advantages of rows. Everything here is data for the policy gradient.

Groups are data: rows belong together when their `group_ids` are equal, wherever they stand in the
batch, and groups may differ in size. A row that is not `valid` enters no statistic and gets 0. A
mean is subtracted as the mean of differences, so equal rewards give exactly 0 in any precision.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

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
  return _center(rewards, _members(group_ids, valid))


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
  members = _members(group_ids, valid)
  centered = _center(rewards, members)
  return _divide(centered, jnp.sqrt(_variance(centered, members, ddof)) + eps)


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
  members = _members(group_ids, valid)
  size = jnp.sum(members, axis=-1)
  return _center(rewards, members) * size / jnp.maximum(size - 1, 1)


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
  return _center(rewards, valid[:, None] & valid[None, :])


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
  members = valid[:, None] & valid[None, :]
  centered = _center(rewards, members)
  return _divide(centered, jnp.sqrt(_variance(centered, members, ddof=1) + eps))


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


def _members(group_ids: Array, valid: Array) -> Array:
  """bool[B, B]: row j counts in the statistics of row i."""
  return (group_ids[:, None] == group_ids[None, :]) & valid[:, None] & valid[None, :]


def _center(rewards: Array, members: Array) -> Array:
  differences = jnp.where(members, rewards[:, None] - rewards[None, :], 0)
  return jnp.sum(differences, axis=-1) / jnp.maximum(jnp.sum(members, axis=-1), 1)


def _variance(centered: Array, members: Array, ddof: int) -> Array:
  squares = jnp.where(members, jnp.square(centered)[None, :], 0)
  return jnp.sum(squares, axis=-1) / jnp.maximum(jnp.sum(members, axis=-1) - ddof, 1)


def _divide(centered: Array, scale: Array) -> Array:
  """centered / scale, and 0 / 0 = 0: equal rewards with eps = 0."""
  return jnp.where(scale > 0, centered / jnp.where(scale > 0, scale, 1), 0)


TABLE = table(raw, group_mean, group_normalized, leave_one_out, batch_mean, batch_normalized)
Part = Annotated[Callable, TABLE]

NORMALIZERS = table(identity, whiten)
NormalizerPart = Annotated[Callable, NORMALIZERS]
