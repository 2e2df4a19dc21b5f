"""The shape of a decoder: one dataclass and one table of axes.

The configuration says which parameters there are (`top`, `layer`) and `AXES` names the axes of each;
shapes, initial scales, sharding and the reading and writing of files all follow from these two."""

import dataclasses
import math

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
  'query_norm': ('heads', 'head_dim'),
  'key_norm': ('kv_heads', 'head_dim'),
  'out': ('heads', 'head_dim', 'embed'),
  'attention_post_norm': ('embed',),
  'mlp_norm': ('embed',),
  'router': ('embed', 'experts'),
  'router_bias': ('experts',),
  'gate': ('embed', 'mlp'),
  'up': ('embed', 'mlp'),
  'down': ('mlp', 'embed'),
  'mlp_post_norm': ('embed',),
}
TOP = ('embedding', 'final_norm', 'unembedding', 'value_head')
ATTENTION = ('query', 'key', 'value', 'out')
MLP = ('gate', 'up', 'down')

VALID = {
  'attention': ('cudnn', 'einsum', 'splash'),
  'remat': ('none', 'full', 'dots'),
  'dtype': ('bfloat16', 'float32'),
  'param_dtype': ('bfloat16', 'float32'),
  'activation': ('gelu', 'silu'),
  'qk_norm': ('none', 'head', 'all'),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """The shape of a decoder; see `decoder` for the fields, and `lora` for those of an adapter."""

  vocab_size: int
  num_layers: int
  width: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_width: int
  activation: str
  rope_theta: float
  rope_factor: float
  rope_low: float
  rope_high: float
  rope_original_length: int
  window: int
  local_layers: tuple[int, ...]
  local_rope_theta: float
  norm_eps: float
  norm_offset: float
  pre_norm: bool
  post_norm: bool
  qk_norm: str
  attention_bias: bool
  query_scale: float
  attention_softcap: float
  logit_softcap: float
  embedding_scale: float
  tie_embeddings: bool
  num_experts: int
  experts_per_token: int
  normalize_experts: bool
  balance_rate: float
  max_length: int
  dtype: str
  param_dtype: str
  remat: str
  value_head: bool
  attention: str = 'einsum'
  lora_rank: int = 0
  lora_scale: float = 1.0
  lora_targets: tuple[str, ...] = ()

  def __post_init__(self):
    for field, valid in VALID.items():
      if getattr(self, field) not in valid:
        raise ValueError(f'unknown {field} {getattr(self, field)!r}; valid: {sorted(valid)}')
    if self.num_heads % self.num_kv_heads:
      raise ValueError(f'{self.num_heads} heads do not divide over {self.num_kv_heads} kv heads')
    if self.attention == 'cudnn' and (self.dtype != 'bfloat16' or self.attention_softcap):
      raise ValueError(
        "attention 'cudnn' needs dtype 'bfloat16' and no attention_softcap; got dtype "
        f'{self.dtype!r} and attention_softcap {self.attention_softcap}'
      )
    if self.head_dim % 2:
      raise ValueError(f'rotary positions need an even head_dim, got {self.head_dim}')
    if not (self.pre_norm or self.post_norm):
      raise ValueError('pre_norm and post_norm: at least one of them must be True')
    if bool(self.window) != bool(self.local_layers):
      raise ValueError(f'window {self.window} and local_layers {self.local_layers} come together')
    if not set(self.local_layers) <= set(range(self.num_layers)):
      raise ValueError(
        f'local_layers {self.local_layers} are not all among {self.num_layers} layers'
      )
    if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
      raise ValueError(f'experts_per_token {self.experts_per_token} of {self.num_experts} experts')
    targets = ATTENTION if self.num_experts else ATTENTION + MLP
    if self.lora_rank and not set(self.lora_targets) <= set(targets):
      raise ValueError(f'lora targets {self.lora_targets}; valid: {targets}')

  @property
  def top(self) -> tuple[str, ...]:
    """Names of the parameters outside the layers."""
    optional = {'unembedding': not self.tie_embeddings, 'value_head': self.value_head}
    return tuple(name for name in TOP if optional.get(name, True))

  @property
  def layer(self) -> tuple[str, ...]:
    """Names of the parameters of a layer, all layers alike."""
    optional = {
      'attention_norm': self.pre_norm,
      'query_bias': self.attention_bias,
      'key_bias': self.attention_bias,
      'value_bias': self.attention_bias,
      'query_norm': self.qk_norm != 'none',
      'key_norm': self.qk_norm != 'none',
      'attention_post_norm': self.post_norm,
      'mlp_norm': self.pre_norm,
      'router': self.num_experts > 0,
      'router_bias': self.balance_rate > 0,
      'mlp_post_norm': self.post_norm,
    }
    names = [n for n in AXES if n not in TOP and optional.get(n, True)]
    return *names, *self.adapter

  @property
  def adapter(self) -> tuple[str, ...]:
    """Names of the low-rank factors of a layer."""
    targets = self.lora_targets if self.lora_rank else ()
    return tuple(f'{name}_lora_{half}' for name in targets for half in 'ab')

  def axes(self, name: str) -> tuple[str, ...]:
    """Logical axes of a parameter (of one layer, for those of a layer)."""
    base, adapter, half = name.partition('_lora_')
    if adapter:
      inputs = num_inputs(base)
      return {'a': (*AXES[base][:inputs], 'rank'), 'b': ('rank', *AXES[base][inputs:])}[half]
    if name in ('query_norm', 'key_norm') and self.qk_norm == 'head':
      return ('head_dim',)
    if name in MLP and self.num_experts:
      return ('experts', *AXES[name])
    return AXES[name]

  def shape(self, name: str) -> tuple[int, ...]:
    """Shape of a parameter (of one layer, for those of a layer)."""
    sizes = {
      'vocab': self.vocab_size,
      'embed': self.width,
      'heads': self.num_heads,
      'kv_heads': self.num_kv_heads,
      'head_dim': self.head_dim,
      'mlp': self.mlp_width,
      'experts': self.num_experts,
      'rank': self.lora_rank,
    }
    return tuple(sizes[axis] for axis in self.axes(name))

  def fan_in(self, name: str) -> int:
    """How many inputs an output of a matrix sums over; matrices of experts begin with that axis."""
    if name in ('embedding', 'unembedding'):
      return self.width
    shape = self.shape(name)
    if name in MLP and self.num_experts:
      shape = shape[1:]
    return math.prod(shape[: num_inputs(name)])


def num_inputs(name: str) -> int:
  """How many leading axes of a matrix are contracted with the activations."""
  return 2 if name in ('out', 'out_lora_a') else 1
