"""Decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, gated feed-forward.

It computes Llama, SmolLM2, Mistral, Qwen2, Qwen3, Gemma 2 and 3, OLMo 2, Mixtral and Qwen3-MoE;
`families.py` says which settings each family has. `Block` and `Decoder` are the Flax modules, and
`Functions` makes a `Policy` of them. `config.py` has the settings and the names, axes and shapes of the
parameters."""

import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from polgrad.models import cache as caches
from polgrad.models import experts, kernels, rotary
from polgrad.models.attention import (
  Source,
  attend,
  attend_to_spans,
  einsum,
  over_positions,
  segment_mask,
  segment_positions,
  softcap,
)
from polgrad.models.cache import Cache, Span
from polgrad.models.config import Config, num_inputs
from polgrad.models.policy import Policy
from polgrad.models.quantized import (
  Quantized,
  dequantize,
  is_quantized,
  quantize_params,
  scaled,
  values_of,
)
from polgrad.sharding import (
  added_up_wide,
  constrain,
  exchanges_heads,
  gathered,
  merge_positions,
  mesh_axes,
  partition_spec,
  pieces_of_a_row,
  platform,
  shards,
  split_positions,
)
from polgrad.types import MixedTokens

Array = jax.Array
Params = Any

HIDDEN = ('batch', 'length', 'hidden')  # logical axes of activations
# Of queries, and of what they attend to; outside and inside of attention.
OUTSIDE = ('batch', 'length', 'heads', 'head_dim')
INSIDE = ('batch', 'attention_length', 'attention_heads', 'head_dim')

METHODS = ['__call__', 'branch']  # methods of a block that are scanned over the layers
# Outputs that the backward pass keeps with remat='none'; matched by primitive name, because kernels'
# primitives are private to JAX.
PRODUCTS = ('dot_general', 'ragged_dot_general', 'dot_product_attention_fwd', 'pallas_call')
_remat = functools.partial(nn.remat, prevent_cse=False, methods=METHODS)
LAYER_INPUT = 'layer_input'
DROPPED = 'dropped'  # Flax's collection of how many of its experts have dropped each token
REMAT = {
  'none': functools.partial(_remat, policy=lambda primitive, *_, **__: primitive.name in PRODUCTS),
  'full': _remat,
  'dots': functools.partial(
    _remat, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  ),
  # As 'full', and what a layer reads waits for the backward pass in the memory of the host.
  'offload': functools.partial(
    _remat,
    policy=jax.checkpoint_policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[],
      names_which_can_be_offloaded=[LAYER_INPUT],
      offload_src='device',
      offload_dst='pinned_host',
    ),
  ),
}
ACTIVATION = {'silu': jax.nn.silu, 'gelu': functools.partial(jax.nn.gelu, approximate=True)}


class View(NamedTuple):
  """What a layer knows about positions: the rotation of each token, and which tokens it may look at."""

  turns: tuple[Array, Array]  # cosines and sines, f32[B, S, head_dim / 2] each
  mask: Array  # bool[B, S, L]


Views = tuple[View, ...]  # (view of local layers, view of the others), or (view of all layers,)


def one_view(local: Array | bool, views: Views) -> View:
  """The view of a layer; `local` is bool[], traced where layers are scanned."""
  if isinstance(local, bool):
    return views[0 if local else -1]
  pick = lambda near, far: jnp.where(local, near, far)
  return jax.tree.map(pick, *views) if len(views) == 2 else views[0]


def contract(x: Array, matrix: Array | Quantized, inputs: int = 1) -> Array:
  """Sums over the last `inputs` axes of `x` [B, T, ...] and the first ones of `matrix`.

  It accumulates like `einsum`. Both are reshaped to matrices, with one row of `x` for each token.
  Otherwise XLA's CPU backend transposes activations to compute the derivatives.
  """
  rows, length = x.shape[:2]
  tokens = merge_positions(x.reshape(rows, length, math.prod(x.shape[-inputs:])))
  flat = values_of(matrix, x.dtype).reshape(tokens.shape[-1], -1)
  out = scaled(einsum('nu,uv->nv', tokens, flat), matrix).astype(x.dtype)
  return split_positions(out, rows, length).reshape(rows, length, *matrix.shape[inputs:])


