"""Rows that a run trained on, and completions of its evaluations, as parquet files in its folder.

    WORKDIR/rollouts/train-000012.parquet      rows of the batch whose last update was number 12
    WORKDIR/evaluations/train-000012.parquet   greedy completions of the held-out problems after it

A file is whole or absent. Any reader of parquet can open it, such as pandas:

    pandas.read_parquet('runs/quickstart/rollouts')[['step', 'prompt', 'completion', 'rewards']]

`docs/looking_inside.md` lists the columns.
"""

import functools
import json
import os
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging

from polgrad import paths
from polgrad.arrays import per_token
from polgrad.data.tokenizers import Tokenizer
from polgrad.environments.episodes import Episode
from polgrad.types import Batch, turns
from polgrad.whole_files import writing

ROLLOUTS, EVALUATIONS = 'rollouts', 'evaluations'  # folders in the folder of a run
ENDING = '.parquet'
META = b'polgrad'  # key of the values that `Stored.meta` has, in the metadata of a file


class Stored(NamedTuple):
  """What a file holds."""

  path: str
  phase: str
  step: int  # updates that the run had made, as in metrics.jsonl
  rows: list[dict[str, Any]]  # values by column
  meta: dict[str, Any]  # `arrays` of the batch, its `columns`, and `of`, the rows that it had


class Store:
  """Writes the files of one run; the first process has one."""

  def __init__(self, workdir: str, *, step: int, past: Sequence[str], limit: int):
    """Opens the folders, and deletes what an interrupted run wrote after its last checkpoint.

    Args:
      workdir: an existing folder.
      step: number of updates before the run (re)starts; files of later steps are deleted.
      past: names of the phases that have begun; files of other phases are deleted.
      limit: bytes that all files of a folder may have; beyond it the oldest are deleted.
    """
    self.workdir, self.limit = workdir, limit
    self._failing = False
    for folder in (ROLLOUTS, EVALUATIONS):
      place = os.path.join(workdir, folder)
      os.makedirs(place, exist_ok=True)
      for name in os.listdir(place):
        phase, number = split_name(name)
        if name.endswith('.tmp') or (number >= 0 and (number > step or phase not in past)):
          os.remove(os.path.join(place, name))

  def write_rows(self, phase: str, step: int, batch: Batch, count: int, **texts: Any) -> None:
    """Writes the first rows of a batch; see `table_of`, which takes `texts`.

    Args:
      phase: name of the phase.
      step: number of updates after the batch.
      batch: NumPy, with all that the update read of it.
      count: number of rows.
    """
    self._write(ROLLOUTS, phase, step, table_of(phase, step, batch, count, **texts))

  def write_samples(self, phase: str, step: int, samples: Sequence[tuple[str, str, float]]) -> None:
    """Writes the completions of an evaluation: (prompt, completion, reward), NaN where it failed."""
    prompts, completions, rewards = zip(*samples) if samples else ((), (), ())
    columns = {
      'step': pa.array([step] * len(samples), pa.int64()),
      'phase': pa.array([phase] * len(samples), pa.string()),
      'problem': pa.array(range(len(samples)), pa.int64()),
      'prompt': pa.array(map(plain, prompts), pa.string()),
      'completion': pa.array(map(plain, completions), pa.string()),
      'rewards': pa.array(rewards, pa.float64()),
    }
    self._write(EVALUATIONS, phase, step, _with_meta(columns, {'of': len(samples)}))

  def _write(self, folder: str, phase: str, step: int, table: pa.Table) -> None:
    """Writes a file whole, then deletes the oldest of its folder until the limit holds.

    A file that cannot be written, as on a full disk, is left out; a warning names the first.
    """
    try:
      self._write_whole(folder, phase, step, table)
      self._failing = False
    except OSError as error:
      if not self._failing:
        logging.warning(
          'rows of %s, update %d, are not kept: %s; the run continues', phase, step, error
        )
      self._failing = True

  def _write_whole(self, folder: str, phase: str, step: int, table: pa.Table) -> None:
    place = os.path.join(self.workdir, folder)
    path = os.path.join(place, file_name(phase, step))
    with writing(path, 'wb') as f:
      pq.write_table(table, f, compression='zstd')
    sizes = {file: os.path.getsize(file) for file in files(self.workdir, folder)}
    while sum(sizes.values()) > self.limit and len(sizes) > 1:
      oldest = next(iter(sizes))
      os.remove(oldest)
      del sizes[oldest]


def file_name(phase: str, step: int) -> str:
  """The name of the file of a phase and a step; characters that a path cannot have are quoted."""
  return f'{urllib.parse.quote(phase, safe="")}-{step:06d}{ENDING}'


def split_name(name: str) -> tuple[str, int]:
  """(phase, step) of the name of a file; the step is -1 if it is no such name."""
  phase, _, number = name.removesuffix(ENDING).rpartition('-')
  whole = name.endswith(ENDING) and number.isdecimal() and phase
  return (urllib.parse.unquote(phase), int(number)) if whole else ('', -1)


