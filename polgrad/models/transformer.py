"""Decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Covers Llama (arXiv:2302.13971) and Qwen3 (arXiv:2505.09388). One table, `AXES`, names the axes of
every parameter; the configuration gives every axis its size, so shapes, initial scales and sharding
are all read from it."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from polgrad.models.policy import Policy
from polgrad.sharding import constrain

Array = jax.Array
Params = Any

AXES = {
  'embedding': ('vocab', 'embed'),
  'unembedding': ('vocab', 'embed'),
  'value_head': ('embed',),
  'final_norm': ('embed',),
  'attention_norm': ('embed',),
  'query': ('embed', 'heads', 'head_dim'),
  'key': ('embed', 'kv_heads', 'head_dim'),
  'value': ('embed', 'kv_heads', 'head_dim'),
  'query_bias': ('heads', 'head_dim'),
  'key_bias': ('kv_heads', 'head_dim'),
  'value_bias': ('kv_heads', 'head_dim'),
  'query_norm': ('head_dim',),
  'key_norm': ('head_dim',),
  'out': ('heads', 'head_dim', 'embed'),
  'mlp_norm': ('embed',),
  'gate': ('embed', 'mlp'),
  'up': ('embed', 'mlp'),
  'down': ('mlp', 'embed'),
}
HIDDEN = ('batch', 'length', 'hidden')
CACHE = ('batch', 'length', 'kv_heads', 'head_dim')

REMAT = {
  'none': lambda block: block,
  'full': functools.partial(nn.remat, prevent_cse=False),
  'dots': functools.partial(
    nn.remat,
    prevent_cse=False,
    policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  ),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """The shape of a decoder; see `decoder`."""

  vocab_size: int
  num_layers: int
  width: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_width: int
  rope_theta: float
  norm_eps: float
  qk_norm: bool
  attention_bias: bool
  tie_embeddings: bool
  max_length: int
  dtype: str
  param_dtype: str
  remat: str
  value_head: bool

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise ValueError(f'{self.num_heads} heads do not divide over {self.num_kv_heads} kv heads')
    if self.head_dim % 2:
      raise ValueError(f'rotary positions need an even head_dim, got {self.head_dim}')
    if self.remat not in REMAT:
      raise ValueError(f'unknown remat {self.remat!r}; valid: {sorted(REMAT)}')
    for dtype in (self.dtype, self.param_dtype):
      if dtype not in ('float32', 'bfloat16'):
        raise ValueError(f"unknown dtype {dtype!r}; valid: ['bfloat16', 'float32']")

  def shape(self, name: str) -> tuple[int, ...]:
    """Shape of a parameter (of one layer, for those of a layer)."""
    sizes = {
      'vocab': self.vocab_size,
      'embed': self.width,
      'heads': self.num_heads,
      'kv_heads': self.num_kv_heads,
      'head_dim': self.head_dim,
      'mlp': self.mlp_width,
    }
    return tuple(sizes[axis] for axis in AXES[name])


class Cache(NamedTuple):
  """Keys and values of the tokens so far; one buffer a layer."""

  keys: tuple[Array, ...]  # [B, length, kv_heads, head_dim] each
  values: tuple[Array, ...]
  valid: Array  # bool[B, length]


def einsum(spec: str, *operands: Array) -> Array:
  """Product that accumulates in float32, and is exact float32 for float32 operands on any device."""
  return jnp.einsum(spec, *operands, precision='highest', preferred_element_type=jnp.float32)


def expand(x: Array, like: Array) -> Array:
  """Adds leading axes until `x` has the rank of `like`."""
  return jnp.expand_dims(x, range(like.ndim - x.ndim))


def rms_norm(x: Array, scale: Array, *, eps: float) -> Array:
  """x / sqrt(mean(x^2) + eps) * scale over the last axis, computed in float32 (arXiv:1910.07467)."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  return (y * expand(scale.astype(jnp.float32), y)).astype(x.dtype)


