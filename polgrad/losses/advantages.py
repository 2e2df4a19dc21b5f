"""Advantages of rows from their rewards.

A function of `TABLE` fills the slot `advantage` of an estimator in `credit`; `TABLE` includes the
functions of `baselines`, `difficulty` and `strata`. A function of `NORMALIZERS` fills the slot
`normalizer` and works on tokens.

A function reads the arrays that it names: rewards, group_ids, valid, and for some baselines the mask,
token statistics or rewards of other samples. A row that is not `valid` enters no statistic and gets
advantage 0. Rows belong to one group when their `group_ids` are equal (see `groups`); G is the number
of valid rows in a group. Except for `raw`, equal rewards give exactly 0 in any precision.

Advantages are constants of the policy gradient: the trainer computes them before it differentiates.
The functions themselves do not call stop_gradient.

The examples need `import jax.numpy as jnp, numpy as np` and `from polgrad.losses import advantages`.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from polgrad.losses import baselines, difficulty, strata
from polgrad.losses.groups import (
  center,
  divide,
  everyone,
  members,
  normalized,
  size,
  total,
  variance,
)
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

  >>> rewards, valid = jnp.array([1.0, 3.0]), jnp.array([True, False])
  >>> print(np.asarray(advantages.raw(rewards, jnp.array([0, 0]), valid)))
  [1. 0.]
  """
  _check(rewards, group_ids, valid)
  return jnp.where(valid, rewards, 0)


def group_mean(rewards: Array, group_ids: Array, valid: Array) -> Array:
  """A_i = R_i - mean of its group: Dr. GRPO (arXiv:2503.20783).

  The row is part of its own baseline, so the expected gradient is (G - 1)/G times the true one. A
  group of one gets 0.

  Args:
    rewards: [B].
    group_ids: i32[B].
    valid: bool[B].

  Returns:
    [B], summing to 0 in every group up to rounding.

  >>> rewards, group_ids = jnp.array([1.0, 0.0, 5.0, 3.0]), jnp.array([0, 0, 1, 1])
  >>> print(np.asarray(advantages.group_mean(rewards, group_ids, jnp.ones(4, bool))))
  [ 0.5 -0.5  1.  -1. ]
  """
  _check(rewards, group_ids, valid)
  return center(rewards, members(group_ids, valid))


def group_normalized(
  rewards: Array, group_ids: Array, valid: Array, *, ddof: int = 1, eps: float = 1e-6
) -> Array:
  """A_i = (R_i - mean) / (std + eps) inside the group: GRPO (arXiv:2402.03300).

  Code bases differ: verl and TRL use ddof=1, the theory and others ddof=0, and eps ranges from 1e-9 to
  1e-4. A group of equal rewards and a group of one get 0; verl returns the reward itself for a group
  of one.

  Args:
    rewards: [B].
    group_ids: i32[B].
    valid: bool[B].
    ddof: 1 divides the sum of squares by G - 1, 0 by G.
    eps: added to the standard deviation, in units of the reward.

  Returns:
    [B], without unit. For eps = 0, a R + b with a > 0 has the same advantages as R.

  >>> rewards = jnp.array([1.0, 0.0, 0.0, 0.0])
  >>> got = advantages.group_normalized(rewards, jnp.zeros(4, int), jnp.ones(4, bool))
  >>> print(np.asarray(got).round(2))
  [ 1.5 -0.5 -0.5 -0.5]
  """
  _check(rewards, group_ids, valid)
  return normalized(rewards, members(group_ids, valid), ddof, eps)


def batch_scaled(
  rewards: Array, group_ids: Array, valid: Array, *, ddof: int = 1, eps: float = 1e-6
) -> Array:
  """A_i = (R_i - mean of its group) / (std of the batch + eps): the mixed normalisation of Lite PPO
  (arXiv:2508.08221).

  The standard deviation is that of the rewards of all valid rows, around their common mean. All groups
  are scaled by one number, so an easy or hard prompt, whose rewards hardly differ, is not enlarged.

  Args:
    rewards: [B].
    group_ids: i32[B].
    valid: bool[B].
    ddof: 1 divides the sum of squares by the number of valid rows - 1, 0 by their number.
    eps: added to the standard deviation, in units of the reward.

  Returns:
    [B], without unit, summing to 0 in every group up to rounding.

  >>> rewards, group_ids = jnp.array([1.0, 0.0, 1.0, 1.0]), jnp.array([0, 0, 1, 1])
  >>> got = advantages.batch_scaled(rewards, group_ids, jnp.ones(4, bool))
  >>> print(np.asarray(got).round(2))
  [ 1. -1.  0.  0.]
  """
  _check(rewards, group_ids, valid)
  batch = everyone(valid)
  std = jnp.sqrt(variance(center(rewards, batch), batch, ddof))
  return divide(center(rewards, members(group_ids, valid)), std + eps)


