"""Fused attention kernels for whole rows; they never store the [T, T] scores of a row.

`ATTENTION` lists them by the name that `Config.attention` has. They replace `attention.attend` in
`Policy.hidden`, which training uses. Shared prompts and the cache of decoding always use `attend`.

All take queries [B, T, heads, head_dim], keys [B, kv_heads, head_dim, T], values [B, kv_heads, T,
head_dim] and segment_ids i32[B, T], and return softmax(cap(scale q k)) v, [B, T, heads, head_dim]. A
token sees itself and the earlier tokens of its segment: the last `window` of them, itself included, or
all of them if `window` is 0. `scale` multiplies the scores; `cap` is the argument of
`attention.softcap`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from polgrad.models.attention import segment_mask
from polgrad.sharding import partition_spec

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
  return jax.nn.dot_product_attention(
    query,
    jnp.transpose(key, (0, 3, 1, 2)),
    jnp.moveaxis(value, 1, 2),
    mask=mask[:, None],
    scale=scale,
    implementation=implementation,
  )


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

  # The kernel wants heads before positions and a whole number of blocks.
  length, heads = query.shape[1:3]
  padding = -length % LANES
  padded = length + padding
  pad = lambda x, axis: jnp.pad(x, [(0, padding * (i == axis)) for i in range(x.ndim)])
  arrays = (
    pad(jnp.moveaxis(query * jnp.asarray(scale, query.dtype), 2, 1), 2),
    pad(jnp.swapaxes(key, 2, 3), 2),
    pad(value, 2),
    pad(segment_ids, 1),  # padding is segment 0
  )
  # One block size for all passes: the largest one that divides the padded length.
  block = next(size for size in BLOCKS if padded % size == 0)
  names = ('block_q', 'block_kv', 'block_kv_compute')
  backward = ('block_q_dkv', 'block_kv_dkv', 'block_kv_dkv_compute', 'block_q_dq', 'block_kv_dq')
  sizes = splash_attention.BlockSizes(**dict.fromkeys(names + backward, block))
  # Both masks are static, so the kernel knows which blocks to skip; segments are checked inside blocks.
  mask = splash_attention.CausalMask((padded, padded))
  if window:
    mask = splash_attention.LocalMask((padded, padded), (window - 1, 0), 0)

  def attend(query: Array, key: Array, value: Array, segment_ids: Array) -> Array:
    kernel = splash_attention.make_splash_mha(
      splash_attention.MultiHeadMask([mask] * query.shape[1]),
      block_sizes=sizes,
      head_shards=1,
      q_seq_shards=1,
      attn_logits_soft_cap=cap or None,
      interpret=interpret,
    )
    segments = splash_attention.SegmentIds(segment_ids, segment_ids)
    return jax.vmap(kernel)(query, key, value, segment_ids=segments)

  out = _on_each_device(attend, heads)(*arrays)
  return jnp.moveaxis(out[:, :, :length], 1, 2)


def _on_each_device(attend: Callable, heads: int) -> Callable:
  """Runs `attend` on each device of the mesh (that of `jax.set_mesh`) with its own rows and heads."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return attend

  def run(query: Array, key: Array, value: Array, segment_ids: Array) -> Array:
    axes = ('batch', 'attention_heads', 'attention_length', 'head_dim')
    spec = partition_spec(mesh, axes, query.shape)
    if partition_spec(mesh, ('attention_kv_heads',), key.shape[1:2]) != PartitionSpec(spec[1]):
      # Fewer key heads than devices: give every query head a copy, so that both split the same way.
      key, value = (jnp.repeat(x, heads // x.shape[1], axis=1) for x in (key, value))
    rows = PartitionSpec(spec[0])
    split = jax.shard_map(
      attend, mesh=mesh, in_specs=(spec, spec, spec, rows), out_specs=spec, check_vma=False
    )
    return split(query, key, value, segment_ids)

  return run


ATTENTION = {'cudnn': cudnn, 'splash': splash}
PLATFORMS = {'cudnn': 'gpu', 'splash': 'tpu'}  # where each kernel runs; 'einsum' runs everywhere
