"""Reads Hugging Face folders (config.json, safetensors) of dense Llama, Qwen2 and Qwen3 models.

Hugging Face stores a matrix as [outputs, inputs] with heads and head size merged; here it is
[inputs, outputs] with heads apart. That and the names in `TENSORS` and `LAYER` are all the
difference: both keep the halves of a rotary pair half a head apart."""

import json
import math
import pathlib
from collections.abc import Iterator

import numpy as np
from safetensors import safe_open

from polgrad.models.policy import Policy
from polgrad.models.transformer import Config, from_config
from polgrad.types import Params

FAMILIES = {
  'llama': dict(qk_norm=False, attention_bias=False),
  'qwen2': dict(qk_norm=False, attention_bias=True),
  'qwen3': dict(qk_norm=True, attention_bias=False),
}
TENSORS = {
  'embedding': 'model.embed_tokens.weight',
  'final_norm': 'model.norm.weight',
  'unembedding': 'lm_head.weight',
}
LAYER = {
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
  'gate': 'mlp.gate_proj.weight',
  'up': 'mlp.up_proj.weight',
  'down': 'mlp.down_proj.weight',
}


def pretrained(
  *,
  path: str,
  max_length: int = 0,
  dtype: str = 'float32',
  param_dtype: str = 'float32',
  remat: str = 'none',
  value_head: bool = False,
) -> Policy:
  """A decoder whose `init` reads its parameters from a Hugging Face folder, into host memory.

  Args:
    path: folder with config.json and model.safetensors (or its index and shards).
    max_length: longest row; 0 takes the model's own limit.
    dtype, param_dtype, remat, value_head: as in `decoder`; a value head is not read, it is zero.

  Raises:
    FileNotFoundError: no such folder, or a file of it is missing.
    ValueError: an architecture or setting that is not supported; from `init`, tensors that are
      missing, unknown or of another shape.
  """
  folder = pathlib.Path(path).expanduser()
  settings = read_settings(json.loads((folder / 'config.json').read_text()))
  limit = settings.pop('max_length')
  config = Config(
    **settings,
    max_length=max_length or limit,
    dtype=dtype,
    param_dtype=param_dtype,
    remat=remat,
    value_head=value_head,
  )

  def init(key):
    del key
    return read_params(folder, config)

  return from_config(config)._replace(init=init)


def read_settings(config: dict) -> dict:
  """The fields of `Config` that config.json fixes."""
  family = config.get('model_type')
  if family not in FAMILIES:
    raise ValueError(f'model_type {family!r} is not supported; supported: {sorted(FAMILIES)}')
  # Newer files keep everything about rotary positions in one place.
  rope = config.get('rope_parameters') or config.get('rope_scaling') or {}
  wanted = {
    'hidden_act': (config.get('hidden_act', 'silu'), 'silu'),
    'rope type': (rope.get('rope_type', rope.get('type', 'default')), 'default'),
    'attention_bias': (config.get('attention_bias', False), False),
    'mlp_bias': (config.get('mlp_bias', False), False),
    'use_sliding_window': (config.get('use_sliding_window', False), False),
  }
  for name, (found, supported) in wanted.items():
    if found != supported:
      raise ValueError(f'{name} {found!r} is not supported, only {supported!r}')
  heads = config['num_attention_heads']
  return dict(
    vocab_size=config['vocab_size'],
    num_layers=config['num_hidden_layers'],
    width=config['hidden_size'],
    num_heads=heads,
    num_kv_heads=config.get('num_key_value_heads', heads),
    head_dim=config.get('head_dim') or config['hidden_size'] // heads,
    mlp_width=config['intermediate_size'],
    rope_theta=float(rope.get('rope_theta', config.get('rope_theta', 10_000.0))),
    norm_eps=config['rms_norm_eps'],
    tie_embeddings=config.get('tie_word_embeddings', False),
    max_length=config['max_position_embeddings'],
    **FAMILIES[family],
  )


def read_params(folder: pathlib.Path, config: Config) -> Params:
  """The parameters of a folder as NumPy arrays; layers are stacked."""
  found = dict(read_tensors(folder))
  problems = []

  def take(name: str, stored: str) -> np.ndarray:
    shape = stored_shape(config, name)
    tensor = found.pop(stored, None)
    if tensor is None:
      problems.append(f'{stored} is missing')
    elif tensor.shape != shape:
      problems.append(f'{stored} has shape {tensor.shape} instead of {shape}')
    else:
      matrix = tensor.ndim == 2 and name not in TENSORS
      tensor = tensor.T if matrix else tensor
      return tensor.reshape(config.shape(name)).astype(config.param_dtype)
    return np.zeros(config.shape(name), config.param_dtype)

  optional = {
    'unembedding': not config.tie_embeddings,
    **dict.fromkeys(('query_bias', 'key_bias', 'value_bias'), config.attention_bias),
    **dict.fromkeys(('query_norm', 'key_norm'), config.qk_norm),
  }
  params = {name: take(name, TENSORS[name]) for name in TENSORS if optional.get(name, True)}
  params['layers'] = {
    name: np.stack([take(name, f'model.layers.{i}.{stored}') for i in range(config.num_layers)])
    for name, stored in LAYER.items()
    if optional.get(name, True)
  }
  if config.value_head:
    params['value_head'] = np.zeros(config.shape('value_head'), config.param_dtype)
  harmless = {'lm_head.weight'} if config.tie_embeddings else set()
  problems += [
    f'{name} is unknown'
    for name in sorted(found.keys() - harmless)
    if not name.endswith('rotary_emb.inv_freq')
  ]
  if problems:
    more = f' (and {len(problems) - 8} more)' if len(problems) > 8 else ''
    raise ValueError(f'{folder}: {"; ".join(problems[:8])}{more}')
  return params


def stored_shape(config: Config, name: str) -> tuple[int, ...]:
  """The shape in which Hugging Face stores a parameter."""
  shape = config.shape(name)
  if name in TENSORS:
    return shape
  if name.endswith(('norm', 'bias')):
    return (math.prod(shape),)
  inputs = 2 if name == 'out' else 1
  return math.prod(shape[inputs:]), math.prod(shape[:inputs])


def read_tensors(folder: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
  """All tensors of a folder by name, from one file or from the shards that its index lists."""
  index = folder / 'model.safetensors.index.json'
  names = {'model.safetensors'}
  if index.exists():
    names = set(json.loads(index.read_text())['weight_map'].values())
  for name in sorted(names):
    if not (folder / name).exists():
      raise FileNotFoundError(f'{folder / name} is missing')
    with safe_open(folder / name, framework='numpy') as file:
      for key in file.keys():  # noqa: SIM118, not a dict
        yield key, file.get_tensor(key)
