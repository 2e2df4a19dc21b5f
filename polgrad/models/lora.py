"""Low-rank adapters (arXiv:2106.09685): a frozen base, with trained factors added to its matrices.

W x becomes W x + s B A x with factors A and B, and s = alpha / rank, or alpha / sqrt(rank) if
rank-stabilised (arXiv:2312.03732). Adapters are read and written in the layout of the PEFT library,
which stores a factor as [outputs, inputs] with the axes of heads and head size merged."""

import dataclasses
import json
import math
import pathlib
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from polgrad import jsons, paths
from polgrad.barriers import together
from polgrad.models.config import ATTENTION, MLP, Config
from polgrad.models.hf import pretrained
from polgrad.models.policy import Policy, overlay
from polgrad.models.tensors import (
  Tensor,
  check_free,
  check_shapes,
  new_folder,
  open_file,
  write_file,
)
from polgrad.models.transformer import decoder, from_config
from polgrad.registry import table
from polgrad.sharding import place, to_host

Params = Any

BASE = table('models', decoder, pretrained)
MODULES = {
  'query': 'self_attn.q_proj',
  'key': 'self_attn.k_proj',
  'value': 'self_attn.v_proj',
  'out': 'self_attn.o_proj',
  'gate': 'mlp.gate_proj',
  'up': 'mlp.up_proj',
  'down': 'mlp.down_proj',
}
TENSOR = 'base_model.model.model.layers.{}.{}.lora_{}.weight'  # layer, module, A or B
# Fields of adapter_config.json that do not change what the adapted model computes.
HARMLESS = {
  'auto_mapping', 'base_model_name_or_path', 'ensure_weight_tying', 'eva_config', 'inference_mode',
  'lora_dropout', 'megatron_core', 'peft_version', 'qalora_group_size', 'revision', 'task_type',
}  # fmt: skip
# Fields and the values that are accepted. Other ways to initialise the factors also change the base.
CHOICES = {
  'peft_type': ('LORA',),
  'bias': ('none',),
  'init_lora_weights': (True, False, 'gaussian', 'eva', 'orthogonal'),
}
ADAPTER_KINDS = {'r': 'a whole number', 'lora_alpha': 'a number', 'use_rslora': 'true or false'}


def lora(
  *,
  base: Annotated[Policy, BASE],
  rank: int = 8,
  alpha: float = 16.0,
  targets: tuple = ATTENTION + MLP,
  rank_stabilized: bool = False,
  adapter: str = '',
) -> Policy:
  """Adds a low-rank adapter to a model. Only the adapter is trained, and a value head if there is one.

  A is uniform within +-1 / sqrt(fan-in), as in PEFT, and B is zero, so the model begins equal to its
  base.

  Args:
    base: the model to adapt; its parameters are frozen.
    rank: inner size of the factors.
    alpha: the adapter is multiplied by alpha / rank.
    targets: the matrices that get factors, out of query, key, value, out, gate, up, down; in a mixture
      of experts only the first four.
    rank_stabilized: multiply by alpha / sqrt(rank) instead.
    adapter: a folder in PEFT's layout to read the factors from; it also determines rank, alpha and
      targets, so those given here are ignored. '' starts with new factors.

  Raises:
    FileNotFoundError: the folder or one of its files is missing.
    ValueError: a rank below 1, targets that the base does not have, or anything that `read_settings`
      refuses; from `init`, anything that `read_adapter` refuses.
  """
  if base.config.lora_rank:
    raise ValueError('base has an adapter already; merge it first')
  if adapter:
    fields = read_settings(adapter)
  else:
    fields = _fields(rank, alpha, targets, rank_stabilized)
  config = dataclasses.replace(base.config, **fields)
  policy = from_config(config)

  def init(key, shardings=None):
    # The base makes or reads its own parameters; the adapter is added to the tree.
    of_base, of_adapter = (None, None) if shardings is None else _split(shardings)
    frozen = base.init(key, of_base)
    if not adapter:
      # Compiled, so that the random base, which `policy.init` makes as well, is dropped by the compiler.
      random = jax.jit(lambda key: _split(policy.init(key))[1], out_shardings=of_adapter)
      return overlay(frozen, random(key))
    found = read_adapter(adapter, config)
    placed = jax.tree.map(jnp.asarray, found) if shardings is None else place(found, of_adapter)
    return overlay(frozen, placed)

  return policy._replace(init=init)


def merge(config: Config, params: Params) -> tuple[Config, Params]:
  """An equal model without an adapter: W + s A B, computed in float32 and rounded to the dtype of W."""
  frozen, adapter = _split(params)
  factors = adapter.get('layers', {})
  layers = dict(frozen['layers'])
  for name in config.lora_targets:
    a, b = (factors[f'{name}_lora_{half}'].astype(jnp.float32) for half in 'ab')
    product = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1, precision='highest'))(a, b)
    w = layers[name]
    layers[name] = (w.astype(jnp.float32) + config.lora_scale * product).astype(w.dtype)
  plain = dataclasses.replace(config, lora_rank=0, lora_scale=1.0, lora_targets=())
  return plain, {**frozen, 'layers': layers}


