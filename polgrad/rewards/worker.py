"""A process that runs verifiers, so that one that hangs, dies or fills the memory harms nothing else.

`Worker` is the trainer's side. `main` is the other: a guard that only watches whether the trainer
lives, and its child, which runs the verifiers. Both are in one process group, together with every
process that a verifier starts, and the group is killed as a whole. Environments run in the same way
(`environments/workers.py`): what is said of verifiers here holds for them.

This contains accidents. It is no sandbox: a verifier can read and write files, use the network, and
leave the group on purpose.
"""

import contextlib
import importlib
import importlib.machinery
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import cloudpickle

from polgrad import registry

START = 'import sys; from polgrad.rewards import worker; worker.main(*map(int, sys.argv[1:]))'
START_S = 120.0  # seconds that a worker may take to start: it imports the modules of its verifiers


class Failure(NamedTuple):
  """Why a verifier returned no number."""

  kind: str  # name of the exception, or 'NotFinite', 'Timeout' or 'Died'
  reason: str  # for people


Part = tuple[int, int, float]  # of a text: start, end, score


def verify(fn: Callable, row: Mapping) -> float | Failure:
  """Runs one verifier on one row; every error becomes a `Failure`."""
  return contained(lambda: number(registry.call(fn, row)))


def contained(call: Callable[[], Any]) -> Any | Failure:
  """What code of a user returns; every error becomes a `Failure`, because the batch continues."""
  process = os.getpid()
  try:
    value = call()
  except (Exception, SystemExit) as error:
    value = Failure(type(error).__name__, words(error))
  if os.getpid() != process:  # the call forked, and this is the copy: it must not answer as well
    os._exit(1)
  return value


def is_batched(fn: Callable) -> bool:
  """Whether a verifier or a comparison judges a whole batch in one call."""
  return bool(getattr(registry.unbound(fn), 'batched', False))


def number(value: Any) -> float | Failure:
  """What a verifier returned as a finite number; a `Failure` stays one, and all else becomes one."""
  if isinstance(value, Failure):
    return value
  try:
    value = float(value)
  except (TypeError, ValueError, OverflowError) as error:
    return Failure(type(error).__name__, words(error))
  return value if math.isfinite(value) else Failure('NotFinite', f'returned {value}')


def mark(fn: Callable, row: Mapping) -> list[Part] | Failure:
  """Runs a function that scores parts of a completion on one row; every error becomes a `Failure`."""
  return contained(lambda: marks(registry.call(fn, row)))


def marks(value: Any) -> list[Part] | Failure:
  """Parts of a text as (start, end, score), in the order of the text; a `Failure` stays one, and what is
  no list of such parts becomes one."""
  if isinstance(value, Failure):
    return value
  try:
    found = sorted((int(start), int(end), float(score)) for start, end, score in value)
  except (TypeError, ValueError, OverflowError) as error:
    return Failure(type(error).__name__, f'expected (start, end, score) of parts: {words(error)}')
  last = 0
  for start, end, score in found:
    if not math.isfinite(score):
      return Failure('NotFinite', f'the score of [{start}, {end}) is {score}')
    if not last <= start < end:
      said = f'[{start}, {end}) is empty or begins before {last}, where the part before it ends'
      return Failure('Overlap', said)
    last = end
  return found


def words(error: BaseException) -> str:
  """What an error says, also if saying it fails."""
  try:
    return str(error)[:500]
  except Exception:  # an exception of the user, with a __str__ of the user
    return 'its message cannot be shown'


def dumps(verifiers: Mapping[str, Callable], run: Callable = verify) -> bytes:
  """The functions as bytes; those of files that another process cannot import travel whole.

  Args:
    verifiers: by name.
    run: (verifier, row) -> what it answers, or a `Failure`.

  Raises:
    TypeError: names the function that cannot be sent.
  """
  for name, fn in verifiers.items():
    try:
      send_whole(registry.unbound(fn).__module__)
      cloudpickle.dumps(fn)
    except Exception as error:  # whatever the objects that it refers to raise
      raise TypeError(
        f'{name}: verifiers run in other processes, and this one cannot be sent there ({error}): let it '
        'refer to no locks, files or other open objects, or set isolate_verifiers=False'
      ) from error
  return cloudpickle.dumps((run, dict(verifiers), False))


