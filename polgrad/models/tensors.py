"""Named tensors that are read on demand, and folders of safetensors files.

A safetensors file consists of the length of its header (u64), the header (JSON: name -> dtype, shape and
range of bytes), and the bytes of all tensors. Files are not memory-mapped, because mapped pages count as
memory of the process as long as the file is open."""

import contextlib
import json
import math
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np

from polgrad import jsons, paths

WHOLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
DTYPES = {
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
}


class Tensor(NamedTuple):
  """A tensor that has not been read.

  Attributes:
    shape: sizes of its axes, at least one.
    dtype: dtype of its elements.
    read: one slice for each axis (with start and stop, step 1) -> that part as a NumPy array.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[tuple[slice, ...]], np.ndarray]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def all(self) -> np.ndarray:
    """The whole tensor."""
    return self.read(tuple(slice(0, size) for size in self.shape))


def open_folder(folder: pathlib.Path) -> dict[str, Tensor]:
  """The tensors of a folder by name, from model.safetensors or from the shards that an index lists.

  Raises:
    FileNotFoundError: files are missing; the message names all of them.
    ValueError: an incomplete or malformed file, an index that names files outside the folder, or tensors
      that the index lists and no shard has.
  """
  index = folder / INDEX
  promised = _read_index(index) if index.exists() else {}
  files = [folder / name for name in sorted(set(promised.values()) or {WHOLE})]
  missing = [str(file) for file in files if not file.is_file()]
  if missing:
    raise FileNotFoundError(f'{", ".join(missing)} is missing')
  tensors = {}
  for file in files:
    tensors |= open_file(file)
  absent = sorted(promised.keys() - tensors.keys())
  if absent:
    raise ValueError(f'{index} promises {absent[:8]}, which no shard has')
  return tensors


def _read_index(index: pathlib.Path) -> dict[str, str]:
  """The file of each tensor, by the index of a folder."""
  try:
    places = jsons.read_object(index)['weight_map']
    names = set(places.values())
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f'{index} is no index of tensors ({type(error).__name__}: {error})') from error
  for name in names:
    plain = isinstance(name, str) and pathlib.PurePath(name).name == name and '\\' not in name
    if not plain or name in ('', '.', '..'):
      raise ValueError(f'{index} names {name!r}, which is no file of its folder')
  return places


def open_file(path: pathlib.Path) -> dict[str, Tensor]:
  """The tensors of one safetensors file by name.

  Raises:
    ValueError: the file is not as long as its header says, has a tensor of another dtype, or its tensors
      overlap, leave gaps or do not have the size of their shape.
  """
  # Read the header; check the size of the file against it, so that a partial download is noticed.
  size = paths.size(path)
  with path.open('rb') as file:
    length = int.from_bytes(file.read(8), 'little')
    header = file.read(length) if 8 + length <= size else b''
  if len(header) < length or not header:
    raise ValueError(f'{path}: {size} bytes are too few for the header, {8 + length} bytes')
  try:
    entries = json.loads(header)
    entries.pop('__metadata__', None)
    end = max((e['data_offsets'][1] for e in entries.values()), default=0)
    expected = 8 + length + end
    odd = {name: e['dtype'] for name, e in entries.items() if e['dtype'] not in DTYPES}
  except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
    raise ValueError(
      f'{path}: its header is malformed ({type(error).__name__}: {error})'
    ) from error
  if size != expected:
    raise ValueError(f'{path} has {size} bytes instead of {expected}; was it cut off?')
  if odd:
    name, dtype = next(iter(odd.items()))
    raise ValueError(f'{path}: {name} has dtype {dtype}; supported: {sorted(DTYPES)}')
  _check_places(path, entries)

  def tensor(entry):
    shape, dtype = tuple(entry['shape']), DTYPES[entry['dtype']]
    start = 8 + length + entry['data_offsets'][0]

    def read(index):
      # Rows are consecutive in the file, so only the selected rows are read; other axes are cut after.
      row = math.prod(shape[1:]) * dtype.itemsize
      count = (index[0].stop - index[0].start) * row
      data = paths.read(path, start + index[0].start * row, count)
      return np.frombuffer(data, dtype).reshape(-1, *shape[1:])[(slice(None), *index[1:])]

    return Tensor(shape, dtype, read)

  return {name: tensor(entry) for name, entry in entries.items()}


def _check_places(path: pathlib.Path, entries: Mapping[str, Mapping]) -> None:
  """Refuses tensors whose bytes are not what their shapes need, or that overlap or leave gaps."""
  natural = lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 0
  reached = 0
  for name, entry in entries.items():
    shape, places = entry.get('shape'), entry['data_offsets']
    lists = isinstance(shape, list) and isinstance(places, list) and len(places) == 2
    if not lists or not shape or not all(map(natural, [*shape, *places])):
      raise ValueError(f'{path}: {name} has shape {shape!r} and bytes {places!r}')
  for name, entry in sorted(entries.items(), key=lambda item: item[1]['data_offsets']):
    shape, places = entry['shape'], entry['data_offsets']
    needed = math.prod(shape) * DTYPES[entry['dtype']].itemsize
    if places[1] - places[0] != needed:
      raise ValueError(f'{path}: {name} of shape {shape} needs {needed} bytes, and has {places}')
    if places[0] != reached:
      raise ValueError(f'{path}: {name} begins at byte {places[0]}, where {reached} is expected')
    reached = places[1]


def check_shapes(
  where: pathlib.Path, tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]
) -> None:
  """Compares the tensors of a file or folder with the names and shapes that a model needs.

  Raises:
    ValueError: tensors that are missing, unknown or of another shape; the message lists up to eight.
  """
  problems = [f'{name} is missing' for name in wanted.keys() - tensors.keys()]
  problems += [f'{name} is unknown' for name in tensors.keys() - wanted.keys()]
  problems += [
    f'{name} has shape {tensors[name].shape} instead of {shape}'
    for name, shape in wanted.items()
    if name in tensors and tensors[name].shape != shape
  ]
  if problems:
    more = f' (and {len(problems) - 8} more)' if len(problems) > 8 else ''
    raise ValueError(f'{where}: {"; ".join(sorted(problems)[:8])}{more}')


def write_folder(
  folder: pathlib.Path, tensors: Mapping[str, Tensor], max_shard_bytes: int = 5_000_000_000
) -> None:
  """Writes model.safetensors, or several shards and their index; only one tensor is in memory at a time.

  Tensors are written in the order of the mapping. A shard has at most `max_shard_bytes` bytes, unless it
  consists of one larger tensor.
  """
  # Fill one shard after the other.
  shards, size = [{}], 0
  for name, tensor in tensors.items():
    if shards[-1] and size + tensor.nbytes > max_shard_bytes:
      shards.append({})
      size = 0
    shards[-1][name] = tensor
    size += tensor.nbytes
  if len(shards) == 1:
    return write_file(folder / WHOLE, tensors)
  # The index says which shard has which tensor.
  places = {}
  for i, shard in enumerate(shards, 1):
    file = f'model-{i:05}-of-{len(shards):05}.safetensors'
    write_file(folder / file, shard)
    places |= dict.fromkeys(shard, file)
  total = sum(tensor.nbytes for tensor in tensors.values())
  index = {'metadata': {'total_size': total}, 'weight_map': places}
  (folder / INDEX).write_text(json.dumps(index, indent=2))


def write_file(path: pathlib.Path, tensors: Mapping[str, Tensor]) -> None:
  """Writes one safetensors file, one tensor after the other."""
  # The header comes first, so the place of every tensor is computed before anything is read.
  names = {dtype: name for name, dtype in DTYPES.items()}
  header, end = {'__metadata__': {'format': 'pt'}}, 0
  for name, tensor in tensors.items():
    start, end = end, end + tensor.nbytes
    header[name] = {
      'dtype': names[tensor.dtype],
      'shape': tensor.shape,
      'data_offsets': [start, end],
    }
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)  # so that the elements are aligned
  with path.open('wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    for tensor in tensors.values():
      np.ascontiguousarray(tensor.all()).view(np.uint8).tofile(file)


@contextlib.contextmanager
def new_folder(folder: str | pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary folder, which is renamed to `folder` at the end unless an error was raised.

  So `folder` is complete or absent.

  Raises:
    FileExistsError: the folder is not empty.
  """
  folder = check_free(folder)
  folder.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f'.{folder.name}-') as work:
    made = pathlib.Path(work) / folder.name
    made.mkdir()
    yield made
    made.rename(folder)


def check_free(folder: str | pathlib.Path) -> pathlib.Path:
  """Returns the folder, with ~ expanded, if it is empty or does not exist.

  Raises:
    FileExistsError: the folder is not empty.
    ValueError: a path of a bucket.
  """
  folder = paths.local(folder)
  if folder.exists() and any(folder.iterdir()):
    raise FileExistsError(f'{folder} is not empty; nothing is overwritten')
  return folder