def rotary_angles(positions: Array, *, head_dim: int, theta: float) -> Array:
  """Angle position / theta^(2i / head_dim) of pair i; i32[B, T] -> f32[B, T, head_dim / 2]."""
  frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  return positions[..., None].astype(jnp.float32) * expand(frequency, positions[..., None])


def rotate(x: Array, angles: Array) -> Array:
  """Rotates the pairs (x[i], x[i + head_dim / 2]) of [B, T, heads, head_dim] (arXiv:2104.09864)."""
  cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attend(query: Array, key: Array, value: Array, mask: Array) -> Array:
  """Grouped-query attention (arXiv:2305.13245): heads h of a group read the same key and value head.

  Args:
    query: [B, S, heads, head_dim].
    key: [B, L, kv_heads, head_dim].
    value: like `key`.
    mask: bool[B, S, L], True where a query may look. A row with no True gives finite garbage.

  Returns:
    [B, S, heads, head_dim]
  """
  batch, length, _, head_dim = query.shape
  groups = query.reshape(batch, length, key.shape[2], -1, head_dim)
  scores = einsum('bsngk,blnk->bngsl', groups, key) * head_dim**-0.5
  scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
  probs = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
  return einsum('bngsl,blnk->bsngk', probs, value).astype(value.dtype).reshape(query.shape)


def segment_positions(segment_ids: Array) -> Array:
  """Position inside the own segment: [1, 1, 1, 2, 2] -> [0, 1, 2, 0, 1]."""
  index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1])[None], segment_ids.shape)
  before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  start = jnp.where(segment_ids != before, index, 0)
  return index - jax.lax.cummax(start, axis=1)


def segment_mask(segment_ids: Array) -> Array:
  """Causal attention inside each segment: i32[B, T] -> bool[B, T, T]."""
  length = segment_ids.shape[1]
  causal = jnp.tril(jnp.ones((1, length, length), bool))
  return causal & (segment_ids[:, :, None] == segment_ids[:, None, :])


class _Weights(nn.Module):
  """A module whose parameters are declared by name alone."""

  config: Config

  def weight(self, name: str) -> Array:
    """Matrices: normal with variance 1 / fan-in. Norm scales: one. Biases, value head: zero."""
    shape = self.config.shape(name)
    if name.endswith('norm'):
      init = nn.initializers.ones
    elif name.endswith('bias') or name == 'value_head':
      init = nn.initializers.zeros
    else:
      inner = {'out': self.config.num_heads * self.config.head_dim, 'down': self.config.mlp_width}
      fan_in = inner.get(name, self.config.width)
      init = nn.initializers.normal(fan_in**-0.5)
    return self.param(name, init, shape, self.config.param_dtype)


