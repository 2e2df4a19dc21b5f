"""Rows of a batch as the model sees them: cut into pieces, and packed into fewer rows.

A row of a batch is one sequence, for losses, groups and counts. Packing is the model's affair alone:
rows that are short are forwarded several to a row, and what the model says of them returns to
their own places.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polgrad.sharding import constrain
from polgrad.types import Array, Batch

ROWS = ('batch', 'length')


def split(batch: Any, parts: int, rows_per_prompt: int) -> Any:
  """[B, ...] -> [parts, B / parts, ...], keeping runs of `rows_per_prompt` rows together.

  Groups are dealt out in turn, so that every device keeps a share of its own rows.
  """

  def deal(x: Array) -> Array:
    x = x.reshape(-1, parts, rows_per_prompt, *x.shape[1:])
    return x.swapaxes(0, 1).reshape(parts, -1, *x.shape[3:])

  return jax.tree.map(deal, batch)


def join(parts: Any, rows_per_prompt: int) -> Any:
  """The inverse of `split`."""

  def gather(x: Array) -> Array:
    x = x.reshape(x.shape[0], -1, rows_per_prompt, *x.shape[2:])
    return x.swapaxes(0, 1).reshape(-1, *x.shape[3:])

  return jax.tree.map(gather, parts)


def pack(
  batch: Batch, *, parts: int = 1, rows_per_prompt: int = 1, data_parallel_size: int = 1
) -> Batch:
  """Finds every row its place in fewer rows, on the host, if the layout allows it (`Layout.pack`).

  The longest row is placed first, each into the fullest packed row that still has room (best fit
  decreasing). A layout is compiled once, so both of its sizes are rounded up to one of `pack` values.
  Where nothing is gained the batch stays as it is.

  Args:
    batch: NumPy; tokens of a row stand in a line, with padding on either side.
    parts: pieces that `split` will cut the batch into, keeping runs of `rows_per_prompt` rows
      together; each is packed separately.
    data_parallel_size: devices that cut the rows; packed rows are a multiple.

  Returns:
    The batch with an `offset`, and with `rows` and `scored` in its layout.

  Raises:
    ValueError: padding between the tokens of a row, by its number.
  """
  layout = batch.layout
  if not layout.pack:
    return batch
  seen = batch.segment_ids > 0
  holes = np.flatnonzero(np.count_nonzero(np.diff(seen, prepend=0, append=0), axis=1) > 2)
  if holes.size:
    raise ValueError(f'row {holes[0]} has padding between its tokens, so it cannot be packed')
  length, lengths, scored = seen.shape[1], seen.sum(axis=1), batch.mask.sum(axis=1)
  offset = np.zeros(len(seen), np.int32)
  rows = most = 0
  for piece in split(np.arange(len(seen)), parts, rows_per_prompt):
    offset[piece], used = _best_fit(lengths[piece], length)
    rows = max(rows, used)
    most = max(most, np.bincount(offset[piece] // length, scored[piece]).max())
  whole = len(seen) // parts
  rows = _round_up(rows, data_parallel_size * -(-whole // (data_parallel_size * layout.pack)))
  most = min(_round_up(max(int(most), 1), -(-length // layout.pack)), length)
  if rows >= whole:
    return batch
  layout = layout._replace(prompt_length=0, rows=rows, scored=most)
  return batch.replace(offset=offset, layout=layout)


def _best_fit(lengths: np.ndarray, room: int) -> tuple[np.ndarray, int]:
  """Where each sequence begins in rows of `room` that are laid end to end, and how many rows."""
  offset, left = np.zeros(len(lengths), np.int32), np.full(len(lengths), room)
  for i in np.argsort(-lengths, kind='stable'):
    row = np.argmin(np.where(left >= lengths[i], left, room + 1))
    offset[i] = row * room + room - left[row]
    left[row] -= lengths[i]
  return offset, np.count_nonzero(left < room)


def _round_up(x: int, step: int) -> int:
  return -(-x // step) * step


def packed(batch: Batch) -> tuple[Batch, Callable[[Array], Array]]:
  """The packed rows of a batch (tokens, segments, mask), and the way back, on devices.

  Returns:
    A batch of `layout.rows` rows; a function [rows, T] -> [B, T], which returns what is said of a
    token to its place, and leaves 0 where there is none.
  """
  rows, (count, length) = batch.layout.rows, batch.tokens.shape
  seen = batch.segment_ids > 0
  column = jnp.arange(length)[None] - jnp.argmax(seen, axis=1)[:, None]
  place = jnp.where(seen, batch.offset[:, None] + column, rows * length)  # beyond the end: nowhere

  def there(x: Array) -> Array:
    flat = jnp.zeros(rows * length, x.dtype).at[place].set(x, mode='drop')
    return constrain(flat.reshape(rows, length), ROWS)

  def back(x: Array) -> Array:
    return constrain(x.reshape(-1).at[place].get(mode='fill', fill_value=0), ROWS)

  apart = jnp.arange(count)[:, None] * length  # no row sees another
  laid = Batch(
    tokens=there(batch.tokens), segment_ids=there(apart + batch.segment_ids), mask=there(batch.mask)
  )
  return laid, back
