"""Reads and writes Hugging Face folders: config.json and safetensors, of the families in `families.py`.

Hugging Face stores a matrix as [outputs, inputs] with heads and head size merged, one tensor a layer
and expert; here it is [inputs, outputs] with heads apart, and layers are stacked. Both keep the
halves of a rotary pair half a head apart. A `Slot` says where a parameter lies, and is all the
difference there is."""

import functools
import json
import math
import pathlib
import shutil
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from flax import traverse_util

from polgrad.models import families
from polgrad.models.config import MLP, Config, num_inputs
from polgrad.models.policy import Policy
from polgrad.models.tensors import (
  Tensor,
  check_free,
  check_shapes,
  new_folder,
  open_folder,
  write_folder,
)
from polgrad.models.transformer import from_config
from polgrad.sharding import to_host, together
from polgrad.types import Params

Path = tuple[str, ...]
# What a folder has besides the model itself.
COMPANIONS = (
  'generation_config.json', 'tokenizer.json', 'tokenizer_config.json', 'tokenizer.model',
  'special_tokens_map.json', 'added_tokens.json', 'vocab.json', 'merges.txt', 'chat_template.jinja',
  'chat_template.json',
)  # fmt: skip


class Slot(NamedTuple):
  """Where a parameter lies in a folder.

  Attributes:
    pattern: name of its tensors, with {layer} and {expert} where there is one for each.
    lead: sizes of these leading axes.
    shape: of the rest, which is one tensor.
    merged: for every stored axis, the axes of `shape` that it is made of.
  """

  pattern: str
  lead: tuple[int, ...]
  shape: tuple[int, ...]
  merged: tuple[tuple[int, ...], ...]

  def name(self, place: tuple[int, ...]) -> str:
    return self.pattern.format(**dict(zip(('layer', 'expert'), place)))

  @property
  def stored_shape(self) -> tuple[int, ...]:
    return tuple(math.prod(self.shape[axis] for axis in axes) for axes in self.merged)

  @property
  def order(self) -> list[int]:
    return [axis for axes in self.merged for axis in axes]


def pretrained(
  *,
  path: str,
  max_length: int = 0,
  dtype: str = 'float32',
  param_dtype: str = 'float32',
  remat: str = 'none',
  attention: str = 'einsum',
  value_head: bool = False,
  balance_rate: float = 0.0,
) -> Policy:
  """A decoder whose `init` reads its parameters from a Hugging Face folder.

  One parameter is read at a time, and of it only what the devices of this process hold.

  Args:
    path: folder with config.json and model.safetensors (or its index and shards).
    max_length: longest row; 0 takes the model's own limit.
    dtype, param_dtype, remat, attention: as in `decoder`.
    value_head: adds a scalar head: that of a reward model (`score.weight`) if the folder has one,
      else zero.
    balance_rate: as in `decoder`; the biases are not in the folder, they begin at zero.

  Raises:
    FileNotFoundError: no such folder, or a file of it is missing.
    ValueError: an architecture or setting that is not supported; from `init`, files that are not
      whole, and tensors that are missing, unknown or of another shape.
  """
  folder = pathlib.Path(path).expanduser()
  stated = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
  settings = families.read_settings(stated)
  limit = settings.pop('max_length')
  if families.is_classifier(stated) and not value_head:
    raise ValueError(f'{folder} holds a reward model; it needs value_head=True')
  config = Config(
    **settings,
    max_length=max_length or limit,
    dtype=dtype,
    param_dtype=param_dtype,
    remat=remat,
    attention=attention,
    value_head=value_head,
    balance_rate=balance_rate,
  )
  policy = from_config(config)

  def init(key, shardings=None):
    del key
    stored = slots(config, stated['model_type'])
    tensors = open_folder(folder)
    if 'score.weight' not in tensors:
      stored.pop(('value_head',), None)
    check(folder, tensors, stored)
    flat = traverse_util.flatten_dict(shardings or {})
    params = {
      path: _place(x, flat.get(path), tensors, stored.get(path))
      for path, x in traverse_util.flatten_dict(policy.shapes()).items()
    }
    return traverse_util.unflatten_dict(params)

  return policy._replace(init=init)


def slots(config: Config, kind: str) -> dict[Path, Slot]:
  """Where the parameters of a model lie in a folder of its family; a router's bias is in none."""
  found = {}
  for name in (*config.top, *config.layer):
    if name == 'router_bias':
      continue
    shape, lead, path = config.shape(name), (), (name,)
    if name in config.layer:
      lead, path = (config.num_layers,), ('layers', name)
    if name in MLP and config.num_experts:
      lead, shape = (*lead, shape[0]), shape[1:]
    axes, inputs = tuple(range(len(shape))), num_inputs(name)
    if name.endswith(('norm', 'bias')):
      merged = (axes,)
    elif name.endswith('embedding'):
      merged = tuple((axis,) for axis in axes)
    else:
      merged = (axes[inputs:], axes[:inputs])
    found[path] = Slot(families.stored_name(kind, name), lead, shape, merged)
  return found


def check(folder: pathlib.Path, tensors: Mapping[str, Tensor], stored: Mapping[Path, Slot]) -> None:
  """Compares names and shapes before anything is read.

  Raises:
    ValueError: see `tensors.check_shapes`.
  """
  wanted = {
    slot.name(place): slot.stored_shape
    for slot in stored.values()
    for place in np.ndindex(slot.lead)
  }
  # Files of tied models may repeat the embedding, and old ones hold what follows from config.json.
  spare = lambda name: name == 'lm_head.weight' or name.endswith('rotary_emb.inv_freq')
  used = {name: x for name, x in tensors.items() if name in wanted or not spare(name)}
  check_shapes(folder, used, wanted)


