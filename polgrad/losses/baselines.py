"""Baselines that weigh or choose the rows of a group, or that look at other samples.

`advantages.TABLE` lists them next to the plain ones. A baseline that depends on the row itself
biases the gradient, as in `advantages.group_mean`; how much is left is said where it matters.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from polgrad.losses.groups import center, divide, members, variance
from polgrad.losses.ratios import bounded
from polgrad.registry import table
from polgrad.types import Array


def sampled_baseline(rewards: Array, baseline_rewards: Array, valid: Array) -> Array:
  """A_i = R_i - mean_k R'_ik, R' the rewards of other completions of the prompt.

  With one greedy completion this is ReMax (arXiv:2310.10505). Unbiased: those completions do not
  depend on the row.

  Args:
    rewards: [B].
    baseline_rewards: [B, n].
    valid: bool[B].

  Returns:
    [B].
  """
  chex.assert_rank([rewards, baseline_rewards], [1, 2])
  chex.assert_equal_shape([rewards, valid])
  chex.assert_equal_shape_prefix([rewards, baseline_rewards], 1)
  return jnp.where(valid, jnp.mean(rewards[:, None] - baseline_rewards, axis=-1), 0)


def length_weighted(rewards: Array, mask: Array, group_ids: Array, valid: Array) -> Array:
  """A_i = R_i - sum_j L_j R_j / sum_j L_j inside the group, L the lengths: OPO (arXiv:2505.23585).

  The baseline of least variance if the squared gradient norm of a row grows like its length.

  Args:
    rewards: [B].
    mask: bool[B, T]; its rows sum to the lengths.
    group_ids: i32[B].
    valid: bool[B].

  Returns:
    [B]; 0 in a group of one.
  """
  group = _group(rewards, group_ids, valid)
  _check_tokens(rewards, mask)
  return center(rewards, group, jnp.sum(mask, axis=-1).astype(rewards.dtype))


def gradient_weighted(
  rewards: Array, score_norm: Array, mask: Array, group_ids: Array, valid: Array
) -> Array:
  """A_i = R_i - sum_j w_j R_j / sum_j w_j inside the group, w_j ~ |grad log pi(row j)|^2: the
  baseline of least variance of OBLR-PO (arXiv:2511.23310).

  The squared norm is taken with respect to the logits, where it needs no backward pass: the sum of
  the token statistic `score_norm` over the row.

  Args:
    rewards: [B].
    score_norm: [B, T], squared norm of the score of each token.
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
  """A_i = B / (B - M) (R_i - group mean), M the rows in groups of equal rewards: GPG
  (arXiv:2504.02546).

  Rows that teach nothing then do not shrink the mean over the batch. B and M count valid rows.

  Args:
    rewards: [B].
    group_ids: i32[B].
    valid: bool[B].

  Returns:
    [B]; 0 when all groups are uniform.
  """
  group = _group(rewards, group_ids, valid)
  centered = center(rewards, group)
  differs = jnp.any(group & (rewards[:, None] != rewards[None, :]), axis=-1)
  return centered * _share(valid, differs)


