"""Advantages of steps and of tree nodes, from rewards of several continuations of one prefix.

A reward at the end of a completion does not say which of its steps were good. Several completions that
share their first tokens do: the mean reward of those that continue a prefix is an estimate of its
value. `step_advantages` uses completions that were drawn for this purpose alone (VinePPO), `tree_values`
and `tree_advantages` those of a tree whose leaves are trained on (TreeRL).

The estimators of `credit` and the collector `collect.Trees` call these functions. Their outputs are
constants of the policy gradient. The functions do not call stop_gradient. Tokens outside the mask are
skipped: nothing is read there, and the output is 0.

The examples need `import jax.numpy as jnp` and `from polgrad.losses import trees`.
"""

from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from polgrad.losses.advantages import leave_one_out
from polgrad.losses.groups import same, total
from polgrad.losses.returns import turn_gae
from polgrad.types import Array


def step_advantages(
  token_rewards: Array, step_values: Array, step_ids: Array, mask: Array
) -> Array:
  """A = r_j + V(s_{j+1}) - V(s_j) for each token of step j: VinePPO (arXiv:2410.01679).

  r_j is the sum of the rewards of the step's tokens, V(s_j) the value of the state before the step. The
  value after the last step is 0, because its rewards are all that follows. The advantages of the steps
  of a row add up to the sum of its rewards minus V(s_0).

  Args:
    token_rewards: [B, T], in units of the reward.
    step_values: [B, T], V(s_j) at each token of step j.
    step_ids: i32[B, T], the number of the step in its row, from 0; numbers grow along the row.
    mask: bool[B, T].

  Returns:
    [B, T].

  >>> row = lambda *numbers: jnp.array([numbers])
  >>> mask = row(True, True, True, True)
  >>> values = row(0.5, 0.5, 0.75, 0.75)
  >>> print(trees.step_advantages(row(0.0, 0, 0, 1), values, row(0, 0, 1, 1), mask))
  [[0.25 0.25 0.25 0.25]]
  """
  chex.assert_equal_shape([token_rewards, step_values, step_ids, mask])
  # The one-step error of `turn_gae`, in which a step is a turn.
  return turn_gae(token_rewards, step_values, step_ids, mask, discount=1.0, trace=0.0)


class TreeValues(NamedTuple):
  """What is known of the node of each token, [B, T]; 0 outside the mask.

  A node is a run of tokens that belong to the same leaves. The root is the prompt.
  """

  node_values: Array  # mean over the leaves below it of their leave-one-out advantage
  parent_values: Array  # that of the node before it; the root has 0
  node_leaves: Array  # f32, trained leaves below it
  parent_leaves: Array  # f32, trained leaves below the node before it


def tree_values(
  rewards: Array, group_ids: Array, valid: Array, drawn_by: Array, mask: Array, trained: Array
) -> TreeValues:
  """Values of the nodes of trees, from the rewards of their leaves (TreeRL, arXiv:2506.11902).

  The value of a leaf is its reward minus the mean reward of the other leaves of its prompt, and the
  value of a node is the mean over the leaves below it. The values of all leaves of a prompt add up to
  0, so the root has the value 0.

  Args:
    rewards: [B], of the leaves, each with the path that leads to it as one row.
    group_ids: i32[B], equal for leaves of one prompt.
    valid: bool[B]; other leaves enter no value and are not counted.
    drawn_by: i32[B, T] in 0..B-1: the row that a token was drawn in. A row that was forked off another
      one has the tokens before the fork from it, at the same columns.
    mask: bool[B, T].
    trained: bool[B], the leaves that are trained on; the others are used for the values only.

  Returns:
    The values, in units of the reward, and numbers of leaves, at each token.
  """
  chex.assert_equal_shape([rewards, group_ids, valid, trained])
  chex.assert_equal_shape([drawn_by, mask])
  columns = jnp.arange(mask.shape[1])[None]

  def below(x):
    """The sum of x [B] over the leaves below the node of each token: [B, T]."""
    by_row = jnp.where(mask, x[:, None], 0)
    return jnp.zeros_like(by_row).at[drawn_by, columns].add(by_row)[drawn_by, columns]

  leaves = jnp.where(valid, leave_one_out(rewards, group_ids, valid), 0)
  count = below(valid.astype(rewards.dtype))
  node_values = below(leaves) / jnp.maximum(count, 1)
  node_leaves = below((trained & valid).astype(rewards.dtype))
  # Along a row leaves only ever go to other branches, so a node ends where their number changes.
  begins = _begins(below(jnp.ones_like(group_ids)), mask)
  start = _latest(jnp.where(begins, columns, -1))
  # The column of the last token of the parent; -1: the parent is the root.
  before = _take(_previous(mask), jnp.maximum(start, 0))
  everyone = total((trained & valid).astype(rewards.dtype), same(group_ids))
  parent = lambda x, root: jnp.where(before >= 0, _take(x, jnp.maximum(before, 0)), root)
  found = TreeValues(
    node_values=node_values,
    parent_values=parent(node_values, jnp.zeros_like(rewards)[:, None]),
    node_leaves=node_leaves,
    parent_leaves=parent(node_leaves, everyone[:, None]),
  )
  return jax.tree.map(lambda x: jnp.where(mask & valid[:, None], x, 0), found)


