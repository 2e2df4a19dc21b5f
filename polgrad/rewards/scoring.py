"""Runs verifiers over a batch of completions, and contains their failures.

If a verifier raises, hangs, dies or returns anything but a finite number, the reward of its row is NaN
and the row is invalid; failures are counted and reported. The reward is never set to 0, which would
teach the policy that its answer was wrong.
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

READS = ('completion', 'record', 'length')  # names of the arguments that a verifier may have
START_S = 120.0  # seconds that a worker may take to start: it imports the modules of its verifiers
MESSAGES = 5  # number of failures that are reported in words for each batch


class Scores(NamedTuple):
  """Rewards of a batch, and the failures of its verifiers."""

  total: np.ndarray  # f64[B], sum of weight * component; NaN where not valid
  components: dict[str, np.ndarray]  # f64[B] each, before weighting; NaN where a verifier failed
  valid: np.ndarray  # bool[B], whether all verifiers of the row returned a number
  errors: dict[str, int]  # number of failures by 'term/kind'
  messages: list[str]  # row and reason of the first few failures


class Failure(NamedTuple):
  """Why a verifier returned no number."""

  kind: str  # name of the exception, or 'NotFinite', 'Timeout' or 'Died'
  reason: str  # for people


def make_scorer(
  terms: Mapping[str, registry.Weighted | Callable],
  *,
  timeout_s: float = 5.0,
  workers: int = 2,
  isolate: bool = False,
) -> Callable[[Sequence[str], Sequence[dict], Sequence[int]], Scores]:
  """Makes `score(completions, records, lengths) -> Scores`.

  Args:
    terms: verifiers by name. Each is a bound part or any callable with positional arguments out of
      completion, record and length. `registry.Weighted` gives it a coefficient; otherwise that is 1.
    timeout_s: seconds that one verifier may take on one row; enforced only with `isolate`.
    workers: number of processes with `isolate`. They start with the first call and live as long as
      `score`.
    isolate: run verifiers in separate processes. A process that hangs is killed and replaced, one that
      dies is replaced. This contains accidents, but it is no sandbox for hostile code. Without
      `isolate`, verifiers run in this process, one after the other: exceptions are contained, a hang
      is not.

  Raises:
    ValueError: a verifier with another argument.
    TypeError: with `isolate`, a function that cannot be pickled (a lambda, a closure).
  """
  # Check everything now, so that a mistake is reported before the first rollout.
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
    # One task for each pair of verifier and row; results come in the order of the tasks.
    tasks = [(name, row) for name in verifiers for row in range(len(rows))]
    results = dict(zip(tasks, run([(name, rows[row]) for name, row in tasks])))

    # A component is NaN unless its verifier returned a number, and NaN in a sum makes the total NaN.
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
  """Refuses a verifier with unknown arguments, or one that cannot be sent to another process."""
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
  """Runs one verifier on one row; every error becomes a `Failure`."""
  try:
    value = float(registry.call(fn, row))
  except (Exception, SystemExit) as error:  # the batch continues whatever a verifier does
    return Failure(type(error).__name__, str(error)[:500])
  return value if math.isfinite(value) else Failure('NotFinite', f'returned {value}')


def _run_here(verifiers):
  return lambda tasks: [_verify(verifiers[name], row) for name, row in tasks]


def _run_isolated(verifiers, workers, timeout_s):
  """Runs tasks in worker processes.

  Each process has a thread here, which sends it a task and waits for the answer or the deadline.
  """
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
  """A process that runs verifiers. It starts with the first task, and again after it was stopped."""

  def __init__(self, verifiers, timeout_s):
    self._verifiers, self._timeout_s = verifiers, timeout_s
    self._process = self._pipe = None

  def ask(self, task) -> float | Failure:
    """Sends a task (name of a verifier, row) and waits for the result."""
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
    # A worker that hangs or has died is not used again; the next task starts a new one.
    self._stop()
    return failure

  def _start(self):
    # Spawned, not forked: a forked child would inherit the locks of JAX's threads.
    context = multiprocessing.get_context('spawn')
    self._pipe, child = context.Pipe()
    self._process = context.Process(target=_work, args=(child, self._verifiers), daemon=True)
    self._process.start()
    child.close()  # now only the worker has this end, so its death ends our file
    # Wait until the worker has imported its modules, so that no verifier loses that time.
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
  """Main function of a worker: reports that it is ready, then answers tasks until the pipe closes."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent
  pipe.send('ready')
  with contextlib.suppress(EOFError, BrokenPipeError):
    while True:
      name, row = pipe.recv()
      pipe.send(_verify(verifiers[name], row))
