"""Attention over one or several sets of keys, and the masks that say which tokens see each other."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from polgrad.models import cache as caches
from polgrad.models.quantized import Quantized, is_quantized, values_of
from polgrad.sharding import kept_cut, mesh_axes, partition_spec

Array = jax.Array
# Keys, values, and a mask of what each query may look at.
Source = tuple[Array | Quantized, Array | Quantized, Array]


def einsum(spec: str, x: Array, y: Array) -> Array:
  """`jnp.einsum` that accumulates in float32, with full float32 precision for float32 operands.

  The derivatives of a bfloat16 product are bfloat16 products. Without this rule they would multiply a
  float32 cotangent, for which XLA copies the weights to float32.
  """
  return (_narrow if x.dtype == y.dtype == jnp.bfloat16 else _product)(spec, x, y)


def _product(spec: str, x: Array, y: Array) -> Array:
  return jnp.einsum(spec, x, y, precision='highest', preferred_element_type=jnp.float32)


_narrow = jax.custom_jvp(_product, nondiff_argnums=(0,))


@functools.partial(_narrow.defjvp, symbolic_zeros=True)
def _narrow_jvp(spec: str, primals: tuple[Array, Array], tangents: tuple):
  (x, y), (dx, dy) = primals, tangents
  terms = [(x, dy), (dx, y)]
  # Operands that do not depend on what is differentiated, frozen weights for example, need no product.
  kept = [t for t in terms if not any(isinstance(v, SymbolicZero) for v in t)]
  return _narrow(spec, x, y), sum(jnp.einsum(spec, *t).astype(jnp.float32) for t in kept)


def softcap(x: Array, cap: float) -> Array:
  """cap tanh(x / cap), so that the result stays within +-cap (Gemma 2, arXiv:2408.00118); 0: no cap."""
  return cap * jnp.tanh(x / cap) if cap else x


def attend(query: Array, *sources: Source, scale: float, cap: float = 0.0) -> Array:
  """Grouped-query attention (arXiv:2305.13245): a group of query heads reads one key and value head.

  The softmax is over the keys of all sources together. Each source is read separately, as
  sum_l exp(s_l - m) v_l and sum_l exp(s_l - m) with its largest score m, and the sums of all sources are
  added up with factors exp(m - largest m); the quotient is the softmax over all keys. A source may have
  fewer rows (N) than the queries (B): then B / N consecutive rows of queries read the same row of the
  source.

  Args:
    query: [B, S, heads, head_dim].
    *sources: keys [N, kv_heads, head_dim, L], values [N, kv_heads, L, head_dim], and a mask
      bool[B, S, L], True where a query may look. A query without any True gets a finite, meaningless
      result. Keys and values may have 8 bits, with scales [N, kv_heads, L].
    scale: multiplies the scores.
    cap: soft cap of the scaled scores (0: none).

  Returns:
    [B, S, heads, head_dim]
  """
  return _quotient([_read(query, *source, scale, cap) for source in sources]).astype(query.dtype)


def attend_to_spans(
  query: Array, *spans: tuple, several: bool, scale: float, cap: float = 0.0
) -> Array:
  """`attend` to one layer of the spans of a cache, with B rows each.

  Args:
    *spans: keys and values of a stack of layers, see `cache`; a mask as in `attend`; and i32[], the
      number of the layer in the stack.
    several: read no span that is masked as a whole. Reading it would add zeros, so whether it is read
      changes no bit of the result.
  """

  # The layer is cut out of its stack inside of the conditional: an operand of it would be a copy.
  def read(key: Array, value: Array, mask: Array, layer: Array) -> Read:
    key = caches.layer_of(caches.KEYS, key, layer)
    value = caches.layer_of(caches.VALUES, value, layer)
    return _read(query, key, value, mask, scale, cap)

  def skip(*span: Array) -> Read:
    top, total, out = jax.tree.map(jnp.zeros_like, jax.eval_shape(read, *span))
    return jnp.full_like(top, jnp.finfo(jnp.float32).min), total, out

  if several:
    parts = [jax.lax.cond(jnp.any(span[2]), read, skip, *span) for span in spans]
  else:
    parts = [read(*span) for span in spans]
  return _quotient(parts).astype(query.dtype)


def over_positions(attend: Callable, query: Array, *sources: Source, whole: bool = False) -> Array:
  """`attend(query, *sources)`, where positions may be cut over devices and are not exchanged for heads.

  Each device attends with the queries of its positions. It gathers the keys and values of a row,
  whose gradients are scattered: exact for every number of devices, and for every mask.

  Args:
    attend: a function with the arguments of `attend`, or of `attend_to_spans`.
    whole: each device has all columns of the sources, as in a cache.
  """
  if not kept_cut(*query.shape[1:3]):
    return attend(query, *sources)
  mesh, used = jax.sharding.get_abstract_mesh(), set()

  def cut(axis: str, *sizes: int) -> tuple[str, ...]:
    """The mesh axes that cut a dimension, if they cut it alike in all arrays; otherwise the compiler
    decides."""
    first, *others = (mesh_axes(partition_spec(mesh, (axis,), (size,))[0]) for size in sizes)
    found = first if all(other == first for other in others) else ()
    used.update(found)
    return found

  rows = cut('batch', len(query), *(len(key) for key, *_ in sources))
  heads = cut('heads', query.shape[2], *(key.shape[-3] for key, *_ in sources))
  positions = cut('length', query.shape[1])
  spec = lambda *axes: PartitionSpec(*(names or None for names in axes))
  queries, masks = spec(rows, positions, heads), spec(rows, positions)

  def on_each(attend: Callable, specs: list) -> Array:
    split = jax.shard_map(
      attend, in_specs=(queries, *specs), out_specs=queries, axis_names=used, check_vma=False
    )
    return split(query, *sources)

  if whole:
    # Only leading axes are named: scales of 8 bits lack the last one, and stacks have one of layers.
    one = spec(rows, *[()] * (len(sources[0][0].shape) - 4), heads)
    return on_each(attend, [(one, one, masks, spec())] * len(sources))
  gathered = [cut('length', mask.shape[-1]) for _, _, mask in sources]
  keys = lambda own: spec(rows, heads, (), own)
  specs = [(keys(own), spec(rows, heads, own), masks) for own in gathered]

  def local(query: Array, *sources: Source) -> Array:
    def gather(x: Array, own: tuple[str, ...], axis: int) -> Array:
      return jax.lax.all_gather(x, own, axis=axis, tiled=True) if own else x

    read = [(gather(k, own, 3), gather(v, own, 2), m) for own, (k, v, m) in zip(gathered, sources)]
    return attend(query, *read)

  return on_each(local, specs)


# Of one source: the largest score and the sum of exponentials, f32[B, S, heads], and the sum of values,
# f32[B, S, heads, head_dim]
Read = tuple[Array, Array, Array]


def _read(query: Array, key: Array, value: Array, mask: Array, scale: float, cap: float) -> Read:
  scores = _scores(query, key, mask, scale, cap)
  # The result does not depend on what is subtracted, so no gradient needs to flow through it.
  top = jax.lax.stop_gradient(jnp.max(scores, axis=-1))
  weights = jnp.exp(scores - top[..., None])
  total = jnp.sum(weights, axis=-1)
  of_queries = lambda x: jnp.moveaxis(x, 3, 1).reshape(query.shape[:3])
  return of_queries(top), of_queries(total), _like(query, _mix(weights, value, query.dtype))


def _quotient(parts: list[Read]) -> Array:
  """The sum of values over that of exponentials, of all sources."""
  if len(parts) == 1:
    [(_, total, out)] = parts
  else:
    top = functools.reduce(jnp.maximum, [top for top, _, _ in parts])
    factors = [jnp.exp(own - top) for own, _, _ in parts]
    total = sum(factor * total for factor, (_, total, _) in zip(factors, parts))
    out = sum(factor[..., None] * out for factor, (_, _, out) in zip(factors, parts))
  # A skipped source has the total 0.
  return out / jnp.maximum(total, 1e-30)[..., None]


def _scores(query: Array, key: Array, mask: Array, scale: float, cap: float) -> Array:
  """Scores of the keys of a source, f32[N, kv_heads, heads / kv_heads, B / N * S, L]."""
  # Merge the positions of all rows that read the same row of keys: [N, rows * S, ...].
  together = lambda x: x.reshape(len(key), -1, *x.shape[2:])
  split = together(query.reshape(*query.shape[:2], key.shape[1], -1, query.shape[3]))
  # One matrix of queries for each head of keys, so that this product and that of `_mix` are plain matrix
  # products.
  heads = jnp.transpose(split, (0, 2, 3, 1, 4))
  matrix = heads.reshape(*heads.shape[:2], -1, heads.shape[-1])
  if is_quantized(key):
    scores = einsum('bnxk,bnkl->bnxl', matrix, values_of(key, matrix.dtype)) * key.scale[:, :, None]
  else:
    scores = einsum('bnxk,bnkl->bnxl', matrix.astype(key.dtype), key)
  scores = softcap(scores.reshape(*heads.shape[:4], -1) * scale, cap)
  # The smallest finite number, not -inf: a query that sees nothing gets no NaN.
  return jnp.where(together(mask)[:, None, None], scores, jnp.finfo(jnp.float32).min)


def _mix(weights: Array, value: Array | Quantized, dtype: Any) -> Array:
  """Sums of values, f32[N, kv_heads, heads / kv_heads * B / N * S, head_dim]; weights are laid out like
  `_scores`. Products are taken in the type of values, or in `dtype` where these have 8 bits."""
  matrix = weights.reshape(*value.shape[:2], -1, value.shape[2])
  if is_quantized(value):
    matrix, value = matrix * value.scale[:, :, None], values_of(value, dtype)
  return einsum('bnxl,bnlk->bnxk', matrix.astype(value.dtype), value)


def _like(query: Array, out: Array) -> Array:
  """A result of `_mix` in the layout of the queries."""
  out = out.reshape(*out.shape[:2], query.shape[2] // out.shape[1], -1, out.shape[-1])
  return jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(query.shape)


def segment_positions(segment_ids: Array) -> Array:
  """Position of each token within its segment, i32[B, T]: [1, 1, 1, 2, 2] -> [0, 1, 2, 0, 1]."""
  index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1])[None], segment_ids.shape)
  before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  start = jnp.where(segment_ids != before, index, 0)
  return index - jax.lax.cummax(start, axis=1)


def segment_mask(segment_ids: Array) -> Array:
  """Causal mask within each segment: i32[B, T] -> bool[B, T, T], [b, t, s]: does token t see s?"""
  length = segment_ids.shape[1]
  causal = jnp.tril(jnp.ones((1, length, length), bool))
  return causal & (segment_ids[:, :, None] == segment_ids[:, None, :])
