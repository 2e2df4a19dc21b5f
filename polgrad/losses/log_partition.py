"""Estimates of log Z, the centre of a regression on rewards.

A function of `TABLE` fills the slot `center` of `objectives.Regression`, whose loss is
scale * (zeta - center)^2 / 2 with zeta = R / beta - sum_t log(pi / anchor), one number per row. For
the policy pi = anchor exp(R / beta) / Z, the tilted anchor, zeta is log Z for every completion of a
prompt, whichever policy sampled it. The loss gives each log-probability of the row the descent weight
scale * (zeta - center). Methods differ in how they estimate log Z. The input `residual` is zeta;
`scaled_rewards` is R / beta.

No gradient flows through an estimate, unless its docstring says so.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from polgrad.losses.groups import Groups, maximum, same, size, total
from polgrad.registry import table
from polgrad.types import Array


def zero(residual: Array) -> Array:
  """0: the reward is assumed to be normalised already, so log Z = 0 (standard).

  Args:
    residual: [B].

  Returns:
    [B].
  """
  return jnp.zeros_like(residual)


def group_mean(residual: Array, group_ids: Array) -> Array:
  """The mean residual of the group, with gradient: VarGrad (arXiv:2010.10436).

  Args:
    residual: [B].
    group_ids: i32[B].

  Returns:
    [B].
  """
  group = _same(residual, group_ids)
  return total(residual, group) / size(group)


def group_mean_detached(residual: Array, group_ids: Array) -> Array:
  """`group_mean` without gradient: TBA (arXiv:2503.18929).

  The differences residual - group_mean sum to 0 in a group, so the gradient of the loss is the same as
  with `group_mean`.

  Args:
    residual: [B].
    group_ids: i32[B].

  Returns:
    [B].
  """
  return jax.lax.stop_gradient(group_mean(residual, group_ids))


def leave_one_out(residual: Array, group_ids: Array) -> Array:
  """The mean residual of the other rows of the group, with gradient: CoPG (arXiv:2406.19185).

  In a group of G rows, residual - center is G/(G - 1) times that of `group_mean`; in a group of two it
  is the difference between the two residuals. A group of one is its own centre and has loss 0.

  Args:
    residual: [B].
    group_ids: i32[B].

  Returns:
    [B].
  """
  group = _same(residual, group_ids)
  rows = size(group)
  others = total(residual, group) - residual
  return jnp.where(rows > 1, others / jnp.maximum(rows - 1, 1), residual)


def reward_mean(scaled_rewards: Array, group_ids: Array) -> Array:
  """The mean of R / beta in the group: Kimi k1.5 (arXiv:2501.12599).

  It leaves out the mean of the log-ratios, so the optimum of the regression is not the tilted anchor,
  and it depends on which policy sampled.

  Args:
    scaled_rewards: [B].
    group_ids: i32[B].

  Returns:
    [B].
  """
  group = _same(scaled_rewards, group_ids)
  return jax.lax.stop_gradient(total(scaled_rewards, group) / size(group))


def log_partition(scaled_rewards: Array, group_ids: Array) -> Array:
  """log mean exp(R / beta) over the group: mirror descent with an estimated Z (arXiv:2501.12599).

  If the anchor itself samples, the estimate tends to log Z as the group grows. In a small group it is
  too low on average.

  Args:
    scaled_rewards: [B].
    group_ids: i32[B].

  Returns:
    [B].
  """
  group = _same(scaled_rewards, group_ids)
  # log of the mean of exp, computed without overflow.
  largest = maximum(scaled_rewards, group)
  largest = jnp.where(jnp.isfinite(largest), largest, 0)
  mean = total(jnp.exp(scaled_rewards - largest), group) / size(group)
  return jax.lax.stop_gradient(largest + jnp.log(mean))


def value(first_value: Array) -> Array:
  """A learned V(x) / beta, trained by the same loss: DRO-V (arXiv:2405.19107).

  The loss is minimal at the tilted anchor with V = beta log Z, for samples of any policy that gives
  every completion a positive probability.

  Args:
    first_value: [B], the critic's value before the first token, in units of beta; carries gradient.

  Returns:
    [B].
  """
  chex.assert_rank(first_value, 1)
  return first_value


def soft_baseline(
  baseline_rewards: Array, beta: Array, *, baseline_temperature: float = 0.5
) -> Array:
  """V* / beta, V* = temperature log mean_k exp(R'_k / temperature) over samples of the reference:
  the first stage of A*-PO (arXiv:2505.20686).

  Args:
    baseline_rewards: [B, n], R', rewards of n completions of the row's prompt by the reference.
    beta: [], the temperature of the regression, in units of the reward.
    baseline_temperature: the temperature of V*, in units of the reward. As it tends to 0, V* tends to
      the largest of the n rewards.

  Returns:
    [B].
  """
  chex.assert_rank([baseline_rewards, beta], [2, 0])
  log_sum = jax.nn.logsumexp(baseline_rewards / baseline_temperature, axis=-1)
  log_mean = log_sum - jnp.log(baseline_rewards.shape[-1])
  return jax.lax.stop_gradient(baseline_temperature * log_mean / beta)


def _same(x: Array, group_ids: Array) -> Groups:
  """The groups of equal ids; checks the shapes."""
  chex.assert_equal_shape([x, group_ids])
  return same(group_ids)


TABLE = table(
  'log_partition',
  zero,
  group_mean,
  group_mean_detached,
  leave_one_out,
  reward_mean,
  log_partition,
  value,
  soft_baseline,
)
Part = Annotated[Callable, TABLE]
