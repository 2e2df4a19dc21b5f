"""Families of models on the Hugging Face hub: how to read config.json, and the names of tensors.

Each family is an entry of `FAMILIES`, which says how the family differs from Llama: the fields of
`Config` that are fixed in the family, the keys of config.json that hold the other fields, the values of
absent keys, the layers that are local, and the names of tensors."""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from polgrad import jsons
from polgrad.models.config import Config, Length
from polgrad.registry import AtLeastOne, Positive, check_range, plain

# Tensors by our names of the parameters: outside the layers, and of one layer in the kinds of families.
TOP = {
  'embedding': 'model.embed_tokens.weight',
  'final_norm': 'model.norm.weight',
  'unembedding': 'lm_head.weight',
  'value_head': 'score.weight',
}
ATTENTION = {
  'attention_norm': 'input_layernorm.weight',
  'query': 'self_attn.q_proj.weight',
  'key': 'self_attn.k_proj.weight',
  'value': 'self_attn.v_proj.weight',
  'query_bias': 'self_attn.q_proj.bias',
  'key_bias': 'self_attn.k_proj.bias',
  'value_bias': 'self_attn.v_proj.bias',
  'query_norm': 'self_attn.q_norm.weight',
  'key_norm': 'self_attn.k_norm.weight',
  'out': 'self_attn.o_proj.weight',
  'mlp_norm': 'post_attention_layernorm.weight',
}
POST_NORMS = {
  'attention_post_norm': 'post_attention_layernorm.weight',
  'mlp_norm': 'pre_feedforward_layernorm.weight',
  'mlp_post_norm': 'post_feedforward_layernorm.weight',
}
DENSE = ATTENTION | {
  'gate': 'mlp.gate_proj.weight',
  'up': 'mlp.up_proj.weight',
  'down': 'mlp.down_proj.weight',
}
QWEN_EXPERTS = ATTENTION | {
  'router': 'mlp.gate.weight',
  'gate': 'mlp.experts.{expert}.gate_proj.weight',
  'up': 'mlp.experts.{expert}.up_proj.weight',
  'down': 'mlp.experts.{expert}.down_proj.weight',
}
MIXTRAL_EXPERTS = ATTENTION | {
  'router': 'block_sparse_moe.gate.weight',
  'gate': 'block_sparse_moe.experts.{expert}.w1.weight',
  'up': 'block_sparse_moe.experts.{expert}.w3.weight',
  'down': 'block_sparse_moe.experts.{expert}.w2.weight',
}

# Fields of `Config` that no key of config.json holds in Llama; families override them.
LLAMA = dict(
  norm_offset=0.0,
  pre_norm=True,
  post_norm=False,
  qk_norm='none',
  attention_bias=False,
  query_scale=0.0,
  attention_softcap=0.0,
  logit_softcap=0.0,
  embedding_scale=1.0,
  num_experts=0,
  experts_per_token=2,
  normalize_experts=True,
  local_rope_theta=10_000.0,
)
# Field of `Config` -> key of config.json; then key -> its value where it is absent.
KEYS = dict(
  vocab_size='vocab_size',
  num_layers='num_hidden_layers',
  width='hidden_size',
  num_heads='num_attention_heads',
  num_kv_heads='num_key_value_heads',
  head_dim='head_dim',
  mlp_width='intermediate_size',
  activation='hidden_act',
  rope_theta='rope_theta',
  norm_eps='rms_norm_eps',
  tie_embeddings='tie_word_embeddings',
  max_length='max_position_embeddings',
)
DEFAULTS = dict(
  hidden_act='silu', rope_theta=10_000.0, tie_word_embeddings=False, sliding_window=None,
  use_sliding_window=True,
)  # fmt: skip
GEMMA_KEYS = dict(
  activation='hidden_activation',
  embedding_scale='hidden_size',
  query_scale='query_pre_attn_scalar',
  attention_softcap='attn_logit_softcapping',
  logit_softcap='final_logit_softcapping',
)
GEMMA_DEFAULTS = dict(
  hidden_activation='gelu_pytorch_tanh', tie_word_embeddings=True, head_dim=256,
  query_pre_attn_scalar=256, sliding_window=4096,
)  # fmt: skip
QWEN_WINDOW = dict(use_sliding_window=False, sliding_window=4096, max_window_layers=28)
MIXTURE_KEYS = dict(num_experts='num_experts', experts_per_token='num_experts_per_tok')