def nonzero_mean(rewards: Array, group_ids: Array, valid: Array) -> Array:
  """A_i = B / #{R != 0} (R_i - group mean): GPG as its code has it (arXiv:2504.02546).

  Unlike `informative_mean` the factor depends on where the zero of the reward lies.

  Args:
    rewards: [B].
    group_ids: i32[B].
    valid: bool[B].

  Returns:
    [B]; 0 when all rewards are 0.
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
  """Group mean over as many rows below it as above: RED-Drop (arXiv:2509.24203).

  Rows with R >= group mean stay. Of the others as many stay as there are of those, chosen at
  random; the rest get 0, and the mean is taken again over the rows that stayed.

  Args:
    rewards: [B].
    group_ids: i32[B].
    valid: bool[B].
    uniform: [B], random numbers in [0, 1): rows with the smallest stay.
    standardized: divides by the standard deviation (ddof 0) of the rows that stayed.
    eps: added to the standard deviation.

  Returns:
    [B], summing to 0 in every group if not standardized.
  """
  group = _group(rewards, group_ids, valid)
  chex.assert_equal_shape([rewards, uniform])
  above = center(rewards, group) >= 0
  order = jnp.arange(len(rewards))
  tie = (uniform[None, :] == uniform[:, None]) & (order[None, :] < order[:, None])
  before = (uniform[None, :] < uniform[:, None]) | tie
  rank = jnp.sum(group & before & ~above[None, :], axis=-1)
  kept = valid & (above | (rank < jnp.sum(group & above[None, :], axis=-1)))
  group = members(group_ids, kept)
  centered = center(rewards, group)
  if not standardized:
    return centered
  return divide(centered, jnp.sqrt(variance(centered, group, ddof=0)) + eps)


def exponential_group_mean(
  rewards: Array, group_ids: Array, valid: Array, *, temperature: float = 1.0
) -> Array:
  """w_i (R_i - sum_j w_j R_j / sum_j w_j), w_i = exp((R_i - group mean) / temperature): RED-Weight
  as derived (arXiv:2509.24203).

  Good rows count more, off-policy ones too. Exponents are clamped to +-20.

  Args:
    rewards: [B].
    group_ids: i32[B].
    valid: bool[B].
    temperature: in units of the reward; large gives `group_mean`.

  Returns:
    [B], summing to 0 in every group.
  """
  group = _group(rewards, group_ids, valid)
  weights = jnp.exp(bounded(center(rewards, group) / temperature))
  return weights * center(rewards, group, weights)


def exponential_times_advantage(
  rewards: Array, group_ids: Array, valid: Array, *, temperature: float = 1.0
) -> Array:
  """A exp(A / temperature), A = R - group mean: RED-Weight as implemented (arXiv:2509.24203).

  The baseline is not weighted again, so a group sums to something >= 0: next to
  `exponential_group_mean` this also raises the likelihood of what was sampled.

  Args:
    rewards: [B].
    group_ids: i32[B].
    valid: bool[B].
    temperature: in units of the reward; large gives `group_mean`.

  Returns:
    [B].
  """
  centered = center(rewards, _group(rewards, group_ids, valid))
  return centered * jnp.exp(bounded(centered / temperature))


def optimal_token_baseline(
  token_returns: Array, score_norm: Array, mask: Array, group_ids: Array, valid: Array
) -> Array:
  """A_it = G_it - sum_j W_jt G_jt / sum_j W_jt inside the group, W_jt = sum_{s<=t} |score_js|^2:
  the optimal token baseline (arXiv:2602.07078).

  W is the squared norm, in the logits, of the score of the row up to t, so a baseline a column. The
  columns of a group are compared as they stand: their prompts have one length. Where only one row
  of the group has a token it is its own baseline and gets 0.

  Args:
    token_returns: [B, T], reward to go.
    score_norm: [B, T], squared norm of the score of each token.
    mask: bool[B, T].
    group_ids: i32[B].
    valid: bool[B].

  Returns:
    [B, T].
  """
  chex.assert_rank([token_returns, valid], [2, 1])
  chex.assert_equal_shape([token_returns, score_norm, mask])
  chex.assert_equal_shape_prefix([valid, mask], 1)
  where = mask & valid[:, None]
  total = jnp.where(where, jnp.cumsum(jnp.where(mask, score_norm, 0), axis=-1), 0)
  token_returns = jnp.where(where, token_returns, 0)

  def row(x):  # one row at a time: [B, B, T] would be large
    own, group = x
    weights = jnp.where(group[:, None], total, 0)
    differences = jnp.sum(weights * (own[None, :] - token_returns), axis=0)
    return divide(differences, jnp.sum(weights, axis=0))

  return jnp.where(where, jax.lax.map(row, (token_returns, members(group_ids, valid))), 0)


def _group(rewards: Array, group_ids: Array, valid: Array) -> Array:
  chex.assert_equal_shape([rewards, group_ids, valid])
  return members(group_ids, valid)


def _check_tokens(rewards: Array, *tokens: Array) -> None:
  chex.assert_rank(tokens, 2)
  chex.assert_equal_shape(tokens)
  chex.assert_equal_shape_prefix([rewards, tokens[0]], 1)


def _share(valid: Array, counted: Array) -> Array:
  """#valid / #counted, and 0 when nothing is counted."""
  return divide(jnp.sum(valid), jnp.sum(counted))


TABLE = table(
  'baselines',
  sampled_baseline,
  length_weighted,
  gradient_weighted,
  informative_mean,
  nonzero_mean,
  balanced_group_mean,
  exponential_group_mean,
  exponential_times_advantage,
)
Part = Annotated[Callable, TABLE]

TOKEN_BASELINES = table('baselines', optimal_token_baseline)
