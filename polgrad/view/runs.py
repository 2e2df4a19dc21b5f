"""What the page shows of the folders of runs, bounded in size."""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from polgrad import identity, jsons, metrics, mirrors, overrides, report, row_files
from polgrad.build import TABLE
from polgrad.view import tokens
from polgrad.view.charts import number

LETTERS = 2000  # of a text that is shown without tokens; longer ones lose their beginning


class Limits(NamedTuple):
  """How much of each run is shown."""

  steps: int = 6  # files of rollouts and of evaluations, evenly spaced, the first and last included
  rows: int = 16  # rows of each of these files
  tokens: int = 100_000  # of all rows of all runs together


class Said(NamedTuple):
  """A part of a row: a turn, what is read between two turns, or a whole completion."""

  title: str  # who says it; '' of a whole completion
  facts: list[tuple[str, str]]  # name and number, such as the reward
  tokens: list[tokens.Token]


class Cell(NamedTuple):
  """A completion of a group, or an episode."""

  row: int
  facts: list[tuple[str, str]]  # name and number, such as the reward
  said: list[Said]


class Group(NamedTuple):
  """The completions of one prompt."""

  prompt: str
  cells: list[Cell]


class Shown(NamedTuple):
  """Some rows of a batch."""

  title: str
  note: str
  groups: list[Group]


class Evaluations(NamedTuple):
  """Held-out problems, with a completion for each evaluation."""

  titles: list[str]  # of the evaluations
  note: str
  problems: list[tuple[str, list[tuple[str, str, str]]]]  # prompt; completion, reward and class


class Run(NamedTuple):
  """The folder of a run."""

  label: str
  workdir: str
  metrics: list[dict]
  config: dict[str, Any]  # {} without a config.json
  rollouts: list[Shown]
  evaluations: Evaluations
  problems: list[str]  # files that cannot be read
  quantities: list[tokens.Quantity]


def read(workdirs: Sequence[str], limits: Limits) -> list[Run]:
  """The runs in these folders.

  Files that cannot be read are left out, and listed in `Run.problems`.

  Raises:
    FileNotFoundError: a folder does not exist, or holds neither metrics nor rows.
    ValueError: the same folder twice.
  """
  with contextlib.ExitStack() as stack:
    here = [stack.enter_context(mirrors.reading(workdir)) for workdir in workdirs]
    found = _read(here, limits)
  return [run._replace(workdir=workdir) for run, workdir in zip(found, workdirs)]