def leave_one_out(rewards: Array, group_ids: Array, valid: Array) -> Array:
  """A_i = R_i - mean of the other rows of its group: RLOO (arXiv:2402.14740).

  The gradient is unbiased for G > 1, since the baseline does not depend on the row. The advantage is
  G/(G - 1) times that of `group_mean`. A group of one has no baseline and gets 0.

  Args:
    rewards: [B].
    group_ids: i32[B].
    valid: bool[B].

  Returns:
    [B].

  >>> rewards = jnp.array([1.0, 0.0, 0.0])
  >>> got = advantages.leave_one_out(rewards, jnp.zeros(3, int), jnp.ones(3, bool))
  >>> print(np.asarray(got).round(2))
  [ 1.  -0.5 -0.5]
  """
  _check(rewards, group_ids, valid)
  group = members(group_ids, valid)
  rows = size(group)
  return center(rewards, group) * rows / jnp.maximum(rows - 1, 1)


def leave_one_out_normalized(
  rewards: Array, group_ids: Array, valid: Array, *, ddof: int = 1, eps: float = 1e-6
) -> Array:
  """A_i = (R_i - mean) / (std + eps), both of the other rows of its group: `leave_one_out` with a scale
  that does not depend on the row either (standard).

  So the expected gradient is that of the rewards, each divided by a positive number. A row whose
  group is otherwise equal is divided by eps alone: with rewards 0 and 1, choose an eps like 0.1.

  Args:
    rewards: [B].
    group_ids: i32[B].
    valid: bool[B].
    ddof: 1 divides the sum of squares of the G - 1 other rows by G - 2, 0 by G - 1.
    eps: added to the standard deviation, in units of the reward.

  Returns:
    [B], without unit; 0 in groups of fewer than three rows, where there is no scale.

  >>> rewards = jnp.array([1.0, 0.0, 2.0])
  >>> got = advantages.leave_one_out_normalized(rewards, jnp.zeros(3, int), jnp.ones(3, bool), ddof=0)
  >>> print(np.asarray(got).round(2))
  [ 0. -3.  3.]
  """
  _check(rewards, group_ids, valid)
  group = members(group_ids, valid)
  rows, centered = size(group), center(rewards, group)
  # Without row i, with c its distance from the mean of all: the mean is lower by c / (G - 1), and the
  # sum of squares by c^2 G / (G - 1). A difference that is only a rounding error is set to 0; NaN stays.
  factor = rows / jnp.maximum(rows - 1, 1)
  squares = total(jnp.square(centered), group)
  others = squares - jnp.square(centered) * factor
  others = jnp.where(others <= 1e-6 * squares, 0, others)
  std = jnp.sqrt(others / jnp.maximum(rows - 1 - ddof, 1))
  return jnp.where(rows > 2, divide(centered * factor, std + eps), 0)


def pass_at_k(
  rewards: Array,
  group_ids: Array,
  valid: Array,
  *,
  k: int = 2,
  least: float = 1.0,
  eps: float = 1e-6,
) -> Array:
  """A_i = m (right_i - mean) / (sigma + eps): pass@k training (arXiv:2508.10751).

  A group of n rows, c of them right, is seen as all its subsets of k rows; a subset has the reward 1 if
  one of its rows is right. Its mean reward is rho = 1 - C(n - c, k) / C(n, k), its standard deviation
  sigma = sqrt(rho (1 - rho)), and a row gets the mean normalised advantage of the subsets that it is
  in: (1 - rho) / (sigma + eps) if it is right, (1 - rho - m) / (sigma + eps) if it is wrong, where
  m = C(n - c - 1, k - 1) / C(n - 1, k - 1). Since 1 - rho = (1 - c/n) m, that is the formula above.

  k = 1 is `group_normalized` of right and wrong with ddof=0. A group with fewer than k wrong rows is
  always passed and gets 0, and so does every group of fewer than k rows.

  Args:
    rewards: [B].
    group_ids: i32[B].
    valid: bool[B].
    k: number of rows of which one should be right.
    least: least reward of a right row, in units of the reward.
    eps: added to the standard deviation of the reward 0 or 1 of a subset.

  Returns:
    [B], without unit, summing to 0 in every group up to rounding.

  Raises:
    ValueError: k < 1.

  >>> rewards = jnp.array([1.0, 0.0, 0.0, 0.0])
  >>> got = advantages.pass_at_k(rewards, jnp.zeros(4, int), jnp.ones(4, bool))
  >>> print(np.asarray(got).round(2))
  [ 1.   -0.33 -0.33 -0.33]
  """
  _check(rewards, group_ids, valid)
  if k < 1:
    raise ValueError(f'k is a number of rows and must be at least 1, got {k}')
  group = members(group_ids, valid)
  right = (rewards >= least).astype(rewards.dtype)
  right = jnp.where(jnp.isnan(rewards), rewards, right)
  rows = size(group).astype(rewards.dtype)
  wrong = total(1 - right, group)
  # C(wrong - 1, k - 1) / C(rows - 1, k - 1) as a product, for group sizes that are only data.
  drawn = jnp.arange(1, k, dtype=rewards.dtype)[None, :]
  left = jnp.maximum(wrong[:, None] - drawn, 0) / jnp.maximum(rows[:, None] - drawn, 1)
  others_wrong = jnp.prod(left, axis=-1)
  failed = divide(wrong, rows) * others_wrong  # 1 - rho
  std = jnp.sqrt(failed * (1 - failed))
  return divide(others_wrong * center(right, group), std + eps)