def files(workdir: str, folder: str) -> list[str]:
  """The paths of the files in a folder of a run, in the order of their steps; [] without a folder."""
  place = os.path.join(workdir, folder)
  names = os.listdir(place) if os.path.isdir(place) else []
  steps = {name: split_name(name)[1] for name in names}
  found = sorted((step, name) for name, step in steps.items() if step >= 0)
  return [os.path.join(place, name) for _, name in found]


def table_of(
  phase: str,
  step: int,
  batch: Batch,
  count: int,
  *,
  tokenizer: Tokenizer,
  number: int = 0,
  terms: Mapping[str, np.ndarray] = {},
  episodes: Sequence[Episode] = (),
) -> pa.Table:
  """The first `count` rows of a batch: texts, terms of the reward, and every array of the batch.

  Of an array [B, T] a row has the part from its first to its last token.

  Args:
    phase: name of the phase.
    step: number of updates after the batch.
    batch: NumPy.
    count: number of rows; the file should have whole groups.
    tokenizer: makes texts of ids.
    number: batches that the phase had collected before.
    terms: f[B], the terms of the rewards of rows that were drawn in this step, NaN where a verifier
      failed; other rows, which a memory kept, get null.
    episodes: of these rows, where there is an environment.
  """
  count = min(count, len(batch.tokens))
  spans = [_span(seen) for seen in batch.segment_ids[:count]]
  ids = [batch.tokens[i, span].tolist() for i, span in enumerate(spans)]
  starts = [completion_start(batch, i) - span.start for i, span in enumerate(spans)]
  text_of = functools.lru_cache(maxsize=2**16)(tokenizer.decode)
  fresh = np.ones(count, bool) if batch.staleness is None else batch.staleness[:count] == 0

  # What a reader looks at first; `start` says where the completion begins in the lists.
  columns = {
    'step': pa.array([step] * count, pa.int64()),
    'phase': pa.array([phase] * count, pa.string()),
    'number': pa.array([number] * count, pa.int64()),
    'row': pa.array(range(count), pa.int64()),
    'prompt': pa.array([plain(text_of(tuple(x[:n]))) for x, n in zip(ids, starts)], pa.string()),
    'completion': pa.array(
      [plain(text_of(tuple(x[n:]))) for x, n in zip(ids, starts)], pa.string()
    ),
    'pieces': pa.array([pieces(x, tokenizer, text_of) for x in ids], pa.list_(pa.string())),
    'start': pa.array(starts, pa.int64()),
    'length': pa.array(batch.mask[:count].sum(axis=1), pa.int64()),
    'column': pa.array([span.start for span in spans], pa.int64()),
  }
  for name, values in terms.items():
    kept = [float(x) if here else None for x, here in zip(values, fresh)]
    columns[f'reward/{name}'] = pa.array(kept, pa.float64())

  if 'turn_rewards' in batch:
    told = [episodes[i] if episodes and fresh[i] else None for i in range(count)]
    said = [
      turns_of(batch, i, episode, span, text_of)
      for i, (episode, span) in enumerate(zip(told, spans))
    ]
    columns['turns'] = pa.array(said, pa.list_(TURN))
    columns['failure'] = pa.array([e and failure_of(e) for e in told], pa.string())

  # Every array of the batch, under its name, but for states, which are as large as a layer's.
  arrays = {}
  for name in [name for name in batch if name != 'teacher_states']:
    x = np.asarray(batch[name])
    token = per_token(name, x, batch.mask)
    arrays[name] = {'dtype': str(x.dtype), 'per_token': token}
    values = [x[i, span] for i, span in enumerate(spans)] if token else list(x[:count])
    columns[name] = pa.array(values)
  meta = {'arrays': arrays, 'columns': batch.tokens.shape[1], 'of': len(batch.tokens)}
  return _with_meta(columns, meta)


# A turn of the policy, or what it reads between two turns; see `turns_of`.
TURN = pa.struct([
  *(('who', pa.string()), ('begin', pa.int64()), ('length', pa.int64()), ('text', pa.string())),
  *(('reward', pa.float64()), ('metrics', pa.string())),
])  # fmt: skip


def turns_of(
  batch: Batch, row: int, episode: Episode | None, span: slice, text_of: Callable[[tuple], str]
) -> list[dict[str, Any]]:
  """Who said what in a row, from its first turn on.

  Args:
    batch: NumPy, with `turn_rewards` and `observation_ids`.
    row: number of the row.
    episode: of the row; None if it is not known, as of a row that a memory kept.
    span: columns of the row's tokens.
    text_of: makes text of ids.

  Returns:
    For each turn `who`, 'policy' or 'environment'; the place of its first token in the lists of the row,
    and how many there are; its text; and of the policy, reward and numbers of the turn, as JSON.
  """
  found, end = [], None
  say = lambda who, begin, stop: {
    'who': who,
    'begin': begin - span.start,
    'length': stop - begin,
    'text': plain(text_of(tuple(batch.tokens[row, begin:stop].tolist()))),
    'reward': None,
    'metrics': '{}',
  }
  # The mask may have lost the row since, for example because its episode has failed.
  for number, turn in enumerate(turns(batch['observation_ids'][row] != 0)):
    if end is not None:
      read = say('environment', end, turn.start)
      if episode and number <= len(episode.observations):
        read['text'] = plain(episode.observations[number - 1])
      found.append(read)
    one = say('policy', turn.start, turn.stop)
    one['reward'] = float(batch['turn_rewards'][row, turn].sum())
    if episode and number < len(episode.metrics):
      one['metrics'] = json.dumps(dict(episode.metrics[number]))
    found.append(one)
    end = turn.stop
  return found


