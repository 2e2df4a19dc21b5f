"""The cache of decoding: keys and values of the tokens so far, and the functions that write them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from polgrad.models.config import Config
from polgrad.models.quantized import KINDS, Quantized, is_quantized, quantize
from polgrad.sharding import constrain, partition_spec, platform

Array = jax.Array

# Axes of the buffers, in the order in which attention multiplies with them, so that a step of decoding
# transposes neither.
KEYS = ('batch', 'attention_kv_heads', 'head_dim', 'attention_length')
VALUES = ('batch', 'attention_kv_heads', 'attention_length', 'head_dim')
POSITIONS = ('batch', 'attention_length')
LANES = 128  # numbers in a line of a TPU's tiles
SCALES = ('batch', 'attention_kv_heads', 'attention_length')  # of keys, and of values, with 8 bits


class Span(NamedTuple):
  """Keys and values of the tokens in consecutive columns, one buffer for each layer."""

  keys: tuple[Array | Quantized, ...]  # [B, kv_heads, head_dim, length] each
  values: tuple[Array | Quantized, ...]  # [B, kv_heads, length, head_dim] each
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


def empty(config: Config, batch: int, length: int, kind: str = '') -> Cache:
  """A cache of `length` empty columns for `batch` rows, in one span.

  Args:
    kind: of `quantized.KINDS`, the type of keys and values; '' is that of activations.
  """
  size = dict(
    batch=batch,
    attention_length=length,
    attention_kv_heads=config.num_kv_heads,
    head_dim=config.head_dim,
  )
  zeros = lambda axes, dtype: constrain(jnp.zeros([size[axis] for axis in axes], dtype), axes)

  def buffer(axes: tuple[str, ...]) -> Array | Quantized:
    if kind:
      return Quantized(zeros(axes, KINDS[kind]), zeros(SCALES, jnp.float32))
    return zeros(axes, held_as(config.dtype))

  span = Span(
    keys=tuple(buffer(KEYS) for _ in range(config.num_layers)),
    values=tuple(buffer(VALUES) for _ in range(config.num_layers)),
    positions=jnp.full((batch, length), -1, jnp.int32),
  )
  return Cache((span,))


def held_as(dtype: Any) -> Any:
  """The type in which keys and values of activations of a type are held.

  On CPUs XLA writes a column of a bfloat16 array by converting all of it to float32 and back. So there
  they are held in float32: the same numbers, in twice the memory, written in place.
  """
  return jnp.float32 if dtype == 'bfloat16' and platform() == 'cpu' else dtype


def each(change: Callable[..., Array], axes: tuple[str, ...], *buffers: Array | Quantized):
  """`change(axes, *buffers)`, of values and of scales where they have 8 bits."""
  if not is_quantized(buffers[0]):
    return change(axes, *buffers)
  values, scales = ([getattr(x, name) for x in buffers] for name in ('values', 'scale'))
  return Quantized(change(axes, *values), change(SCALES, *scales))


def write(
  axes: tuple[str, ...], buffer: Array | Quantized, new: Array | Quantized, index: Array | int
) -> Array | Quantized:
  """`buffer` with `new` in the columns from `index` on; `axes` names the axes of both.

  Args:
    new: of the type of `buffer`, or of one that is converted to it.
    index: one column for all rows, and then `new` is dropped if it does not fit into `buffer` behind it;
      or i32[B], a column for each row, and then columns of `new` outside of `buffer` are dropped.
  """
  if is_quantized(buffer) and not is_quantized(new):
    axis = axes.index('head_dim')
    new = quantize(new, buffer.values.dtype, (axis,))
    new = new.replace(scale=jnp.squeeze(new.scale, axis))
  return each(functools.partial(_write, index=index), axes, buffer, new)


def _write(axes: tuple[str, ...], buffer: Array, new: Array, index: Array | int) -> Array:
  axis, new = axes.index('attention_length'), new.astype(buffer.dtype)
  if jnp.ndim(index) == 0:
    last = buffer.shape[axis] - new.shape[axis]
    if not isinstance(index, int):
      old = jax.lax.dynamic_slice_in_dim(buffer, index, new.shape[axis], axis)
      new = jnp.where((index >= 0) & (index <= last), new, old)
    out = jax.lax.dynamic_update_slice_in_dim(buffer, new, index, axis)
  else:
    columns = index[:, None] + jnp.arange(new.shape[axis])[None]
    columns = jnp.where(columns < 0, buffer.shape[axis], columns)  # no columns from the end
    before = (slice(None),) * (axis - 1)
    put = lambda buffer, new, columns: buffer.at[(*before, columns)].set(new, mode='drop')
    out = jax.vmap(put)(buffer, new, columns)
  return constrain(on_tpu(axes, out), axes)


def on_tpu(axes: tuple[str, ...], buffer: Array) -> Array:
  """The buffer, on a TPU in the order in which attention reads it: columns are last in memory, but not
  those of values whose heads fill whole tiles.

  Where attention is inside of a conditional, a TPU's compiler would otherwise lay out the buffers as it
  likes to write a column, and copy all of them in every step.
  """
  if axes not in (KEYS, VALUES):
    return buffer
  order = [*range(buffer.ndim)]
  if buffer.shape[-1] % LANES:
    order.append(order.pop(axes.index('attention_length')))
  laid_out = lambda x: with_layout_constraint(x, Layout(tuple(order)))
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty:  # each device for its part: the compiler does not cut a constraint
    spec = partition_spec(mesh, axes, buffer.shape)
    laid_out = jax.shard_map(laid_out, in_specs=spec, out_specs=spec)
  return jax.lax.platform_dependent(buffer, tpu=laid_out, default=lambda x: x)


def begin(cache: Cache, read: Cache, rows: Array) -> Cache:
  """Replaces the rows of `cache` where `rows` bool[B] is True by those of `read`, which has one span and
  is no longer than the first span of `cache`.

  The contents keep their columns; the columns that `read` lacks become empty.
  """
  first, *others = cache.spans
  (read,) = read.spans

  def put(axes, buffer, new):
    old = jax.lax.slice_in_dim(buffer, 0, read.length, axis=axes.index('attention_length'))
    chosen = jnp.where(rows.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
    return _write(axes, buffer, chosen, 0)

  # A position of -1 alone makes a column empty: keys and values behind it are never looked at.
  rest = ((0, 0), (0, first.length - read.length))
  positions = jnp.pad(read.positions, rest, constant_values=-1)
  swap = lambda span, new: jnp.where(rows[:, None], new, span.positions)
  first = Span(
    keys=tuple(each(put, KEYS, *pair) for pair in zip(first.keys, read.keys)),
    values=tuple(each(put, VALUES, *pair) for pair in zip(first.values, read.values)),
    positions=swap(first, positions),
  )
  return Cache((first, *(span._replace(positions=swap(span, -1)) for span in others)))
