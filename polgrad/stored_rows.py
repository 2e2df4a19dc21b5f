"""Completions with the teacher's log-probs of their tokens, drawn once and read by record.

    FOLDER/00000000.array_record    settings, and an entry for each of the data rows 0 to 1023
    FOLDER/00001024.array_record    the same for the next ones

A file is whole or absent, so the program that writes them can be stopped and started again. Its first
entry holds the settings of `SETTINGS` and the numbers of the data rows of the others, which are JSON:
`id`, `prompt` (a digest of the prompt's ids), and for each sample of the row `tokens`, `finished`,
`behavior_logp` and `teacher_logp`. Where the setting `top` is above 0, `teacher_top_ids` are the `top`
likeliest tokens of the teacher at the place of each token, and `teacher_top_log_probs` their log-probs.
Numbers of float32 are read back exactly.
"""

import bisect
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from polgrad import jsons, whole_files

ENDING = '.array_record'
FORMAT = 'polgrad completions 1'
# What a run must have in common with the files, and the kinds of values.
SETTINGS = {
  'tokenizer': 'text',
  'samples_per_prompt': 'a whole number',
  'max_new_tokens': 'a whole number',
  'temperature': 'a number',
  'top_k': 'a whole number',
  'top_p': 'a number',
  'prefix': 'text',
  'stop_strings': 'a list of texts',
  'top': 'a whole number',
}
EARLIER = {'top': 0}  # settings that files of earlier versions do not name
HEAD = {'format': 'text', 'vocab_size': 'a whole number', 'rows': 'a list of whole numbers'}
OF_TOKENS = ('tokens', 'behavior_logp', 'teacher_logp')
LISTED = ('teacher_top_ids', 'teacher_top_log_probs')
ENTRY = {'id': 'a whole number', 'prompt': 'text', 'finished': 'a list'}
ENTRY |= dict.fromkeys(OF_TOKENS, 'a list')
WRONG = (ValueError, TypeError, KeyError, OverflowError, RecursionError)


class Entry(NamedTuple):
  """The completions of one record, G samples."""

  id: int  # row in the data set
  prompt: str  # see `digest`
  finished: list[bool]  # [G], whether the sample met a stop token
  tokens: list[np.ndarray]  # [G] of i32[n]
  behavior_logp: list[np.ndarray]  # [G] of f32[n]
  teacher_logp: list[np.ndarray]  # [G] of f32[n]
  teacher_top_ids: list[np.ndarray] = ()  # [G] of i32[n, top]; () where top is 0
  teacher_top_log_probs: list[np.ndarray] = ()  # [G] of f32[n, top]


def digest(ids: Sequence[int]) -> str:
  """A digest of the ids of a prompt."""
  return hashlib.sha256(np.asarray(ids, '<i4').tobytes()).hexdigest()[:16]


def file_name(folder: str, row: int) -> str:
  """The file whose first data row is `row`."""
  return os.path.join(folder, f'{row:08d}{ENDING}')


def write(path: str, settings: Mapping[str, Any], entries: Sequence[Entry]) -> None:
  """Writes a file whole.

  Args:
    settings: those of `SETTINGS`, `vocab_size`, and what else should be known of the file.
    entries: of ascending records.

  Raises:
    ValueError: an entry that could not be read back, such as log-probs that are not finite.
  """
  from array_record.python import array_record_module  # here, because few runs need it

  head = {'format': FORMAT, **settings, 'rows': [one.id for one in entries]}
  with whole_files.naming(path) as temporary:
    writer = array_record_module.ArrayRecordWriter(temporary, 'group_size:1')
    writer.write(json.dumps(head).encode())
    for entry in entries:
      value = _plain(entry)
      try:
        _checked(value, entry.id, head)
      except ValueError as error:
        raise ValueError(f'{path}, record {entry.id}: {error}') from error
      writer.write(json.dumps(value).encode())
    writer.close()


def _plain(entry: Entry) -> dict[str, Any]:
  """An entry as JSON holds it; the text of a float32 is the shortest one that gives it back."""
  exact = lambda x: float(str(np.float32(x)))
  numbers = lambda rows: [[exact(x) for x in row] for row in rows]
  listed = {
    'teacher_top_ids': [np.asarray(row).tolist() for row in entry.teacher_top_ids],
    'teacher_top_log_probs': [numbers(row) for row in entry.teacher_top_log_probs],
  }
  return {
    'id': int(entry.id),
    'prompt': entry.prompt,
    'finished': [bool(x) for x in entry.finished],
    'tokens': [np.asarray(row).tolist() for row in entry.tokens],
    'behavior_logp': numbers(entry.behavior_logp),
    'teacher_logp': numbers(entry.teacher_logp),
  } | (listed if entry.teacher_top_ids else {})