class Block(_Weights):
  """Attention and feed-forward with pre-normalisation; `attend` stands between the two halves."""

  def setup(self):
    c = self.config
    self.attention_norm = self.weight('attention_norm')
    self.query = self.weight('query')
    self.key = self.weight('key')
    self.value = self.weight('value')
    if c.attention_bias:
      self.query_bias = self.weight('query_bias')
      self.key_bias = self.weight('key_bias')
      self.value_bias = self.weight('value_bias')
    if c.qk_norm:
      self.query_norm = self.weight('query_norm')
      self.key_norm = self.weight('key_norm')
    self.out = self.weight('out')
    self.mlp_norm = self.weight('mlp_norm')
    self.gate = self.weight('gate')
    self.up = self.weight('up')
    self.down = self.weight('down')

  def __call__(self, x, angles, mask):
    query, key, value = self.project(x, angles)
    return self.finish(x, attend(query, key, value, mask)), ()

  def project(self, x: Array, angles: Array) -> tuple[Array, Array, Array]:
    """Queries, keys and values of [B, S, D], with positions in them."""
    c = self.config
    y = rms_norm(x, self.attention_norm, eps=c.norm_eps)
    query, key, value = (
      einsum('bsd,dhk->bshk', y, w.astype(y.dtype)).astype(y.dtype)
      for w in (self.query, self.key, self.value)
    )
    if c.attention_bias:
      query, key, value = (
        h + expand(b.astype(h.dtype), h)
        for h, b in zip((query, key, value), (self.query_bias, self.key_bias, self.value_bias))
      )
    if c.qk_norm:
      query = rms_norm(query, self.query_norm, eps=c.norm_eps)
      key = rms_norm(key, self.key_norm, eps=c.norm_eps)
    return rotate(query, angles), rotate(key, angles), value

  def finish(self, x: Array, attended: Array) -> Array:
    """Adds the attention and then the feed-forward to the residual stream."""
    x = x + einsum('bshk,hkd->bsd', attended, self.out.astype(x.dtype)).astype(x.dtype)
    y = rms_norm(x, self.mlp_norm, eps=self.config.norm_eps)
    gate, up = (
      einsum('bsd,df->bsf', y, w.astype(y.dtype)).astype(y.dtype) for w in (self.gate, self.up)
    )
    down = self.down.astype(x.dtype)
    x = x + einsum('bsf,fd->bsd', jax.nn.silu(gate) * up, down).astype(x.dtype)
    return constrain(x, HIDDEN)


class Decoder(_Weights):
  """Embedding, a scan over the blocks (parameters stacked as [layers, ...]) and the heads."""

  def setup(self):
    c = self.config
    self.embedding = self.weight('embedding')
    self.layers = nn.scan(
      REMAT[c.remat](Block),
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(nn.broadcast, nn.broadcast),
      length=c.num_layers,
    )(c)
    self.final_norm = self.weight('final_norm')
    if not c.tie_embeddings:
      self.unembedding = self.weight('unembedding')
    if c.value_head:
      self.value_head = self.weight('value_head')

  def __call__(self, tokens: Array, segment_ids: Array) -> Array:
    angles = self.angles(segment_positions(segment_ids))
    x, _ = self.layers(self.embed(tokens), angles, segment_mask(segment_ids))
    return self.normalise(x)

  def embed(self, tokens: Array) -> Array:
    # A token outside the vocabulary becomes NaN instead of somebody else's embedding.
    x = jnp.take(self.embedding, tokens, axis=0, mode='fill')
    return constrain(x.astype(self.config.dtype), HIDDEN)

  def angles(self, positions: Array) -> Array:
    c = self.config
    return rotary_angles(positions, head_dim=c.head_dim, theta=c.rope_theta)

  def normalise(self, x: Array) -> Array:
    return rms_norm(x, self.final_norm, eps=self.config.norm_eps)

  def unembed(self, hidden: Array) -> Array:
    weight = self.embedding if self.config.tie_embeddings else self.unembedding
    return einsum('...d,vd->...v', hidden, weight.astype(hidden.dtype))

  def value(self, hidden: Array) -> Array:
    return einsum('...d,d->...', hidden, self.value_head.astype(hidden.dtype))


