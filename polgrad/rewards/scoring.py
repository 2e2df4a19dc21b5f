"""Runs verifiers over a batch of completions, and survives them.

A verifier that raises, hangs, dies or answers with something that is not a finite number makes its
row invalid: counted, reported, NaN. It never becomes a reward of 0, which would teach the policy
that its answer was wrong.
"""

import collections
import contextlib
import math
import multiprocessing
import pickle
import queue
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import NamedTuple

import numpy as np

from polgrad import registry

READS = ('completion', 'record', 'length')
START_S = 120.0  # a worker imports the modules of its verifiers first
MESSAGES = 5


class Scores(NamedTuple):
  """Rewards of a batch and what went wrong; a failed verification is NaN."""

  total: np.ndarray  # f64[B], sum of weight * component; NaN where not valid
  components: dict[str, np.ndarray]  # f64[B] each, before weighting
  valid: np.ndarray  # bool[B], every verifier of the row answered
  errors: dict[str, int]  # how often, by 'term/kind'
  messages: list[str]  # the first few, with row and reason


class Failure(NamedTuple):
  """Why a verification gave no number."""

  kind: str
  reason: str


def make_scorer(
  terms: Mapping[str, registry.Weighted | Callable],
  *,
  timeout_s: float = 5.0,
  workers: int = 2,
  isolate: bool = False,
) -> Callable[[Sequence[str], Sequence[dict], Sequence[int]], Scores]:
  """Makes `score(completions, records, lengths) -> Scores`.

  Args:
    terms: named verifiers, each a bound part or any callable whose positional arguments are out of
      completion, record and length; `registry.Weighted` gives a coefficient, a bare callable has 1.
    timeout_s: seconds for one verifier on one row; only isolation can enforce it.
    workers: processes, when isolated. They start with the first call and live as long as `score`.
    isolate: run verifiers in processes of their own. One that hangs is killed and replaced, one
      that dies is replaced. This contains accidents; it is no sandbox for hostile code. Without it
      the verifiers run here, one after the other: exceptions are contained, a hang is not.

  Raises:
    ValueError: a verifier reads something else.
    TypeError: isolation of a function that cannot be pickled (a lambda, a closure).
  """
  terms = {
    name: term if isinstance(term, registry.Weighted) else registry.Weighted(1.0, term)
    for name, term in terms.items()
  }
  verifiers = {name: term.fn for name, term in terms.items()}
  for name, fn in verifiers.items():
    _check(name, fn, isolate)
  run = _run_isolated(verifiers, workers, timeout_s) if isolate else _run_here(verifiers)

  def score(completions, records, lengths):
    rows = [dict(zip(READS, row)) for row in zip(completions, records, lengths, strict=True)]
    tasks = [(name, row) for name in verifiers for row in range(len(rows))]
    results = dict(zip(tasks, run([(name, rows[row]) for name, row in tasks])))

    components = {name: np.full(len(rows), np.nan) for name in verifiers}
    errors, messages = collections.Counter(), []
    for (name, row), result in results.items():
      if isinstance(result, Failure):
        errors[f'{name}/{result.kind}'] += 1
        messages.append(f'row {row}: {name}: {result.kind}: {result.reason}')
      else:
        components[name][row] = result
    total = sum((terms[n].weight * c for n, c in components.items()), np.zeros(len(rows)))
    return Scores(total, components, np.isfinite(total), dict(errors), messages[:MESSAGES])

  return score


def _check(name, fn, isolate):
  unknown = sorted(set(registry.inputs(fn)) - set(READS))
  if unknown:
    raise ValueError(f'{name}: a verifier cannot read {unknown}; valid: {list(READS)}')
  if isolate:
    try:
      pickle.dumps(fn)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
      raise TypeError(
        f'{name}: isolated verifiers are sent to other processes; this one cannot be ({error}): '
        'define it at the top of a module, or set isolate=False'
      ) from error


def _verify(fn, row) -> float | Failure:
  try:
    value = float(registry.call(fn, row))
  except (Exception, SystemExit) as error:  # whatever a verifier does, the batch goes on
    return Failure(type(error).__name__, str(error)[:500])
  return value if math.isfinite(value) else Failure('NotFinite', f'returned {value}')


def _run_here(verifiers):
  return lambda tasks: [_verify(verifiers[name], row) for name, row in tasks]


def _run_isolated(verifiers, workers, timeout_s):
  """One thread a worker process: it hands out a task, and waits for the answer or the deadline."""
  idle = queue.SimpleQueue()
  for _ in range(workers):
    idle.put(_Worker(verifiers, timeout_s))

  def ask(task):
    worker = idle.get()
    try:
      return worker.ask(task)
    finally:
      idle.put(worker)

  def run(tasks):
    with futures.ThreadPoolExecutor(workers) as threads:
      return list(threads.map(ask, tasks))

  return run


class _Worker:
  """A process that verifies, started when it is first asked and again after it had to go."""

  def __init__(self, verifiers, timeout_s):
    self._verifiers, self._timeout_s = verifiers, timeout_s
    self._process = self._pipe = None

  def ask(self, task) -> float | Failure:
    if self._process is None:
      self._start()
    try:
      self._pipe.send(task)
      if self._pipe.poll(self._timeout_s):
        return self._pipe.recv()
      failure = Failure('Timeout', f'no answer in {self._timeout_s} s')
    except (EOFError, OSError):
      failure = Failure('Died', 'the worker process ended')
    except Exception as error:  # a record that cannot be pickled: nothing was sent
      return Failure(type(error).__name__, str(error)[:500])
    self._stop()
    return failure

  def _start(self):
    # A forked child would inherit the locks of JAX's threads, so start from nothing.
    context = multiprocessing.get_context('spawn')
    self._pipe, child = context.Pipe()
    self._process = context.Process(target=_work, args=(child, self._verifiers), daemon=True)
    self._process.start()
    child.close()  # the worker now holds the only end, so its death is our end of file
    try:
      if self._pipe.poll(START_S):
        self._pipe.recv()
        return
      reason = f'did not start in {START_S} s'
    except (EOFError, OSError):
      reason = 'ended before its first task; its own message is on stderr'
      self._process.join(timeout=1.0)  # time to write it
    self._stop()
    raise RuntimeError(f'a verifier process {reason}')

  def _stop(self):
    self._process.kill()
    self._process.join()
    self._pipe.close()
    self._process = self._pipe = None


def _work(pipe, verifiers):
  """Says that it is ready, then answers one task after the other until the pipe is closed."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
  pipe.send('ready')
  with contextlib.suppress(EOFError, BrokenPipeError):
    while True:
      name, row = pipe.recv()
      pipe.send(_verify(verifiers[name], row))
