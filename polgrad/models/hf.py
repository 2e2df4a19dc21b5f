"""Reads and writes Hugging Face folders: config.json and safetensors, for the families in `families.py`.

Hugging Face stores a matrix as [outputs, inputs], with the axes of heads and head size merged, as one
tensor for each layer and expert. Here a matrix is [inputs, outputs], heads have an axis, and layers (and
experts) are stacked. The two halves of a rotary pair are half a head apart in both. A `Slot` describes
the tensors of a parameter; this is the only difference between the two layouts."""

import functools
import json
import math
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from flax import traverse_util

from polgrad import jsons, paths
from polgrad.barriers import together
from polgrad.models import families, heads
from polgrad.models.config import MLP, Config, num_inputs
from polgrad.models.policy import Policy
from polgrad.models.tensors import (
  WHOLE,
  Tensor,
  check_free,
  check_shapes,
  new_folder,
  open_folder,
  write_file,
  write_folder,
)
from polgrad.models.transformer import from_config
from polgrad.sharding import to_host
from polgrad.types import Params

Path = tuple[str, ...]
# Files that a folder has besides the model; `save` copies them.
COMPANIONS = (
  'generation_config.json', 'tokenizer.json', 'tokenizer_config.json', 'tokenizer.model',
  'special_tokens_map.json', 'added_tokens.json', 'vocab.json', 'merges.txt', 'chat_template.jinja',
  'chat_template.json',
)  # fmt: skip


class Slot(NamedTuple):
  """The tensors of a folder in which a parameter is stored.

  Attributes:
    pattern: name of the tensors, with {layer} and {expert} where each layer or expert has a tensor.
    lead: sizes of the leading axes of the parameter over layers and experts.
    shape: the other axes of the parameter; they are one tensor.
    merged: for every axis of the tensor, the axes of `shape` that are merged into it, in order.
  """

  pattern: str
  lead: tuple[int, ...]
  shape: tuple[int, ...]
  merged: tuple[tuple[int, ...], ...]

  def name(self, place: tuple[int, ...]) -> str:
    """Name of the tensor at an index of the leading axes."""
    return self.pattern.format(**dict(zip(('layer', 'expert'), place)))

  @property
  def stored_shape(self) -> tuple[int, ...]:
    return tuple(math.prod(self.shape[axis] for axis in axes) for axes in self.merged)

  @property
  def order(self) -> list[int]:
    """The axes of `shape` in the order in which the tensor has them."""
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

  `init` reads one parameter at a time, and only the slices that the devices of this process hold.

  Args:
    path: folder with config.json and model.safetensors (or its index and shards), also of a bucket.
    max_length: longest row in tokens; 0 takes the limit in config.json.
    dtype, param_dtype, remat, attention: see `Config`.
    value_head: adds a scalar head: that of a reward model (`score.weight`) if the folder has one,
      else zero.
    balance_rate: see `Config`. Folders do not store the router's biases, so they begin at zero.

  Raises:
    FileNotFoundError: the folder or one of its files is missing.
    ValueError: an architecture or setting that is not supported; from `init`, incomplete files, and
      tensors that are missing, unknown or of another shape.
  """
  folder = paths.path(path)
  stated = jsons.read_object(folder / 'config.json')
  asked = dict(
    dtype=dtype,
    param_dtype=param_dtype,
    remat=remat,
    attention=attention,
    value_head=value_head,
    balance_rate=balance_rate,
  )
  try:
    settings = families.read_settings(stated)
    config = Config(**settings | {'max_length': max_length or settings['max_length']}, **asked)
  except ValueError as error:
    raise ValueError(f'{folder}: {error}') from error
  if families.is_classifier(stated) and not value_head:
    raise ValueError(f'{folder} holds a reward model; it needs value_head=True')
  policy = from_config(config)

  def init(key, shardings=None):
    del key  # nothing is random
    stored = slots(config, stated['model_type'])
    return _read_params(folder, stored, policy.shapes(), shardings)

  return policy._replace(init=init)


def unembedding(*, path: str, dtype: str = 'float32') -> Policy:
  """The last matrix of a model in a Hugging Face folder, which makes logits of hidden states.

  Of its functions only `shapes`, `init`, `unembed`, `axes` and `labels` work; `hidden` is None.

  Args:
    path: as in `pretrained`, whose errors it raises.
    dtype: of the computation, 'float32' or 'bfloat16'.
  """
  whole = pretrained(path=path, dtype=dtype)
  name = whole.config.unembedding
  shapes = lambda: {name: whole.shapes()[name]}

  def init(key, shardings=None):
    del key  # nothing is random
    folder = paths.path(path)
    kind = jsons.read_object(folder / 'config.json')['model_type']
    slot = slots(whole.config, kind)[name,]
    sharding = None if shardings is None else shardings[name]
    return {name: _place(shapes()[name], sharding, open_folder(folder), slot)}

  return whole._replace(shapes=shapes, init=init, hidden=None)


def is_reward_model(path: str) -> bool:
  """Whether a Hugging Face folder holds a classifier, such as a reward model."""
  file = pathlib.Path(path).expanduser() / 'config.json'
  return file.is_file() and families.is_classifier(jsons.read_object(file))


def _read_params(
  folder: pathlib.Path, stored: dict[Path, Slot], shapes: Params, shardings: Params | None
) -> Params:
  """The parameters of a folder, placed by their shardings, or on the default device."""
  tensors = open_folder(folder)
  if 'score.weight' not in tensors:  # the value head then begins at zero
    stored.pop(('value_head',), None)
  check(folder, tensors, stored)
  flat = traverse_util.flatten_dict(shardings or {})
  params = {
    path: _place(x, flat.get(path), tensors, stored.get(path))
    for path, x in traverse_util.flatten_dict(shapes).items()
  }
  return traverse_util.unflatten_dict(params)


def slots(config: Config, kind: str) -> dict[Path, Slot]:
  """The slot of every parameter in a folder of the family `kind`; a router's bias has none."""
  found = {}
  for name in (*config.top, *config.layer):
    if name == 'router_bias':
      continue
    # Axes over layers and experts are not in a tensor: each layer and expert has its own.
    shape, lead, path = config.shape(name), (), (name,)
    if name in config.layer:
      lead, path = (config.num_layers,), ('layers', name)
    if name in MLP and config.num_experts:
      lead, shape = (*lead, shape[0]), shape[1:]
    # Vectors are stored flat, embeddings unchanged, and matrices transposed to [outputs, inputs].
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
  """Compares the names and shapes of all tensors with those of the slots, before any data is read.

  Raises:
    ValueError: see `tensors.check_shapes`.
  """
  wanted = {
    slot.name(place): slot.stored_shape
    for slot in stored.values()
    for place in np.ndindex(slot.lead)
  }
  # Ignore two spare tensors: files of tied models may repeat the embedding, and old files hold rotary
  # frequencies, which follow from config.json.
  spare = lambda name: name == 'lm_head.weight' or name.endswith('rotary_emb.inv_freq')
  used = {name: x for name, x in tensors.items() if name in wanted or not spare(name)}
  check_shapes(folder, used, wanted)


