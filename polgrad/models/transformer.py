"""Decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, gated feed-forward.

Covers Llama, SmolLM2, Mistral, Qwen2, Qwen3, Gemma 2 and 3, OLMo 2, Mixtral and Qwen3-MoE; `hf.py`
says which settings make which family. `config.py` holds names, axes and shapes of the parameters."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from polgrad.models import experts, kernels, rotary
from polgrad.models.attention import (
  Source,
  attend,
  einsum,
  segment_mask,
  segment_positions,
  softcap,
)
from polgrad.models.config import Config, num_inputs
from polgrad.models.policy import Policy
from polgrad.sharding import constrain

Array = jax.Array
Params = Any

HIDDEN = ('batch', 'length', 'hidden')
# Where a step multiplies with them, so that it copies neither.
KEYS = ('batch', 'kv_heads', 'head_dim', 'length')
VALUES = ('batch', 'kv_heads', 'length', 'head_dim')

METHODS = ['__call__', 'branch']  # of a block, that are scanned over the layers
# What is dear to compute again; by name, since kernels' primitives are private to JAX.
PRODUCTS = ('dot_general', 'ragged_dot_general', 'dot_product_attention_fwd', 'pallas_call')
_remat = functools.partial(nn.remat, prevent_cse=False, methods=METHODS)
REMAT = {
  'none': functools.partial(_remat, policy=lambda primitive, *_, **__: primitive.name in PRODUCTS),
  'full': _remat,
  'dots': functools.partial(
    _remat, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  ),
}
ACTIVATION = {'silu': jax.nn.silu, 'gelu': functools.partial(jax.nn.gelu, approximate=True)}


class Cache(NamedTuple):
  """Keys and values of the tokens so far; one buffer a layer."""

  keys: tuple[Array, ...]  # [B, kv_heads, head_dim, length] each
  values: tuple[Array, ...]  # [B, kv_heads, length, head_dim] each
  positions: Array  # i32[B, length], of the token in a column; -1 where there is none


class View(NamedTuple):
  """What a layer sees of the positions: rotations of its tokens, and which it may look at."""

  turns: tuple[Array, Array]  # cosines and sines, f32[B, S, head_dim / 2]
  mask: Array  # bool[B, S, L]


Views = tuple[View, ...]  # what local layers see and what the others see, or the one view of all


def one_view(local: Array, views: Views) -> View:
  pick = lambda near, far: jnp.where(local, near, far)
  return jax.tree.map(pick, *views) if len(views) == 2 else views[0]


def contract(x: Array, matrix: Array, inputs: int = 1) -> Array:
  """The last `inputs` axes of `x` against the first of `matrix`; accumulates as `einsum` does.

  All tokens in a line: otherwise XLA's CPU backend transposes activations for the derivatives.
  """
  tokens = x.reshape(-1, math.prod(x.shape[-inputs:]))
  flat = matrix.astype(x.dtype).reshape(tokens.shape[-1], -1)
  out = einsum('nu,uv->nv', tokens, flat).astype(x.dtype)
  return out.reshape(*x.shape[:-inputs], *matrix.shape[inputs:])


def expand(x: Array, like: Array) -> Array:
  """Adds leading axes until `x` has the rank of `like`."""
  return jnp.expand_dims(x, range(like.ndim - x.ndim))


def rms_norm(x: Array, scale: Array, *, eps: float, offset: float = 0.0) -> Array:
  """x / sqrt(mean(x^2) + eps) * (offset + scale) over the axes of `scale` (arXiv:1910.07467).

  Computed in float32.
  """
  y = x.astype(jnp.float32)
  square = jnp.mean(y * y, axis=tuple(range(-scale.ndim, 0)), keepdims=True)
  scale = offset + scale.astype(jnp.float32)
  return (y * jax.lax.rsqrt(square + eps) * expand(scale, y)).astype(x.dtype)


class _Weights(nn.Module):
  """A module whose parameters are declared by name alone."""

  config: Config

  def weight(self, name: str) -> Array:
    """Matrices: normal with variance 1 / fan-in. Norms: the identity. Biases and heads: zero."""
    c = self.config
    if name.endswith('norm'):
      init = nn.initializers.constant(1 - c.norm_offset)
    elif name.endswith(('bias', 'lora_b')) or name == 'value_head':
      init = nn.initializers.zeros
    else:
      init = nn.initializers.normal(c.fan_in(name) ** -0.5)
    # The steps of a router's bias are too small for bfloat16.
    dtype = 'float32' if name == 'router_bias' else c.param_dtype
    return self.param(name, init, c.shape(name), dtype)

  def norm(self, x: Array, scale: Array) -> Array:
    return rms_norm(x, scale, eps=self.config.norm_eps, offset=self.config.norm_offset)


class Block(_Weights):
  """Attention and feed-forward; `attend` stands between the two halves."""

  def setup(self):
    self.weights = {name: self.weight(name) for name in self.config.layer}

  def __call__(self, x: Array, local: Array, views: Views, segment_ids: Array):
    view = one_view(local, views)
    query, key, value = self.project(x, view.turns)
    if self.config.attention == 'einsum':
      attended = self.attend(query, (key, value, view.mask))
    else:
      attended = self.fused(query, key, value, segment_ids, local)
    return self.finish(x, attended, segment_ids > 0), ()

  def branch(self, x: tuple[Array, Array], local: Array, views: tuple[Views, ...], valid: tuple):
    """The layer for prompts and for the completions that look at them and at themselves."""
    before, past, own = (one_view(local, v) for v in views)
    prompts, completions = x
    query, key, value = self.project(prompts, before.turns)
    prompts = self.finish(prompts, self.attend(query, (key, value, before.mask)), valid[0])
    query, own_key, own_value = self.project(completions, own.turns)
    attended = self.attend(query, (key, value, past.mask), (own_key, own_value, own.mask))
    return (prompts, self.finish(completions, attended, valid[1])), ()

  def attend(self, query: Array, *sources: Source) -> Array:
    return attend(query, *sources, **self.score_settings())

  def fused(self, query: Array, key: Array, value: Array, segment_ids: Array, local: Array):
    """`attend` to the own row, by the kernel of the configuration."""
    kernel = kernels.ATTENTION[self.config.attention]
    run = functools.partial(kernel, query, key, value, segment_ids, **self.score_settings())
    if not self.config.window:
      return run(window=0)
    return jax.lax.cond(local, lambda: run(window=self.config.window), lambda: run(window=0))

  def score_settings(self) -> dict[str, float]:
    c = self.config
    return {'scale': c.query_scale or c.head_dim**-0.5, 'cap': c.attention_softcap}

  def project(self, x: Array, turns: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    """Of [B, S, D], queries [B, S, heads, head_dim], and keys and values as `Cache` has them."""
    y = self.before(x, 'attention_norm')
    query, key, value = (self.dense(y, name) for name in ('query', 'key', 'value'))
    if self.config.qk_norm != 'none':
      query = self.norm(query, self.weights['query_norm'])
      key = self.norm(key, self.weights['key_norm'])
    query, key = rotary.rotate(query, turns), rotary.rotate(key, turns)
    return query, jnp.transpose(key, (0, 2, 3, 1)), jnp.moveaxis(value, 2, 1)

  def finish(self, x: Array, attended: Array, valid: Array) -> Array:
    """Adds the attention and then the feed-forward to the residual stream; valid bool[B, S]."""
    x = x + self.after(self.dense(attended, 'out'), 'attention_post_norm')
    y = self.before(x, 'mlp_norm')
    feed_forward = self.mixture(y, valid) if self.config.num_experts else self.mlp(y)
    x = x + self.after(feed_forward, 'mlp_post_norm')
    return constrain(x, HIDDEN)

  def mlp(self, y: Array) -> Array:
    activation = ACTIVATION[self.config.activation]
    return self.dense(activation(self.dense(y, 'gate')) * self.dense(y, 'up'), 'down')

  def mixture(self, y: Array, valid: Array) -> Array:
    c, w = self.config, self.weights
    logits = einsum('bsd,de->bse', y, w['router'].astype(y.dtype)).reshape(-1, c.num_experts)
    bias = w.get('router_bias', jnp.zeros(c.num_experts))
    weights, chosen = experts.route(
      logits, bias, k=c.experts_per_token, normalize=c.normalize_experts
    )
    if c.balance_rate:
      excess = experts.excess(chosen, valid.reshape(-1), c.num_experts)
      weights = experts.with_load_gradient(weights, bias, excess)
    weights, chosen = (x.reshape(*y.shape[:2], -1) for x in (weights, chosen))
    out = experts.mixture(
      y, weights, chosen, w['gate'], w['up'], w['down'], activation=ACTIVATION[c.activation]
    )
    return out.astype(y.dtype)

  def dense(self, y: Array, name: str) -> Array:
    """A matrix product, with its bias and its low-rank adapter (arXiv:2106.09685) if it has them."""
    w, inputs = self.weights, num_inputs(name)
    out = contract(y, w[name], inputs)
    if f'{name}_bias' in w:
      out = out + expand(w[f'{name}_bias'].astype(out.dtype), out)
    if f'{name}_lora_a' in w:
      low = contract(contract(y, w[f'{name}_lora_a'], inputs), w[f'{name}_lora_b'])
      out = out + self.config.lora_scale * low
    return out

  def before(self, x: Array, name: str) -> Array:
    return self.norm(x, self.weights[name]) if self.config.pre_norm else x

  def after(self, x: Array, name: str) -> Array:
    return self.norm(x, self.weights[name]) if self.config.post_norm else x


class Decoder(_Weights):
  """Embedding, a scan over the blocks (parameters stacked as [layers, ...]) and the heads."""

  def setup(self):
    c = self.config
    self.weights = {name: self.weight(name) for name in c.top}
    self.layers = nn.scan(
      REMAT[c.remat](Block),
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(0, nn.broadcast, nn.broadcast),
      length=c.num_layers,
      methods=METHODS,
    )(c)
    self.local = jnp.array([i in c.local_layers for i in range(c.num_layers)])

  def __call__(self, tokens: Array, segment_ids: Array) -> Array:
    positions = segment_positions(segment_ids)
    views = self.views(positions, positions, segment_mask(segment_ids))
    x, _ = self.layers(self.embed(tokens), self.local, views, segment_ids)
    return self.normalise(x)

  def completions(self, tokens: Array, segment_ids: Array, prompt_length: int, each: int) -> Array:
    """Hidden states from column prompt_length - 1 on; `each` consecutive rows share a prompt."""
    positions = segment_positions(segment_ids)
    first = lambda x: x.reshape(-1, each, *x.shape[1:])[:, 0, :prompt_length]
    cut = lambda x: (first(x), x[:, prompt_length:])
    prompt_positions, own_positions = cut(positions)
    prompt_ids, own_ids = cut(segment_ids)
    past = segment_ids[:, :prompt_length]
    views = (
      self.views(prompt_positions, prompt_positions, segment_mask(prompt_ids)),
      self.views(own_positions, positions[:, :prompt_length], own_ids[..., None] == past[:, None]),
      self.views(own_positions, own_positions, segment_mask(own_ids)),
    )
    x, valid = jax.tree.map(self.embed, cut(tokens)), (prompt_ids > 0, own_ids > 0)
    (prompts, own), _ = self.layers.branch(x, self.local, views, valid)
    last = jnp.repeat(prompts[:, -1:], each, axis=0)
    return self.normalise(jnp.concatenate([last, own], axis=1))

  def embed(self, tokens: Array) -> Array:
    # A token outside the vocabulary becomes NaN instead of somebody else's embedding.
    x = jnp.take(self.weights['embedding'], tokens, axis=0, mode='fill').astype(self.config.dtype)
    return constrain(x * jnp.asarray(self.config.embedding_scale, x.dtype), HIDDEN)

  def views(self, positions: Array, keys: Array, mask: Array) -> Views:
    """What local layers see and what the others see, or the one view of all.

    Args:
      positions: i32[B, S], of the tokens in their segments.
      keys: i32[B, L], of what they may look at.
      mask: bool[B, S, L].
    """
    c = self.config
    stretched = rotary.stretch(
      rotary.frequencies(c.head_dim, c.rope_theta),
      factor=c.rope_factor,
      low=c.rope_low,
      high=c.rope_high,
      original_length=c.rope_original_length,
    )
    far = View(rotary.turns(positions, stretched), mask)
    if not c.window:
      return (far,)
    near = mask & (positions[:, :, None] - keys[:, None, :] < c.window)
    plain = rotary.frequencies(c.head_dim, c.local_rope_theta)
    return View(rotary.turns(positions, plain), near), far

  def normalise(self, x: Array) -> Array:
    return self.norm(x, self.weights['final_norm'])

  def unembed(self, hidden: Array) -> Array:
    c = self.config
    weight = self.weights['embedding' if c.tie_embeddings else 'unembedding']
    return softcap(einsum('...d,vd->...v', hidden, weight.astype(hidden.dtype)), c.logit_softcap)

  def value(self, hidden: Array) -> Array:
    return einsum('...d,d->...', hidden, self.weights['value_head'].astype(hidden.dtype))


def decoder(
  *,
  vocab_size: int,
  num_layers: int = 2,
  width: int = 64,
  num_heads: int = 4,
  num_kv_heads: int = 2,
  head_dim: int = 16,
  mlp_width: int = 192,
  activation: str = 'silu',
  rope_theta: float = 10_000.0,
  rope_factor: float = 1.0,
  rope_low: float = 1.0,
  rope_high: float = 4.0,
  rope_original_length: int = 0,
  window: int = 0,
  local_layers: tuple = (),
  local_rope_theta: float = 10_000.0,
  norm_eps: float = 1e-6,
  norm_offset: float = 0.0,
  pre_norm: bool = True,
  post_norm: bool = False,
  qk_norm: str = 'none',
  attention_bias: bool = False,
  query_scale: float = 0.0,
  attention: str = 'einsum',
  attention_softcap: float = 0.0,
  logit_softcap: float = 0.0,
  embedding_scale: float = 1.0,
  tie_embeddings: bool = True,
  num_experts: int = 0,
  experts_per_token: int = 2,
  normalize_experts: bool = True,
  balance_rate: float = 0.0,
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
    mlp_width: inner size of the feed-forward, or of each expert.
    activation: 'silu' or 'gelu' (its tanh form), of the gate.
    rope_theta: base of the rotary frequencies.
    rope_factor, rope_low, rope_high, rope_original_length: longer contexts, see `rotary.stretch`.
    window: how many tokens a local layer sees, its own included; 0 if there are none.
    local_layers: indices of the local layers.
    local_rope_theta: base of the rotary frequencies of local layers, never stretched.
    norm_eps: added to the mean square in RMSNorm.
    norm_offset: norms multiply by offset + scale (1 in Gemma).
    pre_norm: normalise what goes into attention and feed-forward.
    post_norm: normalise what comes out of them, before it is added (OLMo 2; Gemma has both).
    qk_norm: RMSNorm on queries and keys: 'none', 'head' (over each head) or 'all' (over all heads).
    attention_bias: bias on queries, keys and values (Qwen2).
    query_scale: multiplies attention scores; 0 stands for head_dim^-1/2.
    attention: how whole rows attend in training: 'einsum', or a kernel: 'cudnn' (bfloat16 on GPUs; no
      soft cap) or 'splash' (TPUs). Results are equal up to rounding.
    attention_softcap, logit_softcap: soft caps of attention scores and logits, 0 for none.
    embedding_scale: multiplies embeddings (sqrt(width) in Gemma).
    tie_embeddings: the unembedding is the embedding.
    num_experts: experts of every feed-forward, 0 for a dense one; see `experts`.
    experts_per_token: how many of them a token goes to.
    normalize_experts: the weights of a token's experts add up to 1.
    balance_rate: step of the bias that balances their load; 0 for no bias.
    max_length: longest row; longer ones raise ValueError.
    dtype: 'float32' or 'bfloat16', of activations; sums, norms, softmax and logits are float32.
    param_dtype: 'float32' or 'bfloat16', of the stored parameters.
    remat: which matrix products of a block the backward pass computes again: 'none', 'full' (all), or
      'dots' (those without weights: attention). All else is cheaper to compute again than to keep.
    value_head: adds a scalar head, zero at first; also the head of a reward model.

  Raises:
    ValueError: a shape that cannot be, or an unknown choice; the message lists the valid ones.
  """
  return from_config(Config(**locals()))