def head(path: str) -> dict[str, Any]:
  """The settings of a file.

  Raises:
    ValueError: it is cut off or damaged, or no file of completions.
  """
  return _open(path).head


class Rows:
  """The completions in the files of a folder, by the number of the record."""

  def __init__(self, folder: str):
    """Reads the settings of all files.

    Raises:
      FileNotFoundError: there is no such folder, or it has no such file.
      ValueError: names a file that is damaged, or that differs from the first one in a setting.
    """
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    paths = [os.path.join(folder, name) for name in names if name.endswith(ENDING)]
    if not paths:
      raise FileNotFoundError(
        f'{folder or "no folder is named"}: expected the files *{ENDING} of polgrad.teacher_logp'
      )
    self.folder = folder
    self._files = [_open(path) for path in paths]
    self._rows = {}  # number of the record -> (file, number of its entry)
    for file in self._files:
      for name in SETTINGS:
        first = self._files[0]
        if file.head[name] != first.head[name]:
          raise ValueError(
            f'{file.path}: {name} is {file.head[name]!r}, but {first.head[name]!r} in {first.path}; '
            'one folder holds the completions of one run of polgrad.teacher_logp'
          )
      for number, row in enumerate(file.head['rows'], start=1):
        if row in self._rows:
          raise ValueError(f'{file.path}: record {row} is in {self._rows[row][0].path} too')
        self._rows[row] = file, number

  def __len__(self) -> int:
    return len(self._rows)

  @property
  def top(self) -> int:
    """Listed tokens at the place of each token."""
    return self._files[0].head['top']

  def check(self, settings: Mapping[str, Any]) -> None:
    """Refuses files that were made with other settings.

    Raises:
      ValueError: names the file, the setting and both values.
    """
    head, path = self._files[0].head, self._files[0].path
    for name in SETTINGS:  # in one order, so that all processes name the same
      if name in settings and head[name] != settings[name]:
        raise ValueError(
          f'{path}: its completions were drawn with {name} {head[name]!r}, this run has '
          f'{settings[name]!r}; set that of the files, or run polgrad.teacher_logp for another path'
        )

  def __contains__(self, row: int) -> bool:
    return row in self._rows

  def check_complete(self, rows: Iterable[int]) -> None:
    """Refuses files that lack one of these records.

    Raises:
      ValueError: names the first record and the file that should have it.
    """
    missing = [row for row in rows if row not in self]
    if not missing:
      return
    # A file has the records from the number in its name on.
    begins = [int(os.path.basename(file.path).removesuffix(ENDING)) for file in self._files]
    before = bisect.bisect(begins, missing[0]) - 1
    file = self._files[before]
    until = file.head.get('until', file.head['rows'][-1] + 1 if file.head['rows'] else 0)
    where = f'{file.path} does not have it'
    if before < 0 or missing[0] >= until:
      last = f', the last one before it is {file.path}' if before >= 0 else ''
      where = f'{self.folder} has no file with it{last}'
    raise ValueError(
      f'record {missing[0]} has no completion: {where}; {len(missing)} records of the run have none. '
      'Delete a file that lacks some of its records, and run polgrad.teacher_logp with the configura'
      'tion of the run: it makes the files that are missing'
    )

  def read(self, row: int, prompt: str) -> Entry:
    """The completions of a record.

    Args:
      row: number of the record.
      prompt: digest of its prompt.

    Raises:
      ValueError: names file and record: there is no such record, it had another prompt, or its entry is
        damaged.
    """
    if row not in self._rows:
      raise ValueError(
        f'{self.folder}: no completion of record {row}; it holds {len(self)} records{self._near(row)}'
      )
    file, number = self._rows[row]
    entry = file.entry(number)
    if entry.prompt != prompt:
      raise ValueError(
        f'{file.path}, record {row}: it was drawn for another prompt; the data, the chat template or '
        'the tokenizer have changed'
      )
    return entry

  def _near(self, row: int) -> str:
    known = sorted(self._rows)
    place = bisect.bisect(known, row)
    beside = known[max(place - 1, 0) : place + 1]
    return f', such as {beside}' if beside else ''


class _File(NamedTuple):
  """One file, whose first entry was read."""

  path: str
  head: dict[str, Any]
  reads: Callable[[int], bytes]

  def entry(self, number: int) -> Entry:
    """The completions in entry `number`, from 1.

    Raises:
      ValueError: names the file and the record.
    """
    row = self.head['rows'][number - 1]
    try:
      value = json.loads(self.reads(number))
      return _checked(value, row, self.head)
    except (*WRONG, RuntimeError) as error:
      reason = str(error).split('\n')[0][:200]
      raise ValueError(f'{self.path}, record {row}: {reason}') from error


