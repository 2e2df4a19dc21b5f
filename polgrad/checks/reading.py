"""Reads all records of a source as a run will, and says how long they are and what becomes of them."""

import collections
import concurrent.futures
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from polgrad.checks import duplicates
from polgrad.checks.findings import Finding, reader_field, some, source_field
from polgrad.data import batching
from polgrad.data.tokenizers import Tokenizer

PATIENCE = 8.0  # seconds of reading that are not worth starting further processes, which takes some
CHUNK = 500  # records that a process reads at a time


class Budget(NamedTuple):
  """The tokens that a reader of records (a collector, or the evaluation) has room for."""

  prompt: int  # of a prompt; 0: as many as the row
  new: int  # of a completion; 0: as many as the row
  row: int

  @classmethod
  def of(cls, reader: Any) -> 'Budget':
    new = getattr(reader, 'max_new_tokens', 0)
    return cls(
      reader.prompt_length, new, getattr(reader, 'length', 0) or reader.prompt_length + new
    )

  def fits(self, row: batching.TokenRow) -> bool:
    """Whether a row (of a prompt, or with its completion) loses no token."""
    prompt, rest = row.prompt, len(row.ids) - row.prompt
    if self.prompt and (prompt > self.prompt or self.prompt + rest > self.row):
      return False
    return len(row.ids) <= self.row and not (self.new and rest > self.new)


class RecordFacts(NamedTuple):
  """What is known of a record after it was read."""

  row: int  # its number in the source
  error: str = ''  # why it is refused for another reason than its length; then the rest is unknown
  fate: str = 'kept'  # of `batching.fate`, or 'refused' because it is too long
  prompts: tuple[int, ...] = ()  # tokens of the prompt of each of its rows
  completions: tuple[
    int, ...
  ] = ()  # tokens of each completion through its stop token; () for prompts
  trained: tuple[int, ...] = ()  # of these, tokens that the loss looks at before anything is cut
  ends_lost: int = 0  # completions that are cut before their stop token
  asked: bytes = b''  # digest of the text of the prompt, see `duplicates`
  answered: bytes = b''  # digest of the answer, or of the chosen completion


def read_record(record: Mapping, reader: Any, tokenizer: Tokenizer) -> RecordFacts:
  """Reads one record, which has its row as `id`, as `reader` would lay it out."""
  fields = getattr(reader, 'fields', ())
  own = RecordFacts(row=record['id'])
  try:
    own = own._replace(asked=duplicates.asked(record), answered=duplicates.answered(record))
    rows = batching.read(record, tokenizer, fields)
    budget = Budget.of(reader)
    # Whether pairs, labels and lists are usable is known only when they are laid out.
    if {*fields} - {'answer'} or not all(budget.fits(row) for row in rows):
      own = own._replace(fate=_fate(record, reader, tokenizer))
  except batching.Unusable as error:
    own = own._replace(fate='unusable')
    if getattr(reader, 'unusable', 'error') == 'drop':
      return own
    return own._replace(error=str(error).removeprefix(f'record {record["id"]}: '))
  except ValueError as error:
    return own._replace(error=str(error).removeprefix(f'record {record["id"]}: '))
  if not fields:
    return own._replace(prompts=(len(rows[0].ids),))
  cut = [row for row in rows if own.fate == 'cut' and not _end_fits(row, budget)]
  return own._replace(
    prompts=tuple(row.prompt for row in rows),
    completions=tuple(len(row.ids) - row.prompt for row in rows),
    trained=tuple(sum(row.trained) for row in rows),
    ends_lost=len(cut),
  )


def _end_fits(row: batching.TokenRow, budget: Budget) -> bool:
  """Whether a row keeps its last token when it is cut: a prompt loses its beginning, a row its end."""
  rest = len(row.ids) - row.prompt
  prompt = budget.prompt or row.prompt
  return prompt + rest <= budget.row and not (budget.new and rest > budget.new)


def _fate(record: Mapping, reader: Any, tokenizer: Tokenizer) -> str:
  try:
    return batching.fate(reader, record, tokenizer)
  except batching.TooLong:
    return 'refused'


class ReadJob(NamedTuple):
  """A source, and those who read it."""

  source: Sequence[Mapping]
  reader: Any  # a collector, or the evaluation
  tokenizer: Tokenizer

  def read(self, rows: Sequence[int]) -> list[RecordFacts]:
    return [read_record({**self.source[i], 'id': i}, self.reader, self.tokenizer) for i in rows]


def read_all(
  rows: Sequence[int], job: ReadJob, make: Callable[[], ReadJob], processes: int = 0
) -> Iterator[list[RecordFacts]]:
  """Reads records of a source in pieces, which come in their order.

  Args:
    rows: numbers of the records.
    job: reads them in this process, if they are few.
    make: is sent to other processes, and makes the same job there.
    processes: number of processes; 0: as many as there are CPUs, 16 at most.
  """
  processes = processes or min(os.cpu_count() or 1, 16)
  pieces = [rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK)]
  # The first piece says how long all will take.
  started = time.perf_counter()
  yield from map(job.read, pieces[:1])
  pieces = pieces[1:]
  if processes == 1 or (time.perf_counter() - started) * len(pieces) < PATIENCE:
    yield from map(job.read, pieces)
    return
  # Processes are spawned, because one that was forked from a process with JAX's threads may hang.
  with concurrent.futures.ProcessPoolExecutor(
    processes, multiprocessing.get_context('spawn'), initializer=_start, initargs=(make,)
  ) as pool:
    yield from pool.map(_read, pieces)


