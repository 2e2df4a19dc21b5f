"""Advantages with a baseline that weighs or chooses the rows of a group, or that uses other samples.

`advantages.TABLE` includes the functions of `TABLE`, so they fill the slot `advantage` of an estimator
in `credit`. A function of `TOKEN_BASELINES` gives one advantage per token.

All baselines here except `sampled_baseline` and that of `tracked_baseline` contain the row's own reward,
as that of `advantages.group_mean` does, so the expected gradient is not exactly the true one.

`valid` is False for rows whose verifier failed: they enter no statistic and get 0. Like all
advantages, the results are constants of the policy gradient, but no function calls stop_gradient.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax.numpy as jnp

from polgrad.losses._common import bounded
from polgrad.losses.groups import (
  Groups,
  center,
  divide,
  everyone,
  maximum,
  members,
  minimum,
  normalized,
  rank,
  total,
  variance,
)
from polgrad.registry import table
from polgrad.types import Array


def sampled_baseline(rewards: Array, baseline_rewards: Array, valid: Array) -> Array:
  """A_i = R_i - mean_k R'_ik, R' the rewards of n further completions of the prompt.

  With one greedy completion this is ReMax (arXiv:2310.10505). The gradient is unbiased, since those
  completions do not depend on the row.

  Args:
    rewards: [B].
    baseline_rewards: [B, n], R'.
    valid: bool[B].

  Returns:
    [B].
  """
  chex.assert_rank([rewards, baseline_rewards], [1, 2])
  chex.assert_equal_shape([rewards, valid])
  chex.assert_equal_shape_prefix([rewards, baseline_rewards], 1)
  return jnp.where(valid, jnp.mean(rewards[:, None] - baseline_rewards, axis=-1), 0)


def tracked_baseline(
  rewards: Array, tracked_value: Array, valid: Array, *, normalized: bool = True, eps: float = 1e-8
) -> Array:
  """A_i = (a_i - mean) / (std + eps), a_i = R_i - v_i, over the batch: SPO (arXiv:2509.13232).

  v is the success rate of the prompt in earlier steps, so it does not depend on the row, and one
  completion of a prompt is enough. The standard deviation is the unbiased one.

  Args:
    rewards: [B].
    tracked_value: [B], v, in units of the reward; from the curriculum `spo`.
    valid: bool[B].
    normalized: False returns a.
    eps: added to the standard deviation, in units of the reward.

  Returns:
    [B]; 0 in a batch of one valid row, if `normalized`.

  >>> rewards, tracked = jnp.array([1.0, 0.0, 1.0]), jnp.array([0.5, 0.5, 0.75])
  >>> got = baselines.tracked_baseline(rewards, tracked, jnp.ones(3, bool))
  >>> print(np.asarray(got).round(2))
  [ 0.8  -1.12  0.32]
  """
  chex.assert_rank(rewards, 1)
  chex.assert_equal_shape([rewards, tracked_value, valid])
  gap = jnp.where(valid, rewards - tracked_value, 0)
  if not normalized:
    return gap
  batch = everyone(valid)
  centered = center(gap, batch)
  return divide(centered, jnp.sqrt(variance(centered, batch, 1)) + eps)


def length_weighted(rewards: Array, mask: Array, group_ids: Array, valid: Array) -> Array:
  """A_i = R_i - sum_j L_j R_j / sum_j L_j inside the group, L the lengths: OPO (arXiv:2505.23585).

  If the squared gradient norm of a row is proportional to its length, E[L R] / E[L] is the constant
  baseline of least variance; the group estimates it.

  Args:
    rewards: [B].
    mask: bool[B, T]; L_i is the number of True entries of row i.
    group_ids: i32[B].
    valid: bool[B].

  Returns:
    [B]; 0 in a group of one.
  """
  group = _group(rewards, group_ids, valid)
  _check_tokens(rewards, mask)
  return center(rewards, group, jnp.sum(mask, axis=-1).astype(rewards.dtype))


def token_normalized(
  rewards: Array,
  mask: Array,
  group_ids: Array,
  valid: Array,
  *,
  eps: float = 1e-6,
  limit: float = 5.0,
) -> Array:
  """A_i = (R_i - m) / (s + eps), m and s the mean and the deviation of R over the tokens of the group:
  HAPO (arXiv:2509.16591).

  A row counts as often as it has tokens, so the advantages of a group sum to 0 over its tokens, and with
  a mean over tokens long rows do not shift it. s divides by the number of tokens. If a row of the group
  has |A| >= limit, which happens where a short row differs from many tokens, the group gets A with
  the mean and the unbiased deviation over its rows instead.

  Args:
    rewards: [B].
    mask: bool[B, T]; row i has as many tokens as True entries.
    group_ids: i32[B].
    valid: bool[B].
    eps: added to the deviation, in units of the reward.
    limit: |A| from which on a group is normalised over its rows.

  Returns:
    [B]; 0 in a group of one.
  """
  group = _group(rewards, group_ids, valid)
  _check_tokens(rewards, mask)
  lengths = jnp.sum(mask, axis=-1).astype(rewards.dtype)
  centered = center(rewards, group, lengths)
  spread = divide(total(lengths * jnp.square(centered), group), total(lengths, group))
  advantages = centered / (jnp.sqrt(spread) + eps)
  of_rows = normalized(rewards, group, 1, eps)
  return jnp.where(maximum(jnp.abs(advantages), group) < limit, advantages, of_rows)


def gradient_weighted(
  rewards: Array, score_norm: Array, mask: Array, group_ids: Array, valid: Array
) -> Array:
  """A_i = R_i - sum_j w_j R_j / sum_j w_j inside the group, w_j ~ |grad log pi(row j)|^2: the
  baseline of least variance of OBLR-PO (arXiv:2511.23310).

  The gradient is taken with respect to the logits, not the parameters, so it needs no backward pass:
  w_j is the sum of the token statistic `logit_stats.score_norm` over row j.

  Args:
    rewards: [B].
    score_norm: [B, T], squared norm of the gradient of log pi(token) with respect to its logits.
    mask: bool[B, T].
    group_ids: i32[B].
    valid: bool[B].

  Returns:
    [B]; 0 in a group of one.
  """
  group = _group(rewards, group_ids, valid)
  _check_tokens(rewards, score_norm, mask)
  return center(rewards, group, jnp.sum(jnp.where(mask, score_norm, 0), axis=-1))


def informative_mean(rewards: Array, group_ids: Array, valid: Array) -> Array:
  """A_i = B / (B - M) (R_i - group mean), M the number of rows in groups of equal rewards: GPG
  (arXiv:2504.02546).

  B and M count valid rows. A row in a group of equal rewards, or in a group of one, has advantage 0
  but is counted by the aggregation. The factor undoes this: a mean over B rows becomes a mean over the
  B - M others. With `aggregation.token_mean` that holds exactly only if all rows are equally long.

  Args:
    rewards: [B].
    group_ids: i32[B].
    valid: bool[B].

  Returns:
    [B]; all 0 when every group has equal rewards.
  """
  group = _group(rewards, group_ids, valid)
  differs = minimum(rewards, group) != maximum(rewards, group)  # also where a reward is NaN
  return center(rewards, group) * _share(valid, differs)


def nonzero_mean(rewards: Array, group_ids: Array, valid: Array) -> Array:
  """A_i = B / #{R != 0} (R_i - group mean): GPG (arXiv:2504.02546) as verl has it.

  B and #{R != 0} count valid rows. The factor differs from that of `informative_mean`: rows of a group
  in which all rewards are 1 are counted, rows with reward 0 of a mixed group are not. So adding a
  constant to all rewards changes the advantages.

  Args:
    rewards: [B].
    group_ids: i32[B].
    valid: bool[B].

  Returns:
    [B]; all 0 when every reward is 0.
  """
  group = _group(rewards, group_ids, valid)
  return center(rewards, group) * _share(valid, valid & (rewards != 0))


def balanced_group_mean(
  rewards: Array,
  group_ids: Array,
  valid: Array,
  uniform: Array,
  *,
  standardized: bool = False,
  eps: float = 1e-6,
) -> Array:
  """A_i = R_i - mean over the rows that are kept, at most as many bad as good: RED-Drop
  (arXiv:2509.24203).

  All rows with R >= group mean are kept. Of the other rows of the group at most the same number is
  kept, chosen at random. Dropped rows get 0.

  Args:
    rewards: [B].
    group_ids: i32[B].
    valid: bool[B].
    uniform: [B], random numbers in [0, 1): the bad rows with the smallest numbers are kept.
    standardized: whether to divide by the standard deviation (ddof 0) of the rows kept; default no.
    eps: added to the standard deviation, in units of the reward.

  Returns:
    [B], summing to 0 in every group up to rounding.
  """
  group = _group(rewards, group_ids, valid)
  chex.assert_equal_shape([rewards, uniform])
  above = ~(center(rewards, group) < 0)  # NaN is kept, and shows
  drawn = rank(uniform, members(group_ids, valid & ~above))  # among the bad rows of its group
  kept = valid & (above | (drawn < total(above.astype(jnp.int32), group)))
  # Mean and standard deviation are those of the rows kept.
  group = members(group_ids, kept)
  return normalized(rewards, group, 0, eps) if standardized else center(rewards, group)


def exponential_group_mean(
  rewards: Array, group_ids: Array, valid: Array, *, temperature: float = 1.0
) -> Array:
  """A_i = w_i (R_i - sum_j w_j R_j / sum_j w_j), w_i = exp((R_i - group mean) / temperature): RED-Weight
  as derived in the paper (arXiv:2509.24203).

  Rows with a higher reward have a larger weight. Exponents are clamped to +-20.

  Args:
    rewards: [B].
    group_ids: i32[B].
    valid: bool[B].
    temperature: in units of the reward; a large one gives `advantages.group_mean`.

  Returns:
    [B], summing to 0 in every group up to rounding.
  """
  group = _group(rewards, group_ids, valid)
  weights = jnp.exp(bounded(center(rewards, group) / temperature))
  return weights * center(rewards, group, weights)


def exponential_times_advantage(
  rewards: Array, group_ids: Array, valid: Array, *, temperature: float = 1.0
) -> Array:
  """A exp(A / temperature), A = R - group mean: RED-Weight as its code implements it
  (arXiv:2509.24203).

  The baseline is the unweighted mean, so the advantages of a group sum to a number >= 0. Compared with
  `exponential_group_mean`, this also raises the likelihood of the samples as a whole.
  Exponents are clamped to +-20.

  Args:
    rewards: [B].
    group_ids: i32[B].
    valid: bool[B].
    temperature: in units of the reward; a large one gives `advantages.group_mean`.

  Returns:
    [B].
  """
  centered = center(rewards, _group(rewards, group_ids, valid))
  return centered * jnp.exp(bounded(centered / temperature))


def optimal_token_baseline(
  token_returns: Array,
  score_norm: Array,
  mask: Array,
  group_ids: Array,
  valid: Array,
  *,
  lone_baseline: bool = False,
) -> Array:
  """A_it = G_it - sum_j W_jt G_jt / sum_j W_jt inside the group, W_jt = sum_{s<=t} |score_js|^2:
  the optimal token baseline (arXiv:2602.07078).

  W_jt is the squared norm of the gradient of log pi(tokens of row j up to t) with respect to the
  logits. There is one baseline per group and number t of a token of the policy; what lies between tokens
  of the mask is not counted.

  In a group of one, and beyond the end of the second longest row, only one row of the group has a token
  of a number. There the baseline is 0, so A = G, as in verl; with `lone_baseline` the formula is kept,
  by which that row is its own baseline and gets 0.

  Args:
    token_returns: [B, T], G, the reward to go.
    score_norm: [B, T], squared norm of the score of each token, `logit_stats.score_norm`.
    mask: bool[B, T].
    group_ids: i32[B].
    valid: bool[B].
    lone_baseline: whether a row that is alone at a token is its own baseline, or has the baseline 0.

  Returns:
    [B, T]; 0 where `mask` or `valid` is False.
  """
  chex.assert_rank([token_returns, valid], [2, 1])
  chex.assert_equal_shape([token_returns, score_norm, mask])
  chex.assert_equal_shape_prefix([valid, mask], 1)
  # Column t of the sorted arrays is the t-th token of the policy.
  order = jnp.argsort(~mask, axis=-1, stable=True)
  token_returns, score_norm, mask = (
    jnp.take_along_axis(x, order, axis=-1) for x in (token_returns, score_norm, mask)
  )
  where = mask & valid[:, None]
  weights = jnp.where(where, jnp.cumsum(jnp.where(mask, score_norm, 0), axis=-1), 0)
  token_returns, group = jnp.where(where, token_returns, 0), members(group_ids, valid)
  centered = center(token_returns, group, weights)
  if not lone_baseline:
    centered = jnp.where(total(where.astype(jnp.int32), group) == 1, token_returns, centered)
  centered = jnp.where(where, centered, 0)
  return jnp.take_along_axis(centered, jnp.argsort(order, axis=-1), axis=-1)


def _group(rewards: Array, group_ids: Array, valid: Array) -> Groups:
  """The groups of equal ids, of which only valid rows count; checks the shapes."""
  chex.assert_equal_shape([rewards, group_ids, valid])
  return members(group_ids, valid)


def _check_tokens(rewards: Array, *tokens: Array) -> None:
  chex.assert_rank(tokens, 2)
  chex.assert_equal_shape(tokens)
  chex.assert_equal_shape_prefix([rewards, tokens[0]], 1)


def _share(valid: Array, counted: Array) -> Array:
  """#valid / #counted, and 0 when no row is counted."""
  return divide(jnp.sum(valid), jnp.sum(counted))


TABLE = table(
  'baselines',
  sampled_baseline,
  tracked_baseline,
  length_weighted,
  token_normalized,
  gradient_weighted,
  informative_mean,
  nonzero_mean,
  balanced_group_mean,
  exponential_group_mean,
  exponential_times_advantage,
)
Part = Annotated[Callable, TABLE]

TOKEN_BASELINES = table('baselines', optimal_token_baseline)
