"""Estimates of log Z, the centre of the regression on rewards.

The policy pi = anchor exp(R / beta) / Z is where zeta = R / beta - sum_t log(pi / anchor) is the same
number log Z for every completion of a prompt, whoever drew it. The regression
scale * (zeta - center)^2 / 2 descends with weight scale * (zeta - center) on every log-probability of
the row; which estimate of log Z stands in `center` makes the method. `residual` is zeta and
`scaled_rewards` R / beta.

Unless said otherwise the estimate is a constant for the gradient.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from polgrad.losses.groups import same, total
from polgrad.registry import table
from polgrad.types import Array


def zero(residual: Array) -> Array:
  """No centre: the reward is taken as normalised already (standard).

  Args:
    residual: [B].

  Returns:
    [B].
  """
  return jnp.zeros_like(residual)


def group_mean(residual: Array, group_ids: Array) -> Array:
  """The mean of the group, with its gradient: VarGrad (arXiv:2010.10436).

  Args:
    residual: [B].
    group_ids: i32[B].

  Returns:
    [B].
  """
  group = _same(residual, group_ids)
  return total(residual, group) / jnp.sum(group, axis=-1)


def group_mean_detached(residual: Array, group_ids: Array) -> Array:
  """`group_mean` as a constant: TBA (arXiv:2503.18929).

  Residuals sum to 0 in a group, so the gradient of the loss is the same as with `group_mean`.

  Args:
    residual: [B].
    group_ids: i32[B].

  Returns:
    [B].
  """
  return jax.lax.stop_gradient(group_mean(residual, group_ids))


def leave_one_out(residual: Array, group_ids: Array) -> Array:
  """The mean of the other rows of the group, with its gradient: CoPG (arXiv:2406.19185).

  Residuals are G/(G - 1) times those of `group_mean`; in a group of two they are the difference of
  the pair. A group of one is its own centre and has loss 0.

  Args:
    residual: [B].
    group_ids: i32[B].

  Returns:
    [B].
  """
  group = _same(residual, group_ids)
  size = jnp.sum(group, axis=-1)
  others = total(residual, group) - residual
  return jnp.where(size > 1, others / jnp.maximum(size - 1, 1), residual)


def reward_mean(scaled_rewards: Array, group_ids: Array) -> Array:
  """The mean of R / beta in the group: Kimi k1.5 (arXiv:2501.12599).

  It leaves out the mean of the log-ratios, so the policy at rest is another one than the tilted
  anchor, and depends on who sampled.

  Args:
    scaled_rewards: [B].
    group_ids: i32[B].

  Returns:
    [B].
  """
  group = _same(scaled_rewards, group_ids)
  return jax.lax.stop_gradient(total(scaled_rewards, group) / jnp.sum(group, axis=-1))


def log_partition(scaled_rewards: Array, group_ids: Array) -> Array:
  """log mean exp(R / beta) over the group: mirror descent with an estimated Z (arXiv:2501.12599).

  It tends to log Z for many samples of the anchor itself; with few it is too low on average.

  Args:
    scaled_rewards: [B].
    group_ids: i32[B].

  Returns:
    [B].
  """
  group = _same(scaled_rewards, group_ids)
  of_group = jnp.where(group, scaled_rewards[None, :], -jnp.inf)
  log_mean = jax.nn.logsumexp(of_group, axis=-1) - jnp.log(jnp.sum(group, axis=-1))
  return jax.lax.stop_gradient(log_mean)


def value(first_value: Array) -> Array:
  """A learned V(x) / beta, trained by the same loss: DRO-V (arXiv:2405.19107).

  Both are at rest at the tilted anchor and V = beta log Z, for samples of any policy that draws
  every completion.

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
    baseline_rewards: [B, n], rewards of the reference's completions of the row's prompt.
    beta: [], the temperature of the regression.
    baseline_temperature: that of V*; small tends to the best of the n.

  Returns:
    [B].
  """
  chex.assert_rank([baseline_rewards, beta], [2, 0])
  log_sum = jax.nn.logsumexp(baseline_rewards / baseline_temperature, axis=-1)
  log_mean = log_sum - jnp.log(baseline_rewards.shape[-1])
  return jax.lax.stop_gradient(baseline_temperature * log_mean / beta)


def _same(x: Array, group_ids: Array) -> Array:
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