_JOB: list[ReadJob] = []  # of a process that reads for another one


def _start(make: Callable[[], ReadJob]) -> None:
  _JOB.append(make())


def _read(rows: Sequence[int]) -> list[RecordFacts]:
  return _JOB[0].read(rows)


class Spread(NamedTuple):
  """How numbers are distributed."""

  name: str
  count: int
  median: int
  most: int  # that 95% do not exceed
  largest: int
  edges: tuple[int, ...]  # of the histogram, n + 1
  counts: tuple[int, ...]  # numbers in each of its n parts: edge <= x < next edge
  budget: int = 0  # the largest number that there is room for; 0: none is named
  over: int = 0  # how many numbers exceed it


def spread(name: str, values: Sequence[int], budget: int = 0, parts: int = 8) -> Spread:
  """The distribution of some (at least one) numbers, in a histogram of at most `parts` equal parts."""
  x = np.asarray(values)
  low, high = int(x.min()), int(x.max()) + 1
  # A few very long ones have a part for themselves.
  end = min(high, 2 * int(np.quantile(x, 0.95, method='higher')) + 1)
  width = -(-(end - low) // parts)
  edges = [*range(low, end, width), end] if end > low else [low]
  edges = tuple(dict.fromkeys([*edges, high]))
  counts, _ = np.histogram(x, np.asarray(edges) - 0.5)
  middle, most = np.quantile(x, [0.5, 0.95], method='higher')
  return Spread(
    name, len(x), int(middle), int(most), high - 1, edges, tuple(map(int, counts)),
    budget, int((x > budget).sum()) if budget else 0,
  )  # fmt: skip


class Summary(NamedTuple):
  """What is known of a source after it was read."""

  records: int
  spreads: tuple[Spread, ...]  # of prompts, completions and rows, in tokens
  fates: Mapping[str, int]  # records by what becomes of them, 'error' included
  tokens: int  # of all rows with completions
  trained: int  # of these, tokens that the loss looks at
  untrained: tuple[int, ...]  # records with a row of which no token is trained
  ends_lost: tuple[int, ...]  # records with a completion that loses its stop token


def summary(found: Sequence[RecordFacts], reader: Any) -> Summary:
  """Lengths, masks and fates of what was read."""
  budget = Budget.of(reader)
  flat = lambda name: [x for one in found for x in getattr(one, name)]
  prompts, completions, trained = flat('prompts'), flat('completions'), flat('trained')
  rows = [p + c for p, c in zip(prompts, completions)] if completions else []
  kinds = (
    ('prompt', prompts, budget.prompt),
    ('completion', completions, budget.new),
    ('row', rows, budget.row),
  )
  return Summary(
    records=len(found),
    spreads=tuple(spread(*kind) for kind in kinds if kind[1]),
    fates=collections.Counter('error' if one.error else one.fate for one in found),
    tokens=sum(rows),
    trained=sum(trained),
    untrained=tuple(one.row for one in found if completions and 0 in one.trained),
    ends_lost=tuple(one.row for one in found if one.ends_lost),
  )


def findings(
  path: str, found: Sequence[RecordFacts], said: Summary, overlong: str, place: Callable[[int], str]
) -> list[Finding]:
  """What is wrong with the records of a source.

  Args:
    path: of the section of the configuration that reads them.
    overlong: what the run does with records that are too long.
    place: what a person calls a row.
  """
  wrong, source = [], source_field(path)
  fate = lambda name: [one.row for one in found if one.fate == name and not one.error]
  errors = collections.defaultdict(list)
  unusable = {one.row for one in found if one.fate == 'unusable'}
  for one in found:
    if one.error:
      errors[one.error].append(one.row)
  for text, rows in sorted(errors.items(), key=lambda item: item[1])[:5]:
    mend = 'correct or remove them'
    if rows[0] in unusable:
      mend += f', or --{reader_field(path)}.unusable=drop'
    wrong.append(Finding(source, f'{some(rows, place)}: {text}', mend, fails=True))
  if len(errors) > 5:
    wrong.append(Finding(source, f'and {len(errors) - 5} other kinds of errors', fails=True))
  if refused := fate('refused'):
    text = f'{len(refused)} of {said.records} records are too long ({some(refused, place)})'
    owner = reader_field(path)
    mend = f'give more room, or --{owner}.overlong=drop (or truncate)'
    wrong.append(Finding(source, text, mend, fails=True))
  for name in ('dropped', 'cut'):
    if rows := fate(name):
      text = f'{len(rows)} of {said.records} records are too long and {name} ({some(rows, place)})'
      everything = name == 'dropped' and len(rows) == said.records
      wrong.append(Finding(source, text, f'overlong is {overlong}', fails=everything))
  if rows := fate('unusable'):
    text = f'{len(rows)} of {said.records} records are unusable and dropped ({some(rows, place)})'
    everything = len(rows) == said.records
    wrong.append(Finding(source, text, "unusable is 'drop'", fails=everything))
  if rows := said.ends_lost:
    text = f'{len(rows)} records are cut before their stop token ({some(rows, place)})'
    wrong.append(Finding(source, text, 'the model does not learn to stop from them'))
  if said.untrained:
    text = f'no token of {some(said.untrained, place)} is trained'
    wrong.append(Finding(source, text, fails=len(said.untrained) == said.records))
  return wrong
