"""Fused attention kernels for whole rows; they never store the [T, T] scores of a row.

`ATTENTION` lists them by the name that `Config.attention` has. They replace `attention.attend` in
`Policy.hidden`, which training uses. Shared prompts and the cache of decoding always use `attend`.

All take queries [B, T, heads, head_dim], keys [B, kv_heads, head_dim, T], values [B, kv_heads, T,
head_dim] and segment_ids i32[B, T], and return softmax(cap(scale q k)) v, [B, T, heads, head_dim]. A
token sees itself and the earlier tokens of its segment: the last `window` of them, itself included, or
all of them if `window` is 0. `scale` multiplies the scores; `cap` is the argument of
`attention.softcap`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from polgrad.models.attention import Source, over_positions, segment_mask
from polgrad.sharding import kept_cut, mesh_axes, partition_spec

Array = jax.Array

LANES = 128  # splash attention reads keys in multiples of this number
BLOCKS = (512, 384, 256, LANES)  # sizes of blocks, the preferred one first


def cudnn(
  query: Array,
  key: Array,
  value: Array,
  segment_ids: Array,
  *,
  window: int,
  scale: float,
  cap: float,
  implementation: str = 'cudnn',
) -> Array:
  """cuDNN's flash attention (arXiv:2205.14135), for bfloat16 on NVIDIA GPUs.

  Raises:
    ValueError: a soft cap, which cuDNN cannot apply.
  """
  if cap:
    raise ValueError(f'cuDNN attention takes no soft cap, got {cap}')
  mask = segment_mask(segment_ids)
  if window:  # remove the keys that are `window` or more columns back
    length = query.shape[1]
    mask &= ~jnp.tril(jnp.ones((1, length, length), bool), -window)

  def attend(query: Array, source: Source) -> Array:
    key, value, mask = source
    return jax.nn.dot_product_attention(
      query,
      jnp.transpose(key, (0, 3, 1, 2)),
      jnp.moveaxis(value, 1, 2),
      mask=mask[:, None],
      scale=scale,
      implementation=implementation,
    )

  return over_positions(attend, query, (key, value, mask))


def splash(
  query: Array,
  key: Array,
  value: Array,
  segment_ids: Array,
  *,
  window: int,
  scale: float,
  cap: float,
  interpret: bool = False,
) -> Array:
  """Splash attention, for TPUs: skips blocks of keys that no query looks at.

  On a mesh every device computes its own rows and heads.
  """
  from jax.experimental.pallas.ops.tpu import splash_attention  # here, because only TPUs need it

  # The kernel wants heads before positions and, on each device, a whole number of blocks.
  mesh, length = jax.sharding.get_abstract_mesh(), query.shape[1]
  cut = kept_cut(*query.shape[1:3])
  pieces = math.prod(mesh.shape[name] for name in cut)
  padding = -length % (LANES * pieces)
  padded = length + padding
  pad = lambda x, axis: jnp.pad(x, [(0, padding * (i == axis)) for i in range(x.ndim)])
  query = pad(jnp.moveaxis(query * jnp.asarray(scale, query.dtype), 2, 1), 2)
  key, value = pad(jnp.swapaxes(key, 2, 3), 2), pad(value, 2)
  segment_ids = pad(segment_ids, 1)  # padding is segment 0
  # One block size for all passes: the largest one that divides the padded length of a device.
  block = next(size for size in BLOCKS if padded // pieces % size == 0)
  names = ('block_q', 'block_kv', 'block_kv_compute')
  backward = ('block_q_dkv', 'block_kv_dkv', 'block_kv_dkv_compute', 'block_q_dq', 'block_kv_dq')
  sizes = splash_attention.BlockSizes(**dict.fromkeys(names + backward, block))
  # Both masks are static, so the kernel knows which blocks to skip; segments are checked inside blocks.
  mask = splash_attention.CausalMask((padded, padded))
  if window:
    mask = splash_attention.LocalMask((padded, padded), (window - 1, 0), 0)
  make = functools.partial(
    splash_attention.make_splash_mha,
    block_sizes=sizes,
    head_shards=1,
    q_seq_shards=pieces,
    attn_logits_soft_cap=cap or None,
    interpret=interpret,
  )

  def attend(kernel: Callable, query: Array, key: Array, value: Array, own: Array, ids: Array):
    gather = lambda x: jax.lax.all_gather(x, cut, axis=2, tiled=True) if cut else x
    segments = splash_attention.SegmentIds(own, ids)  # of the queries, and of the keys
    return jax.vmap(kernel)(query, gather(key), gather(value), segment_ids=segments)

  of_heads = lambda count: make(splash_attention.MultiHeadMask([mask] * count))
  out = _on_each_device(attend, of_heads, cut, query, key, value, segment_ids)
  return jnp.moveaxis(out[:, :, :length], 1, 2)


def _on_each_device(
  attend: Callable,
  of_heads: Callable[[int], Any],
  cut: tuple[str, ...],
  query: Array,
  key: Array,
  value: Array,
  segment_ids: Array,
) -> Array:
  """Each device attends for its own rows, and its own heads or positions.

  Args:
    attend: (kernel, query, key, value, segments of the queries, segments of the keys) -> out.
    of_heads: the kernel of a number of heads.
    cut: the mesh axes that cut positions, `kept_cut`.
    query, key, value: [B, heads, T, head_dim].
  """
  mesh, heads = jax.sharding.get_abstract_mesh(), query.shape[1]
  if mesh.empty:
    return attend(of_heads(heads), query, key, value, segment_ids, segment_ids)
  kind = '' if cut else 'attention_'
  of = lambda name, size: partition_spec(mesh, (name,), (size,))[0]
  rows, own = of('batch', len(query)), of(f'{kind}heads', heads)
  if of(f'{kind}kv_heads', key.shape[1]) != own:
    # Fewer key heads than devices: give every query head a copy, so that both split the same way.
    key, value = (jnp.repeat(x, heads // x.shape[1], axis=1) for x in (key, value))
  local = heads // math.prod(mesh.shape[name] for name in mesh_axes(own))
  kernel = of_heads(local)
  positions = cut or None
  spec, ids = PartitionSpec(rows, own, positions), PartitionSpec(rows, positions)
  split = jax.shard_map(
    attend,
    mesh=mesh,
    in_specs=(
      kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, positions))),
      *(spec, spec, spec, ids, PartitionSpec(rows)),
    ),
    out_specs=spec,
    check_vma=False,
  )
  return split(kernel, query, key, value, segment_ids, segment_ids)


ATTENTION = {'cudnn': cudnn, 'splash': splash}
PLATFORMS = {'cudnn': 'gpu', 'splash': 'tpu'}  # where each kernel runs; 'einsum' runs everywhere