def batch_mean(rewards: Array, group_ids: Array, valid: Array) -> Array:
  """A_i = R_i - mean of the batch: one baseline for all prompts (standard).

  The row is part of its own baseline, so the expected gradient is (n - 1)/n times the true one, with n
  the number of valid rows.

  Args:
    rewards: [B].
    group_ids: i32[B]; not used.
    valid: bool[B].

  Returns:
    [B].

  >>> rewards, group_ids = jnp.array([1.0, 0.0, 5.0, 2.0]), jnp.array([0, 0, 1, 1])
  >>> print(np.asarray(advantages.batch_mean(rewards, group_ids, jnp.ones(4, bool))))
  [-1. -2.  3.  0.]
  """
  _check(rewards, group_ids, valid)
  return center(rewards, everyone(valid))


def batch_normalized(
  rewards: Array, group_ids: Array, valid: Array, *, ddof: int = 1, eps: float = 1e-8
) -> Array:
  """A_i = (R_i - mean) / sqrt(var + eps) over the batch: REINFORCE++ (arXiv:2501.03262).

  Every row counts the same; in `whiten` every token counts the same.

  Args:
    rewards: [B].
    group_ids: i32[B]; not used.
    valid: bool[B].
    ddof: 1 divides the sum of squares by the number of valid rows - 1, 0 by their number.
    eps: added to the variance, in squared units of the reward.

  Returns:
    [B].

  >>> rewards = jnp.array([1.0, 0.0, 0.0, 0.0])
  >>> got = advantages.batch_normalized(rewards, jnp.zeros(4, int), jnp.ones(4, bool))
  >>> print(np.asarray(got).round(2))
  [ 1.5 -0.5 -0.5 -0.5]
  """
  _check(rewards, group_ids, valid)
  batch = everyone(valid)
  centered = center(rewards, batch)
  return divide(centered, jnp.sqrt(variance(centered, batch, ddof) + eps))


def identity(advantages: Array, mask: Array) -> Array:
  """A where the mask is True, 0 elsewhere: no normalisation (standard).

  Args:
    advantages: [B, T].
    mask: bool[B, T].

  Returns:
    [B, T].

  >>> got = advantages.identity(jnp.array([[2.0, 2.0]]), jnp.array([[True, False]]))
  >>> print(np.asarray(got))
  [[2. 0.]]
  """
  chex.assert_equal_shape([advantages, mask])
  return jnp.where(mask, advantages, 0)


def whiten(advantages: Array, mask: Array, *, ddof: int = 1, eps: float = 1e-8) -> Array:
  """(A - mean) / sqrt(var + eps) over all valid tokens (PPO practice; arXiv:2501.03262).

  Every token counts the same, so long rows have more influence on the statistics. Pass the
  whole batch, not a micro-batch: the statistics are taken over the array given.

  Args:
    advantages: [B, T].
    mask: bool[B, T].
    ddof: 1 divides the sum of squares by the number of tokens - 1 (the unbiased variance), 0 by their
      number.
    eps: added to the variance, in squared units of the reward.

  Returns:
    [B, T]; exactly 0 outside the mask, and everywhere when all valid entries are equal.

  >>> mask = jnp.array([[True, False], [True, True]])
  >>> got = advantages.whiten(jnp.array([[2.0, 2.0], [0.0, 1.0]]), mask)
  >>> print(np.asarray(got).round(2))
  [[ 1.  0.]
   [-1.  0.]]
  """
  chex.assert_equal_shape([advantages, mask])
  # Subtracting one valid entry first makes equal advantages exactly 0, free of rounding.
  shifted = jnp.where(mask, advantages - advantages.ravel()[jnp.argmax(mask)], 0)
  count = jnp.sum(mask)
  centered = jnp.where(mask, shifted - jnp.sum(shifted) / jnp.maximum(count, 1), 0)
  variance = jnp.sum(jnp.square(centered)) / jnp.maximum(count - ddof, 1)
  return centered * jax.lax.rsqrt(variance + eps)


def _check(rewards: Array, group_ids: Array, valid: Array) -> None:
  chex.assert_rank(rewards, 1)
  chex.assert_equal_shape([rewards, group_ids, valid])


TABLE = (
  baselines.TABLE
  | difficulty.TABLE
  | strata.TABLE
  | table(
    'advantages',
    raw,
    group_mean,
    group_normalized,
    batch_scaled,
    leave_one_out,
    leave_one_out_normalized,
    pass_at_k,
    batch_mean,
    batch_normalized,
  )
)
Part = Annotated[Callable, TABLE]

NORMALIZERS = table('advantages', identity, whiten)
NormalizerPart = Annotated[Callable, NORMALIZERS]
