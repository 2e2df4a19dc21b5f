"""Rows of data sets: Hugging Face `datasets` by name or folder, and files of tables."""

import codecs
import csv
import gzip
import io
import json
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from polgrad import paths

MISSING = 'the package datasets is missing; pip install "polgrad[hub]"'


class Table(NamedTuple):
  """The rows of one split."""

  size: int
  row: Callable[[int], Mapping]
  place: Callable[[int], str]  # what a person calls a row, such as file.jsonl:12
  fingerprint: str = ''  # of a data set of the hub


def read(path: str, *, subset: str = '', split: str = 'train', revision: str = '') -> Table:
  """Reads a data set; nothing is streamed.

  * A file `.parquet`, `.csv`, `.json` (a list of objects), `.jsonl` or `.jsonl.gz`. What CSV holds is
    text: `007` stays `007`.
  * A folder that `datasets` has saved, or one of such files, in which `datasets` finds the splits. It
    guesses the types of columns in CSV and JSON.
  * Any other path is a name of the hub. A data set that was used before is found without a network.

  Raises:
    FileNotFoundError: there is no such file or folder, and no data set of that name can be reached.
    ImportError: a folder or a name, and the package `datasets` is missing.
    ValueError: a file that cannot be read, or a subset or split that the data set does not have.
  """
  local = paths.path(path)
  if local.is_file():
    if subset or revision or split != 'train':
      raise ValueError(
        f'{path}: a file has the split train alone, and neither subset nor revision; '
        f'got split={split!r}, subset={subset!r}, revision={revision!r}'
      )
    return _file(local)
  if local.name.endswith(FILES):
    raise FileNotFoundError(f'{path}: there is no such file')
  try:
    import datasets  # here, because it is optional and takes seconds
  except ImportError as error:
    raise ImportError(MISSING) from error
  where = '/'.join(filter(None, [path, subset, split]))
  try:
    if (local / 'dataset_dict.json').is_file() or (local / 'state.json').is_file():
      found = _saved(datasets, path, split)
    else:
      datasets.disable_progress_bars()
      found = datasets.load_dataset(path, subset or None, split=split, revision=revision or None)
  except (ConnectionError, FileNotFoundError) as error:
    if local.is_dir():
      raise FileNotFoundError(f'{path}: the folder has no data files') from error
    raise FileNotFoundError(
      f'{path}: no file or folder of this name, and no data set of the hub that can be reached and was '
      f'not used before ({str(error)[:300]})'
    ) from error
  except Exception as error:  # datasets has many classes of errors
    raise ValueError(f'{where}: {error.__cause__ or error}') from error
  named = paths.REMOTE in path or not local.is_dir()  # a local folder is known by its contents
  fingerprint = found._fingerprint if named else ''
  return Table(len(found), found.__getitem__, lambda row: f'{where}:{row + 1}', fingerprint)


def lines(path: str) -> list[bytes]:
  """The lines of a text file in UTF-8, split at newlines only: U+2028 may be inside a JSON string."""
  data = paths.path(path).read_bytes()
  try:
    if data.startswith(b'\x1f\x8b'):
      data = gzip.decompress(data)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
      data = data.decode('utf-16').encode('utf-8')
  except (OSError, EOFError, ValueError, zlib.error) as error:
    raise ValueError(f'{path}: {error}') from error
  return data.removeprefix(codecs.BOM_UTF8).split(b'\n')


def json_lines(path: str) -> tuple[list, list[int]]:
  """The values of a file with one in each line, and the line number of each; blank lines are skipped.

  Raises:
    ValueError: a line that is no JSON, as `path:line: why`, or from `lines`.
  """
  values, numbers = [], []
  for number, line in enumerate(lines(path), start=1):
    try:
      if line.strip():
        values.append(json.loads(line.decode('utf-8')))
        numbers.append(number)
    except (ValueError, RecursionError) as error:
      raise ValueError(f'{path}:{number}: {error}') from error
  return values, numbers


def plain(value: Any) -> Any:
  """NumPy and Arrow values as Python's; keys of mappings whose value is None are left out.

  A table has None in every row that lacks a field, at any depth.
  """
  if isinstance(value, pa.Scalar):
    value = value.as_py()
  if isinstance(value, np.ndarray | np.generic):
    value = value.tolist()
  if isinstance(value, Mapping):
    return {k: plain(v) for k, v in value.items() if v is not None}
  return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def _saved(datasets: Any, path: str, split: str) -> Any:
  """A split of a folder that `save_to_disk` has written."""
  found = datasets.load_from_disk(path)
  if not isinstance(found, Mapping):
    found = {'train': found}
  if split not in found:
    raise ValueError(f'no split {split!r}; valid: {sorted(found)}')
  return found[split]


def _file(path: pathlib.Path) -> Table:
  readers = [reader for ending, reader in _READERS.items() if path.name.endswith(ending)]
  if not readers:
    raise ValueError(f'{path}: unknown kind of file; valid: {", ".join(FILES)}')
  try:
    rows, numbers = readers[0](path)
  except (ValueError, OSError, pa.ArrowException, csv.Error, RecursionError) as error:
    text = str(error)  # it may name the file already
    raise ValueError(text if text.startswith(f'{path}:') else f'{path}: {text}') from error
  if not len(rows):
    raise ValueError(f'{path}: no records')
  return Table(len(rows), rows.__getitem__, lambda row: f'{path}:{numbers[row]}')


class _Parquet:
  """Rows of a parquet file, of which the columns are kept as Arrow has them."""

  def __init__(self, path: pathlib.Path):
    with path.open('rb') as file:
      self._table = pa.parquet.read_table(file).combine_chunks()

  def __len__(self) -> int:
    return self._table.num_rows

  def __getitem__(self, row: int) -> dict:
    return {
      name: column[row].as_py() for name, column in zip(self._table.column_names, self._table)
    }


def _counted(rows: Sequence) -> tuple[Sequence, Sequence[int]]:
  """Rows, with numbers from 1 on."""
  return rows, range(1, len(rows) + 1)


def _csv(path: pathlib.Path) -> list[dict]:
  """The rows of a file with commas whose first line names the columns."""
  table = csv.reader(io.StringIO(path.read_bytes().decode('utf-8-sig'), newline=''), strict=True)
  names, *rows = [row for row in table if row] or [[]]
  if len(set(names)) < len(names):
    raise ValueError(f'two columns have one name: {names}')
  for number, row in enumerate(rows, start=1):
    if len(row) != len(names):
      raise ValueError(f'row {number} has {len(row)} values, but there are {len(names)} columns')
  return [dict(zip(names, row)) for row in rows]


def _json(path: pathlib.Path) -> tuple[list, Sequence[int]]:
  """The objects of a list, or of lines."""
  text = b'\n'.join(lines(str(path))).decode('utf-8')
  return _counted(json.loads(text)) if text.lstrip().startswith('[') else json_lines(str(path))


# Ending of a file -> function of its path to (rows, what a person calls each).
_READERS = {
  '.parquet': lambda path: _counted(_Parquet(path)),
  '.csv': lambda path: _counted(_csv(path)),
  '.json': _json,
  '.jsonl': lambda path: json_lines(str(path)),
  '.jsonl.gz': lambda path: json_lines(str(path)),
}
FILES = tuple(_READERS)
