"""Runs verifiers over a batch of completions, and contains their failures.

If a verifier raises, hangs, dies or returns anything but a finite number, the reward of its row is NaN
and the row is invalid; failures are counted and reported. The reward is never set to 0, which would
teach the policy that its answer was wrong.

A verifier with the attribute `batched = True` judges all rows in one call, such as a reward model or a
judge that is asked over the network. Its arguments are lists over the rows, out of `OF_BATCHES`; it
returns a list with a number or a `Failure` for each row. It runs in this process, without a limit of
time. If it raises, all of its rows have failed.
"""

import collections
import types
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import NamedTuple

import numpy as np

from polgrad import registry
from polgrad.rewards import combinations, comparisons, spans, worker
from polgrad.rewards import verifiers as ours
from polgrad.rewards.worker import (
  Failure,
  Part,
  is_batched,
  mark,
  marks,
  number,
  verify,
  words,
)

READS = ('completion', 'record', 'length')  # what every call of `score` gets of a row
ALSO = ('prompt', 'tokens')  # what it gets only if a verifier reads it
# What a verifier of whole batches may read: lists over the rows.
OF_BATCHES = ('completions', 'records', 'lengths', *ALSO)
# What a comparison gets of a pair of rows, besides 'prompt'.
PAIR = ('first', 'second', 'record', 'first_reward', 'second_reward')
# What a function that scores parts of a completion gets of a row, besides `ALSO`.
WHOLE = (*READS, 'reward')
MESSAGES = 5  # number of failures that are reported in words for each batch
# Verifiers that run in this process: they are quick, start nothing and evaluate nothing.
IN_PROCESS = (
  *(ours.exact_match, ours.numeric_answer, ours.boxed_answer),
  *(ours.choice_letter, ours.soft_overlong, ours.length_gap, ours.length_budget),
  *(comparisons.by_reward, comparisons.larger_reward, comparisons.by_table, comparisons.shorter),
  *(spans.whole, spans.agreeing_characters),
)


class Scores(NamedTuple):
  """Rewards of a batch, and the failures of its verifiers."""

  total: (
    np.ndarray
  )  # f64[B], the components combined, by default sum of weight * component; NaN where
  # not valid
  components: dict[str, np.ndarray]  # f64[B] each, before weighting; NaN where a verifier failed
  valid: (
    np.ndarray
  )  # bool[B], whether all verifiers of the row returned numbers that can be combined
  errors: dict[str, int]  # number of failures by 'term/kind'
  messages: list[str]  # row and reason of the first few failures


def make_scorer(
  terms: Mapping[str, registry.Weighted | Callable],
  *,
  combine: Callable[..., np.ndarray] = combinations.weighted_sum,
  timeout_s: float = 5.0,
  workers: int = 2,
  memory_gib: float = 4.0,
  isolate: bool = True,
) -> Callable[..., Scores]:
  """Makes `score(completions, records, lengths, others={}) -> Scores`.

  The first three are lists over the rows. `others` has functions by 'prompt' and 'tokens', which make
  such lists; they are called only if a verifier reads the result. `score.begin(rows)` starts processes
  for a number of rows in the background, so that the first call need not wait for their imports.

  Args:
    terms: verifiers by name. Each is a bound part or any callable with positional arguments out of
      completion, record, length, prompt and tokens, or of `OF_BATCHES` if it judges whole batches.
      `registry.Weighted` gives it a coefficient; otherwise that is 1.
    combine: (components f64[n, B], weights f64[n]) -> total f64[B], see `combinations`.
    timeout_s: seconds that one isolated verifier may take on one row.
    workers: processes of isolated verifiers. They start with the first call, or `begin`, and live as
      long as `score`.
    memory_gib: address space of each process; 0: no limit.
    isolate: run verifiers in separate processes, except those of polgrad that need none
      (`IN_PROCESS`). A process that hangs is killed and replaced, one that dies is replaced (see
      `rewards/worker.py`, also for what this does not keep out). False runs all in this process, one
      after the other: exceptions are contained, a hang is not.

  Raises:
    ValueError: a verifier with another argument, or a limit that is not positive.
    TypeError: a function that is isolated and cannot be sent to another process.
  """
  # Check everything now, so that a mistake is reported before the first rollout.
  terms = {
    name: term if isinstance(term, registry.Weighted) else registry.Weighted(1.0, term)
    for name, term in terms.items()
  }
  verifiers = {name: term.fn for name, term in terms.items()}
  weights = np.array([term.weight for term in terms.values()], np.float64)
  for name, fn in verifiers.items():
    _check(name, fn)
  plural = dict(zip(OF_BATCHES, (*READS, *ALSO)))
  judge = _make_judge(verifiers, plural, timeout_s, workers, memory_gib, isolate)

  def score(completions, records, lengths, others=types.MappingProxyType({})):
    rows = [dict(zip(READS, row)) for row in zip(completions, records, lengths, strict=True)]
    answers, errors, messages = judge(_with_others(rows, others, verifiers))
    components = {name: _numbers(found) for name, found in answers.items()}
    # A component is NaN unless its verifier returned a number, and then the total is NaN too.
    found = np.array([*components.values()], np.float64).reshape(len(terms), len(rows))
    total = combine(found, weights) if terms else np.zeros(len(rows))
    alone = ~np.isfinite(total) & np.isfinite(found).all(axis=0)
    if alone.any():
      row = int(np.argmax(alone))
      name = registry.unbound(combine).__name__
      errors['combine/NoNumber'] = int(alone.sum())
      said = {n: round(float(x[row]), 4) for n, x in components.items()}
      messages = [*messages, f'row {row}: combine: {name} of {said} is no number'][:MESSAGES]
    return Scores(total, components, np.isfinite(total), errors, messages)

  score.begin = judge.begin
  return score