def decoder(
  *,
  vocab_size: int,
  num_layers: int = 2,
  width: int = 64,
  num_heads: int = 4,
  num_kv_heads: int = 2,
  head_dim: int = 16,
  mlp_width: int = 192,
  rope_theta: float = 10_000.0,
  norm_eps: float = 1e-6,
  qk_norm: bool = False,
  attention_bias: bool = False,
  tie_embeddings: bool = True,
  max_length: int = 2048,
  dtype: str = 'float32',
  param_dtype: str = 'float32',
  remat: str = 'none',
  value_head: bool = False,
) -> Policy:
  """A decoder with random weights.

  Args:
    vocab_size: number of tokens.
    num_layers: number of blocks.
    width: size of the residual stream.
    num_heads: query heads.
    num_kv_heads: key and value heads; divides `num_heads`.
    head_dim: size of a head, even.
    mlp_width: inner size of the feed-forward.
    rope_theta: base of the rotary frequencies.
    norm_eps: added to the mean square in RMSNorm.
    qk_norm: RMSNorm on queries and keys (Qwen3).
    attention_bias: bias on queries, keys and values (Qwen2).
    tie_embeddings: the unembedding is the embedding.
    max_length: longest row; longer ones raise ValueError.
    dtype: 'float32' or 'bfloat16', of activations; sums, norms, softmax and logits are float32.
    param_dtype: 'float32' or 'bfloat16', of the stored parameters.
    remat: what the backward pass recomputes in a block: 'none', 'full' (all), or 'dots' (all but
      matrix products with weights).
    value_head: adds a scalar head, zero at first; also the head of a reward model.

  Raises:
    ValueError: a shape that cannot be, or an unknown dtype or remat.
  """
  return from_config(Config(**locals()))


def from_config(config: Config) -> Policy:
  """The policy of a configuration; parameters come from `init` or from a checkpoint."""
  model = Decoder(config)
  block = Block(config)

  def check_length(length):
    if length > config.max_length:
      raise ValueError(f'{length} tokens are more than max_length {config.max_length}')

  def apply(params, *args, method='__call__'):
    return model.apply({'params': params}, *args, method=method)

  def init(key):
    tokens = jnp.zeros((1, 1), jnp.int32)
    return model.init(key, tokens, tokens)['params']

  def hidden(params, tokens, segment_ids):
    check_length(tokens.shape[1])
    return apply(params, tokens, segment_ids)

  def unembed(params, hidden):
    return apply(params, hidden, method='unembed')

  def value(params, hidden):
    if not config.value_head:
      raise ValueError('the model has no value head; build it with value_head=True')
    return apply(params, hidden, method='value')

  def init_cache(batch, length):
    check_length(length)
    shape = (batch, length, config.num_kv_heads, config.head_dim)
    buffers = lambda: tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_layers))
    return Cache(buffers(), buffers(), jnp.zeros((batch, length), bool))

  def unstack(params):
    # Cast once to the dtype of use: in the loop, every step would read the stored weights again.
    used = lambda path, p: p if path[-1].key.endswith('norm') else p.astype(config.dtype)
    params = jax.tree_util.tree_map_with_path(used, params)
    cut = lambda i: jax.tree.map(lambda p: p[i], params['layers'])
    return {**params, 'layers': tuple(cut(i) for i in range(config.num_layers))}

  def decode(params, tokens, positions, valid, cache, index):
    def write(buffer, new):
      return jax.lax.dynamic_update_slice_in_dim(buffer, new, index, axis=1)

    seen = write(cache.valid, valid)
    slots = jnp.arange(seen.shape[1])[None, None]
    own = index + jnp.arange(tokens.shape[1])[None, :, None]
    mask = seen[:, None, :] & (slots <= own)
    angles = apply(params, positions, method='angles')
    x = apply(params, tokens, method='embed')
    keys, values = [], []
    # Unrolled: a scan would copy the weights and the cache of every layer at every step.
    for i, weights in enumerate(params['layers']):
      layer = {'params': weights}
      query, key, value = block.apply(layer, x, angles, method='project')
      keys.append(constrain(write(cache.keys[i], key), CACHE))
      values.append(constrain(write(cache.values[i], value), CACHE))
      x = block.apply(layer, x, attend(query, keys[i], values[i], mask), method='finish')
    return apply(params, x, method='normalise'), Cache(tuple(keys), tuple(values), seen)

  return Policy(config, init, hidden, unembed, value, init_cache, unstack, decode, axes)


def axes(params: Params) -> Params:
  """The logical axis names of every parameter, in the same tree."""

  def names(path, _):
    keys = [key.key for key in path]
    return ('layers',) * ('layers' in keys[:-1]) + AXES[keys[-1]]

  return jax.tree_util.tree_map_with_path(names, params)
