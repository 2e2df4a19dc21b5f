"""How the rows of a batch reach the model: cut into pieces, and packed into fewer rows.

A row of a batch is one sequence, for losses, groups and counts. Only the model sees packed rows:
several short sequences are forwarded in one row, and the model's outputs return to the rows of
the batch. `pack` chooses the places on the host, `packed` moves arrays there and back on devices.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polgrad.arrays import WIDE
from polgrad.sharding import constrain
from polgrad.types import Array, Batch

SHORTEST = 32  # columns of the shortest rows of `padded`

ROWS = ('batch', 'length')


def split(batch: Any, parts: int, rows_per_prompt: int) -> Any:
  """Cuts arrays [B, ...] into pieces [parts, B / parts, ...].

  `rows_per_prompt` consecutive rows are a group and stay together: group i goes to piece i % parts, so
  every piece has rows of every device, and no row moves to another device. B must be a multiple of
  parts * rows_per_prompt.
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
  """Gives every row of the batch a place in fewer rows, on the host; 0 in `Layout.pack` turns it off.

  Rows are placed from the longest to the shortest, each into the fullest packed row that has room
  (best fit decreasing). The number of packed rows, and the most tokens that one of them scores, are
  each rounded up to one of `Layout.pack` sizes, because every pair of sizes compiles once.

  Args:
    batch: NumPy arrays; the tokens of a row are consecutive, with padding on either side.
    parts: number of pieces that `split` will cut the batch into; each piece is packed separately.
    rows_per_prompt: as `split` gets it.
    data_parallel_size: the number of packed rows is a multiple of it.

  Returns:
    The batch with `offset`, and with `rows` and `scored` in its layout; or the batch unchanged, if
    packing is off or saves no row.

  Raises:
    ValueError: a row has padding between its tokens; the message gives its number.
  """
  layout = batch.layout
  if not layout.pack:
    return batch

  # A packed row has no room for padding inside a sequence.
  seen = batch.segment_ids > 0
  holes = np.flatnonzero(np.count_nonzero(np.diff(seen, prepend=0, append=0), axis=1) > 2)
  if holes.size:
    raise ValueError(f'row {holes[0]} has padding between its tokens, so it cannot be packed')

  # Places of every piece. All pieces get the sizes of the largest, so that they have one shape.
  length, lengths, scored = seen.shape[1], seen.sum(axis=1), batch.mask.sum(axis=1)
  offset = np.zeros(len(seen), np.int32)
  rows = most = 0
  for piece in split(np.arange(len(seen)), parts, rows_per_prompt):
    offset[piece], used = _best_fit(lengths[piece], length)
    rows = max(rows, used)
    most = max(most, np.bincount(offset[piece] // length, scored[piece]).max())

  # Round both sizes up to one of `pack` values.
  whole = len(seen) // parts
  rows = _round_up(rows, data_parallel_size * -(-whole // (data_parallel_size * layout.pack)))
  most = min(_round_up(max(int(most), 1), -(-length // layout.pack)), length)
  if rows >= whole:
    return batch
  layout = layout._replace(prompt_length=0, rows=rows, scored=most)
  return batch.replace(offset=offset, layout=layout)


def _best_fit(lengths: np.ndarray, room: int) -> tuple[np.ndarray, int]:
  """Places sequences into rows of `room` tokens.

  Returns:
    The offset i32[n] of each sequence in the rows, concatenated; and the number of rows that are used.
  """
  offset, left = np.zeros(len(lengths), np.int32), np.full(len(lengths), room)
  for i in np.argsort(-lengths, kind='stable'):
    row = np.argmin(np.where(left >= lengths[i], left, room + 1))
    offset[i] = row * room + room - left[row]
    left[row] -= lengths[i]
  return offset, np.count_nonzero(left < room)


def _round_up(x: int, step: int) -> int:
  return -(-x // step) * step


def packed(batch: Batch) -> tuple[Batch, Callable[[Array], Array]]:
  """The packed rows of a batch that went through `pack`, on devices.

  Returns:
    A batch of `layout.rows` rows with tokens, segment_ids, mask and the features that are `arrays.WIDE`;
    and a function [rows, T, ...] -> [B, T, ...] that returns the numbers of every token to the token's
    place in the original batch, 0 on padding.
  """
  # The place of each token in the concatenated packed rows; padding gets one beyond the end.
  rows, (count, length) = batch.layout.rows, batch.tokens.shape
  seen = batch.segment_ids > 0
  column = jnp.arange(length)[None] - jnp.argmax(seen, axis=1)[:, None]
  place = jnp.where(seen, batch.offset[:, None] + column, rows * length)

  axes = lambda x: ROWS + ('hidden',) * (x.ndim - 2)

  def there(x: Array) -> Array:
    flat = jnp.zeros((rows * length, *x.shape[2:]), x.dtype).at[place].set(x, mode='drop')
    return constrain(flat.reshape(rows, length, *x.shape[2:]), axes(x))

  def back(x: Array) -> Array:
    flat = x.reshape(-1, *x.shape[2:])
    return constrain(flat.at[place].get(mode='fill', fill_value=0), axes(x))

  def wide(x: Array) -> Array:
    return there(x.reshape(count, length, -1)).reshape(rows, -1)

  # Segment numbers of different rows are made different, so that no row sees another one.
  apart = jnp.arange(count)[:, None] * length
  laid = Batch(
    tokens=there(batch.tokens),
    segment_ids=there(apart + batch.segment_ids),
    mask=there(batch.mask),
    features={name: wide(batch.features[name]) for name in WIDE & batch.features.keys()},
  )
  return laid, back


def padded(
  rows: Sequence[list[int]], count: int, pad_id: int, most: int
) -> tuple[np.ndarray, np.ndarray]:
  """Tokens and segment ids i32[count, T] of rows that begin at column 0; the last row is repeated.

  T is `SHORTEST` times a power of two, but at most `most`, so that few shapes compile.
  """
  rows = [*rows, *[rows[-1]] * (count - len(rows))]
  longest, length = max(map(len, rows)), SHORTEST
  while length < longest:
    length *= 2
  length = min(length, most)
  tokens = np.full((count, length), pad_id, np.int32)
  segment_ids = np.zeros((count, length), np.int32)
  for i, row in enumerate(rows):
    tokens[i, : len(row)] = row
    segment_ids[i, : len(row)] = 1
  return tokens, segment_ids
