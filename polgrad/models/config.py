"""The configuration of a decoder, and the parameters that follow from it.

`Config.top` and `Config.layer` name the parameters that a configuration has, and `AXES` names the
axes of each parameter. Shapes, initial scales, sharding and the reading and writing of files all
follow from these names."""

import dataclasses
import math
from typing import Annotated

from polgrad.registry import NotNegative, Positive, Range, check_ranges

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

# Sizes beyond these are mistakes: nothing would hold the arrays. Layers are also listed one by one.
Size = Annotated[int, Range(at_least=1, at_most=10_000_000)]
SizeOrNone = Annotated[int, Range(at_least=0, at_most=10_000_000)]
Layers = Annotated[int, Range(at_least=1, at_most=10_000)]
Length = Annotated[int, Range(at_least=1, below=2**31)]  # positions are 32-bit numbers
Span = Annotated[int, Range(at_least=0, below=2**31)]
LARGEST = 10**14  # parameters

VALID = {
  'attention': ('cudnn', 'einsum', 'splash'),
  'remat': ('none', 'full', 'dots', 'offload'),
  'dtype': ('bfloat16', 'float32'),
  'param_dtype': ('bfloat16', 'float32'),
  'activation': ('gelu', 'silu'),
  'qk_norm': ('none', 'head', 'all'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """All settings of a decoder. `decoder` takes each of them as a keyword, except those of an adapter.

  Raises:
    ValueError: a size out of its range, an impossible combination of sizes, or an unknown choice; the
      message lists the valid ones.
  """

  vocab_size: Size  # number of tokens in the vocabulary
  num_layers: Layers = 2  # number of blocks
  width: Size = 64  # size of the residual stream
  num_heads: Size = 4  # query heads
  num_kv_heads: Size = 2  # key and value heads; divides num_heads
  head_dim: Size = 16  # size of a head, even
  mlp_width: Size = 192  # inner size of the feed-forward, or of each expert
  activation: str = 'silu'  # of the gate: 'silu', or 'gelu' in its tanh form

  # Rotary positions. The middle four extend the context, see `rotary.stretch`.
  rope_theta: Positive = 10_000.0  # base of the frequencies
  rope_factor: Positive = 1.0
  rope_low: Positive = 1.0
  rope_high: Positive = 4.0
  rope_original_length: Span = 0

  # Local layers look at a sliding window; all other layers look at the whole past.
  window: Span = 0  # tokens that a local layer sees, its own included; 0: there are no local layers
  local_layers: tuple[int, ...] = ()  # indices of the local layers
  local_rope_theta: Positive = 10_000.0  # base of the frequencies of local layers, never stretched

  norm_eps: NotNegative = 1e-6  # added to the mean square in RMSNorm
  norm_offset: float = 0.0  # norms multiply by norm_offset + scale (1 in Gemma)
  pre_norm: bool = True  # normalise the inputs of attention and feed-forward
  post_norm: bool = False  # normalise their outputs, before the addition (OLMo 2; Gemma has both)
  qk_norm: str = (
    'none'  # RMSNorm of queries and keys: 'none', 'head' (each head) or 'all' (all heads)
  )

  attention_bias: bool = False  # queries, keys and values have a bias (Qwen2)
  query_scale: NotNegative = 0.0  # multiplies attention scores; 0 means head_dim^-1/2
  # How training attends within whole rows: 'einsum', or a kernel: 'cudnn' (NVIDIA GPUs; bfloat16, no
  # soft cap) or 'splash' (TPUs). Results are equal up to rounding.
  attention: str = 'einsum'
  attention_softcap: NotNegative = 0.0  # soft cap of attention scores, 0 for none
  logit_softcap: NotNegative = 0.0  # soft cap of logits, 0 for none
  embedding_scale: Positive = 1.0  # multiplies embeddings (sqrt(width) in Gemma)
  tie_embeddings: bool = True  # the embedding is also the unembedding

  # A mixture of experts, see `experts`.
  num_experts: SizeOrNone = 0  # experts of every feed-forward, 0 for a dense feed-forward
  experts_per_token: Size = 2  # experts that process each token
  normalize_experts: bool = True  # divide the weights of a token's experts by their sum
  balance_rate: NotNegative = 0.0  # step of the bias that balances experts; 0 for no bias
  # 0: no token is dropped; otherwise the most tokens of an expert, as a multiple of the mean load. Which
  # tokens are dropped depends on the mesh and on how a batch is cut.
  expert_capacity: NotNegative = 0.0

  max_length: Length = 2048  # longest row in tokens; longer rows raise ValueError
  dtype: str = 'float32'  # of activations, or 'bfloat16'; sums, norms, softmax, logits are float32
  param_dtype: str = 'float32'  # of the stored parameters, or 'bfloat16'
  # The matrix products of a block that the backward pass computes again: 'none', 'full' (all of them),
  # 'dots' (attention, whose products have no weights), or 'offload': all of them, from inputs of the
  # block that wait in the memory of the host. Everything between products is always computed again,
  # because keeping it would cost more.
  remat: str = 'none'
  value_head: bool = False  # adds a scalar head, zero at first; also the head of a reward model

  # A low-rank adapter; only `lora` sets these.
  lora_rank: SizeOrNone = 0  # inner size of the factors, 0 for no adapter
  lora_scale: float = 1.0  # multiplies the product of the factors
  lora_targets: tuple[str, ...] = ()  # names of the matrices that have factors

  def __post_init__(self):
    check_ranges(Config, vars(self))
    for field, valid in VALID.items():
      if getattr(self, field) not in valid:
        raise ValueError(f'unknown {field} {getattr(self, field)!r}; valid: {sorted(valid)}')
    self._check_attention()
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
    count = sum(math.prod(self.shape(name)) for name in self.top)
    count += self.num_layers * sum(math.prod(self.shape(name)) for name in self.layer)
    if count > LARGEST:
      raise ValueError(
        f'these sizes make {count:.1e} parameters, at most {LARGEST:.0e} are possible'
      )

  def _check_attention(self):
    if self.num_heads % self.num_kv_heads:
      raise ValueError(f'{self.num_heads} heads do not divide over {self.num_kv_heads} kv heads')
    if self.attention == 'cudnn' and (self.dtype != 'bfloat16' or self.attention_softcap):
      raise ValueError(
        "attention 'cudnn' needs dtype 'bfloat16' and no attention_softcap; got dtype "
        f'{self.dtype!r} and attention_softcap {self.attention_softcap}'
      )
    if self.head_dim % 2:
      raise ValueError(f'rotary positions need an even head_dim, got {self.head_dim}')

  @property
  def unembedding(self) -> str:
    """Name of the parameter [V, D] that makes logits of hidden states."""
    return 'embedding' if self.tie_embeddings else 'unembedding'

  @property
  def top(self) -> tuple[str, ...]:
    """Names of the parameters outside the layers."""
    optional = {'unembedding': not self.tie_embeddings, 'value_head': self.value_head}
    return tuple(name for name in TOP if optional.get(name, True))

  @property
  def layer(self) -> tuple[str, ...]:
    """Names of the parameters of one layer; all layers have the same names."""
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
    """Names of the low-rank factors of one layer, for example `query_lora_a`."""
    targets = self.lora_targets if self.lora_rank else ()
    return tuple(f'{name}_lora_{half}' for name in targets for half in 'ab')

  def axes(self, name: str) -> tuple[str, ...]:
    """Logical axes of a parameter, without the axis over layers."""
    base, adapter, half = name.partition('_lora_')
    # The factors have the axes of their matrix, with the rank in place of its outputs (a) or inputs (b).
    if adapter:
      inputs = num_inputs(base)
      return {'a': (*AXES[base][:inputs], 'rank'), 'b': ('rank', *AXES[base][inputs:])}[half]
    if name in ('query_norm', 'key_norm') and self.qk_norm == 'head':
      return ('head_dim',)
    if name in MLP and self.num_experts:
      return ('experts', *AXES[name])
    return AXES[name]

  def shape(self, name: str) -> tuple[int, ...]:
    """Shape of a parameter, without the axis over layers."""
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
    """Number of inputs that one output of a matrix sums over, for one expert where there are experts."""
    if name in ('embedding', 'unembedding'):
      return self.width
    shape = self.shape(name)
    if name in MLP and self.num_experts:
      shape = shape[1:]
    return math.prod(shape[: num_inputs(name)])


def num_inputs(name: str) -> int:
  """Number of leading axes of a matrix that a product with activations sums over."""
  return 2 if name in ('out', 'out_lora_a') else 1