def _checked(value: Any, row: int, head: Mapping[str, Any]) -> Entry:
  """An entry of a file.

  Raises:
    ValueError, TypeError, KeyError: what is wrong with it.
  """
  if not isinstance(value, dict) or ENTRY.keys() - value.keys():
    raise ValueError(f'expected an object with {sorted(ENTRY)}, got {jsons.shown(value)}')
  jsons.check('its entry', value, ENTRY)
  if value['id'] != row:
    raise ValueError(f'its entry is one of record {value["id"]}')
  samples = head['samples_per_prompt']
  for name in ('finished', *OF_TOKENS):
    if len(value[name]) != samples:
      raise ValueError(f'{len(value[name])} samples in {name}, but samples_per_prompt is {samples}')
  made = {name: [_array(x, name) for x in value[name]] for name in OF_TOKENS}
  for sample, tokens in enumerate(made['tokens']):
    sizes = {name: len(x[sample]) for name, x in made.items()}
    if len(set(sizes.values())) > 1:
      raise ValueError(f'sample {sample} has arrays of different lengths: {sizes}')
    if not 0 < len(tokens) <= head['max_new_tokens']:
      raise ValueError(
        f'sample {sample} has {len(tokens)} tokens, but must have 1 to {head["max_new_tokens"]}'
      )
    if tokens.min() < 0 or tokens.max() >= head['vocab_size']:
      raise ValueError(
        f'sample {sample} has ids from {tokens.min()} to {tokens.max()}, but the model has '
        f'{head["vocab_size"]} tokens'
      )
    for name in ('behavior_logp', 'teacher_logp'):
      x = made[name][sample]
      if not np.isfinite(x).all() or x.max() > 1e-3:
        raise ValueError(f'sample {sample}: {name} must be finite and at most 0, got {x.max()}')
  if head.get('top', 0):
    made |= _lists(value, made['tokens'], head)
  return Entry(id=row, prompt=value['prompt'], finished=value['finished'], **made)


def _lists(
  value: Mapping[str, Any], tokens: Sequence[np.ndarray], head: Mapping[str, Any]
) -> dict[str, list[np.ndarray]]:
  """The listed tokens of an entry.

  Raises:
    ValueError, TypeError: what is wrong with them.
  """
  found = {}
  for name, kind in zip(LISTED, (np.int32, np.float32)):
    rows = value.get(name)
    if not isinstance(rows, list) or len(rows) != len(tokens):
      raise ValueError(f'{name} must have {len(tokens)} samples, because top is {head["top"]}')
    found[name] = [np.asarray(row, kind) for row in rows]
    for sample, (x, own) in enumerate(zip(found[name], tokens)):
      if x.shape != (len(own), head['top']):
        shape = f'{len(own)} times top={head["top"]}'
        raise ValueError(f'sample {sample}: {name} must be {shape} numbers, got {x.shape}')
  for sample, (ids, log_probs) in enumerate(zip(*found.values())):
    if ids.min() < 0:
      raise ValueError(f'sample {sample}: {LISTED[0]} must not be negative, got {ids.min()}')
    mass = np.exp(log_probs).sum(axis=1).max()
    if not np.isfinite(log_probs).all() or not mass < 1.01:
      raise ValueError(f'sample {sample}: {LISTED[1]} are no log-probs, their sum is {mass:.3f}')
  return found


def _array(values: Any, name: str) -> np.ndarray:
  """The numbers of one sample.

  Raises:
    ValueError, TypeError: they are none.
  """
  kind = np.int32 if name == 'tokens' else np.float32
  found = np.asarray(values)
  if found.ndim != 1 or not np.can_cast(found.dtype, np.int64 if kind is np.int32 else np.float64):
    raise ValueError(f'{name} must be lists of numbers, got {jsons.shown(values)}')
  return found.astype(kind)


def _open(path: str) -> _File:
  """A file with its settings.

  Raises:
    ValueError: it is cut off or damaged, or no file of completions.
  """
  from array_record.python import array_record_module

  try:
    reader = array_record_module.ArrayRecordReader(path)
    count = reader.num_records()
    if not count:
      raise ValueError('no entries; it is cut off, or no array_record file')
    reads = functools.partial(_read, reader)
    head = json.loads(reads(0))
    head = EARLIER | head if isinstance(head, dict) else head
    known = HEAD | SETTINGS
    if not isinstance(head, dict) or known.keys() - head.keys() or head['format'] != FORMAT:
      raise ValueError(f'its first entry has not the settings of {FORMAT!r}: {sorted(known)}')
    jsons.check('its settings', head, known)
    if len(head['rows']) != count - 1:
      raise ValueError(f'{count - 1} records, but its settings name {len(head["rows"])}')
  except (*WRONG, RuntimeError) as error:
    reason = str(error).split('\n')[0][:200]
    raise ValueError(
      f'{path}: no file of completions ({reason}); delete it and run polgrad.teacher_logp again'
    ) from error
  return _File(path, head, reads)


def _read(reader: Any, number: int) -> bytes:
  return reader.read([number])[0]