def read(
  tensors: Mapping[str, Tensor], slot: Slot, index: tuple[slice, ...], dtype: np.dtype
) -> np.ndarray:
  """Reads a part of a parameter; `index` has a slice with start and stop for each of its axes."""
  size = len(slot.lead)
  out = np.empty([s.stop - s.start for s in index], dtype)
  for place in np.ndindex(out.shape[:size]):
    name = slot.name(tuple(s.start + i for s, i in zip(index, place)))
    out[place] = from_stored(slot, tensors[name], index[size:])
  return out


def from_stored(slot: Slot, tensor: Tensor, index: tuple[slice, ...]) -> np.ndarray:
  """Reads a part of one tensor in our layout; `index` has a slice for each axis of `slot.shape`.

  A merged axis is read for a range of its first component only; the result is then cut along the others.
  """
  # cut: slices of the tensor; sizes: shape of what is read; rest: slices that are still to be applied.
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
  """One tensor in the layout of the folder; the inverse of `from_stored`."""
  return x.transpose(slot.order).reshape(slot.stored_shape)


def save(
  folder: str | pathlib.Path,
  config: Config,
  params: Params,
  *,
  source: str | pathlib.Path = '',
  reward_model: bool = False,
  layers: tuple[Params, Mapping] | None = None,
  max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes a folder that the transformers library reads. The folder appears when it is complete.

  Every process must call this function; the first process writes. Tensors are fetched from the devices
  one at a time. The value head is written only if `reward_model` is True.

  Args:
    folder: must be empty or not exist.
    config: of the policy, without an adapter.
    params: its parameters, on any devices; they are written in the dtype that they have.
    source: the folder that the model was read from, if any; its config.json, tokenizer and generation
      settings are copied.
    reward_model: write a classifier with one label, the value head, instead of a language model.
    layers: NumPy arrays of further layers, and what they are; written beside the model, see `heads`.
    max_shard_bytes: largest size of a file, unless a single tensor is larger.

  Raises:
    FileExistsError: the folder is not empty.
    ValueError: an adapter, a balancing bias that is not zero, a reward model without a value head,
      a model that no family can express, or one that differs from that of `source`.
  """
  # Refuse what a folder cannot hold.
  check_free(folder)
  source = paths.path(source) if source else None
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
  settings = _settings(config, source, reward_model)
  left_out = 'unembedding' if reward_model else 'value_head'
  tensors = named(config, flat, settings['model_type'], left_out=(left_out,))
  together(
    'checked'
  )  # barrier: all processes have checked the folder before the first one makes it
  if jax.process_index():
    for tensor in tensors.values():
      tensor.all()  # takes part in gathering the tensor from all processes
  else:
    _write(folder, tensors, settings, source, max_shard_bytes, layers)
  together('written')  # barrier: from here on every process finds the folder


def as_tensors(config: Config, params: Params) -> dict[str, Tensor]:
  """The tensors that a folder of a language model with these parameters would have, by their names.

  Args:
    config: of the policy, without an adapter.
    params: its parameters; those that no family has a place for are left out.
  """
  flat = traverse_util.flatten_dict(params)
  flat.pop(('layers', 'router_bias'), None)
  kind = families.write_settings(config, False)['model_type']
  return named(config, flat, kind, left_out=('value_head',))


def write_bare(folder: pathlib.Path, config: Config, params: Params, dtype: str) -> tuple[int, int]:
  """Writes config.json and model.safetensors alone, in one dtype, over those that are there.

  Args:
    folder: local; it is made if it is not there.
    config: of the policy, without an adapter.
    params: its parameters; those that no family has a place for are left out.
    dtype: of the tensors, 'float32' or 'bfloat16'.

  Returns:
    How many tensors these are, and their bytes.

  Raises:
    ValueError: a model that no family can express.
  """
  to = np.dtype(dtype)  # of ml_dtypes, or NumPy's
  cast = lambda x: Tensor(x.shape, to, lambda index: x.read(index).astype(to, copy=False))
  tensors = {name: cast(x) for name, x in as_tensors(config, params).items()}
  folder.mkdir(exist_ok=True)
  write_file(folder / WHOLE, tensors)
  settings = families.write_settings(config, False) | {'torch_dtype': dtype}
  (folder / 'config.json').write_text(json.dumps(settings), encoding='utf-8')
  return len(tensors), sum(x.nbytes for x in tensors.values())


def named(
  config: Config, flat: Mapping[Path, jax.Array], kind: str, *, left_out: Path = ()
) -> dict[str, Tensor]:
  """The parameters as the tensors of a folder, by their stored names; they are fetched when read.

  Args:
    config: of the policy, without an adapter.
    flat: its parameters by their paths.
    kind: `model_type` of the family, see `families.write_settings`.
    left_out: path of a parameter that the folder does not hold.

  Raises:
    ValueError: the parameters are not those of the model.
  """
  stored = slots(config, kind)
  if stored.keys() != flat.keys():
    raise ValueError(
      f'params have {sorted(flat.keys() - stored.keys())} too many and lack '
      f'{sorted(stored.keys() - flat.keys())}'
    )
  stored.pop(left_out, None)
  return {
    slot.name(place): _tensor(slot, flat[path], place)
    for path, slot in stored.items()
    for place in np.ndindex(slot.lead)
  }


def _settings(config: Config, source: pathlib.Path | None, reward_model: bool) -> dict:
  """The config.json to be written: that of the source, if there is one, else a new one."""
  if source is None:
    return families.write_settings(config, reward_model)
  stated = jsons.read_object(source / 'config.json')
  return families.keep_settings(stated, config, reward_model)


def _write(folder, tensors, settings, source, max_shard_bytes, layers) -> None:
  """Writes weights, settings and the companions of the source to a new folder."""
  with new_folder(folder) as made:
    write_folder(made, tensors, max_shard_bytes)
    if layers is not None:
      heads.save(made, *layers)
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (made / 'config.json').write_text(text, encoding='utf-8')
    for name in COMPANIONS:
      if source and (source / name).exists():
        (made / name).write_bytes((source / name).read_bytes())


def _place(shape: jax.ShapeDtypeStruct, sharding, tensors: Mapping[str, Tensor], slot: Slot | None):
  """Reads one parameter onto the devices of its sharding, or the default one; zero if it has no slot."""

  @functools.cache  # several devices may hold the same part, which is read once
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
  """A tensor of the folder; it is fetched from the devices when it is read."""

  def fetch(index):
    return to_stored(slot, to_host(param[place]))[index]

  return Tensor(slot.stored_shape, np.dtype(param.dtype), fetch)
