"""From token losses to one number: the only reductions over rows.

A reduction returns `Mean(total, count)`. Totals and counts add over micro-batches and devices, so
the split of a batch never changes the objective. Masked entries are replaced, not multiplied: NaN
there changes nothing. Counts depend on `where` only, never on parameters.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax.numpy as jnp

from polgrad.registry import table
from polgrad.types import Array, Mean


def token_mean(loss: Array, where: Array) -> Mean:
  """Every valid token counts the same: sum / number of valid tokens (DAPO, arXiv:2503.14476).

  Args:
    loss: [B, T].
    where: bool[B, T].
  """
  return Mean(total=jnp.sum(_row_sums(loss, where)), count=_count(where, loss))


def sequence_mean(loss: Array, where: Array) -> Mean:
  """Every row with a valid token counts the same, by its mean over tokens (GRPO, arXiv:2402.03300).

  A token of a long row weighs less than one of a short row; Dr. GRPO (arXiv:2503.20783) calls this
  the length bias.

  Args:
    loss: [B, T].
    where: bool[B, T].
  """
  lengths = jnp.maximum(jnp.sum(where, axis=-1), 1)
  return Mean(
    total=jnp.sum(_row_sums(loss, where) / lengths), count=_count(jnp.any(where, -1), loss)
  )


def sequence_sum(loss: Array, where: Array) -> Mean:
  """Mean over rows with a valid token of the sum of the row (RLOO, arXiv:2402.14740).

  With `reinforce` this is the policy gradient of whole sequences.

  Args:
    loss: [B, T].
    where: bool[B, T].
  """
  return Mean(total=jnp.sum(_row_sums(loss, where)), count=_count(jnp.any(where, -1), loss))


def constant_length(loss: Array, where: Array, *, length: int) -> Mean:
  """sum / (B length): no dependence on what was sampled (Dr. GRPO, arXiv:2503.20783).

  B counts all rows, also those without a valid token.

  Args:
    loss: [B, T].
    where: bool[B, T].
    length: the token budget of generation, not the padded length T of this batch.

  Raises:
    ValueError: length < 1.
  """
  if length < 1:
    raise ValueError(f'length must be positive, got {length}')
  total = jnp.sum(_row_sums(loss, where))
  return Mean(total=total, count=jnp.asarray(loss.shape[0] * length, total.dtype))


def _row_sums(loss: Array, where: Array) -> Array:
  chex.assert_rank([loss, where], 2)
  chex.assert_equal_shape([loss, where])
  return jnp.sum(jnp.where(where, loss, 0), axis=-1)


def _count(where: Array, loss: Array) -> Array:
  return jnp.sum(where, dtype=loss.dtype)


TABLE = table('aggregation', token_mean, sequence_mean, sequence_sum, constant_length)
Part = Annotated[Callable, TABLE]