def read_settings(folder: str | pathlib.Path) -> dict:
  """The fields of `Config` that adapter_config.json determines.

  Raises:
    FileNotFoundError: the file is missing.
    ValueError: a field of a feature that is not supported (DoRA, biases, ranks by layer, ...), or
      modules that are not in `MODULES`.
  """
  path = paths.path(folder) / 'adapter_config.json'
  found = jsons.read_object(path)
  jsons.check(str(path), found, ADAPTER_KINDS)
  # Take out the fields that are understood. Of the others, those that are set must be harmless.
  for field, valid in CHOICES.items():
    value = found.pop(field, valid[0])
    if value not in valid:
      raise ValueError(f'{path}: {field} {value!r} is not supported; supported: {valid}')
  modules = found.pop('target_modules', None)
  given = found.pop('r', None), found.pop('lora_alpha', None)
  rank, alpha = (8 if x is None else x for x in given)  # 8 is PEFT's own default of both
  stabilized = bool(found.pop('use_rslora', False))
  for field, value in found.items():
    if value and field not in HARMLESS:
      raise ValueError(f'{path}: {field} {value!r} is not supported; it must not be set')
  # Modules may be written with or without their parent, `self_attn.q_proj` or `q_proj`.
  names = {module.rpartition('.')[2]: name for name, module in MODULES.items()}
  if not jsons.KINDS['a list of texts'](modules):
    raise ValueError(f'{path}: target_modules {modules!r} is not supported, only a list of names')
  last = {module.rpartition('.')[2] for module in modules}
  if not last <= names.keys():
    unknown = sorted(last - names.keys())
    raise ValueError(f'{path}: target_modules {unknown} are not supported; valid: {sorted(names)}')
  try:
    return _fields(rank, alpha, [n for n in MODULES if n in {names[m] for m in last}], stabilized)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error


def read_adapter(folder: str | pathlib.Path, config: Config) -> Params:
  """The factors of a folder as NumPy arrays, {'layers': {'query_lora_a': [layers, ...], ...}}.

  Raises:
    FileNotFoundError: the file is missing.
    ValueError: an incomplete file, or tensors that `tensors.check_shapes` refuses.
  """
  path = paths.path(folder) / 'adapter_model.safetensors'
  layers = range(config.num_layers)
  wanted = {name: [_stored(config, name, i) for i in layers] for name in config.adapter}
  shapes = {stored: shape for pairs in wanted.values() for stored, shape in pairs}
  found = open_file(path)
  check_shapes(path, found, shapes)

  def read(name, stored):
    return found[stored].all().T.reshape(config.shape(name)).astype(config.param_dtype)

  stacked = {n: np.stack([read(n, stored) for stored, _ in pairs]) for n, pairs in wanted.items()}
  return {'layers': stacked}


def save_adapter(
  folder: str | pathlib.Path, config: Config, params: Params, *, base_model: str = ''
) -> None:
  """Writes the adapter, without base and value head, in PEFT's layout. The folder appears when complete.

  Every process must call this function; the first process writes.

  Args:
    folder: must be empty or not exist.
    config: of the policy, with an adapter.
    params: all parameters, or only those of the adapter.
    base_model: name or folder of the base, written down for readers; '' for none.

  Raises:
    FileExistsError: the folder is not empty.
    ValueError: there is no adapter.
  """
  if not config.lora_rank:
    raise ValueError('the model has no adapter (lora_rank is 0)')
  tensors = {}
  for name in config.adapter:
    # A is [inputs..., rank] and B [rank, outputs...]. Merge the axes on each side of the rank.
    rows = config.lora_rank if name.endswith('b') else math.prod(config.shape(name)[:-1])
    for i, x in enumerate(to_host(params['layers'][name])):
      stored, shape = _stored(config, name, i)
      tensors[stored] = Tensor(shape, x.dtype, x.reshape(rows, -1).T.__getitem__)
  settings = {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': base_model or None,
    'inference_mode': True,
    'r': config.lora_rank,
    'lora_alpha': config.lora_scale * config.lora_rank,
    'use_rslora': False,  # lora_alpha accounts for it
    'lora_dropout': 0.0,
    'bias': 'none',
    'fan_in_fan_out': False,
    'init_lora_weights': True,
    'target_modules': [MODULES[name].rpartition('.')[2] for name in config.lora_targets],
  }
  check_free(folder)
  together(
    'checked'
  )  # barrier: all processes have checked the folder before the first one makes it
  if jax.process_index() == 0:
    with new_folder(folder) as made:
      write_file(made / 'adapter_model.safetensors', tensors)
      (made / 'adapter_config.json').write_text(json.dumps(settings, indent=2), encoding='utf-8')
  together('written')  # barrier: from here on every process finds the folder


def _fields(rank, alpha, targets, stabilized) -> dict:
  """The fields of `Config` that describe an adapter."""
  if rank < 1 or not targets or len(set(targets)) < len(targets):
    raise ValueError(
      f'an adapter of rank {rank} on {tuple(targets)}: need rank >= 1 and names, once'
    )
  scale = alpha / (math.sqrt(rank) if stabilized else rank)
  return dict(lora_rank=rank, lora_scale=scale, lora_targets=tuple(targets))


def _split(params):
  """Splits a tree with the keys of the parameters into base and adapter."""
  flat = traverse_util.flatten_dict(params)
  adapter = {path for path in flat if '_lora_' in path[-1]}
  base = {path: x for path, x in flat.items() if path not in adapter}
  return tuple(map(traverse_util.unflatten_dict, (base, {path: flat[path] for path in adapter})))


def _stored(config: Config, name: str, layer: int) -> tuple[str, tuple[int, int]]:
  """The name and shape that PEFT's layout has for a factor of a layer."""
  target, _, half = name.partition('_lora_')
  shape, rank = config.shape(name), config.lora_rank
  stored = (rank, math.prod(shape[:-1])) if half == 'a' else (math.prod(shape[1:]), rank)
  return TENSOR.format(layer, MODULES[target], half.upper()), stored