def whole_rows(
  query: Array, key: Array, value: Array, *, cached: bool
) -> tuple[Array, Array, Array]:
  """Exchanges positions for heads, so that each device attends over whole rows with some of the heads.

  Where the mesh does not divide the heads, positions stay cut, see `attention.over_positions`.

  Args:
    query: [B, S, heads, head_dim].
    key, value: [B, S, kv_heads, head_dim].
    cached: keys and values go into a cache. Otherwise, where the shards of heads do not divide the heads
      of keys, each is repeated as often as needed.

  Returns:
    The queries, and keys and values laid out as in `Cache`.
  """
  exchanged = exchanges_heads(*query.shape[1:3])
  if exchanged and not cached:
    count = shards('attention_heads', query.shape[2])
    copies = count // math.gcd(count, key.shape[2])
    if copies > 1:
      key, value = (jnp.repeat(x, copies, axis=2) for x in (key, value))
  if pieces_of_a_row(query.shape[1]) > 1:
    query, key, value = (constrain(x, OUTSIDE) for x in (query, key, value))
  if exchanged:
    query, key, value = (constrain(x, INSIDE) for x in (query, key, value))
  return query, jnp.transpose(key, (0, 2, 3, 1)), jnp.moveaxis(value, 2, 1)


def in_pieces(attended: Array) -> Array:
  """The inverse of `whole_rows`, for what queries have attended to."""
  if pieces_of_a_row(attended.shape[1]) == 1:
    return attended
  if exchanges_heads(*attended.shape[1:3]):
    attended = constrain(attended, INSIDE)
  return constrain(attended, OUTSIDE)


def look_up(table: Array | Quantized, tokens: Array) -> Array:
  """Rows [B, T, D] of a table [V, D]; NaN for a token outside of it.

  On a mesh each device looks up its columns, for the rows of all devices that have other columns. So it
  adds up the gradient of these columns alone, over the copies of them.
  """

  def run(table: Array | Quantized, tokens: Array) -> Array:
    take = functools.partial(jnp.take, indices=tokens, axis=0, mode='fill')
    return dequantize(jax.tree.map(take, table))

  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return run(table, tokens)
  # XLA cannot partition the sum over copies if all axes of the program below have size 1.
  cutting = lambda entry: tuple(name for name in mesh_axes(entry) if mesh.shape[name] > 1)
  columns = cutting(partition_spec(mesh, ('vocab', 'embed'), table.shape)[1])
  [copies] = partition_spec(mesh, ('copied_batch',), tokens.shape[:1])
  copies = tuple(name for name in cutting(copies) if name not in columns)
  if not columns + copies:
    return run(table, tokens)
  # Scales may have one column.
  of = lambda x: PartitionSpec(None, columns if x.shape[1] > 1 else None)
  split = jax.shard_map(
    run,
    in_specs=(jax.tree.map(of, table), PartitionSpec(copies)),
    out_specs=PartitionSpec(copies, None, columns),
    axis_names={*copies, *columns},
    check_vma=False,
  )
  # Outside of a compiled program, axes that are left to the compiler would be refused.
  found = jax.jit(split)(added_up_wide(table), tokens)
  return found if is_quantized(table) else found.astype(table.dtype)


def expand(x: Array, like: Array) -> Array:
  """Adds leading axes until `x` has the rank of `like`."""
  return jnp.expand_dims(x, range(like.ndim - x.ndim))


def rms_norm(x: Array, scale: Array, *, eps: float, offset: float = 0.0) -> Array:
  """x / sqrt(mean(x^2) + eps) * (offset + scale), in float32 (arXiv:1910.07467).

  The mean is over the last axes of x, as many as `scale` has. The result has the dtype of x.
  """
  y = x.astype(jnp.float32)
  square = jnp.mean(y * y, axis=tuple(range(-scale.ndim, 0)), keepdims=True)
  scale = offset + scale.astype(jnp.float32)
  return (y * jax.lax.rsqrt(square + eps) * expand(scale, y)).astype(x.dtype)


