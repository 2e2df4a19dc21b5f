"""What a run shows: metrics.jsonl and tables of samples."""

import contextlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging

from polgrad.whole_files import writing


class NotWrittenError(OSError):
  """A row of metrics could not be written, for example because the disk is full."""


class Writer:
  """Appends rows of metrics to `metrics.jsonl`, and to the trackers of the run."""

  def __init__(
    self,
    workdir: str,
    *,
    step: int,
    past: Sequence[str],
    track: Callable[[Mapping[tuple[str, int], Mapping]], Any] | None = None,
  ):
    """Opens the files, and drops the rows that an interrupted run wrote after its last checkpoint.

    Args:
      workdir: an existing folder.
      step: number of updates before the run (re)starts; later rows are dropped.
      past: names of the phases that have begun; rows of other phases are dropped.
      track: (dropped rows by phase and step) -> where rows go as well, an open `trackers.Tracking`;
        None: nowhere.
    """
    self.path = os.path.join(workdir, 'metrics.jsonl')

    # Keep a copy of a file with unreadable lines; a last line that a crash cut off does not count.
    rows, damaged = parse(self.path)
    if damaged:
      aside = _unused(f'{self.path}.damaged')
      shutil.copyfile(self.path, aside)
      logging.warning(
        '%s: lines %s are no rows of metrics; the file is kept as %s', self.path, damaged[:5], aside
      )

    # Rewrite the file with the rows to keep, as a whole, so that a crash here loses nothing.
    stays = lambda row: row['step'] <= step and row['phase'] in past
    kept = [row for row in rows if stays(row)]
    dropped = {(row['phase'], row['step']): row for row in rows if not stays(row)}
    with writing(self.path) as f:
      f.writelines(_line(r) for r in kept)

    # Append from here on. Line buffering makes every row readable at once.
    self._tracking = track(dropped) if track else None
    self._file = open(self.path, 'a', buffering=1)  # noqa: SIM115, closed by `close`

  def write(self, step: int, phase: str, values: Mapping[str, float]) -> None:
    """Appends one row: the metrics after `step` updates, made in a phase. JSON has null for NaN.

    Raises:
      NotWrittenError: the file cannot be written.
    """
    row = {k: float(v) for k, v in values.items()}
    try:
      self._file.write(_line({'step': step, 'phase': phase, **row}))
    except OSError as error:
      raise NotWrittenError(f'{self.path}: {error.strerror}') from error
    if self._tracking:
      self._tracking.write(step, phase, row)

  def close(self) -> None:
    with contextlib.suppress(OSError):  # the end of a row that `write` has raised for
      self._file.close()
    if self._tracking:
      self._tracking.close()


def read(path: str) -> list[dict]:
  """The readable rows of a metrics file, [] if there is none."""
  return parse(path)[0]


def parse(path: str) -> tuple[list[dict], list[int]]:
  """The rows of a metrics file, and the numbers (from 1) of the lines that cannot be read.

  A last line that a crash cut off is left out of both.
  """
  if not os.path.exists(path):
    return [], []
  with open(path, 'rb') as f:
    *lines, last = f.read().split(b'\n')
  rows, damaged = [], []
  for number, line in enumerate([*lines, last] if _row(last) else lines, 1):
    row = _row(line)
    if row is None:
      damaged.append(number)
    else:
      rows.append(row)
  return rows, damaged


def _row(line: bytes) -> dict | None:
  """The row of a line, or None if it is none: a step, a phase, and numbers or null."""
  try:
    row = json.loads(line)
    row = {**row, 'step': int(row['step']), 'phase': str(row['phase'])}
  except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
    return None
  numbers = all(x is None or isinstance(x, int | float) for k, x in row.items() if k != 'phase')
  return row if numbers else None


def _line(row: Mapping) -> str:
  known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
  return json.dumps(known, allow_nan=False) + '\n'


def _unused(path: str) -> str:
  """The path, or the first of path.1, path.2, ... that is free."""
  names = itertools.chain([path], (f'{path}.{n}' for n in itertools.count(1)))
  return next(name for name in names if not os.path.exists(name))


def show_samples(title: str, rows: Sequence[tuple[str, str, float]]) -> None:
  """Prints rows (prompt, completion, reward) as a table; of long texts the last 400 characters. A reward
  of NaN is one whose verifier failed."""
  from rich.console import Console  # here, because only tables need it
  from rich.table import Table
  from rich.text import Text

  table = Table('prompt', 'completion', 'reward', title=title, title_justify='left')
  for prompt, completion, reward in rows:
    clip = lambda s: Text(s if len(s) <= 400 else '…' + s[-400:])
    table.add_row(
      clip(prompt), clip(completion), 'failed' if math.isnan(reward) else f'{reward:.3g}'
    )
  Console().print(table)
