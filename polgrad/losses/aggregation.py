"""Reductions from token losses to one number. No other function of `losses` averages a loss over rows.

A function of `TABLE` fills the slot `aggregation` of an objective. It returns a `Mean(total, count)`.
Totals and counts are summed over micro-batches and devices before the division, so the way a batch is
split never changes the objective. Counts depend on `where` and the shape only, never on parameters.

A masked entry is replaced by 0, not multiplied by 0. So NaN or infinity at a masked place of `loss`
changes neither the value nor the gradient with respect to `loss`, which is exactly 0 there. The chain
rule multiplies that 0 by the derivative of the loss at its inputs, and 0 * NaN is NaN (for example of
exp at NaN or inf). The functions of `surrogates`, `penalties`, `ratios` and `divergences` have no such
derivative. For a loss of your own, replace masked entries of its inputs before it is computed, as
`objectives.view` does.

Sums and counts of losses in half precision are float32.

The examples need `import jax.numpy as jnp` and `from polgrad.losses import aggregation`.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax.numpy as jnp

from polgrad.losses import turns
from polgrad.losses._common import single
from polgrad.reductions import Mean
from polgrad.registry import table
from polgrad.types import Array


def token_mean(loss: Array, where: Array) -> Mean:
  """Every valid token counts the same: sum / number of valid tokens (DAPO, arXiv:2503.14476).

  Args:
    loss: [B, T].
    where: bool[B, T].

  Returns:
    total: the sum of the loss over valid tokens; count: the number of valid tokens.

  >>> loss = jnp.array([[1.0, 9.0, 9.0], [0.0, 0.0, 0.0]])
  >>> where = jnp.array([[True, False, False], [True, True, True]])
  >>> print(float(aggregation.token_mean(loss, where).value()))
  0.25
  """
  return Mean(total=jnp.sum(_row_sums(loss, where)), count=_count(where, loss))


def sequence_mean(loss: Array, where: Array, *, empty_rows: bool = False) -> Mean:
  """Every row with a valid token counts the same, by its mean over tokens (GRPO, arXiv:2402.03300).

  A token of a long row has a smaller weight than a token of a short row; Dr. GRPO (arXiv:2503.20783)
  calls this the length bias.

  Args:
    loss: [B, T].
    where: bool[B, T].
    empty_rows: whether rows without a valid token are counted, with a mean of 0; default no.

  Returns:
    total: the sum of the rows' means; count: the number of rows that are counted.

  >>> loss = jnp.array([[1.0, 9.0, 9.0], [0.0, 0.0, 0.0]])
  >>> where = jnp.array([[True, False, False], [True, True, True]])
  >>> print(float(aggregation.sequence_mean(loss, where).value()))
  0.5
  """
  lengths = jnp.maximum(jnp.sum(where, axis=-1), 1)
  return Mean(total=jnp.sum(_row_sums(loss, where) / lengths), count=_rows(where, loss, empty_rows))


def turn_mean(loss: Array, where: Array) -> Mean:
  """Every turn counts the same, by its mean over tokens (standard).

  A turn is a run of valid tokens: between two turns there is something that the policy read. So a token
  of a long turn has a smaller weight than one of a short turn, and a row with many turns counts more
  than one with few. In rows of one turn this is `sequence_mean`.

  Args:
    loss: [B, T].
    where: bool[B, T].

  Returns:
    total: the sum of the turns' means; count: the number of turns.

  >>> loss = jnp.array([[1.0, 9.0, 9.0], [4.0, 9.0, 6.0]])
  >>> where = jnp.array([[True, False, False], [True, False, True]])
  >>> print(round(float(aggregation.turn_mean(loss, where).value()), 4))
  3.6667
  """
  chex.assert_rank([loss, where], 2)
  chex.assert_equal_shape([loss, where])
  ids = turns.numbers(where)
  means = turns.means(single(loss), ids, where)
  return Mean(total=jnp.sum(means), count=jnp.sum(turns.present(ids, where), dtype=means.dtype))


def sequence_sum(loss: Array, where: Array, *, empty_rows: bool = False) -> Mean:
  """Sum over the tokens of a row, then the mean over rows with a valid token (RLOO, arXiv:2402.14740).

  With `surrogates.reinforce` this is the policy gradient of whole sequences.

  Args:
    loss: [B, T].
    where: bool[B, T].
    empty_rows: whether rows without a valid token are counted, with a sum of 0; default no.

  Returns:
    total: the sum of the loss over valid tokens; count: the number of rows that are counted.

  >>> loss = jnp.array([[1.0, 9.0, 9.0], [1.0, 2.0, 3.0]])
  >>> where = jnp.array([[True, False, False], [True, True, True]])
  >>> print(float(aggregation.sequence_sum(loss, where).value()))
  3.5
  """
  return Mean(total=jnp.sum(_row_sums(loss, where)), count=_rows(where, loss, empty_rows))


def constant_length(loss: Array, where: Array, *, length: int) -> Mean:
  """sum / (B length): the denominator does not depend on the samples (Dr. GRPO, arXiv:2503.20783).

  B counts all rows, also those without a valid token.

  Args:
    loss: [B, T].
    where: bool[B, T].
    length: the largest number of tokens that a completion may have, not the padded length T.

  Returns:
    total: the sum of the loss over valid tokens; count: B length.

  Raises:
    ValueError: length < 1.

  >>> loss = jnp.array([[1.0, 9.0, 9.0], [1.0, 2.0, 3.0]])
  >>> where = jnp.array([[True, False, False], [True, True, True]])
  >>> print(float(aggregation.constant_length(loss, where, length=7).value()))
  0.5
  """
  if length < 1:
    raise ValueError(f'length must be positive, got {length}')
  total = jnp.sum(_row_sums(loss, where))
  return Mean(total=total, count=jnp.asarray(loss.shape[0] * length, total.dtype))


def token_sum(loss: Array, where: Array, *, rows: int) -> Mean:
  """The sum over all valid tokens of an update of `rows` rows: sum * rows / B (standard).

  Long batches have larger gradients than short ones. The number of rows is a knob because an update may
  be split: a part of B rows has its share of the count, and the shares add up to 1.

  Args:
    loss: [B, T].
    where: bool[B, T].
    rows: the number of rows of the whole update (the minibatch), also those without a valid token.

  Returns:
    total: the sum of the loss over valid tokens; count: B / rows.

  Raises:
    ValueError: rows < 1.

  >>> loss = jnp.array([[1.0, 9.0, 9.0], [1.0, 2.0, 3.0]])
  >>> where = jnp.array([[True, False, False], [True, True, True]])
  >>> print(float(aggregation.token_sum(loss, where, rows=2).value()))
  7.0
  """
  if rows < 1:
    raise ValueError(f'rows must be positive, got {rows}')
  total = jnp.sum(_row_sums(loss, where))
  return Mean(total=total, count=jnp.asarray(loss.shape[0] / rows, total.dtype))


def _row_sums(loss: Array, where: Array) -> Array:
  chex.assert_rank([loss, where], 2)
  chex.assert_equal_shape([loss, where])
  return jnp.sum(jnp.where(where, single(loss), 0), axis=-1)


def _rows(where: Array, loss: Array, empty_rows: bool) -> Array:
  """The number of rows, with or without those that have no valid token."""
  return _count(jnp.any(where, axis=-1) | empty_rows, loss)


def _count(where: Array, loss: Array) -> Array:
  return jnp.sum(where, dtype=single(loss).dtype)


TABLE = table(
  'aggregation', token_mean, sequence_mean, turn_mean, sequence_sum, constant_length, token_sum
)
Part = Annotated[Callable, TABLE]