def read(
  tensors: Mapping[str, Tensor], slot: Slot, index: tuple[slice, ...], dtype: np.dtype
) -> np.ndarray:
  """A part of a parameter: one slice for each of its axes, start and stop given."""
  size = len(slot.lead)
  out = np.empty([s.stop - s.start for s in index], dtype)
  for place in np.ndindex(out.shape[:size]):
    name = slot.name(tuple(s.start + i for s, i in zip(index, place)))
    out[place] = from_stored(slot, tensors[name], index[size:])
  return out


def from_stored(slot: Slot, tensor: Tensor, index: tuple[slice, ...]) -> np.ndarray:
  """A part of one tensor, in our layout. A merged axis is read from its first to its last row."""
  cut, sizes, rest = [], [], list(index)
  for axes in slot.merged:
    inner = [slot.shape[axis] for axis in axes[1:]]
    row = math.prod(inner)
    first = index[axes[0]] if axes else slice(0, 1)
    cut.append(slice(first.start * row, first.stop * row))
    if axes:
      sizes += [first.stop - first.start, *inner]
      rest[axes[0]] = slice(None)
  x = tensor.read(tuple(cut)).reshape(sizes)
  return x.transpose(np.argsort(slot.order))[tuple(rest)]


def to_stored(slot: Slot, x: np.ndarray) -> np.ndarray:
  """What `from_stored` undoes."""
  return x.transpose(slot.order).reshape(slot.stored_shape)


def save(
  folder: str | pathlib.Path,
  config: Config,
  params: Params,
  *,
  source: str | pathlib.Path = '',
  reward_model: bool = False,
  max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes a folder that transformers reads, whole or not at all; one tensor is fetched at a time.

  Every process must call it; the first writes. The value head is left out unless `reward_model`.

  Args:
    folder: must be empty or not there.
    config: of the policy, without an adapter.
    params: its parameters, on any devices; they are written in their own dtype.
    source: the folder that the model came from, whose config.json, tokenizer and generation settings
      are taken over.
    reward_model: writes a classifier with one label, the value head, in place of a language model.
    max_shard_bytes: size of a file, if no tensor is larger.

  Raises:
    FileExistsError: there is something in the folder.
    ValueError: an adapter, a balancing bias that is not zero, a reward model without a value head,
      a model that fits no family, or not the `source`.
  """
  check_free(folder)
  source = pathlib.Path(source).expanduser() if source else None
  if config.lora_rank:
    raise ValueError(f'the adapter of rank {config.lora_rank} must be merged before saving')
  if reward_model and not config.value_head:
    raise ValueError('a reward model needs value_head=True')
  flat = traverse_util.flatten_dict(params)
  bias = flat.pop(('layers', 'router_bias'), None)
  if bias is not None and np.any(to_host(bias)):
    raise ValueError(
      'layers/router_bias is not zero: no family has a place for it, and without it tokens would go '
      'to other experts'
    )
  if source:
    stated = json.loads((source / 'config.json').read_text(encoding='utf-8'))
    settings = families.keep_settings(stated, config, reward_model)
  else:
    settings = families.write_settings(config, reward_model)
  stored = slots(config, settings['model_type'])
  if stored.keys() != flat.keys():
    raise ValueError(
      f'params have {sorted(flat.keys() - stored.keys())} too many and lack '
      f'{sorted(stored.keys() - flat.keys())}'
    )
  stored.pop(('unembedding' if reward_model else 'value_head',), None)
  tensors = {
    slot.name(place): _tensor(slot, flat[path], place)
    for path, slot in stored.items()
    for place in np.ndindex(slot.lead)
  }
  together('checked')  # before the folder comes to be
  if jax.process_index():
    for tensor in tensors.values():
      tensor.all()  # takes part in the gathering
  else:
    _write(folder, tensors, settings, source, max_shard_bytes)
  together('written')  # now every process finds the folder


def _write(folder, tensors, settings, source, max_shard_bytes) -> None:
  with new_folder(folder) as made:
    write_folder(made, tensors, max_shard_bytes)
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (made / 'config.json').write_text(text, encoding='utf-8')
    for name in COMPANIONS:
      if source and (source / name).exists():
        shutil.copy(source / name, made / name)


def _place(shape: jax.ShapeDtypeStruct, sharding, tensors: Mapping[str, Tensor], slot: Slot | None):
  """One parameter where its sharding says, or on the default device; zero if it has no slot."""

  @functools.cache  # several devices may hold the same part
  def part(bounds):
    index = tuple(slice(*b) for b in bounds)
    if slot is None:
      return np.zeros([s.stop - s.start for s in index], shape.dtype)
    return read(tensors, slot, index, shape.dtype)

  def callback(index):
    return part(tuple(s.indices(n)[:2] for s, n in zip(index, shape.shape)))

  if sharding is None:
    return jax.device_put(callback((slice(None),) * len(shape.shape)))
  return jax.make_array_from_callback(shape.shape, sharding, callback)


def _tensor(slot: Slot, param: jax.Array, place: tuple[int, ...]) -> Tensor:
  """A tensor to be written, fetched when it is read."""

  def fetch(index):
    return to_stored(slot, to_host(param[place]))[index]

  return Tensor(slot.stored_shape, np.dtype(param.dtype), fetch)