def failure_of(episode: Episode) -> str:
  """Why an episode failed, in words; '' if it did not."""
  return plain(f'{episode.failure.kind}: {episode.failure.reason}') if episode.failure else ''


def _with_meta(columns: Mapping[str, pa.Array], meta: Mapping) -> pa.Table:
  return pa.table(columns).replace_schema_metadata({META: json.dumps(meta)})


def _span(segment_ids: np.ndarray) -> slice:
  """The columns from the first to the last token of a row, i32[T]."""
  seen = np.flatnonzero(segment_ids)
  return slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(0, 0)


def completion_start(batch: Batch, row: int) -> int:
  """The column at which the completion of a row begins: after the prompt columns, if there are any,
  else at the first token of the mask, which for rows without one is the end of the row."""
  span = _span(batch.segment_ids[row])
  if batch.layout.prompt_length:
    return min(max(batch.layout.prompt_length, span.start), span.stop)
  made = np.flatnonzero(batch.mask[row])
  return int(made[0]) if len(made) else span.stop


def pieces(
  ids: Sequence[int], tokenizer: Tokenizer, text_of: Callable[[tuple], str] | None = None
) -> list[str]:
  """The text that each token adds to the row.

  A character that several tokens share belongs to the last of them, and the others have an empty text.
  Stop, bos and pad tokens, which have no text, are ⟨stop⟩, ⟨bos⟩ and ⟨pad⟩; others are ⟨id⟩.

  Args:
    ids: the tokens of a row.
    tokenizer: makes texts of ids.
    text_of: its `decode` for tuples, which may remember results.
  """
  text_of = text_of or tokenizer.decode
  named = {tokenizer.pad_id: '⟨pad⟩', tokenizer.bos_id: '⟨bos⟩'}
  named |= dict.fromkeys(tokenizer.stop_ids, '⟨stop⟩')
  found = []
  begin = 0  # the first token whose text is not known yet
  for i, token in enumerate(ids):
    if token in named:
      found.append(named[token])
      begin = i + 1
      continue
    # The token before decides, for example, whether a space belongs to this one.
    before = tuple(ids[max(begin - 1, 0) : begin])
    text = text_of(before + tuple(ids[begin : i + 1]))[len(text_of(before)) :]
    if text.endswith('\N{REPLACEMENT CHARACTER}') and i < min(begin + 3, len(ids) - 1):
      found.append('')  # UTF-8 needs four bytes at most
      continue
    found.append(plain(text) or f'⟨{token}⟩')
    begin = i + 1
  return found


def plain(text: str) -> str:
  """The text without lone surrogates, which no UTF-8 file can hold."""
  return text.encode('utf-8', 'replace').decode('utf-8')


def read(path: str) -> Stored:
  """The rows of a file.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no parquet file of a run.
  """
  place = paths.path(path)
  if not place.is_file():
    raise FileNotFoundError(f'{path}: expected a file of rows, such as WORKDIR/rollouts/*{ENDING}')
  phase, step = split_name(os.path.basename(path))
  try:
    with place.open('rb') as file:
      table = pq.read_table(file)
    meta = json.loads((table.schema.metadata or {})[META])
    rows = table.to_pylist()
  except (pa.ArrowException, OSError, KeyError, ValueError) as error:
    reason = str(error).split('\n')[0][:200]
    raise ValueError(
      f'{path}: no file of rows of a run ({type(error).__name__}: {reason})'
    ) from error
  return Stored(path, phase, step, rows, meta)


def as_batch(stored: Stored) -> Batch:
  """The stored rows as the batch that they were, with zeros in the padding.

  Raises:
    ValueError: the file is one of an evaluation, which has no arrays.
  """
  arrays = stored.meta.get('arrays')
  if not arrays:
    raise ValueError(
      f'{stored.path}: it has texts only; rows with arrays are in WORKDIR/{ROLLOUTS}'
    )
  found = {}
  for name, kind in arrays.items():
    values = [row[name] for row in stored.rows]
    if kind['per_token']:
      x = np.zeros((len(values), stored.meta['columns']), kind['dtype'])
      for i, (row, value) in enumerate(zip(stored.rows, values)):
        x[i, row['column'] : row['column'] + len(value)] = value
    else:
      x = np.array(values, kind['dtype'])
    found[name] = x
  required = {name: found.pop(name) for name in ('tokens', 'segment_ids', 'mask')}
  return Batch(**required).with_arrays(**found)
