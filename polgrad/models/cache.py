"""The cache of decoding: keys and values of the tokens so far, and the functions that write them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from polgrad.models.config import Config
from polgrad.sharding import constrain

Array = jax.Array

# Axes of the buffers, in the order in which attention multiplies with them, so that a step of decoding
# transposes neither.
KEYS = ('batch', 'attention_kv_heads', 'head_dim', 'attention_length')
VALUES = ('batch', 'attention_kv_heads', 'attention_length', 'head_dim')
POSITIONS = ('batch', 'attention_length')


class Span(NamedTuple):
  """Keys and values of the tokens in consecutive columns, one buffer for each layer."""

  keys: tuple[Array, ...]  # [B, kv_heads, head_dim, length] each
  values: tuple[Array, ...]  # [B, kv_heads, length, head_dim] each
  positions: Array  # i32[B, length], position of the token in each column; -1 in empty columns

  @property
  def length(self) -> int:
    return self.positions.shape[1]


class Cache(NamedTuple):
  """Keys and values of the tokens so far; a cache that was widened has more than one span."""

  spans: tuple[Span, ...]

  @property
  def length(self) -> int:
    return sum(span.length for span in self.spans)


def empty(config: Config, batch: int, length: int) -> Cache:
  """A cache of `length` empty columns for `batch` rows, in one span."""
  size = dict(
    batch=batch,
    attention_length=length,
    attention_kv_heads=config.num_kv_heads,
    head_dim=config.head_dim,
  )
  zeros = lambda axes: constrain(jnp.zeros([size[axis] for axis in axes], config.dtype), axes)
  span = Span(
    keys=tuple(zeros(KEYS) for _ in range(config.num_layers)),
    values=tuple(zeros(VALUES) for _ in range(config.num_layers)),
    positions=jnp.full((batch, length), -1, jnp.int32),
  )
  return Cache((span,))


def write(axes: tuple[str, ...], buffer: Array, new: Array, index: Array | int) -> Array:
  """`buffer` with `new` in the columns from `index` on; `axes` names the axes of both.

  Args:
    index: one column for all rows, and then `new` must fit into `buffer` behind it; or i32[B], a column
      for each row, and then columns of `new` outside of `buffer` are dropped.
  """
  axis = axes.index('attention_length')
  if jnp.ndim(index) == 0:
    out = jax.lax.dynamic_update_slice_in_dim(buffer, new, index, axis)
  else:
    columns = index[:, None] + jnp.arange(new.shape[axis])[None]
    columns = jnp.where(columns < 0, buffer.shape[axis], columns)  # no columns from the end
    before = (slice(None),) * (axis - 1)
    put = lambda buffer, new, columns: buffer.at[(*before, columns)].set(new, mode='drop')
    out = jax.vmap(put)(buffer, new, columns)
  return constrain(out, axes)


def begin(cache: Cache, read: Cache, rows: Array) -> Cache:
  """Replaces the rows of `cache` where `rows` bool[B] is True by those of `read`, which has one span and
  is no longer than the first span of `cache`.

  The contents keep their columns; the columns that `read` lacks become empty.
  """
  first, *others = cache.spans
  (read,) = read.spans

  def put(axes, buffer, new):
    old = jax.lax.slice_in_dim(buffer, 0, read.length, axis=axes.index('attention_length'))
    return write(axes, buffer, jnp.where(rows[:, None, None, None], new, old), 0)

  # A position of -1 alone makes a column empty: keys and values behind it are never looked at.
  rest = ((0, 0), (0, first.length - read.length))
  positions = jnp.pad(read.positions, rest, constant_values=-1)
  swap = lambda span, new: jnp.where(rows[:, None], new, span.positions)
  first = Span(
    keys=tuple(put(KEYS, *pair) for pair in zip(first.keys, read.keys)),
    values=tuple(put(VALUES, *pair) for pair in zip(first.values, read.values)),
    positions=swap(first, positions),
  )
  return Cache((first, *(span._replace(positions=swap(span, -1)) for span in others)))