def from_config(config: Config) -> Policy:
  """The policy of a configuration, with random parameters."""
  model = Decoder(config)
  block = Block(config)

  def check_length(length):
    if length > config.max_length:
      raise ValueError(f'{length} tokens are more than max_length {config.max_length}')

  def apply(params, *args, method='__call__'):
    return model.apply({'params': params}, *args, method=method)

  def init(key, shardings=None):
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.jit(model.init, out_shardings={'params': shardings})(key, tokens, tokens)['params']

  def hidden(params, tokens, segment_ids):
    check_length(tokens.shape[1])
    return apply(params, tokens, segment_ids)

  def completions(params, tokens, segment_ids, *, prompt_length, rows_per_prompt):
    check_length(tokens.shape[1])
    return apply(params, tokens, segment_ids, prompt_length, rows_per_prompt, method='completions')

  def unembed(params, hidden):
    return apply(params, hidden, method='unembed')

  def value(params, hidden):
    if not config.value_head:
      raise ValueError('the model has no value head; build it with value_head=True')
    return apply(params, hidden, method='value')

  def init_cache(batch, length):
    check_length(length)
    size = dict(batch=batch, length=length, kv_heads=config.num_kv_heads, head_dim=config.head_dim)
    zeros = lambda axes: jnp.zeros([size[axis] for axis in axes], config.dtype)
    return Cache(
      keys=tuple(zeros(KEYS) for _ in range(config.num_layers)),
      values=tuple(zeros(VALUES) for _ in range(config.num_layers)),
      positions=jnp.full((batch, length), -1, jnp.int32),
    )

  def write(axes, buffer, new, index):
    out = jax.lax.dynamic_update_slice_in_dim(buffer, new, index, axes.index('length'))
    return constrain(out, axes)

  def begin(cache, read, rows):
    width = read.positions.shape[1]

    def put(axes, buffer, new):
      old = jax.lax.slice_in_dim(buffer, 0, width, axis=axes.index('length'))
      return write(axes, buffer, jnp.where(rows[:, None, None, None], new, old), 0)

    rest = ((0, 0), (0, cache.positions.shape[1] - width))
    positions = jnp.pad(read.positions, rest, constant_values=-1)
    return Cache(
      keys=tuple(put(KEYS, *pair) for pair in zip(cache.keys, read.keys)),
      values=tuple(put(VALUES, *pair) for pair in zip(cache.values, read.values)),
      positions=jnp.where(rows[:, None], positions, cache.positions),
    )

  def unstack(params):
    # Cast once to the dtype of use: in the loop, every step would read the stored weights again.
    exact = ('norm', 'router_bias')
    used = lambda path, p: p if path[-1].key.endswith(exact) else p.astype(config.dtype)
    params = jax.tree_util.tree_map_with_path(used, params)
    cut = lambda i: jax.tree.map(lambda p: p[i], params['layers'])
    return {**params, 'layers': tuple(cut(i) for i in range(config.num_layers))}

  def decode(params, tokens, positions, valid, cache, index):
    held = write(('batch', 'length'), cache.positions, jnp.where(valid, positions, -1), index)
    mask = (held[:, None] >= 0) & (held[:, None] <= positions[:, :, None])
    views = apply(params, positions, held, mask, method='views')
    x = apply(params, tokens, method='embed')
    keys, values = [], []
    # Unrolled: a scan would copy the weights and the cache of every layer at every step.
    for i, weights in enumerate(params['layers']):
      run = functools.partial(block.apply, {'params': weights})
      view = views[0 if i in config.local_layers else -1]
      query, key, value = run(x, view.turns, method='project')
      keys.append(write(KEYS, cache.keys[i], key, index))
      values.append(write(VALUES, cache.values[i], value, index))
      attended = run(query, (keys[i], values[i], view.mask), method='attend')
      x = run(x, attended, valid, method='finish')
    return apply(params, x, method='normalise'), Cache(tuple(keys), tuple(values), held)

  def axes(params):
    def names(path, _):
      stacked = 'layers' in (key.key for key in path[:-1])
      return ('layers',) * stacked + config.axes(path[-1].key)

    return jax.tree_util.tree_map_with_path(names, params)

  def labels(params):
    def label(path, _):
      name = path[-1].key
      if name == 'router_bias':
        return 'balance' if not config.lora_rank else 'frozen'
      return (
        'train' if not config.lora_rank or '_lora_' in name or name == 'value_head' else 'frozen'
      )

    return jax.tree_util.tree_map_with_path(label, params)

  return Policy(
    config=config,
    shapes=lambda: jax.eval_shape(init, jax.random.key(0)),
    init=init,
    hidden=hidden,
    completions=completions,
    unembed=unembed,
    value=value,
    init_cache=init_cache,
    begin=begin,
    unstack=unstack,
    decode=decode,
    axes=axes,
    labels=labels,
  )
