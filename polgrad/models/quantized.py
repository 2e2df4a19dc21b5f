"""Arrays in 8 bits: the weights and the cache of a sampler, which has less to read and to hold.

An array W becomes values Q of 8 bits and a scale s for each slice along some axes, with W ~ s Q:

    s = max |W| / m,   Q = round(W / s)

m is 127 for 'int8' and 448 for 'float8' (e4m3, arXiv:2209.05433). The axes are those that a product sums
over: a matrix has a scale for each of its outputs, keys and values have one for each token and head. The
product is then taken with Q, in the type of activations, and multiplied by s (arXiv:2208.07339 has such
scales), so no compiler needs the weights in more bits.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from polgrad.models.config import ATTENTION, MLP, Config, num_inputs

Array = jax.Array
Params = Any

KINDS = {'int8': jnp.int8, 'float8': jnp.float8_e4m3fn}


@struct.dataclass
class Quantized:
  """An array as values of 8 bits times a scale."""

  values: Array
  scale: Array  # f32, whose shape has 1 in the axes that share a scale, or lacks them

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values.shape

  def __len__(self) -> int:
    return len(self.values)


def is_quantized(x: Any) -> bool:
  return isinstance(x, Quantized)


def quantize(x: Array, kind: Any, axes: tuple[int, ...]) -> Quantized:
  """The nearest values of 8 bits, with a scale for all entries along `axes`.

  An entry is off by at most half a step: s / 2 for int8, and for float8 |x| / 16, or s / 1024 near zero.
  Zeros stay exact, and where an entry is NaN or infinite, all that share its scale become NaN.

  >>> quantize(jnp.array([[0.0, -2.54], [1.0, 1.27]]), jnp.int8, (0,))
  Quantized(values=Array([[   0, -127],
         [ 127,   64]], dtype=int8), scale=Array([[0.00787402, 0.02      ]], dtype=float32))

  Args:
    kind: type of the values.

  Returns:
    values of the shape of x, and scales with 1 in `axes`.
  """
  most = float((jnp.iinfo if jnp.issubdtype(kind, jnp.integer) else jnp.finfo)(kind).max)
  x = x.astype(jnp.float32)
  top = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
  # At least the smallest normal number, so that nothing is divided by 0. The scale of NaN is NaN, which
  # whole numbers cannot hold.
  scale = jnp.maximum(top / most, jnp.finfo(jnp.float32).tiny)
  values = jnp.clip(x / scale, -most, most)
  if jnp.issubdtype(kind, jnp.integer):
    values = jnp.round(values)
  return Quantized(values.astype(kind), scale)


def dequantize(x: Array | Quantized) -> Array:
  """What the values stand for, f32; other arrays are unchanged."""
  return x.values.astype(jnp.float32) * x.scale if is_quantized(x) else x


def values_of(x: Array | Quantized, dtype: Any) -> Array:
  """What a product multiplies with; what it gives is then multiplied by the scales."""
  return (x.values if is_quantized(x) else x).astype(dtype)


def scaled(out: Array, matrix: Array | Quantized) -> Array:
  """The product [..., outputs] of activations with `values_of` a matrix, times the scales of outputs."""
  if not is_quantized(matrix):
    return out
  return out * matrix.scale.reshape(*(1,) * (out.ndim - 1), -1)


def summed_axes(config: Config, name: str) -> tuple[int, ...]:
  """Axes of a parameter, counted from the end, that share a scale: those that its product sums over.

  () for a parameter that stays in more bits: norms, biases, routers, heads and adapters are small, and a
  step reads few rows of embeddings that are only looked up.

  >>> summed_axes(Config(vocab_size=8), 'out')
  (-3, -2)
  """
  if name == config.unembedding:
    return (-1,)
  if name not in ATTENTION + MLP:
    return ()
  rank = len(config.axes(name)) - (name in MLP and config.num_experts > 0)
  return tuple(range(-rank, num_inputs(name) - rank))


def quantize_params(params: Params, config: Config, kind: str) -> Params:
  """Parameters, or a part of the tree, with matrices in 8 bits; what is quantized already stays.

  Args:
    kind: of `KINDS`; '' changes nothing.
  """
  if not kind:
    return params

  def one(path: tuple, x: Array | Quantized) -> Array | Quantized:
    axes = () if is_quantized(x) else summed_axes(config, path[-1].key)
    return quantize(x, KINDS[kind], axes) if axes else x

  return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_quantized)


def dequantize_params(params: Params) -> Params:
  """Parameters whose matrices are what the quantized ones stand for, f32."""
  return jax.tree.map(dequantize, params, is_leaf=is_quantized)