Weighting = Literal['advantage', 'value', 'none']


def tree_advantages(
  node_values: Array,
  parent_values: Array,
  node_leaves: Array,
  parent_leaves: Array,
  *,
  weighting: Weighting = 'advantage',
) -> Array:
  """A = (V(n) - V(root)) + (V(n) - V(parent(n))), weighed by leaves: TreeRL (arXiv:2506.11902).

  The first term, the global advantage, says how good the node is for its prompt (V(root) = 0); the
  second one, the local advantage, how much better it is than the node before it. A token of a node with
  L trained leaves is in L rows, so it is weighed by 1 / sqrt(L).

  Args:
    node_values, parent_values, node_leaves, parent_leaves: [B, T], see `TreeValues`.
    weighting: 'advantage' divides the sum of both terms by sqrt(L), as in the paper. 'value' divides the
      value of each node by the root of its number of leaves before both terms are formed, as in the
      authors' code. 'none' does neither.

  Returns:
    [B, T], in units of the reward.

  A prompt with two nodes of two leaves each, of which one leaf has the reward 1; at that leaf:

  >>> numbers = [jnp.array([[x]]) for x in (1.0, 1 / 3, 1.0, 2.0)]
  >>> for weighting in ('advantage', 'value'):
  ...   print(trees.tree_advantages(*numbers, weighting=weighting).round(2))
  [[1.67]]
  [[1.76]]
  """
  chex.assert_equal_shape([node_values, parent_values, node_leaves, parent_leaves])
  scale = jax.lax.rsqrt(jnp.maximum(node_leaves, 1))
  if weighting == 'value':
    node_values = node_values * scale
    parent_values = parent_values * jax.lax.rsqrt(jnp.maximum(parent_leaves, 1))
  advantages = node_values + (node_values - parent_values)
  return advantages * scale if weighting == 'advantage' else advantages


def _previous(mask: Array) -> Array:
  """The column of the last token of the mask before each column, -1 where there is none: i32[B, T]."""
  columns = jnp.arange(mask.shape[1])
  latest = _latest(jnp.where(mask, columns, -1))
  return jnp.pad(latest[:, :-1], ((0, 0), (1, 0)), constant_values=-1)


def _latest(x: Array) -> Array:
  """The largest x up to each column, [B, T]."""
  return jax.lax.cummax(x, axis=1)


def _begins(ids: Array, mask: Array) -> Array:
  """bool[B, T]: the tokens whose id differs from that of the token of the mask before them."""
  previous = _previous(mask)
  changed = _take(ids, jnp.maximum(previous, 0)) != ids
  return mask & (changed | (previous < 0))


def _take(x: Array, columns: Array) -> Array:
  """x at other columns of the same row, [B, T]."""
  return jnp.take_along_axis(x, columns, axis=1)
