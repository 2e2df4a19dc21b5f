"""Tokens that rows with good and with bad rewards have in common: GTPO (arXiv:2508.03772)."""

import chex
import jax
import jax.numpy as jnp

from polgrad.losses.groups import joint, same, total
from polgrad.types import Array


def conflict_weights(
  tokens: Array, mask: Array, gains: Array, group_ids: Array, *, factor: float = 2.0
) -> Array:
  """Weights of tokens by the sign of the gain of their row: `factor` at conflicting tokens of good rows,
  0 at those of bad rows, and 1 elsewhere (GTPO, arXiv:2508.03772).

  A token is shared if a good and a bad row of the group have it at the same place. The shared tokens
  from the beginning of a row up to the first one that is not shared are conflicting; so are those from
  the end of a row backwards, where places count from the end. The weights of both are multiplied, so a
  token in both has factor^2. Rows with the gain 0 have the weight 1 and share nothing.

  Good rows push a common prefix up and bad rows push it down, and the difference of both is noise; with
  these weights it is only pushed up.

  Args:
    tokens: i32[B, T].
    mask: bool[B, T]; places are those among the tokens of the mask.
    gains: [B], such as the reward minus the mean of the group; only the sign is read.
    group_ids: i32[B].
    factor: 1 or more; with 1 good rows keep their weights, and bad ones lose their conflicting tokens.

  Returns:
    [B, T]; 1 outside the mask.
  """
  chex.assert_equal_shape([tokens, mask])
  chex.assert_equal_shape([gains, group_ids])
  columns = jnp.arange(mask.shape[1])[None]
  length = jnp.sum(mask, axis=1, keepdims=True)
  # The k-th token of a row in column k, and the k-th from its end likewise.
  order = jnp.argsort(~mask, axis=1, stable=True)
  forward = jnp.take_along_axis(tokens, order, axis=1)
  number = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
  mirrored = jnp.maximum(length - 1 - columns, 0)
  backward = jnp.take_along_axis(forward, mirrored, axis=1)
  there = columns < length
  weights = jnp.ones(mask.shape)
  for row, place in ((forward, number), (backward, jnp.maximum(length - 1 - number, 0))):
    run = jnp.cumprod(_shared(row, there, gains, group_ids), axis=1)
    conflicting = jnp.take_along_axis(run, place, axis=1) > 0
    weight = jnp.where(gains > 0, factor, jnp.where(gains < 0, 0.0, 1.0))
    weights *= jnp.where(conflicting, weight[:, None], 1.0)
  return jnp.where(mask, weights, 1.0)


def _shared(tokens: Array, there: Array, gains: Array, group_ids: Array) -> Array:
  """i32[B, T], 1 where good and bad rows of the group have the token of this row in this column."""

  def column(token, here):
    groups = same(joint(group_ids, jnp.where(here, token, -1)))
    good, bad = (total((here & rows).astype(jnp.int32), groups) for rows in (gains > 0, gains < 0))
    return here & (good > 0) & (bad > 0)

  return jax.vmap(column, in_axes=1, out_axes=1)(tokens, there).astype(jnp.int32)