NOTHING = types.MappingProxyType({})


class Family(NamedTuple):
  """How a family differs from Llama.

  Attributes:
    architecture: beginning of the class names in the transformers library, `Llama` for example.
    fixed: field of `Config` -> its value in the whole family.
    keys: field of `Config` -> key of config.json.
    defaults: key of config.json -> its value where the key is absent.
    layer: parameter of a layer -> name of its tensor in the layer.
    local: (config.json, layer) -> whether the layer is local; None if the family has no local layers.
    names_layers: whether config.json may list in `layer_types` which layers are local.
  """

  architecture: str
  fixed: Mapping[str, Any] = NOTHING
  keys: Mapping[str, str] = NOTHING
  defaults: Mapping[str, Any] = NOTHING
  layer: Mapping[str, str] = DENSE
  local: Callable[[dict, int], bool] | None = None
  names_layers: bool = False


FAMILIES = {
  'llama': Family('Llama'),
  'mistral': Family('Mistral', defaults=dict(sliding_window=4096), local=lambda c, i: True),
  'qwen2': Family(
    'Qwen2',
    fixed=dict(attention_bias=True),
    defaults=QWEN_WINDOW,
    local=lambda c, i: i >= c['max_window_layers'],
    names_layers=True,
  ),
  'qwen3': Family(
    'Qwen3',
    fixed=dict(qk_norm='head'),
    defaults=dict(head_dim=128, **QWEN_WINDOW),
    local=lambda c, i: i >= c['max_window_layers'],
    names_layers=True,
  ),
  'gemma2': Family(
    'Gemma2',
    fixed=dict(norm_offset=1.0, post_norm=True),
    keys=GEMMA_KEYS,
    defaults=dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0, **GEMMA_DEFAULTS),
    layer=DENSE | POST_NORMS,
    local=lambda c, i: i % 2 == 0,
    names_layers=True,
  ),
  'gemma3_text': Family(
    'Gemma3',
    fixed=dict(norm_offset=1.0, post_norm=True, qk_norm='head'),
    keys=dict(local_rope_theta='rope_local_base_freq', **GEMMA_KEYS),
    defaults=dict(
      attn_logit_softcapping=None, final_logit_softcapping=None, rope_theta=1e6,
      rope_local_base_freq=10_000.0, sliding_window_pattern=6, **GEMMA_DEFAULTS,
    ),
    layer=DENSE | POST_NORMS,
    local=lambda c, i: (i + 1) % c['sliding_window_pattern'] != 0,
    names_layers=True,
  ),
  'olmo2': Family(
    'Olmo2',
    fixed=dict(pre_norm=False, post_norm=True, qk_norm='all'),
    layer=DENSE | POST_NORMS,
  ),
  'qwen3_moe': Family(
    'Qwen3Moe',
    fixed=dict(qk_norm='head'),
    keys=dict(
      mlp_width='moe_intermediate_size', normalize_experts='norm_topk_prob', **MIXTURE_KEYS
    ),
    defaults=dict(norm_topk_prob=False, **QWEN_WINDOW),
    layer=QWEN_EXPERTS,
    local=lambda c, i: True,
  ),
  'mixtral': Family(
    'Mixtral',
    keys=MIXTURE_KEYS | dict(num_experts='num_local_experts'),
    defaults=dict(rope_theta=1e6),
    layer=MIXTRAL_EXPERTS,
    local=lambda c, i: True,
  ),
}  # fmt: skip

ACTIVATIONS = {'silu': 'silu', 'gelu_pytorch_tanh': 'gelu'}
# Field -> (value of config.json -> value of the field, and the inverse).
CONVERT = {
  'rope_theta': (float, float),
  'local_rope_theta': (float, float),
  'activation': (
    lambda x: ACTIVATIONS.get(x, x),
    lambda x: {ours: theirs for theirs, ours in ACTIVATIONS.items()}[x],
  ),
  'query_scale': (lambda x: x**-0.5, lambda x: round(x**-2)),
  'embedding_scale': (lambda x: x**0.5, lambda x: round(x**2)),
  'attention_softcap': (lambda x: float(x or 0), lambda x: x or None),
  'logit_softcap': (lambda x: float(x or 0), lambda x: x or None),
}
SAME = (lambda x: x, lambda x: x)
SCALES = ('query_scale', 'embedding_scale')  # fields that are powers of the numbers in config.json