class _Weights(nn.Module):
  """A module that declares its parameters by name; `Config` has the shape of each name."""

  config: Config

  def weight(self, name: str) -> Array:
    """Declares a parameter. Initial values: matrices are normal with variance 1 / fan-in, the first
    factors of adapters uniform within +-1 / sqrt(fan-in), norms are the identity, biases, the second
    factors of adapters and the value head are zero."""
    c = self.config
    if name.endswith('norm'):
      init = nn.initializers.constant(1 - c.norm_offset)
    elif name.endswith(('bias', 'lora_b')) or name == 'value_head':
      init = nn.initializers.zeros
    elif name.endswith('lora_a'):  # Kaiming's with a = sqrt 5, as PEFT has it
      bound = c.fan_in(name) ** -0.5
      init = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
    else:
      init = nn.initializers.normal(c.fan_in(name) ** -0.5)
    # bfloat16 is too coarse for the small steps of a router's bias.
    dtype = 'float32' if name == 'router_bias' else c.param_dtype
    return self.param(name, init, c.shape(name), dtype)

  def norm(self, x: Array, scale: Array) -> Array:
    return rms_norm(x, scale, eps=self.config.norm_eps, offset=self.config.norm_offset)


class Block(_Weights):
  """One layer: `project` makes queries, keys and values, `attend` mixes tokens, `finish` does the rest.

  Decoding calls these three methods itself, because it writes keys and values to the cache in between.
  """

  trains: bool = False  # whether a backward pass may follow, see `matrix`

  def setup(self):
    self.weights = {name: self.weight(name) for name in self.config.layer}

  def __call__(self, x: Array, local: Array, views: Views, segment_ids: Array):
    """The layer for whole rows [B, T, D]; returns (carry, output) for a scan, with an empty output."""
    x = checkpoint_name(x, LAYER_INPUT)
    view = one_view(local, views)
    query, key, value = self.project(x, view.turns)
    if self.config.attention == 'einsum':
      attended = self.attend(query, (key, value, view.mask))
    else:
      attended = self.fused(query, key, value, segment_ids, local)
    return self.finish(x, attended, segment_ids > 0), ()

  def branch(self, x: tuple[Array, Array], local: Array, views: tuple[Views, ...], valid: tuple):
    """The layer for prompts [N, Tp, D] and the completions [B, Tc, D] that share them, for a scan.

    `views` says what a prompt sees of itself, and what a completion sees of its prompt and of itself.
    """
    before, past, own = (one_view(local, v) for v in views)
    prompts, completions = (checkpoint_name(one, LAYER_INPUT) for one in x)
    # Prompts attend to themselves; completions read the keys and values of this layer's prompts.
    query, key, value = self.project(prompts, before.turns)
    prompts = self.finish(prompts, self.attend(query, (key, value, before.mask)), valid[0])
    query, own_key, own_value = self.project(completions, own.turns)
    attended = self.attend(query, (key, value, past.mask), (own_key, own_value, own.mask))
    return (prompts, self.finish(completions, attended, valid[1])), ()

  def attend(self, query: Array, *sources: Source) -> Array:
    return over_positions(functools.partial(attend, **self.score_settings()), query, *sources)

  def attend_to_cache(self, query: Array, *spans: tuple, several: bool) -> Array:
    """Attention to the spans of a cache; `several`: some may be empty, and need not be read."""
    run = functools.partial(attend_to_spans, several=several, **self.score_settings())
    return over_positions(run, query, *spans, whole=True)

  def fused(self, query: Array, key: Array, value: Array, segment_ids: Array, local: Array):
    """Attention within whole rows by the kernel that the configuration names."""
    kernel = kernels.ATTENTION[self.config.attention]
    run = functools.partial(kernel, query, key, value, segment_ids, **self.score_settings())
    if not self.config.window:
      return run(window=0)
    # Kernels need a static window, and `local` is traced: compile both and choose at run time.
    return jax.lax.cond(local, lambda: run(window=self.config.window), lambda: run(window=0))

  def score_settings(self) -> dict[str, float]:
    c = self.config
    return {'scale': c.query_scale or c.head_dim**-0.5, 'cap': c.attention_softcap}

  def project(
    self, x: Array, turns: tuple[Array, Array], cached: bool = False
  ) -> tuple[Array, Array, Array]:
    """[B, S, D] -> queries [B, S, heads, head_dim], and keys and values laid out as in `Cache`.

    Where rows are sharded along their positions, heads are sharded instead from here on to `finish`.
    """
    y = self.before(x, 'attention_norm')
    query, key, value = (self.dense(y, name) for name in ('query', 'key', 'value'))
    if self.config.qk_norm != 'none':
      query = self.norm(query, self.weights['query_norm'])
      key = self.norm(key, self.weights['key_norm'])
    query, key = rotary.rotate(query, turns), rotary.rotate(key, turns)
    return whole_rows(query, key, value, cached=cached)

  def finish(self, x: Array, attended: Array, valid: Array) -> Array:
    """Adds attention, then feed-forward, to the residual stream x; valid is bool[B, S], not padding."""
    attended = in_pieces(attended)
    x = x + self.after(self.dense(attended, 'out'), 'attention_post_norm')
    y = self.before(x, 'mlp_norm')
    feed_forward = self.mixture(y, valid) if self.config.num_experts else self.mlp(y)
    x = x + self.after(feed_forward, 'mlp_post_norm')
    return constrain(x, HIDDEN)

  def mlp(self, y: Array) -> Array:
    activation = ACTIVATION[self.config.activation]
    return self.dense(activation(self.dense(y, 'gate')) * self.dense(y, 'up'), 'down')

  def mixture(self, y: Array, valid: Array) -> Array:
    """The feed-forward as a mixture of experts; padding does not count as load."""
    c, w = self.config, self.weights
    logits = merge_positions(einsum('bsd,de->bse', y, w['router'].astype(y.dtype)))
    bias = w.get('router_bias', jnp.zeros(c.num_experts))
    weights, chosen = experts.route(
      logits, bias, k=c.experts_per_token, normalize=c.normalize_experts
    )
    if c.balance_rate:  # the backward pass then returns the loads as gradient of the bias
      excess = experts.excess(chosen, merge_positions(valid), c.num_experts)
      weights = experts.with_load_gradient(weights, bias, excess)
    weights, chosen = (split_positions(x, *y.shape[:2]) for x in (weights, chosen))
    matrices = (self.matrix(name, y.dtype) for name in ('gate', 'up', 'down'))
    settings = dict(activation=ACTIVATION[c.activation], capacity=c.expert_capacity)
    if c.expert_capacity:  # padding takes no place of a token
      chosen = jnp.where(valid[..., None], chosen, c.num_experts)
    out, dropped = experts.mixture(y, weights, chosen, *matrices, **settings)
    if dropped is not None:
      self.sow(DROPPED, 'choices', dropped)
    return out.astype(y.dtype)

  def dense(self, y: Array, name: str) -> Array:
    """Product of y with a matrix, plus its bias and low-rank adapter (arXiv:2106.09685) if any."""
    w, inputs = self.weights, num_inputs(name)
    out = contract(y, self.matrix(name, y.dtype), inputs)
    if f'{name}_bias' in w:
      out = out + expand(w[f'{name}_bias'].astype(out.dtype), out)
    if f'{name}_lora_a' in w:
      low = contract(contract(y, w[f'{name}_lora_a'], inputs), w[f'{name}_lora_b'])
      out = out + self.config.lora_scale * low
    return out

  def matrix(self, name: str, dtype: Any) -> Array:
    """A parameter; in training cast before devices exchange it, and gathered once for all products."""
    if not self.trains:
      return self.weights[name]
    return gathered(self.weights[name].astype(dtype), self.config.axes(name))

  def before(self, x: Array, name: str) -> Array:
    return self.norm(x, self.weights[name]) if self.config.pre_norm else x

  def after(self, x: Array, name: str) -> Array:
    return self.norm(x, self.weights[name]) if self.config.post_norm else x