def _read(workdirs: Sequence[str], limits: Limits) -> list[Run]:
  plans = [_plan(workdir, limits) for workdir in workdirs]
  # All rows share the budget of tokens; a page with very many rows shows fewer of them.
  rows = sum(min(len(stored.rows), limits.rows) for files, _ in plans for stored in files)
  most = max(limits.tokens // max(rows, 1), 40)
  shown = max(1, min(limits.rows, limits.rows * limits.tokens // max(rows * most, 1)))
  limits = limits._replace(rows=shown)
  labels = report.labels(workdirs)
  return [
    _run(workdir, label, files, problems, limits, most)
    for workdir, label, (files, problems) in zip(workdirs, labels, plans)
  ]


def _plan(workdir: str, limits: Limits) -> tuple[list[row_files.Stored], list[str]]:
  """The files of rows to show, and what is wrong with others."""
  here = [
    os.path.join(workdir, name)
    for name in ('metrics.jsonl', row_files.ROLLOUTS, row_files.EVALUATIONS)
  ]
  if not os.path.isdir(workdir) or not any(map(os.path.exists, here)):
    raise FileNotFoundError(f'{workdir}: expected the folder of a run, with metrics.jsonl')
  problems = []
  paths = spread(_files(workdir, row_files.ROLLOUTS), limits.steps)
  return list(_read_all(paths, problems)), problems


def _files(workdir: str, folder: str) -> list[str]:
  """The files of a folder in the order in which the run wrote them: by update, then by phase."""
  rows = metrics.read(os.path.join(workdir, 'metrics.jsonl'))
  order = list(dict.fromkeys(row['phase'] for row in rows))

  def place(path):
    phase, step = row_files.split_name(os.path.basename(path))
    return step, order.index(phase) if phase in order else len(order)

  return sorted(row_files.files(workdir, folder), key=place)


def _read_all(paths: Iterable[str], problems: list[str]) -> Iterable[row_files.Stored]:
  """The files that can be read; what is wrong with the others is added to `problems`."""
  for path in paths:
    try:
      yield row_files.read(path)
    except (ValueError, OSError) as error:
      problems.append(str(error))


def spread(items: Sequence[Any], most: int) -> list[Any]:
  """At most `most` of the items, evenly spaced, the last included, and the first if most > 1."""
  if len(items) <= most:
    return list(items)
  if most == 1:
    return [items[-1]]
  return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _run(
  workdir: str,
  label: str,
  files: Sequence[row_files.Stored],
  problems: list[str],
  limits: Limits,
  most: int,
) -> Run:
  """One run; of each row at most `most` tokens."""
  config = {}
  try:
    config = jsons.read_object(os.path.join(workdir, 'config.json'))
  except (ValueError, OSError) as error:
    problems.append(str(error))
  return Run(
    label=label,
    workdir=workdir,
    metrics=metrics.read(os.path.join(workdir, 'metrics.jsonl')),
    config=config,
    rollouts=[shown(stored, limits.rows, most) for stored in files],
    evaluations=_evaluations(workdir, limits, problems),
    problems=problems,
    quantities=tokens.quantities([row for stored in files for row in stored.rows]),
  )


def shown(stored: row_files.Stored, rows: int, most: int) -> Shown:
  """The first rows of a file by groups."""
  groups = {}
  for row in stored.rows[:rows]:
    key = row.get('group_ids')
    groups.setdefault(row['row'] if key is None else key, []).append(row)
  made = [
    Group(tokens.cut(members[0]['prompt'], LETTERS), [cell(row, most) for row in members])
    for members in groups.values()
  ]
  taken = min(rows, len(stored.rows))
  note = f'{taken} of the {stored.meta.get("of", "?")} rows of this batch'
  rewards = [
    r['rewards'] for r in stored.rows if r.get('rewards') is not None and r.get('valid', True)
  ]
  if rewards:
    note += f'; mean reward of the stored rows {number(float(np.mean(rewards)))}'
  return Shown(f'{stored.phase}, update {stored.step}', note, made)


def cell(row: Mapping[str, Any], most: int) -> Cell:
  """A completion or an episode with its numbers."""
  return Cell(row['row'], facts(row), said(row, most, row['start']))


def said(row: Mapping[str, Any], most: int = 10**9, first: int = 0) -> list[Said]:
  """A row from token `first` on, cut into turns if it has some; at most `most` of its tokens."""
  parts = row.get('turns')
  if not parts:
    return [Said('', [], tokens.tokens(row, most, first))]
  found, each, turn = [], max(most // (len(parts) + 1), 8), 0
  if first < parts[0]['begin']:
    found.append(Said('prompt', [], tokens.tokens(row, each, first, parts[0]['begin'])))
  for part in parts:
    own = part['who'] == 'policy'
    turn += own
    numbers = {'reward': part['reward'], **json.loads(part['metrics'])} if own else {}
    end = part['begin'] + part['length']
    found.append(
      Said(
        f'turn {turn}' if own else 'read',
        [(name, number(x)) for name, x in numbers.items()],
        tokens.tokens(row, each, part['begin'], end),
      )
    )
  return found


def facts(row: Mapping[str, Any]) -> list[tuple[str, str]]:
  """What is said of a row as a whole: its reward first."""
  found = []
  if row.get('rewards') is not None:
    found.append(('reward', number(row['rewards']) if row.get('valid', True) else 'failed'))
  terms = {k: x for k, x in row.items() if k.startswith('reward/')}
  found += [
    (name.partition('/')[2], 'none' if x is None else 'failed' if math.isnan(x) else number(x))
    for name, x in terms.items()
    if len(terms) > 1
  ]
  if row.get('label') is not None:
    found.append(('label', number(row['label'])))
  if row.get('advantages') is not None:
    inside = [a for a, m in zip(row['advantages'], row['mask']) if m]
    low, high = (min(inside), max(inside)) if inside else (0.0, 0.0)
    found.append(('advantage', number(low) + ('' if low == high else f' to {number(high)}')))
  found.append(('length', number(row['length'])))
  if row.get('turns'):
    found.append(('turns', number(sum(part['who'] == 'policy' for part in row['turns']))))
  if row.get('failure'):
    found.append(('failed', tokens.cut(row['failure'], 200)))
  if row.get('finished') is False:
    found.append(('cut off', 'at the limit'))
  if row.get('staleness'):
    found.append(('age', f'{number(row["staleness"])} batches'))
  return found


def _evaluations(workdir: str, limits: Limits, problems: list[str]) -> Evaluations:
  """The first problems of the evaluations, with the completion of each evaluation."""
  paths = spread(_files(workdir, row_files.EVALUATIONS), limits.steps)
  files = list(_read_all(paths, problems))
  table = {}  # by prompt and place: what each evaluation has
  for column, stored in enumerate(files):
    for row in stored.rows[: limits.rows]:
      place = (row['problem'], row['prompt'])
      table.setdefault(place, [('', '', '')] * len(files))[column] = (
        tokens.cut(row['completion'], LETTERS // 4),
        'failed' if math.isnan(row['rewards']) else number(row['rewards']),
        'good' if row['rewards'] > 0 else 'bad',
      )
  most = max((len(stored.rows) for stored in files), default=0)
  return Evaluations(
    [f'{stored.phase}, update {stored.step}' for stored in files],
    f'{min(limits.rows, most)} of {most} problems, greedy',
    [(tokens.cut(prompt, LETTERS // 4), row) for (_, prompt), row in table.items()],
  )


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
  """The values of the configurations that are not the same in all runs: (path, value of each)."""
  leaves = [dict(identity.leaves(run.config)) if run.config else {} for run in runs]
  paths = sorted({path for one in leaves for path in one})
  rows = [(path, [_text(one[path]) if path in one else '' for one in leaves]) for path in paths]
  return [(path, values) for path, values in rows if len(set(values)) > 1]


def chosen(runs: Sequence[Run]) -> list[tuple[str, str, list[str]]]:
  """The values that are not the defaults of polgrad: (path, default, value of each run)."""
  found = [overrides.not_default(run.config, TABLE) if run.config else {} for run in runs]
  defaults = {path: default for one in found for path, (_, default) in one.items()}
  leaves = [dict(identity.leaves(run.config)) if run.config else {} for run in runs]
  return [
    (
      path,
      '' if default is None else _text(default),
      [_text(one[path]) if path in one else '' for one in leaves],
    )
    for path, default in sorted(defaults.items())
  ]


def _text(value: Any) -> str:
  """A value of a configuration as JSON, at most 200 characters of it."""
  return tokens.cut(json.dumps(value, default=str, ensure_ascii=False), 200)


def summary(run: Run) -> list[tuple[str, str]]:
  """What the top of the page says of a run."""
  rows = run.metrics
  last = {k: x for row in rows for k, x in row.items() if isinstance(x, int | float)}
  found = [('updates', number(last['step']) if rows else '0')]
  found.append(('phases', ', '.join(dict.fromkeys(row['phase'] for row in rows))))
  for name in ('evaluation/greedy', 'reward', 'loss'):
    found.append((f'last {name}', number(last[name]) if name in last else ''))
  seconds = sum(row['seconds'] for row in rows if isinstance(row.get('seconds'), int | float))
  found.append(('seconds in logged steps', number(seconds)))
  return found
