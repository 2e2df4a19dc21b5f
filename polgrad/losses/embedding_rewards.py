"""Rewards of embeddings: a policy that writes a rationale is rewarded by what the text embeds to."""

from typing import Literal

import chex
import jax.numpy as jnp

from polgrad.losses.groups import divide, first, maximum, members, size, total
from polgrad.registry import Positive
from polgrad.types import Array


def mean_pooled(hidden: Array, mask: Array) -> Array:
  """The mean state of each row, scaled to length 1: [B, T, D], mask bool[B, T] -> f32[B, D].

  A row without any token, or whose mean is 0, gives 0. States outside the mask may be anything.

  >>> states = jnp.array([[[3.0, 0.0], [3.0, 8.0], [9.0, 9.0]]])
  >>> print(embedding_rewards.mean_pooled(states, jnp.array([[1, 1, 0]])))
  [[0.6 0.8]]
  """
  chex.assert_rank([hidden, mask], [3, 2])
  chex.assert_equal_shape_prefix([hidden, mask], 2)
  mask = mask.astype(bool)
  states = jnp.where(mask[..., None], hidden, 0).astype(
    jnp.promote_types(hidden.dtype, jnp.float32)
  )
  mean = divide(jnp.sum(states, axis=1), jnp.sum(mask, axis=1).astype(states.dtype)[:, None])
  return divide(mean, jnp.sqrt(jnp.sum(jnp.square(mean), axis=-1, keepdims=True)))


def contrastive(
  query: Array,
  positive: Array,
  negative: Array,
  group_ids: Array,
  valid: Array,
  *,
  negatives: Literal['first', 'own'] = 'own',
  cluster: float = 0.2,
  across: float = 0.2,
  temperature: Positive = 0.1,
) -> Array:
  """(s+ - s- + cluster c - across a) / temperature: the reward of GRACE (arXiv:2510.04506).

  s+ is the cosine of query and positive, s- the largest one of query and its negatives, c the mean
  cosine of the positive with those of the other rows of the group, and a the mean over the other groups
  of the largest cosine of the query with their positives.

  In the released code s- is that of the first row of the group and its first negative
  (`negatives='first'`). Then it is constant in the group, and a baseline of the group removes it.

  Args:
    query: [B, D], unit vectors.
    positive: [B, D], unit vectors.
    negative: [B, n, D], unit vectors.
    group_ids: i32[B].
    valid: bool[B].
    negatives: 'own' or 'first'.
    cluster: weight of the agreement inside the group.
    across: weight of the likeness to other groups.
    temperature: divides the sum.

  Returns:
    [B]; 0 for rows that are not valid.
  """
  chex.assert_rank([query, positive, negative], [2, 2, 3])
  chex.assert_equal_shape([query, positive, negative[:, 0]])
  chex.assert_equal_shape_prefix([query, positive, group_ids, valid], 1)
  group = members(group_ids, valid)
  leading = first(group)
  close = jnp.sum(query * positive, axis=-1)
  against = jnp.einsum('bd,bnd->bn', query, negative)
  if negatives == 'own':
    far = jnp.max(against, axis=-1)
  else:
    far = total(jnp.where(leading, against[:, 0], 0), group)
  alike = jnp.sum(positive * (total(positive, group) - positive), axis=-1)
  inside = divide(alike, (size(group) - 1).astype(alike.dtype))
  # The largest cosine with each group, read at the first row of that group.
  likeness = query @ positive.T
  other = group_ids[:, None] != group_ids[None]
  top = maximum(likeness.T, group).T
  counted = other & leading[None]
  mean = divide(
    jnp.sum(jnp.where(counted, top, 0), axis=1), jnp.sum(counted, axis=1).astype(top.dtype)
  )
  reward = (close - far + cluster * inside - across * mean) / temperature
  return jnp.where(valid, reward, 0)