class Compared(NamedTuple):
  """Comparisons of pairs, and the failures of the verifier that compares."""

  wins: np.ndarray  # f64[n], probability that the first of the pair is better; NaN where it failed
  errors: dict[str, int]  # number of failures by 'comparison/kind'
  messages: list[str]  # pair and reason of the first few failures


def make_comparer(
  comparison: Callable,
  *,
  timeout_s: float = 5.0,
  workers: int = 2,
  memory_gib: float = 4.0,
  isolate: bool = True,
) -> Callable[..., Compared]:
  """Makes `compare(pairs, others={}) -> Compared`.

  `pairs` is a list of mappings with first, second, record, first_reward and second_reward; `others` and
  `compare.begin` are as in `make_scorer`. A comparison that raises, hangs, or returns no number in
  [0, 1] has failed.

  Args:
    comparison: see `comparisons`.
    timeout_s, workers, memory_gib, isolate: as in `make_scorer`.

  Raises:
    ValueError: the comparison has another argument, or a limit is not positive.
    TypeError: the comparison is isolated and cannot be sent to another process.
  """
  unknown = sorted(set(registry.inputs(comparison)) - {*PAIR, 'prompt'})
  if unknown:
    raise ValueError(f'comparison: it cannot read {unknown}; valid: {[*PAIR, "prompt"]}')
  verifiers = {'comparison': comparison}
  plural = {name: name for name in (*PAIR, 'prompt')}
  judge = _make_judge(verifiers, plural, timeout_s, workers, memory_gib, isolate)

  def compare(pairs, others=types.MappingProxyType({})):
    answers, errors, messages = judge(_with_others([dict(p) for p in pairs], others, verifiers))
    wins = _numbers(answers['comparison'])
    messages = [text.replace('row', 'pair', 1) for text in messages]
    outside = (wins < 0) | (wins > 1)
    if outside.any():
      wins = np.where(outside, np.nan, wins)
      errors['comparison/NotAProbability'] = int(outside.sum())
      messages.append(f'pair {np.argmax(outside)}: comparison: it returned no number in [0, 1]')
    return Compared(wins, errors, messages)

  compare.begin = judge.begin
  return compare


class Marked(NamedTuple):
  """Scores of parts of completions, and the failures of the function that gives them."""

  parts: list[list[Part] | None]  # [B], (start, end, score) in characters; None where it failed
  errors: dict[str, int]  # number of failures by 'spans/kind'
  messages: list[str]  # row and reason of the first few failures


def make_marker(
  fn: Callable,
  *,
  timeout_s: float = 5.0,
  workers: int = 2,
  memory_gib: float = 4.0,
  isolate: bool = True,
) -> Callable[..., Marked]:
  """Makes `mark(completions, records, lengths, rewards, others={}) -> Marked`.

  `others` and `mark.begin` are as in `make_scorer`. A function that raises or hangs has failed, and so
  has one whose parts overlap, are empty or lie outside of the completion.

  Args:
    fn: see `spans`.
    timeout_s, workers, memory_gib, isolate: as in `make_scorer`.

  Raises:
    ValueError: the function has another argument, or a limit is not positive.
    TypeError: the function is isolated and cannot be sent to another process.
  """
  singular = [*WHOLE, *ALSO]
  plural = dict(zip((*OF_BATCHES[:3], 'rewards', *ALSO), singular))
  valid = [*plural] if is_batched(fn) else singular
  unknown = sorted(set(registry.inputs(fn)) - set(valid))
  if unknown:
    raise ValueError(f'spans: it cannot read {unknown}; valid: {valid}')
  limits = timeout_s, workers, memory_gib, isolate
  judge = _make_judge({'spans': fn}, plural, *limits, run=mark, read=marks)

  def marked(completions, records, lengths, rewards, others=types.MappingProxyType({})):
    columns = completions, records, lengths, rewards
    rows = [dict(zip(WHOLE, row)) for row in zip(*columns, strict=True)]
    answers, errors, messages = judge(_with_others(rows, others, {'spans': fn}))
    parts = [None if isinstance(x, Failure) else x for x in answers['spans']]
    for i, (found, text) in enumerate(zip(parts, completions)):
      if found and found[-1][1] > len(text):
        said = (
          f'row {i}: spans: Outside: [{found[-1][0]}, {found[-1][1]}) of {len(text)} characters'
        )
        errors['spans/Outside'] = errors.get('spans/Outside', 0) + 1
        messages, parts[i] = [*messages, said][:MESSAGES], None
    return Marked(parts, errors, messages)

  marked.begin = judge.begin
  return marked


