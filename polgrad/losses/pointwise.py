"""Losses of one row from its own score: unpaired feedback and reward regression.

`score` is an implicit reward: with beta inside for the labelled losses, the plain sum of
log-ratios for `consistency`. Labels and rewards are data.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from polgrad.losses import links
from polgrad.registry import table
from polgrad.types import Array


def zero(residual: Array, group_ids: Array) -> Array:
  """No centre: the reward is taken as normalised already (standard).

  Args:
    residual: [B].
    group_ids: i32[B]; not used.

  Returns:
    [B].
  """
  chex.assert_equal_shape([residual, group_ids])
  return jnp.zeros_like(residual)


def group_mean(residual: Array, group_ids: Array) -> Array:
  """The mean of the group, an estimate of log Z, with its gradient: VarGrad (arXiv:2010.10436).

  Args:
    residual: [B].
    group_ids: i32[B].

  Returns:
    [B].
  """
  same = _same_group(residual, group_ids)
  return jnp.sum(jnp.where(same, residual[None, :], 0), axis=-1) / jnp.sum(same, axis=-1)


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
  same = _same_group(residual, group_ids)
  size = jnp.sum(same, axis=-1)
  others = jnp.sum(jnp.where(same, residual[None, :], 0), axis=-1) - residual
  return jnp.where(size > 1, others / jnp.maximum(size - 1, 1), residual)


def _same_group(residual: Array, group_ids: Array) -> Array:
  chex.assert_rank(residual, 1)
  chex.assert_equal_shape([residual, group_ids])
  return group_ids[:, None] == group_ids[None, :]


CENTERS = table(zero, group_mean, group_mean_detached, leave_one_out)
CenterPart = Annotated[Callable, CENTERS]


def logistic(score: Array, label: Array) -> Array:
  """p log(1 + exp(-z)) + (1 - p) log(1 + exp(z)): the binary classifier of BCO (arXiv:2404.04656).

  Args:
    score: [...].
    label: [...], 1 for a desirable row, 0 for an undesirable one.

  Returns:
    [...].
  """
  return links.logistic(score, label)


def sigmoid(score: Array, label: Array) -> Array:
  """p sigmoid(-z) + (1 - p) sigmoid(z): KTO with reference point z0 = 0 (arXiv:2402.01306), which
  is APO-zero on unpaired data (arXiv:2408.06266).

  Bounded, so rows that are hopeless either way lose their gradient. For KTO's z0, subtract it
  (detached) from the score.

  Args:
    score: [...].
    label: [...], 1 for a desirable row, 0 for an undesirable one.

  Returns:
    [...], in [0, 1] for labels in [0, 1].
  """
  chex.assert_equal_shape([score, label])
  return label * jax.nn.sigmoid(-score) + (1 - label) * jax.nn.sigmoid(score)


def squared(score: Array, label: Array, *, target: float = 1.0) -> Array:
  """(z - (2 p - 1) target)^2: SPPO (arXiv:2405.00675).

  With p the win rate of the row against the current policy, the reference one iteration old and
  target = 1/(2 beta), the mean over a pair is the paper's loss.

  Args:
    score: [...].
    label: [...], a probability of winning.
    target: the score of a row that always wins.

  Returns:
    [...].
  """
  chex.assert_equal_shape([score, label])
  return jnp.square(score - (2 * label - 1) * target)


def consistency(
  score: Array,
  rewards: Array,
  group_ids: Array,
  *,
  beta: float = 0.5,
  center: CenterPart = group_mean,
) -> Array:
  """e^2 / 2 with e = zeta - center(zeta), zeta = R / beta - score (arXiv:2503.18929).

  Zero for every sample, whoever drew it, exactly at pi = anchor exp(R / beta) / Z, if the centre is
  log Z. The descent weight of a row's log-probabilities is e. The loss published as TBA is twice
  this one (e^2 without the half).

  Args:
    score: [B], sum of log pi - log anchor over the row, nats.
    rewards: [B].
    group_ids: i32[B], equal for samples of one prompt.
    beta: the temperature, in units of the reward.
    center: the estimate of log Z.

  Returns:
    [B].
  """
  chex.assert_rank(score, 1)
  chex.assert_equal_shape([score, rewards, group_ids])
  residual = rewards / beta - score
  return 0.5 * jnp.square(residual - center(residual, group_ids))


TABLE = table(logistic, sigmoid, squared, consistency)
Part = Annotated[Callable, TABLE]