class Decoder(_Weights):
  """Embedding, a scan over the blocks (parameters stacked as [layers, ...]), final norm and heads."""

  def setup(self):
    c = self.config
    self.weights = {name: self.weight(name) for name in c.top}
    # One compiled block for all layers; the backward pass recomputes what `remat` says.
    self.layers = nn.scan(
      REMAT[c.remat](Block),
      variable_axes={'params': 0, DROPPED: 0},
      split_rngs={'params': True},
      in_axes=(0, nn.broadcast, nn.broadcast),
      length=c.num_layers,
      methods=METHODS,
    )(c, trains=True)
    self.local = jnp.array([i in c.local_layers for i in range(c.num_layers)])

  def __call__(self, tokens: Array, segment_ids: Array) -> Array:
    """Final hidden states of whole rows: i32[B, T], i32[B, T] -> [B, T, D]."""
    positions = segment_positions(segment_ids)
    views = self.views(positions, positions, segment_mask(segment_ids))
    x, _ = self.layers(self.embed(tokens), self.local, views, segment_ids)
    return self.normalise(x)

  def completions(
    self, tokens: Array, segment_ids: Array, prompt_length: int, rows_per_prompt: int
  ) -> Array:
    """See `Policy.completions`."""
    # Each prompt is taken from the first of the consecutive rows that share it.
    positions = segment_positions(segment_ids)
    first = lambda x: x.reshape(-1, rows_per_prompt, *x.shape[1:])[:, 0, :prompt_length]
    cut = lambda x: (first(x), x[:, prompt_length:])
    prompt_positions, own_positions = cut(positions)
    prompt_ids, own_ids = cut(segment_ids)
    past = segment_ids[:, :prompt_length]
    # What a prompt sees of itself, what a completion sees of its prompt, and of itself.
    views = (
      self.views(prompt_positions, prompt_positions, segment_mask(prompt_ids)),
      self.views(own_positions, positions[:, :prompt_length], own_ids[..., None] == past[:, None]),
      self.views(own_positions, own_positions, segment_mask(own_ids)),
    )
    x, valid = jax.tree.map(self.embed, cut(tokens)), (prompt_ids > 0, own_ids > 0)
    (prompts, own), _ = self.layers.branch(x, self.local, views, valid)
    # The last token of a prompt predicts the first token of each completion.
    last = jnp.repeat(prompts[:, -1:], rows_per_prompt, axis=0)
    return self.normalise(jnp.concatenate([last, own], axis=1))

  def embed(self, tokens: Array | MixedTokens) -> Array:
    if isinstance(tokens, MixedTokens):
      own, other = self.embed(tokens.tokens), self.embed(tokens.others)
      return other + tokens.share.astype(own.dtype)[:, None, None] * (own - other)
    x = look_up(self.weights['embedding'], tokens).astype(self.config.dtype)
    if pieces_of_a_row(x.shape[1]) > 1:
      x = constrain(x, ('batch', 'attention_length', 'looked_up'))
    return constrain(x * jnp.asarray(self.config.embedding_scale, x.dtype), HIDDEN)

  def views(self, positions: Array, keys: Array, mask: Array) -> Views:
    """The view of local layers and that of the others; only one view if no layer is local.

    Args:
      positions: i32[B, S], positions of the tokens in their segments.
      keys: i32[B, L], positions of the tokens that they may look at.
      mask: bool[B, S, L], what a layer without a window may look at.
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

  def value(self, hidden: Array) -> Array:
    return einsum('...d,d->...', hidden, self.weights['value_head'].astype(hidden.dtype))


def decoder(**fields: Any) -> Policy:
  """A decoder with random weights.

  The keywords are the fields of `polgrad.models.config.Config`, which documents them, except those of an
  adapter (`lora_*`). Only `vocab_size` has no default.

  Raises:
    ValueError: an impossible combination of sizes, or an unknown choice; the message lists the valid
      ones.
    TypeError: an unknown keyword.
  """
  return from_config(Config(**KNOBS.bind(**fields).kwargs))


# The signature is made from `Config`, so that a field is written once. `registry.part` and `bind` read
# the names and defaults of a configuration from it, and the types from the annotations.
KNOBS = inspect.Signature(
  [p for p in inspect.signature(Config).parameters.values() if not p.name.startswith('lora_')],
  return_annotation=Policy,
)
decoder.__signature__ = KNOBS
decoder.__annotations__ = {p.name: p.annotation for p in KNOBS.parameters.values()} | {
  'return': Policy
}


def from_config(config: Config) -> Policy:
  """The policy of a configuration, with random parameters."""
  functions = Functions(config, Decoder(config), Block(config))
  return Policy(
    config=config,
    shapes=functions.shapes,
    init=functions.init,
    hidden=functions.hidden,
    completions=functions.completions,
    states=functions.states,
    unembed=functions.unembed,
    readout=functions.readout,
    value=functions.value,
    init_cache=functions.init_cache,
    begin=caches.begin,
    widen=functions.widen,
    unstack=functions.unstack,
    decode=functions.decode,
    axes=functions.axes,
    labels=functions.labels,
    dropped=functions.dropped if config.expert_capacity else None,
  )


def sampled(
  policy: Policy,
  *,
  dtype: str = '',
  weights: str = '',
  cache: str = '',
  looped: bool | None = None,
) -> Policy:
  """The policy as a sampler computes it, with the same parameters; `unstack` rounds them.

  Args:
    dtype: of its activations and its other weights: 'float32', 'bfloat16', or '' for that of the policy.
    weights: of the matrices that products read, a kind of `quantized.KINDS`, or '' for `dtype`. Adapters
      are not rounded: a step of an adapter is less than a step of 8 bits.
    cache: of keys and values, a kind of `quantized.KINDS`, or '' for `dtype`.
    looped: whether `decode` loops over the layers for each token; None: on TPUs alone.
  """
  if not (dtype or weights or cache) and looped is None:
    return policy
  config = dataclasses.replace(policy.config, dtype=dtype or policy.config.dtype)
  own = Functions(config, Decoder(config), Block(config), cache, looped)
  unstack = lambda params: own.unstack(quantize_params(params, config, weights))
  names = ('config', 'unembed', 'value', 'init_cache', 'widen', 'decode')
  return policy._replace(unstack=unstack, **{name: getattr(own, name) for name in names})


def _over_layers(layer: Callable, local: tuple[bool, ...], carry: Any) -> Any:
  """The result of `carry = layer(i, local[i], *carry)` for each layer i of a stack; a loop, if several.

  Args:
    local: whether the attention of each layer is local.
  """
  if len(local) < 2:
    return layer(0, local[0], *carry) if local else carry
  kinds = jnp.array(local)
  step = lambda i, carry: layer(i, kinds[i], *carry)
  return jax.lax.fori_loop(0, len(local), step, carry)


def _in_one_stack(decode: Callable, params: Params, cache: Cache) -> tuple[Array, Cache]:
  """`decode(params, cache)` of prompts where each layer is a stack, by a loop: one layer is compiled
  instead of all.

  Weights and caches are copied into one stack and back. Prompts are read once, so this costs little
  beside the products.
  """
  join = lambda *parts: jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
  stack = lambda buffers: jax.tree.map(lambda *x: jnp.stack(x, caches.STACK), *buffers)
  one_of = lambda i, x: jax.lax.index_in_dim(x, i, caches.STACK, keepdims=False)
  cut = lambda one: tuple(
    jax.tree.map(functools.partial(one_of, i), one) for i in range(len(params['layers']))
  )
  stacked = lambda span: Span((stack(span.keys),), (stack(span.values),), span.positions)
  apart = lambda span: Span(cut(span.keys[0]), cut(span.values[0]), span.positions)
  whole = {**params, 'layers': (join(*params['layers']),)}
  states, one = decode(whole, Cache(tuple(map(stacked, cache.spans))))
  return states, Cache(tuple(map(apart, one.spans)))


@dataclasses.dataclass(frozen=True)
class Functions:
  """The functions of a `Policy`, which documents them, for one configuration."""

  config: Config
  model: Decoder
  block: Block
  cache: str = ''  # type of keys and values in the cache, see `caches.empty`
  looped: bool | None = None  # see `stacks`; None: by the platform

  def apply(self, params: Params, *args: Any, method: str = '__call__') -> Any:
    """Calls a method of `Decoder` with these parameters."""
    return self.model.apply({'params': params}, *args, method=method)

  def check_length(self, length: int) -> None:
    if length > self.config.max_length:
      raise ValueError(f'{length} tokens are more than max_length {self.config.max_length}')

  def init(self, key: Array, shardings: Any = None) -> Params:
    tokens = jnp.zeros((1, 1), jnp.int32)
    init = functools.partial(self.model.init, mutable='params')  # and no count of dropped tokens
    run = jax.jit(init, out_shardings={'params': shardings})
    return run(key, tokens, tokens)['params']

  def shapes(self) -> Params:
    return jax.eval_shape(self.init, jax.random.key(0))

  def hidden(self, params: Params, tokens: Array, segment_ids: Array) -> Array:
    self.check_length(tokens.shape[1])
    return self.apply(params, tokens, segment_ids)

  def completions(
    self,
    params: Params,
    tokens: Array,
    segment_ids: Array,
    *,
    prompt_length: int,
    rows_per_prompt: int,
  ) -> Array:
    self.check_length(tokens.shape[1])
    sizes = (prompt_length, rows_per_prompt)
    return self.apply(params, tokens, segment_ids, *sizes, method='completions')

  def dropped(
    self,
    params: Params,
    tokens: Array,
    segment_ids: Array,
    *,
    prompt_length: int = 0,
    rows_per_prompt: int = 1,
  ) -> tuple[Array, Array]:
    self.check_length(tokens.shape[1])
    run = functools.partial(self.model.apply, {'params': params}, tokens, segment_ids)
    if rows_per_prompt == 1:
      hidden, counts = run(mutable=DROPPED)
      [total] = counts[DROPPED]['layers']['choices']
    else:
      sizes = (prompt_length, rows_per_prompt)
      run = functools.partial(run, *sizes, method='completions', mutable=DROPPED)
      hidden, counts = run()
      prompts, own = counts[DROPPED]['layers']['choices']
      last = jnp.repeat(prompts[..., -1:], rows_per_prompt, axis=1)
      total = jnp.concatenate([last, own], axis=2)
    choices = self.config.num_layers * self.config.experts_per_token
    return hidden, jnp.sum(total, axis=0) / choices

  def states(
    self, params: Params, tokens: Array, segment_ids: Array, *, layers: tuple[int, ...]
  ) -> Array:
    self.check_length(tokens.shape[1])
    last = self.config.num_layers
    if not layers or list(layers) != sorted({*layers}) or not 1 <= layers[0] <= layers[-1] <= last:
      raise ValueError(
        f'layers {layers}: expected numbers from 1 to {last}, in ascending order and each once'
      )
    positions = segment_positions(segment_ids)
    views = self.apply(params, positions, positions, segment_mask(segment_ids), method='views')
    x = self.apply(params, tokens, method='embed')
    # One compiled layer, as in `Decoder`. It writes its output to its place among those that are kept;
    # a layer that is not asked for writes to a place that is dropped.
    places = jnp.array(
      [layers.index(i + 1) if i + 1 in layers else len(layers) for i in range(last)]
    )
    local = jnp.array([i in self.config.local_layers for i in range(last)])
    kept = jnp.zeros((len(layers) + 1, *x.shape), x.dtype)

    def layer(carry, own):
      (x, kept), (weights, local, place) = carry, own
      x, _ = self.block.apply({'params': weights}, x, local, views, segment_ids)
      return (x, kept.at[place].set(x)), ()

    computed = jax.tree.map(lambda p: p[: layers[-1]], (params['layers'], local, places))
    (_, kept), _ = jax.lax.scan(layer, (x, constrain(kept, ('layers', *HIDDEN))), computed)
    if layers[-1] == last:
      kept = kept.at[len(layers) - 1].set(
        self.apply(params, kept[len(layers) - 1], method='normalise')
      )
    return kept[: len(layers)]

  def unembed(self, params: Params, hidden: Array) -> Array:
    weight = params[self.config.unembedding]
    logits = einsum('...d,vd->...v', hidden, values_of(weight, hidden.dtype))
    return softcap(scaled(logits, weight), self.config.logit_softcap)

  def readout(self, params: Params) -> Params:
    return {self.config.unembedding: params[self.config.unembedding]}

  def value(self, params: Params, hidden: Array) -> Array:
    if not self.config.value_head:
      raise ValueError('the model has no value head; build it with value_head=True')
    return self.apply(params, hidden, method='value')

  def init_cache(self, batch: int, length: int) -> Cache:
    self.check_length(length)
    return caches.empty(self.config, batch, length, self.stacks(), self.cache)

  def widen(self, cache: Cache, length: int) -> Cache:
    self.check_length(cache.length + length)
    rows = len(cache.spans[0].positions)
    empty = caches.empty(self.config, rows, length, self.stacks(), self.cache)
    return Cache(cache.spans + empty.spans)

  def unstack(self, params: Params) -> Params:
    c = self.config
    # Cast once to the dtype of computation: in the decode loop, every step would read the stored weights
    # again. Norms and the router's bias are used in the dtype in which they are stored.
    exact = ('norm', 'router_bias')
    kept = lambda path, p: is_quantized(p) or path[-1].key.endswith(exact)
    used = lambda path, p: p if kept(path, p) else p.astype(c.dtype)
    params = jax.tree_util.tree_map_with_path(used, params, is_leaf=is_quantized)
    ends = itertools.accumulate(self.stacks())
    cut = lambda size, end: jax.tree.map(lambda p: p[end - size : end], params['layers'])
    return {**params, 'layers': tuple(map(cut, self.stacks(), ends))}

  def stacks(self) -> tuple[int, ...]:
    """The number of layers in each stack: `decode` reads parameters and caches as stacks of layers.

    On a TPU all layers are one stack. A loop reads the part of each layer where it is, and writes the
    new column in place, so one layer is compiled instead of all. On CPUs each layer is a stack, so the
    loop is unrolled: a product is a library call, for which a part of a larger stack would be copied.
    """
    looped = self.looped if self.looped is not None else platform() == 'tpu'
    layers = self.config.num_layers
    return (layers,) if looped else (1,) * layers

  def decode(
    self,
    params: Params,
    tokens: Array,
    positions: Array,
    valid: Array,
    cache: Cache,
    index: Array | int,
  ) -> tuple[Array, Cache]:
    # Prompts begin at a column known when tracing; steps and replies at one that is computed.
    if isinstance(index, int) and tokens.shape[1] > 1 and len(params['layers']) > 1:
      read = lambda params, cache: self.decode(params, tokens, positions, valid, cache, index)
      return _in_one_stack(read, params, cache)
    # The new tokens are in the cache before they attend, so that they see themselves.
    written = jnp.where(valid, positions, -1)
    starts = itertools.accumulate((span.length for span in cache.spans[:-1]), initial=0)
    columns = [index - start for start in starts]  # in each span
    places, views = [], []  # of each span: its positions, and what the new tokens see of it
    for span, column in zip(cache.spans, columns):
      held = caches.write(caches.POSITIONS, span.positions, written, column)
      mask = (held[:, None] >= 0) & (held[:, None] <= positions[:, :, None])
      views.append(self.apply(params, positions, held, mask, method='views'))
      places.append(held)
    x = self.apply(params, tokens, method='embed')
    several = bool(jnp.ndim(index)) or len(cache.spans) > 1

    def layer(stack: Params, i: Array | int, local: Array | bool, x: Array, held: tuple):
      """Layer i of a stack; `held` are keys and values of the stack, by span."""
      run = functools.partial(self.block.apply, {'params': jax.tree.map(lambda p: p[i], stack)})
      seen = [one_view(local, view) for view in views]
      query, key, value = run(x, seen[0].turns, cached=True, method='project')
      write = lambda keys, values, column: (
        caches.write(caches.KEYS, keys, key, column, i),
        caches.write(caches.VALUES, values, value, column, i),
      )
      held = [write(*pair, column) for pair, column in zip(held, columns, strict=True)]
      sources = [(*pair, view.mask, i) for pair, view in zip(held, seen, strict=True)]
      attended = run(query, *sources, several=several, method='attend_to_cache')
      return run(x, attended, valid, method='finish'), tuple(held)

    def through(stack: Params, local: tuple[bool, ...], x: Array, held: tuple):
      return _over_layers(functools.partial(layer, stack), local, (x, held))

    # Stacks of one kind are traced once; `inline` copies what they do, so XLA gets the same program as
    # if each was traced. Calls outside of any program compile nothing anew: they run step by step.
    if isinstance(x, jax.core.Tracer):
      through = jax.jit(through, static_argnames='local', inline=True)

    # `first_layers` has fewer layers than parameters and cache, and leaves the others unchanged.
    local = tuple(i in self.config.local_layers for i in range(self.config.num_layers))
    read = []  # keys and values of the spans, by stack
    for number, stack in enumerate(params['layers']):
      held = tuple((span.keys[number], span.values[number]) for span in cache.spans)
      size = len(jax.tree.leaves(stack)[0])
      here, local = local[:size], local[size:]
      x, held = through(stack, here, x, held)
      read.append(held)
    return self.apply(params, x, method='normalise'), Cache(
      tuple(Span(*zip(*pairs), held) for *pairs, held in zip(*read, places, strict=True))
    )

  def axes(self, params: Params) -> Params:
    def names(path, _):
      stacked = 'layers' in (key.key for key in path[:-1])
      return ('layers',) * stacked + self.config.axes(path[-1].key)

    return jax.tree_util.tree_map_with_path(names, params)

  def labels(self, params: Params) -> Params:
    has_adapter = self.config.lora_rank > 0

    def label(path, _):
      name = path[-1].key
      if name == 'router_bias':
        return 'frozen' if has_adapter else 'balance'
      # With an adapter, only its factors and the value head are trained.
      trained = not has_adapter or '_lora_' in name or name == 'value_head'
      return 'train' if trained else 'frozen'

    return jax.tree_util.tree_map_with_path(label, params)