ROPE = {  # rope_type -> field -> key
  'default': {},
  'linear': dict(rope_factor='factor'),
  'llama3': dict(
    rope_factor='factor', rope_low='low_freq_factor', rope_high='high_freq_factor',
    rope_original_length='original_max_position_embeddings',
  ),
}  # fmt: skip
ROPE_PLACES = ('full_attention', 'sliding_attention')
PLAIN_ROPE = dict(rope_factor=1.0, rope_low=1.0, rope_high=4.0, rope_original_length=0)

# Keys of features that are not supported, with the only value that is accepted; absent and null are too.
INERT = dict(
  attention_bias=False, mlp_bias=False, partial_rotary_factor=1.0, quantization_config=None,
  use_bidirectional_attention=False, mlp_only_layers=[], decoder_sparse_step=1,
)  # fmt: skip
LAYER_TYPES = {'full_attention': False, 'sliding_attention': True}
# Types of the keys that are not read into one field of `Config`, of `jsons.KINDS`.
OTHERS = {
  'model_type': 'text', 'architectures': 'a list of texts', 'layer_types': 'a list of texts',
  'rope_parameters': 'an object', 'rope_scaling': 'an object', 'sliding_window': 'a whole number',
  'use_sliding_window': 'true or false', 'max_window_layers': 'a whole number',
  'sliding_window_pattern': 'a whole number', 'num_experts': 'a whole number',
  'num_local_experts': 'a whole number', 'num_experts_per_tok': 'a whole number',
}  # fmt: skip
KIND_OF = {int: 'a whole number', float: 'a number', bool: 'true or false', str: 'text'}


def read_settings(config: dict) -> dict:
  """The fields of `Config` that config.json determines.

  Raises:
    ValueError: a family that is not supported, a missing key, or a value of a feature that the decoder
      does not have; the message names the key and what is supported.
  """
  kind = config.get('model_type')
  if 'vision_config' in config:
    raise ValueError(f'{kind!r} is a model of images too; only text models are supported')
  jsons.check('config.json', config, OTHERS)
  if kind not in FAMILIES:
    raise ValueError(f'model_type {kind!r} is not supported; supported: {sorted(FAMILIES)}')
  family = FAMILIES[kind]
  rope = config.get('rope_parameters') or config.get('rope_scaling') or {}
  # Newer files have separate rotary settings for full and for local layers.
  jsons.check('rotary settings of config.json', rope, dict.fromkeys(ROPE_PLACES, 'an object'))
  far, near = (rope.get(place) for place in ROPE_PLACES)
  far, near = rope if far is None else far, near or {}
  given = _with_defaults(config, family, far, near)
  # Refuse features that the decoder does not have, instead of computing another model.
  for key, value in INERT.items():
    _require(key, given.get(key, value), (value, None))
  _require('partial_rotary_factor', far.get('partial_rotary_factor'), (1.0, None))
  _require('rope type of local layers', near.get('rope_type', 'default'), ('default',))
  # Read the fields that the family has keys for.
  keys = KEYS | family.keys
  missing = sorted({key for key in keys.values() if given.get(key) is None} - _nullable(family))
  if missing:
    raise ValueError(f'config.json lacks {missing}')
  _check_values(keys, given)
  fields = {field: CONVERT.get(field, SAME)[0](given[key]) for field, key in keys.items()}
  _require(keys['activation'], given[keys['activation']], tuple(ACTIVATIONS))
  if is_classifier(config):
    fields['tie_embeddings'] = True  # a reward model has a score instead of the unembedding
  # Derive the fields that depend on several keys: rotary positions and local layers.
  fields |= _read_rope(far)
  local = _local_layers(given, family)
  fields |= dict(window=given['sliding_window'] if local else 0, local_layers=local)
  if local and 'local_rope_theta' not in keys:  # local layers then rotate like the others
    fields['local_rope_theta'] = fields['rope_theta']
    _require('rope factor with a sliding window', fields['rope_factor'], (1.0,))
  return LLAMA | family.fixed | fields


