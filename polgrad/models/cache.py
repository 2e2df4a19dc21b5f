"""The cache of decoding: keys and values of the tokens so far, and the functions that write them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType

from polgrad.models.config import Config
from polgrad.models.quantized import KINDS, Quantized, is_quantized, quantize
from polgrad.sharding import constrain, partition_spec, platform

Array = jax.Array

# Axes of the buffers, in the order in which attention multiplies with them, so that a step of decoding
# transposes neither.
KEYS = ('batch', 'attention_kv_heads', 'head_dim', 'attention_length')
VALUES = ('batch', 'attention_kv_heads', 'attention_length', 'head_dim')
POSITIONS = ('batch', 'attention_length')
STACK = 1  # the axis of layers, in a stack of several
LANES = 128  # numbers in a line of a TPU's tiles
SCALES = ('batch', 'attention_kv_heads', 'attention_length')  # of keys, and of values, with 8 bits


class Span(NamedTuple):
  """Keys and values of the tokens in consecutive columns, one buffer for each stack of layers.

  A stack of several layers has one more axis, behind that of rows.
  """

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


def empty(
  config: Config, batch: int, length: int, stacks: tuple[int, ...], kind: str = ''
) -> Cache:
  """A cache of `length` empty columns for `batch` rows, in one span.

  Args:
    stacks: number of layers of each buffer.
    kind: of `quantized.KINDS`, the type of keys and values; '' is that of activations.
  """
  size = dict(
    batch=batch,
    attention_length=length,
    attention_kv_heads=config.num_kv_heads,
    head_dim=config.head_dim,
  )

  def buffer(axes: tuple[str, ...], layers: int) -> Array | Quantized:
    stack = [] if layers == 1 else [layers]

    def zeros(axes: tuple[str, ...], dtype: Any) -> Array:
      first, *rest = (size[axis] for axis in axes)
      empty = jnp.zeros([first, *stack, *rest], dtype)
      return constrain(empty, axes_of(axes, empty))

    if kind:
      return Quantized(zeros(axes, KINDS[kind]), zeros(SCALES, jnp.float32))
    return zeros(axes, held_as(config.dtype))

  span = Span(
    keys=tuple(buffer(KEYS, layers) for layers in stacks),
    values=tuple(buffer(VALUES, layers) for layers in stacks),
    positions=jnp.full((batch, length), -1, jnp.int32),
  )
  return Cache((span,))


def held_as(dtype: Any) -> Any:
  """The type in which keys and values of activations of a type are held.

  On CPUs XLA writes a column of a bfloat16 array by converting all of it to float32 and back. So there
  they are held in float32: the same numbers, in twice the memory, written in place.
  """
  return jnp.float32 if dtype == 'bfloat16' and platform() == 'cpu' else dtype


def axes_of(axes: tuple[str, ...], buffer: Array) -> tuple[str, ...]:
  """The axes of a buffer, with that of layers if it is of a stack of several."""
  if buffer.ndim == len(axes):
    return axes
  return (*axes[:STACK], 'layers', *axes[STACK:])


def each(change: Callable[..., Any], axes: tuple[str, ...], *buffers: Array | Quantized):
  """`change(axes, *buffers)`; where buffers have 8 bits, of their values, and of their scales.

  `axes` are then those of the array, with that of layers if it has one.
  """
  if not is_quantized(buffers[0]):
    return change(axes_of(axes, buffers[0]), *buffers)
  values, scales = ([getattr(x, name) for x in buffers] for name in ('values', 'scale'))
  return Quantized(
    change(axes_of(axes, values[0]), *values), change(axes_of(SCALES, scales[0]), *scales)
  )


def layer_of(axes: tuple[str, ...], buffer: Array | Quantized, layer: Array | int) -> Any:
  """The part of one layer in a buffer of its stack."""

  def cut(own: tuple[str, ...], x: Array) -> Array:
    if 'layers' not in own:
      return x
    # If the layout of the read differed from that of the stack, all layers would be copied.
    return jax.lax.dynamic_index_in_dim(on_tpu(own, x), layer, STACK, keepdims=False)

  return each(cut, axes, buffer)


def write(
  axes: tuple[str, ...],
  buffer: Array | Quantized,
  new: Array,
  index: Array | int,
  layer: Array | int = 0,
) -> Array | Quantized:
  """`buffer` with `new` in the columns from `index` on; `axes` names the axes of `buffer`.

  Args:
    new: of one layer; of the type of `buffer`, or of one that is converted to it.
    index: one column for all rows, and then `new` is dropped if it does not fit into `buffer` behind it;
      or i32[B], a column for each row, and then columns of `new` outside of `buffer` are dropped.
    layer: number of the layer in the stack.
  """
  if is_quantized(buffer):
    axis = axes.index('head_dim')
    new = quantize(new, buffer.values.dtype, (axis,))
    new = new.replace(scale=jnp.squeeze(new.scale, axis))
  return each(functools.partial(_write, index=index, layer=layer), axes, buffer, new)


def _write(
  axes: tuple[str, ...], buffer: Array, new: Array, index: Array | int, layer: Array | int = 0
) -> Array:
  axis, new = axes.index('attention_length'), new.astype(buffer.dtype)
  if new.ndim < buffer.ndim:
    new = jnp.expand_dims(new, STACK)
  if jnp.ndim(index) == 0:
    starts = [{'layers': layer, 'attention_length': index}.get(name, 0) for name in axes]
    last = buffer.shape[axis] - new.shape[axis]
    if not isinstance(index, int):
      old = jax.lax.dynamic_slice(buffer, starts, new.shape)
      new = jnp.where((index >= 0) & (index <= last), new, old)
    out = jax.lax.dynamic_update_slice(buffer, new, starts)
  else:
    columns = index[:, None] + jnp.arange(new.shape[axis])[None]
    columns = jnp.where(columns < 0, buffer.shape[axis], columns)  # no columns from the end
    if 'layers' in axes:  # what is indexed by two arrays has its columns first
      new = jnp.moveaxis(jnp.squeeze(new, STACK), axis - 1, 1)

    def put(buffer: Array, new: Array, columns: Array) -> Array:
      at = {'layers': layer, 'attention_length': columns}
      places = tuple(at.get(name, slice(None)) for name in axes[1:])
      return buffer.at[places].set(new, mode='drop')

    out = jax.vmap(put)(buffer, new, columns)
  return constrain(on_tpu(axes, out), axes)


def on_tpu(axes: tuple[str, ...], buffer: Array) -> Array:
  """The buffer, on a TPU in the order in which attention reads it: columns are last in memory, but not
  those of values whose heads fill whole tiles.

  Where attention is inside of a conditional, a TPU's compiler would otherwise lay out the buffers as it
  likes to write a column, and copy all of them in every step.
  """
  if axes in (POSITIONS, SCALES):
    return buffer
  order = [*range(buffer.ndim)]
  if axes[-1] == 'head_dim' and buffer.shape[-1] % LANES:
    order.append(order.pop(axes.index('attention_length')))
  laid_out = lambda x: with_layout_constraint(x, Layout(tuple(order)))
  mesh = jax.sharding.get_abstract_mesh()
  if AxisType.Manual in mesh.axis_types:  # inside of a `jax.shard_map`
    return buffer
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
