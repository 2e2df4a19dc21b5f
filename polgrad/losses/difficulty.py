"""Advantages in which the share of right answers says how much a prompt counts.

`advantages.TABLE` includes the functions of `TABLE`, so they fill the slot `advantage` of an estimator
in `credit`. Group normalisation counts a prompt by sqrt(p (1 - p)), with p the share of its answers
that are right; the functions here choose another dependence on p.

A row that is not `valid` enters no statistic and gets 0. All results are constants of the policy
gradient, but no function calls stop_gradient.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax.numpy as jnp
from jax.scipy.special import gammaln

from polgrad.losses.groups import (
  center,
  divide,
  everyone,
  first,
  first_best,
  maximum,
  members,
  normalized,
  ordered,
  running_total,
  size,
  total,
  variance,
)
from polgrad.registry import AtLeastOne, table
from polgrad.types import Array


def beta_normalized(
  rewards: Array,
  group_ids: Array,
  valid: Array,
  *,
  low: float = 0.0,
  high: float = 1.0,
  largest: float = 1e6,
) -> Array:
  """A_i = (x_i - p) min(1 / f(p), largest), f the density of a Beta distribution: BNPO
  (arXiv:2506.02864).

  x is the reward, mapped linearly so that `low` becomes 0 and `high` 1, and p is its mean in the group.
  A Beta distribution with parameters a and b is fitted to the p of all groups by its mean m and
  unbiased variance v, a = (m (1 - m) / v - 1) m and b = (m (1 - m) / v - 1) (1 - m). The density f has
  the parameters max(1, 1 + a / 3) and max(1, 1 + b / 3), for which the paper shows that the variance of
  the gradient is least. Parameters 1 and 1 give `advantages.group_mean`. Parameters 3/2 and 3/2 give pi
  / 8 times `advantages.group_normalized` with ddof 0.

  With a single group, or if all p are equal, nothing can be fitted and the parameters are 1.

  Args:
    rewards: [B], in [low, high].
    group_ids: i32[B].
    valid: bool[B].
    low: the least reward.
    high: the largest reward.
    largest: largest factor of a group.

  Returns:
    [B], without unit, summing to 0 in every group up to rounding.

  Raises:
    ValueError: `low` is not below `high`.
  """
  _check(rewards, group_ids, valid)
  if not low < high:
    raise ValueError(f'low must be below high, got {low} and {high}')
  x = (rewards - low) / (high - low)
  group = members(group_ids, valid)
  p = divide(total(x, group), size(group))
  # The mean and the variance over groups, each of which counts once.
  groups = everyone(first(group))
  spread = jnp.sum(variance(center(p, groups), groups, 1) * first(group)) / jnp.maximum(
    jnp.sum(first(group)), 1
  )
  mean = jnp.sum(jnp.where(first(group), p, 0)) / jnp.maximum(jnp.sum(first(group)), 1)
  excess = divide(mean * (1 - mean), spread) - 1
  excess = jnp.where(spread > 0, excess, 0)
  a, b = (jnp.maximum(1, 1 + excess * m / 3) for m in (mean, 1 - mean))
  inside = (p > 0) & (p < 1)
  q = jnp.where(inside, p, 0.5)
  log_beta = gammaln(a) + gammaln(b) - gammaln(a + b)
  log_density = (a - 1) * jnp.log(q) + (b - 1) * jnp.log1p(-q) - log_beta
  factor = jnp.minimum(jnp.exp(-log_density), largest)
  return center(x, group) * jnp.where(inside, factor, 1)


def two_sided(
  rewards: Array, group_ids: Array, valid: Array, *, least: float = 1.0, eps: float = 1e-6
) -> Array:
  """A_i = (w / sqrt(p) + (1 - w) / sqrt(1 - p)) a_i / 2: the difficulty weights of A-GRAE
  (arXiv:2602.05548).

  a = (right_i - p) / (std + eps) with ddof 0, p the share of right rows of the group, and w the share
  of right rows of the batch, the proficiency of the policy. sum_i |a_i| is 2 G sqrt(p (1 - p)), so the
  first term counts a group by sqrt(1 - p), which is most for hard prompts, and the second one by
  sqrt(p), which is most for easy ones. The better the policy, the more the hard prompts count.

  Args:
    rewards: [B].
    group_ids: i32[B].
    valid: bool[B].
    least: least reward of a right row, in units of the reward.
    eps: added to the standard deviation of the reward 0 or 1.

  Returns:
    [B], without unit, summing to 0 in every group up to rounding; 0 where all or none are right.
  """
  _check(rewards, group_ids, valid)
  right, group = _right(rewards, least), members(group_ids, valid)
  p = divide(total(right, group), size(group))
  proficiency = jnp.sum(jnp.where(valid, right, 0)) / jnp.maximum(jnp.sum(valid), 1)
  plain = normalized(right, group, 0, eps)
  hard, easy = divide(plain, jnp.sqrt(p)), divide(plain, jnp.sqrt(1 - p))
  return (proficiency * hard + (1 - proficiency) * easy) / 2


def max_at_k(rewards: Array, group_ids: Array, valid: Array, *, k: AtLeastOne = 2) -> Array:
  """A_i = n times what row i adds to the mean of max over k of n rows: PKPO (arXiv:2505.15201, eq. 33).

  With rewards sorted ascending and S_i the subsets of k rows that contain row i,

      A_i = n / C(n, k) sum over S in S_i of (max of S - max of S without i)
          = n / C(n, k) sum over j < i of C(j - 1, k - 2) (R_i - R_j)

  where R_j is the j-th smallest reward. The expected gradient of sum_i (A_i / n) log pi(y_i) is exactly
  that of E[max of k rewards], so its mean over rows needs the factor n. Subtracting the maximum of the
  other rows makes the variance small. No further baseline and no scale belongs to these advantages. For
  k > 1 they are never negative; k = 1 is `advantages.leave_one_out`.

  Args:
    rewards: [B], any real numbers.
    group_ids: i32[B].
    valid: bool[B].
    k: number of rows of which the best counts.

  Returns:
    [B], in units of the reward; 0 in groups of fewer than k rows, and of fewer than two.

  Raises:
    ValueError: k < 1.
  """
  _check(rewards, group_ids, valid)
  if k < 1:
    raise ValueError(f'k is a number of rows and must be at least 1, got {k}')
  group = members(group_ids, valid)
  rows, x = size(group).astype(rewards.dtype), center(rewards, group)
  if k == 1:
    return x * rows / jnp.maximum(rows - 1, 1)
  ranked = ordered(x, group)
  before = (running_total(jnp.ones_like(x), ranked) - 1)[:, None]  # rows with a smaller reward
  # C(before, k - 2) / C(n - 2, k - 2) as a product, for group sizes that are only data.
  drawn = jnp.arange(k - 2, dtype=rewards.dtype)[None, :]
  left = jnp.maximum(before - drawn, 0) / jnp.maximum(rows[:, None] - 2 - drawn, 1)
  weight = jnp.prod(left, axis=-1)
  # The sum of row i may include row i, which adds weight (R_i - R_i) = 0.
  added = x * running_total(weight, ranked) - running_total(weight * x, ranked)
  return jnp.where(rows >= k, k * (k - 1) * added / jnp.maximum(rows - 1, 1), 0)


def best_only(rewards: Array, group_ids: Array, valid: Array) -> Array:
  """A = R - second best reward for the best row of a group, 0 for all others (arXiv:2503.19595).

  This is the gradient of the best of all G rows, since only the best one changes it, and the second best
  is what the group would have without it. If several rows are best, all get 0.

  Args:
    rewards: [B].
    group_ids: i32[B].
    valid: bool[B].

  Returns:
    [B], in units of the reward, never negative; 0 in a group of one.
  """
  _check(rewards, group_ids, valid)
  group = members(group_ids, valid)
  best = first_best(rewards, group)
  second = maximum(jnp.where(best, -jnp.inf, rewards), group)  # of a group of one: -inf
  return jnp.where(
    best & (second > -jnp.inf), rewards - second, jnp.where(jnp.isnan(second), second, 0)
  )


def _right(rewards: Array, least: float) -> Array:
  """1 for a reward of at least `least`, 0 for a smaller one, NaN for NaN: [B]."""
  return jnp.where(jnp.isnan(rewards), rewards, (rewards >= least).astype(rewards.dtype))


def _check(rewards: Array, group_ids: Array, valid: Array) -> None:
  chex.assert_rank(rewards, 1)
  chex.assert_equal_shape([rewards, group_ids, valid])


TABLE = table('difficulty', beta_normalized, two_sided, max_at_k, best_only)
Part = Annotated[Callable, TABLE]