def write_settings(config: Config, reward_model: bool = False) -> dict:
  """The config.json of a model, as the transformers library would write it.

  Args:
    config: the model. The first family that can express it is used.
    reward_model: describe a classifier with one label instead of a language model.

  Raises:
    ValueError: no family can express the model; the message lists the differences to the nearest one.
  """
  # Files hold the scale itself, so 0, which means the default, is resolved first.
  config = dataclasses.replace(config, query_scale=config.query_scale or config.head_dim**-0.5)
  # A family fits if its config.json, read back, gives the same fields.
  differences = {}
  for kind in FAMILIES:
    written = _body(config, kind) | _head(config, kind, reward_model)
    differences[kind] = _differences(config, written, reward_model)
    if not differences[kind]:
      return written
  nearest = min(differences, key=lambda kind: len(differences[kind]))
  raise ValueError(
    f'no family of Hugging Face stores this model; nearest is {nearest!r}, but for '
    + ', '.join(differences[nearest])
  )


def keep_settings(stated: dict, config: Config, reward_model: bool = False) -> dict:
  """The config.json that a model was read from, updated to the model's present class and dtype.

  Args:
    stated: the config.json that the model was read from.
    config: the model now; apart from class and dtype it must be the same.
    reward_model: describe a classifier with one label instead of a language model.

  Raises:
    ValueError: `stated` describes another model; the message lists the differences.
  """
  kept = {key: value for key, value in stated.items() if key not in ('dtype', 'torch_dtype')}
  kept |= _head(config, stated.get('model_type'), reward_model)
  differences = _differences(config, kept, reward_model)
  if differences:
    raise ValueError(f'the source holds another model: {", ".join(differences)}')
  return kept


def stored_name(kind: str, name: str) -> str:
  """Name of a parameter's tensors, with placeholders {layer} and {expert} where each has a tensor."""
  return TOP[name] if name in TOP else 'model.layers.{layer}.' + FAMILIES[kind].layer[name]


def is_classifier(config: dict) -> bool:
  """Whether config.json is that of a reward model, which has a score instead of an unembedding."""
  return any(
    name.endswith('ForSequenceClassification') for name in config.get('architectures') or ()
  )


def _require(key: str, found: Any, supported: tuple) -> None:
  if found not in supported:
    *others, last = supported if supported[-1] is not None else supported[:-1]
    valid = ', '.join(map(repr, others)) + (' or ' if others else '') + repr(last)
    raise ValueError(f'{key} {found!r} is not supported, only {valid}')


def _nullable(family: Family) -> set[str]:
  """Keys of config.json that may be null."""
  softcaps = ('attention_softcap', 'logit_softcap')
  return {family.keys[field] for field in softcaps if field in family.keys}


def _check_values(keys: Mapping[str, str], given: Mapping[str, Any]) -> None:
  """Refuses values of another type than their field in `Config`, or out of its range.

  Args:
    keys: field of `Config` -> key of config.json.
    given: config.json with absent keys filled in.

  Raises:
    ValueError: names the key.
  """
  hints = typing.get_type_hints(Config, include_extras=True)
  for field, key in keys.items():
    hint, value = hints[field], given.get(key)
    jsons.check('config.json', {key: value}, {key: KIND_OF[plain(hint)]})
    if value is not None:
      range_of_key = Positive if field in SCALES else hint
      check_range(value, range_of_key, f'config.json: {key}')


def _with_defaults(config: dict, family: Family, far: dict, near: dict) -> dict:
  """config.json with absent keys filled in, and the keys of newer files moved to their older places.

  Args:
    far: rotary settings of full layers.
    near: rotary settings of local layers, where they differ.
  """
  theta = dict(rope_theta=far.get('rope_theta'), rope_local_base_freq=near.get('rope_theta'))
  given = DEFAULTS | family.defaults | config | {k: v for k, v in theta.items() if v is not None}
  if given.get('num_key_value_heads') is None:
    given['num_key_value_heads'] = given.get('num_attention_heads')
  width, heads = given.get('hidden_size'), given.get('num_attention_heads')
  if given.get('head_dim') is None and isinstance(width, int) and isinstance(heads, int) and heads:
    given['head_dim'] = width // heads
  for ours, theirs in (('num_experts', 'num_local_experts'), ('num_local_experts', 'num_experts')):
    given.setdefault(ours, given.get(theirs))  # files of one model may use either name
  return given


def _read_rope(rope: dict) -> dict:
  """The fields of `Config` that say how rotary positions are extended to longer contexts."""
  kind = rope.get('rope_type', rope.get('type', 'default'))
  _require('rope type', kind, tuple(ROPE))
  missing = sorted(key for key in ROPE[kind].values() if rope.get(key) is None)
  if missing:
    raise ValueError(f'the {kind!r} rotary positions of config.json lack {missing}')
  _check_values(ROPE[kind], rope)
  return PLAIN_ROPE | {field: rope[key] for field, key in ROPE[kind].items()}


