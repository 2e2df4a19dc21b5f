"""Advantages that compare a row with those rows of its group that are of the same kind.

`advantages.TABLE` includes the functions of `TABLE`, so they fill the slot `advantage` of an estimator
in `credit`. The kind of a row is a number that some term of the reward found, usually a term of weight
0: how often the answer searched, for example. Rows of one group with equal numbers are a stratum.

A row that is not `valid` enters no statistic and gets 0.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax.numpy as jnp

from polgrad.losses.groups import (
  Groups,
  center,
  divide,
  everyone,
  first,
  joint,
  members,
  normalized,
  size,
  total,
  variance,
)
from polgrad.registry import Fraction, NotNegative, table
from polgrad.types import Array


def stratified(
  rewards: Array,
  stratum_term: Array,
  group_ids: Array,
  valid: Array,
  *,
  mix: Fraction = 0.8,
  ddof: int = 1,
  eps: float = 1e-6,
) -> Array:
  """A = mix A_stratum + (1 - mix) A_group: stratified advantage normalisation (arXiv:2510.06214).

  Both parts are (R - mean) / (std + eps), A_stratum with mean and standard deviation of the rows of the
  stratum, A_group with those of the whole group. All answers of a stratum searched equally often, for
  example, so a row is not compared with answers that used more or fewer searches. The second part
  keeps a signal between strata.

  Args:
    rewards: [B].
    stratum_term: [B], equal for rows of one stratum.
    group_ids: i32[B].
    valid: bool[B].
    mix: share of the part inside strata; 0 is `advantages.group_normalized`.
    ddof: 1 divides a sum of squares by the number of rows - 1, 0 by their number.
    eps: added to the standard deviations, in units of the reward.

  Returns:
    [B], without unit, summing to 0 in every group up to rounding. A row that is alone in its stratum has
    A_stratum = 0.
  """
  chex.assert_rank(rewards, 1)
  chex.assert_equal_shape([rewards, stratum_term, group_ids, valid])
  stratum = members(joint(group_ids, stratum_term), valid)
  inside = normalized(rewards, stratum, ddof, eps)
  across = normalized(rewards, members(group_ids, valid), ddof, eps)
  return mix * inside + (1 - mix) * across


def answer_entropy(answer_term: Array, group_ids: Array, valid: Array) -> Array:
  """Entropy of the answers of a group, in bits: 0 if all rows agree, log2 G if no two do (standard).

  Args:
    answer_term: [B], equal for rows with the same answer.
    group_ids: i32[B].
    valid: bool[B].

  Returns:
    [B], the same in all valid rows of a group.
  """
  chex.assert_rank(answer_term, 1)
  chex.assert_equal_shape([answer_term, group_ids, valid])
  group = members(group_ids, valid)
  alike = size(members(joint(group_ids, answer_term), valid))
  share = divide(alike.astype(answer_term.dtype), size(group))
  bits = -jnp.log2(jnp.where(share > 0, share, 1))
  return divide(total(bits, group), size(group))


def across_prompts(
  rewards: Array, group_ids: Array, valid: Array, *, ddof: int = 1, eps: float = 1e-6
) -> Array:
  """(u - mean) / (std + eps) with u the mean reward of a group, and moments over the groups: COPO's
  global advantage (arXiv:2508.04138).

  A group counts once, whatever its number of rows. Groups of equal rewards have a signal here.

  Args:
    rewards: [B].
    group_ids: i32[B].
    valid: bool[B].
    ddof: 1 divides the sum of squares by the number of groups - 1, 0 by their number.
    eps: added to the standard deviation, in units of the reward.

  Returns:
    [B], the same in all valid rows of a group; 0 if there is one group.
  """
  chex.assert_rank(rewards, 1)
  chex.assert_equal_shape([rewards, group_ids, valid])
  group = members(group_ids, valid)
  mean = divide(total(rewards, group), size(group))
  once = first(group)
  normal = normalized(mean, everyone(once), ddof, eps)  # of the first row of each group, else 0
  return total(normal, group)


def mode_choice(
  rewards: Array,
  mode_term: Array,
  group_ids: Array,
  valid: Array,
  *,
  tie: NotNegative = 0.01,
  own: NotNegative = 0.3,
  ddof: int = 0,
  eps: float = 1e-6,
) -> Array:
  """A = (mean of its mode - mean + own (R - mean)) / (std + eps): the advantage of having chosen a mode
  in HiPO (arXiv:2509.23967).

  A row with `mode_term` > 0 is in the mode 'on', such as thinking before the answer, and others are in
  the mode 'off'. If 'on' is better than 'off' by at most b = tie * (mean of 'on'), b is added to the
  mean of 'off': a mode that is hardly worse and cheaper is chosen. A group of equal rewards has
  advantage 0 nevertheless: there is no standard deviation to compare b with.

  Args:
    rewards: [B].
    mode_term: [B].
    group_ids: i32[B].
    valid: bool[B].
    tie: how much better 'on' must be, in units of its mean.
    own: weight of the reward of the row itself.
    ddof: 1 divides the sum of squares by the number of rows - 1, 0 by their number.
    eps: added to the standard deviation, in units of the reward.

  Returns:
    [B], without unit; 0 in a group of equal rewards.
  """
  chex.assert_rank(rewards, 1)
  chex.assert_equal_shape([rewards, mode_term, group_ids, valid])
  on = mode_term > 0
  group = members(group_ids, valid)
  centered = center(rewards, group)
  mean_of = lambda kind: divide(total(jnp.where(kind, centered, 0), group), _number(kind, group))
  of_on, of_off = mean_of(on), mean_of(~on)
  bias = tie * (rewards - centered + of_on)
  near = (of_on - of_off >= 0) & (of_on - of_off <= bias)
  near &= (_number(on, group) > 0) & (_number(~on, group) > 0)
  mean = jnp.where(on, of_on, of_off + jnp.where(near, bias, 0))
  std = jnp.sqrt(variance(centered, group, ddof))
  # Equal rewards teach nothing, though a tie would be broken.
  found = divide(mean + own * centered, jnp.where(std > 0, std + eps, std))
  return jnp.where(valid, found, 0)


def _number(kind: Array, groups: Groups) -> Array:
  """How many counted rows of the group are of the kind, bool[B] -> i32[B]."""
  return total(kind.astype(jnp.int32), groups)


TABLE = table('strata', stratified, mode_choice)
Part = Annotated[Callable, TABLE]