def _numbers(answers: Sequence[float | Failure]) -> np.ndarray:
  """f64[n]; NaN where a verifier failed."""
  return np.array([np.nan if isinstance(x, Failure) else x for x in answers], np.float64)


def _with_others(
  rows: list[dict], others: Mapping[str, Callable], verifiers: Mapping[str, Callable]
) -> list[dict]:
  """Adds to the rows, in place, what is made only if a verifier reads it: the names of `ALSO`."""
  read = {name for fn in verifiers.values() for name in registry.inputs(fn)}
  for name in read & {*ALSO} & others.keys():
    for row, value in zip(rows, others[name](), strict=True):
      row[name] = value
  return rows


def _make_judge(
  verifiers: Mapping[str, Callable],
  plural: Mapping[str, str],
  timeout_s: float,
  workers: int,
  memory_gib: float,
  isolate: bool,
  *,
  run: Callable = verify,
  read: Callable = number,
) -> Callable[[list[dict]], tuple[dict[str, list], dict[str, int], list[str]]]:
  """Makes `judge(rows) -> (answers, errors, messages)`, which runs every verifier on every row.

  `judge.begin(rows)` starts the processes of isolated verifiers for a number of rows in the background.

  Args:
    plural: by the name that a verifier of whole batches gives to an argument, its name in a row.
    run: (verifier, row) -> answer or `Failure`.
    read: the same of what a verifier of whole batches has returned for a row.
  """
  if timeout_s <= 0 or workers < 1 or memory_gib < 0:
    raise ValueError(
      f'verifier limits: {timeout_s} s and {workers} workers must be positive, and {memory_gib} GiB '
      'at least 0'
    )
  whole = {name: fn for name, fn in verifiers.items() if is_batched(fn)}
  apart = {
    name: fn
    for name, fn in verifiers.items()
    if isolate and name not in whole and registry.unbound(fn) not in IN_PROCESS
  }
  sent = worker.dumps(apart, run)
  pool = worker.Workers(workers if apart else 0, sent, timeout_s, memory_gib)
  reads = {name: registry.inputs(fn) for name, fn in verifiers.items()}

  def run_all(tasks):
    here = lambda name, row: run(verifiers[name], row)
    # Workers start first, and this process judges while they do.
    threads = futures.ThreadPoolExecutor(workers)
    try:
      answers = [threads.submit(pool.ask, t) if t[0] in apart else None for t in tasks]
      return [a.result() if a else here(*t) for a, t in zip(answers, tasks)]
    finally:  # after an interruption, the tasks that wait are not done
      threads.shutdown(wait=False, cancel_futures=True)

  def judge(rows):
    # One task for each pair of verifier and row; results come in the order of the tasks. A verifier gets
    # what it reads, because all that it gets is sent to its process.
    tasks = [(name, row) for name in verifiers if name not in whole for row in range(len(rows))]
    given = [
      (name, {k: v for k, v in rows[row].items() if k in reads[name]}) for name, row in tasks
    ]
    results = dict(zip(tasks, run_all(given), strict=True))
    for name, fn in whole.items():
      answers = _judge_batch(fn, rows, plural, read)
      results |= {(name, row): answer for row, answer in enumerate(answers)}

    answers = {name: [None] * len(rows) for name in verifiers}
    errors, messages = collections.Counter(), []
    for (name, row), result in results.items():
      answers[name][row] = result
      if isinstance(result, Failure):
        errors[f'{name}/{result.kind}'] += 1
        messages.append(f'row {row}: {name}: {result.kind}: {result.reason}')
    return answers, dict(errors), messages[:MESSAGES]

  judge.begin = pool.begin
  return judge


def _judge_batch(
  fn: Callable, rows: Sequence[Mapping], plural: Mapping[str, str], read: Callable
) -> list:
  """One answer for each row by a verifier of whole batches, as `read` reads it; else a `Failure`."""
  if not rows:
    return []
  lists = {k: [row[name] for row in rows] for k, name in plural.items() if name in rows[0]}
  try:
    answers = list(registry.call(fn, lists))
    if len(answers) != len(rows):
      raise ValueError(f'it returned {len(answers)} values for {len(rows)} rows')
  except Exception as error:  # the batch continues whatever a verifier does
    return [Failure(type(error).__name__, words(error))] * len(rows)
  return [read(x) for x in answers]


def _check(name: str, fn: Callable) -> None:
  """Refuses a verifier with unknown arguments."""
  valid = OF_BATCHES if is_batched(fn) else (*READS, *ALSO)
  unknown = sorted(set(registry.inputs(fn)) - set(valid))
  if unknown:
    raise ValueError(f'{name}: a verifier cannot read {unknown}; valid: {[*valid]}')
