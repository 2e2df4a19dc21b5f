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

from polgrad.losses.groups import Groups, center, divide, joint, members, variance
from polgrad.registry import Fraction, table
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
  stratum, A_group with those of the whole group. Inside a stratum the answers did equally much, such as
  searching equally often, so a row is not compared with answers that had other means. The second part
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


def normalized(rewards: Array, groups: Groups, ddof: int, eps: float) -> Array:
  """(R - mean) / (std + eps) over the counted rows of a group, [B] -> [B]."""
  centered = center(rewards, groups)
  return divide(centered, jnp.sqrt(variance(centered, groups, ddof)) + eps)


TABLE = table('strata', stratified)
Part = Annotated[Callable, TABLE]