def send_whole(name: str) -> None:
  """Lets what a module has travel by value if a fresh process would not find it: a config file."""
  module = sys.modules.get(name)
  if module is None or module.__name__ == '__main__':
    return  # these travel by value anyway
  package = module.__name__.partition('.')[0]
  if (
    package not in sys.stdlib_module_names
    and importlib.machinery.PathFinder.find_spec(package) is None
  ):
    cloudpickle.register_pickle_by_value(module)


class Worker:
  """Starts the process with the first task if not before, and again after it was stopped.

  Args:
    verifiers: of `dumps`; in general, three values as cloudpickle writes them: `run`, things by name,
      and whether what the process prints is thrown away once it has started. A task (name, given) is
      answered by `run(things[name], given)`, which raises nothing.
    timeout_s: seconds for one task.
    memory_gib: address space that the process may use; 0: no limit.
  """

  def __init__(self, verifiers: bytes, timeout_s: float, memory_gib: float):
    self._verifiers, self._timeout_s, self._memory_gib = verifiers, timeout_s, memory_gib
    self._process = self._pipe = self._life = None
    self._sent = 0  # number of the last task
    self._worked = False  # whether the process has started once
    self._lock = threading.RLock()  # one thread starts it at a time, and others wait

  def ask(self, task: tuple[str, Any]) -> Any | Failure:
    """Sends a task (name of a verifier, row) and waits for its answer.

    Raises:
      RuntimeError: the process cannot start at all. If it cannot start again, that is a `Failure`.
    """
    try:
      sent = bytes(reduction.ForkingPickler.dumps((self._sent + 1, *task)))
    except Exception as error:  # a record that cannot be pickled
      return Failure(type(error).__name__, words(error))
    try:
      self.start()
    except (RuntimeError, OSError) as error:
      if not self._worked:
        raise
      return Failure('Died', f'no new worker could be started: {words(error)}')
    self._worked = True
    self._sent += 1
    # At the deadline the group is killed, which ends every wait below: for room in the pipe as well.
    late = threading.Event()
    timer = threading.Timer(self._timeout_s, self._kill, [late])
    timer.daemon = True
    timer.start()
    try:
      answer = self._exchange(sent)
      if not late.is_set():
        return answer
      failure = Failure('Timeout', f'no answer in {self._timeout_s} s')
    except Exception as error:
      failure = Failure('Died', 'the worker process ended')
      if not isinstance(error, EOFError | OSError):  # something else wrote into the pipe
        failure = Failure('Died', f'the worker process sent what is no answer: {words(error)}')
      if late.is_set():
        failure = Failure('Timeout', f'no answer in {self._timeout_s} s')
    finally:
      timer.cancel()
    # A worker that hangs or has died is not used again; the next task starts a new one.
    self.stop()
    return failure

  def _exchange(self, sent: bytes) -> Any | Failure:
    """The answer with the number of this task; others are of processes that a verifier forked."""
    self._pipe.send_bytes(sent)
    while True:
      number, answer = self._pipe.recv()
      if number == self._sent:
        return answer

  def _kill(self, late: threading.Event) -> None:
    late.set()
    with contextlib.suppress(ProcessLookupError, AttributeError):
      os.killpg(self._process.pid, signal.SIGKILL)

  def start(self):
    """Starts the guard and the process that works, and waits until it has loaded the verifiers; nothing
    if it has started.

    Raises:
      RuntimeError, OSError: it cannot start.
    """
    with self._lock:
      if self._process is None:
        self._start()

  def _start(self):
    # The two sockets are the conversation. The pipe tells the guard that this process is gone: the guard
    # then reads the end of the file.
    ours, theirs = socket.socketpair()
    alive, self._life = os.pipe()
    self._pipe = Connection(ours.detach())
    # The new process finds modules where this one does.
    path = os.pathsep.join(os.path.abspath(p) for p in sys.path)
    try:
      self._process = subprocess.Popen(
        [sys.executable, '-c', START, str(theirs.fileno()), str(alive)],
        pass_fds=(theirs.fileno(), alive),
        env={**os.environ, 'PYTHONPATH': path},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
      )
    finally:
      theirs.close()
      os.close(alive)
      if self._process is None:
        self._close()
    # Wait until the worker has imported its modules, so that no verifier loses that time.
    reason = 'ended before its first task; its own message is on stderr'
    with contextlib.suppress(EOFError, OSError):
      self._pipe.send((self._verifiers, self._memory_gib))
      if self._pipe.poll(START_S):
        failed = self._pipe.recv()
        if not failed:
          return
        self.stop()
        raise RuntimeError(f'a worker process cannot start: {failed}')
      reason = f'did not start in {START_S} s'
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._process.wait(1.0)  # time to write its message
    self.stop()
    raise RuntimeError(f'a worker process {reason}')

  def stop(self):
    """Kills the process and all that it started."""
    with self._lock:
      if self._process is None:
        return
      with contextlib.suppress(ProcessLookupError):
        os.killpg(self._process.pid, signal.SIGKILL)
      self._process.wait()
      self._close()

  def _close(self):
    self._pipe.close()
    os.close(self._life)
    self._process = self._pipe = self._life = None

  def __del__(self):
    if contextlib is not None:  # at the end of the interpreter the guard notices by itself
      self.stop()


