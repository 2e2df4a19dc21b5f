"""Factors of advantages that follow from the rewards and lengths of a group.

A function of `TABLE` fills the slot `multiplier` of `credit.scaled`, which multiplies the advantages of
another estimator. It returns one factor a row, [B], or one a token, [B, T], where it depends on the
sign of the advantage. A factor of 1 changes nothing. A factor that is the same for a whole group keeps
the sum of its advantages at 0; one that depends on the row does not.

A right row has a reward of at least `least`. L is the length of a row, the number of its tokens in the
mask. Rows that are not `valid` enter no statistic. Factors are constants of the policy gradient.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from polgrad.losses.groups import divide, maximum, members, size, total
from polgrad.registry import AtLeastOne, Fraction, NotNegative, Range, table
from polgrad.types import Array


def longer_when_right(
  rewards: Array,
  mask: Array,
  group_ids: Array,
  valid: Array,
  *,
  otherwise: NotNegative = 0.1,
  no_right: NotNegative = 0.1,
  no_wrong: NotNegative = 1.0,
  least: float = 1.0,
  cut: AtLeastOne = 4054,
) -> Array:
  """1 for a group whose longest right row is longer than its wrong ones on average, else `otherwise`:
  ADORA (arXiv:2602.10019).

  Such prompts, on which long answers succeed, are learned at full weight. Wrong rows of at least `cut`
  tokens were truncated and are not compared.

  Args:
    rewards: [B].
    mask: bool[B, T].
    group_ids: i32[B].
    valid: bool[B].
    otherwise: factor of groups whose right rows are not longer.
    no_right: factor of groups without a right row.
    no_wrong: factor of groups with a right row and no wrong one that is compared.
    least: least reward of a right row, in units of the reward.
    cut: number of tokens from which on a wrong row counts as truncated.

  Returns:
    [B], the same in all rows of a group.
  """
  _check(rewards, mask, group_ids, valid)
  group, lengths = members(group_ids, valid), _lengths(rewards, mask)
  right = (rewards >= least) & valid
  wrong = ~right & valid & (lengths < cut)
  longest = maximum(jnp.where(right, lengths, -jnp.inf), group)
  wrongs = total(wrong.astype(lengths.dtype), group)
  mean = divide(total(jnp.where(wrong, lengths, 0), group), wrongs)
  compared = jnp.where(longest > mean, 1.0, otherwise)
  factor = jnp.where(longest == -jnp.inf, no_right, jnp.where(wrongs == 0, no_wrong, compared))
  return jnp.where(valid, factor, 1).astype(rewards.dtype)


def long_and_wrong(
  rewards: Array,
  mask: Array,
  group_ids: Array,
  valid: Array,
  *,
  least: float = 1.0,
  base: Annotated[float, Range(at_least=1)] = 1.00001,
) -> Array:
  """2 - base^-(L - mean length of the right rows) for wrong rows that are longer than these, else 1:
  suboptimal trajectory complexity regularisation of APO (arXiv:2506.21655).

  The factor grows from 1 to at most 2 with the number of tokens too many.

  Args:
    rewards: [B].
    mask: bool[B, T].
    group_ids: i32[B].
    valid: bool[B].
    least: least reward of a right row, in units of the reward.
    base: 1 gives the factor 1.

  Returns:
    [B], in [1, 2); 1 in a group without right rows.
  """
  _check(rewards, mask, group_ids, valid)
  group, lengths = members(group_ids, valid), _lengths(rewards, mask)
  right = ((rewards >= least) & valid).astype(lengths.dtype)
  rights = total(right, group)
  mean = divide(total(right * lengths, group), rights)
  excess = jnp.where((rewards < least) & (rights > 0), jnp.maximum(lengths - mean, 0), 0)
  return 2 - jnp.exp(-excess * jnp.log(jnp.asarray(base, lengths.dtype)))


def damped_positive(
  rewards: Array, advantages: Array, valid: Array, *, least: float = 1.0, goal: float = 1.0
) -> Array:
  """min(1, w / goal) where A > 0, else 1, with w the share of right rows of the batch: A-GRAE
  (arXiv:2602.05548).

  While the policy is weak, right answers are learned less than wrong ones are unlearned. Then the sum of
  the advantages of a group is negative, which raises the probability of answers that were not sampled.

  Args:
    rewards: [B].
    advantages: [B, T].
    valid: bool[B].
    least: least reward of a right row, in units of the reward.
    goal: share of right rows from which on nothing is damped.

  Returns:
    [B, T].

  Raises:
    ValueError: `goal` is not positive.
  """
  chex.assert_rank([rewards, advantages], [1, 2])
  chex.assert_equal_shape([rewards, valid])
  chex.assert_equal_shape_prefix([rewards, advantages], 1)
  if goal <= 0:
    raise ValueError(f'goal is a share of rows and must be positive, got {goal}')
  right = jnp.sum(jnp.where(valid, rewards >= least, False))
  share = (right / jnp.maximum(jnp.sum(valid), 1)).astype(advantages.dtype)
  return jnp.where(advantages > 0, jnp.minimum(1, share / goal), 1)


def hardness(
  rewards: Array,
  group_ids: Array,
  valid: Array,
  *,
  least: float = 1.0,
  extra: float = 1.0,
  power: NotNegative = 1.0,
) -> Array:
  """1 + extra (1 - p)^power, with p the share of right rows of the group: hard prompts count more.

  The policy-specific hardness of Confucius3-Math (arXiv:2506.18330) is a weight of this kind; the
  function is ours, because the paper's is not published.

  Args:
    rewards: [B].
    group_ids: i32[B].
    valid: bool[B].
    least: least reward of a right row, in units of the reward.
    extra: how much more a prompt counts that is never solved; 0 gives the factor 1.
    power: of the share of wrong rows.

  Returns:
    [B], the same in all rows of a group.
  """
  p = success_rate(rewards, group_ids, valid, least)
  return 1 + extra * jnp.maximum(1 - p, 0) ** power


def logistic_hardness(
  rewards: Array,
  advantages: Array,
  group_ids: Array,
  valid: Array,
  *,
  least: float = 1.0,
  low: float = 0.4,
  span: float = 1.1,
  slope: float = 10.0,
  middle: float = 0.75,
) -> Array:
  """w(p) where A > 0 and w(1 - p) elsewhere, w(x) = low + span / (1 + exp(slope (x - middle))):
  GRPO-LEAD (arXiv:2504.09696).

  p is the share of right rows of the group. A right answer to a hard prompt counts much, and a wrong
  answer to an easy one too.

  Args:
    rewards: [B].
    advantages: [B, T].
    group_ids: i32[B].
    valid: bool[B].
    least: least reward of a right row, in units of the reward.
    low: the least factor.
    span: difference between the largest and the least factor.
    slope: how fast the factor falls with the share of right rows.
    middle: share at which it is half-way.

  Returns:
    [B, T].
  """
  chex.assert_rank([rewards, advantages], [1, 2])
  chex.assert_equal_shape_prefix([rewards, advantages], 1)
  p = success_rate(rewards, group_ids, valid, least)
  factor = lambda x: (low + span / (1 + jnp.exp(slope * (x - middle))))[:, None]
  return jnp.where(advantages > 0, factor(p), factor(1 - p))


def different(
  tokens: Array,
  mask: Array,
  group_ids: Array,
  valid: Array,
  *,
  strength: Fraction = 1.0,
  buckets: AtLeastOne = 4096,
) -> Array:
  """1 + strength (d / mean_g d - 1): rows that differ from the others of their group count more.

  d = |e - mean_g e| is the distance of a row from the centroid of its group, of the unit vectors e of
  the counts of its tokens, by their ids modulo `buckets`. The mean of the factors of a group is 1. A row
  without tokens has e = 0. ExIt (arXiv:2509.04575) embeds the text by a model; counts of tokens and the
  form of the factor are ours.

  Args:
    tokens: i32[B, T].
    mask: bool[B, T].
    group_ids: i32[B].
    valid: bool[B].
    strength: 0 gives the factor 1.
    buckets: entries of a vector.

  Returns:
    [B], at least 1 - strength; 1 for a group of equal rows.
  """
  chex.assert_rank([tokens, group_ids], [2, 1])
  chex.assert_equal_shape([tokens, mask])
  chex.assert_equal_shape([group_ids, valid])
  rows = jnp.arange(len(tokens))[:, None]
  counts = jnp.zeros((len(tokens), buckets)).at[rows, tokens % buckets].add(mask.astype(float))
  norm = jnp.linalg.norm(counts, axis=1)
  vectors = divide(counts, norm[:, None])
  group = members(group_ids, valid)
  number = size(group)
  centre = divide(total(vectors, group), number[:, None])
  apart = jnp.linalg.norm(vectors - centre, axis=1)
  apart = jnp.where(valid & (apart > 1e-6), apart, 0)
  mean = divide(total(apart, group), number)
  relative = jnp.where(mean > 0, divide(apart, mean), 1)
  return jnp.where(valid, 1 + strength * (relative - 1), 1)


def early(advantages: Array, mask: Array, *, strength: NotNegative = 0.5) -> Array:
  """1 + strength (1 - sum_{j < t} |A_j| / sum_j |A_j|): early tokens count more (IW-OPD,
  arXiv:2606.22600).

  In distillation A is log T - log S of the sampled token. The further student and teacher have parted in
  the row before a token, the less the teacher's opinion of it counts. The first token of a row has the
  factor 1 + strength, and factors fall along the row, to 1 behind the last |A| > 0.

  Args:
    advantages: [B, T].
    mask: bool[B, T].
    strength: 0 gives the factor 1.

  Returns:
    [B, T], in [1, 1 + strength].

  >>> a, mask = jnp.array([[1.0, -2.0, 1.0, 7.0]]), jnp.array([[True, True, True, False]])
  >>> print(multipliers.early(a, mask)[0, :3])
  [1.5   1.375 1.125]
  """
  chex.assert_equal_shape([advantages, mask])
  size = jnp.where(mask, jnp.abs(jax.lax.stop_gradient(advantages)), 0)
  before = jnp.cumsum(size, axis=1) - size
  return 1 + strength * (1 - divide(before, jnp.sum(size, axis=1, keepdims=True)))


def success_rate(rewards: Array, group_ids: Array, valid: Array, least: float) -> Array:
  """The share of rows with a reward of at least `least` among the valid ones of the group, [B]."""
  chex.assert_rank(rewards, 1)
  chex.assert_equal_shape([rewards, group_ids, valid])
  group = members(group_ids, valid)
  right = (rewards >= least).astype(rewards.dtype)
  return divide(total(right, group), size(group))


def _lengths(rewards: Array, mask: Array) -> Array:
  return jnp.sum(mask, axis=-1).astype(rewards.dtype)


def _check(rewards: Array, mask: Array, group_ids: Array, valid: Array) -> None:
  chex.assert_rank([rewards, mask], [1, 2])
  chex.assert_equal_shape([rewards, group_ids, valid])
  chex.assert_equal_shape_prefix([rewards, mask], 1)


TABLE = table(
  'multipliers',
  longer_when_right,
  long_and_wrong,
  damped_positive,
  hardness,
  logistic_hardness,
  different,
  early,
)
Part = Annotated[Callable, TABLE]