def _local_layers(given: dict, family: Family) -> tuple[int, ...]:
  """Indices of the local layers: those that `layer_types` lists, else by the rule of the family."""
  if family.local is None or not (given['use_sliding_window'] and given['sliding_window']):
    return ()
  check_range(given.get('sliding_window'), Length, 'config.json: sliding_window')
  pattern = given.get('sliding_window_pattern')
  check_range(pattern, AtLeastOne, 'config.json: sliding_window_pattern')
  layers = range(given['num_hidden_layers'])
  kinds = given.get('layer_types') if family.names_layers else None
  if not kinds:
    return tuple(i for i in layers if family.local(given, i))
  unknown = sorted(set(kinds) - LAYER_TYPES.keys())
  if unknown or len(kinds) != len(layers):
    valid = f'one of {sorted(LAYER_TYPES)} for each of {len(layers)} layers'
    raise ValueError(f'layer_types {kinds} is not supported, only {valid}')
  return tuple(i for i in layers if LAYER_TYPES[kinds[i]])


def _head(config: Config, kind: str, reward_model: bool) -> dict:
  """The keys of config.json that depend on what the model is used for: class, dtype and labels."""
  if kind not in FAMILIES:
    raise ValueError(f'model_type {kind!r} is not supported; supported: {sorted(FAMILIES)}')
  text = 'Text' if reward_model and kind == 'gemma3_text' else ''
  task = 'ForSequenceClassification' if reward_model else 'ForCausalLM'
  labels = dict(id2label={'0': 'LABEL_0'}, label2id={'LABEL_0': 0}) if reward_model else {}
  return dict(
    architectures=[f'{FAMILIES[kind].architecture}{text}{task}'],
    model_type=kind,
    torch_dtype=config.param_dtype,
    **labels,
  )


def _body(config: Config, kind: str) -> dict:
  """The keys of config.json that describe `config`, as far as the family can express it."""
  family, written = FAMILIES[kind], {}
  # Fields that have a key; two fields may share one key, whose first value is kept.
  for field, key in (KEYS | family.keys).items():
    written.setdefault(key, CONVERT.get(field, SAME)[1](getattr(config, field)))
  rope = (
    'default' if config.rope_factor == 1 else 'llama3' if config.rope_original_length else 'linear'
  )
  # Rotary positions of longer contexts.
  if rope != 'default':
    values = {key: getattr(config, field) for field, key in ROPE[rope].items()}
    written['rope_scaling'] = dict(rope_type=rope, **values)
  # Local layers, in every form that the family reads.
  if family.local:
    written['sliding_window'] = config.window or None
  if 'use_sliding_window' in family.defaults:
    written['use_sliding_window'] = bool(config.window)
    written['max_window_layers'] = config.num_layers - len(config.local_layers)
  if family.names_layers:
    kinds = {local: kind for kind, local in LAYER_TYPES.items()}
    written['layer_types'] = [kinds[i in config.local_layers] for i in range(config.num_layers)]
  return written


def _differences(config: Config, written: dict, reward_model: bool) -> list[str]:
  """The fields in which the model of config.json differs from `config`, or why it cannot be read."""
  try:
    found = read_settings(written)
  except ValueError as error:
    return [str(error)]
  found, wanted = (_effective(x, reward_model) for x in (found, dataclasses.asdict(config)))
  return [
    f'{field} {wanted.get(field)!r} instead of {value!r}'
    for field, value in found.items()
    if value != wanted.get(field)
  ]


def _effective(fields: dict, reward_model: bool) -> dict:
  """The fields that change what the model computes, with the default of `query_scale` resolved."""
  # Field -> whether it has no effect here.
  idle = {
    'max_length': True,  # rows may be kept shorter than the model allows
    'local_rope_theta': not fields['window'],
    'tie_embeddings': reward_model,
    'rope_original_length': fields['rope_factor'] == 1,
    **dict.fromkeys(('rope_low', 'rope_high'), not fields['rope_original_length']),
    **dict.fromkeys(('experts_per_token', 'normalize_experts'), not fields['num_experts']),
  }
  kept = {field: value for field, value in fields.items() if not idle.get(field)}
  return kept | dict(query_scale=fields['query_scale'] or fields['head_dim'] ** -0.5)
