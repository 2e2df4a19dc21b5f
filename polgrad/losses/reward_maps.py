"""Rewards of rows made of other rewards of rows.

A function of `TABLE` fills the slot `reward` of `credit.shaped`, whose inner estimator then sees the new
rewards. An estimator whose scale is the standard deviation of a group does not see a map r -> a r + b
with a > 0, and one with the mean of a group as baseline does not see the b, even if a and b differ from
group to group.

Rows that are not `valid` enter no statistic; what they get does not matter.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax.numpy as jnp

from polgrad.losses.groups import members, normalized
from polgrad.registry import Fraction, NotNegative, Positive, table
from polgrad.types import Array


def bent(
  rewards: Array, *, knee: float = 0.8, above: NotNegative = 0.01, below: Positive = 1.0
) -> Array:
  """knee + above log(1 + r - knee) from the knee on, knee - (e^(below (knee - r)) - 1) / (e^below - 1)
  under it: TempSamp-R1 (arXiv:2509.18056).

  Above the knee rewards are compressed, so that a very good row, such as the answer in the data, does
  not make all others look bad. Below it, differences between bad rows are enlarged. The map is
  continuous and increasing, with slopes `above` and below / (e^below - 1) at the knee.

  Args:
    rewards: [B], usually in [0, 1].
    knee: reward at which the map bends.
    above: slope above the knee, without unit.
    below: how much the map bends below it, per unit of the reward.

  Returns:
    [B].
  """
  chex.assert_rank(rewards, 1)
  high = knee + above * jnp.log1p(jnp.maximum(rewards - knee, 0))
  low = knee - jnp.expm1(below * jnp.maximum(knee - rewards, 0)) / jnp.expm1(below)
  return jnp.where(rewards >= knee, high, low)


def signed(rewards: Array, *, threshold: float = 1.0) -> Array:
  """1 where r >= threshold, else -1 (standard).

  Args:
    rewards: [B].
    threshold: smallest reward of a right row.

  Returns:
    [B].

  >>> print(reward_maps.signed(jnp.array([1.0, 0.5, 0.0])))
  [ 1. -1. -1.]
  """
  return jnp.where(rewards >= threshold, 1.0, -1.0).astype(rewards.dtype)


def mistaken(
  rewards: Array,
  uniform: Array,
  *,
  false_positive: Fraction = 0.1,
  false_negative: Fraction = 0.1,
) -> Array:
  """What a verifier that makes mistakes says: 0 becomes 1, and 1 becomes 0, with given probabilities
  (standard).

  For experiments with noise whose rates are known. Metrics still show the rewards without noise.

  Args:
    rewards: [B]; at least 0.5 is right.
    uniform: [B], random numbers in [0, 1), which decide the mistakes.
    false_positive: probability that a wrong row gets 1.
    false_negative: probability that a right row gets 0.

  Returns:
    [B], 0 or 1.
  """
  chex.assert_rank(rewards, 1)
  chex.assert_equal_shape([rewards, uniform])
  said = jnp.where(rewards >= 0.5, uniform >= false_negative, uniform < false_positive)
  return jnp.where(jnp.isnan(rewards), rewards, said.astype(rewards.dtype))


def without_noise(
  rewards: Array, *, false_positive: Fraction = 0.1, false_negative: Fraction = 0.1
) -> Array:
  """(r - false_positive) / (1 - false_positive - false_negative): the backward correction of a noisy
  verifier (arXiv:2510.00915).

  A verifier accepts a wrong answer with probability `false_positive` and rejects a right one with
  probability `false_negative`. The mean of the corrected reward over its mistakes is the true reward, so
  the expected gradient is that without noise. Its variance grows as the two rates add up to 1. Dividing
  by the standard deviation of a group undoes the correction, so use a baseline without a scale.

  Args:
    rewards: [B], 0 or 1, as the verifier says.
    false_positive: share of wrong answers that the verifier accepts.
    false_negative: share of right answers that it rejects.

  Returns:
    [B], outside [0, 1] unless both rates are 0.

  Raises:
    ValueError: the rates add up to 1 or more, so the verifier says nothing or the contrary.
  """
  chex.assert_rank(rewards, 1)
  if false_positive + false_negative >= 1:
    raise ValueError(
      f'false_positive {false_positive} and false_negative {false_negative} add up to 1 or more: such a '
      'verifier accepts wrong answers at least as often as right ones'
    )
  return denoised(rewards, false_positive, false_negative)


def denoised(rewards: Array, false_positive: Array | float, false_negative: Array | float) -> Array:
  """`without_noise` for rates that are known only at run time, and so are not checked: [B] -> [B]."""
  return (rewards - false_positive) / (1 - false_positive - false_negative)


def without_misses(rewards: Array, *, false_negative: Fraction = 0.1) -> Array:
  """r - (1 - false_negative): the forward correction of a noisy verifier (arXiv:2510.00915).

  These numbers are the weights of the score function itself, so they belong to `advantages.raw`; any
  baseline would subtract the constant again. The mean over the mistakes of the verifier is 0 for a right
  answer and false_positive + false_negative - 1 for a wrong one, so the expected gradient has the
  direction of the true one, and the rate of false positives need not be known. It is the gradient of a
  constant baseline, and it mostly pushes wrong answers down.

  Args:
    rewards: [B], 0 or 1, as the verifier says.
    false_negative: share of right answers that the verifier rejects.

  Returns:
    [B].
  """
  chex.assert_rank(rewards, 1)
  return rewards - (1 - false_negative)


def brief_when_right(
  rewards: Array,
  mask: Array,
  finished: Array,
  group_ids: Array,
  valid: Array,
  *,
  least: float = 1.0,
  strength: float = 0.05,
  wrong: float = -1.0,
  unfinished: float = 0.0,
) -> Array:
  """exp(-strength z) for right rows, `wrong` for others: the reward of GRPO-LEAD (arXiv:2504.09696).

  z = (L - mean) / (std + 1e-6) is the standardised length, with mean and unbiased deviation of the right
  rows of the group, so the shortest right row gets most. A group with one right row has z = 0.

  Args:
    rewards: [B].
    mask: bool[B, T]; L is the number of its True entries.
    finished: bool[B], whether the row met a stop token.
    group_ids: i32[B].
    valid: bool[B].
    least: least reward of a right row, in units of the reward.
    strength: of the standardised length.
    wrong: reward of a wrong row that is finished.
    unfinished: reward of a wrong row that is not.

  Returns:
    [B].
  """
  chex.assert_rank([rewards, mask], [1, 2])
  chex.assert_equal_shape([rewards, finished, group_ids, valid])
  chex.assert_equal_shape_prefix([rewards, mask], 1)
  lengths = jnp.sum(mask, axis=-1).astype(rewards.dtype)
  right = rewards >= least
  group = members(group_ids, valid & right)
  z = normalized(lengths, group, 1, 1e-6)
  other = jnp.where(finished, wrong, unfinished).astype(rewards.dtype)
  found = jnp.where(right, jnp.exp(-strength * z), other)
  found = jnp.where(jnp.isnan(rewards), rewards, found)
  return jnp.where(valid, found, 0)


def with_bonus(rewards: Array, bonus_scores: Array, *, coefficient: float = 1.0) -> Array:
  """r + coefficient sum_t b_t: the reward of a row and a bonus for the states that it visits, as in RDD
  (arXiv:2505.11044).

  Args:
    rewards: [B].
    bonus_scores: [B, T], bonus of the state after each token, 0 where no state counts as visited; from a
      network called `bonus`, such as `networks.RandomTargets`.
    coefficient: unit of the reward per unit of the bonus; at 0 the rewards are unchanged.

  Returns:
    [B].
  """
  chex.assert_rank([rewards, bonus_scores], [1, 2])
  chex.assert_equal_shape_prefix([rewards, bonus_scores], 1)
  return rewards + coefficient * jnp.sum(bonus_scores, axis=1)


TABLE = table(
  'reward_maps', bent, signed, mistaken, without_noise, without_misses, brief_when_right, with_bonus
)
Part = Annotated[Callable, TABLE]