class Workers:
  """Several workers for the same tasks, so that this number of tasks run at the same time.

  The worker that was busy last is taken first, so that no more of them start than are needed.

  Args:
    count: number of workers.
    verifiers, timeout_s, memory_gib: as in `Worker`.
  """

  def __init__(self, count: int, verifiers: bytes, timeout_s: float, memory_gib: float):
    self._workers = [Worker(verifiers, timeout_s, memory_gib) for _ in range(count)]
    self._idle = queue.LifoQueue()
    for one in reversed(self._workers):
      self._idle.put(one)

  def ask(self, task: tuple[str, Any]) -> Any | Failure:
    """Waits for an idle worker and for its answer; see `Worker.ask`."""
    one = self._idle.get()
    try:
      return one.ask(task)
    finally:
      self._idle.put(one)

  def begin(self, rows: int) -> None:
    """Starts workers for a number of rows in the background; nothing where they have started.

    A worker that cannot start says so at its first task.
    """
    for one in self._workers[:rows]:
      threading.Thread(target=_start_if_it_can, args=[one], daemon=True).start()

  def stop(self) -> None:
    """Ends all of them, after the tasks that they have."""
    for _ in self._workers:
      self._idle.get().stop()


def _start_if_it_can(one: Worker) -> None:
  with contextlib.suppress(RuntimeError, OSError):
    one.start()


def main(pipe: int, alive: int) -> None:
  """The guard forks the process that works, and kills the group when the trainer has gone."""
  if os.fork():
    os.close(pipe)
    os.read(alive, 1)  # returns at the end of the file
    os.killpg(0, signal.SIGKILL)
  os.close(alive)
  os.set_inheritable(pipe, False)
  work(Connection(pipe))


def work(pipe: Connection) -> None:
  """Loads the verifiers, says that they are there, then answers tasks until the pipe closes."""
  verifiers, memory_gib = pipe.recv()
  try:
    run, verifiers, quiet = cloudpickle.loads(verifiers)
    # What a verifier would import with its first row, it has before its time counts.
    for fn in verifiers.values():
      for module in getattr(registry.unbound(fn), 'imports', ()):
        importlib.import_module(module)
      if prepare := getattr(fn, 'prepare', None):
        prepare()
  except Exception as error:
    pipe.send(f'{type(error).__name__}: {words(error)}')
    return
  if memory_gib:
    import resource  # not on Windows

    limit = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  pipe.send('')  # nothing has failed
  if quiet:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
  with contextlib.suppress(EOFError, BrokenPipeError):
    while True:
      number, name, row = pipe.recv()
      pipe.send((number, run(verifiers[name], row)))
