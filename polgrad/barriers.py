"""Barriers across processes, with a time limit and a message that names who is late."""

import contextlib
import os
import pathlib
import pickle
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import NamedTuple

import jax
from jax._src import distributed

# Seconds that a process waits at a barrier; the flag --wait_at_most sets it.
WAIT_AT_MOST = 1800.0
# Seconds without a barrier after which a watched process ends, 0: never; the flag --stuck_after sets it.
STUCK_AFTER = 7200.0
# Seconds in which processes that end so tell each other where they are.
TELLING = 10.0


class _Passed(NamedTuple):
  """The last barrier that this process has passed."""

  what: str
  detail: str  # that of the last barrier that had one
  at: float  # of `time.monotonic`


_last = _Passed('', '', 0.0)
_LATE = re.compile(r'timed out task names:((?:\s+\d+)+)')


def together(what: str, failure: Exception | None = None, *, detail: str = '') -> None:
  """Barrier across processes; `what` names it and must be the same in all of them.

  It is one of JAX's coordination service, so it needs no device and can be used in any thread. After
  `WAIT_AT_MOST` seconds the process ends, with a message that names the barrier and the processes that
  are alive but have not arrived. Those that are lost end the others by themselves, see `cli.join`.

  Args:
    failure: an error of this process, which all processes then raise. Of several, that of the process
      with the lowest number.
    detail: what the message of `watched` says besides the name, such as the number of a step; later
      barriers without a detail keep it.
  """
  if jax.process_count() == 1:
    if failure is not None:
      raise failure
    return
  client, place = distributed.global_state.client, f'polgrad/failures/{what}'
  if failure is not None:
    client.key_value_set_bytes(f'{place}/{jax.process_index():06}', _sent(failure))
  try:
    client.wait_at_barrier(f'polgrad/{what}', round(WAIT_AT_MOST * 1000))
  except jax.errors.JaxRuntimeError as error:
    if not str(error).startswith('DEADLINE_EXCEEDED'):
      raise
    _never_together(what, WAIT_AT_MOST, str(error))
    return
  _pass(what, detail)
  failures = client.key_value_dir_get_bytes(f'{place}/')
  if failure is not None and len(failures) < 2:
    raise failure
  if failures:
    key, sent = min(failures)
    first = pickle.loads(sent)
    first.add_note(f'process {int(key.rpartition("/")[2])} of {jax.process_count()} has failed')
    raise first


def _sent(failure: Exception) -> bytes:
  """An error as bytes; one that cannot be sent becomes a RuntimeError of the same words."""
  try:
    sent = pickle.dumps(failure)
    pickle.loads(sent)
    return sent
  except Exception:  # whatever the class of the error does
    return pickle.dumps(RuntimeError(f'{type(failure).__name__}: {failure}'))


def _never_together(what: str, seconds: float, said: str) -> None:
  """Ends the process, which the others then lose."""
  found = _LATE.search(said)
  late = ', '.join(found[1].split()) if found else 'another one'
  print(
    f'\nprocess {jax.process_index()} of {jax.process_count()} ends: it has waited {seconds:g} seconds '
    f'for process {late} at the barrier {what!r} (--wait_at_most)',
    file=sys.stderr,
    flush=True,
  )
  os._exit(1)


@contextlib.contextmanager
def watched() -> Iterator[None]:
  """Ends the process, with a message, if it passes no barrier for `STUCK_AFTER` seconds within.

  If one process never starts a program on the devices, the others wait in it without a limit, although
  all processes live. (CPU devices give up after 30 minutes.) All reach this limit at about the same
  time, and tell each other where they are: the message has the last barrier of each process and its
  place in the code, or says that it has not answered.
  """
  if jax.process_count() == 1 or not STUCK_AFTER:
    yield
    return
  over, thread = threading.Event(), threading.get_ident()
  _pass('beginning of the run', '')
  threading.Thread(target=_watch, args=(over, thread), daemon=True, name='watch').start()
  try:
    yield
  finally:
    over.set()


def _pass(what: str, detail: str) -> None:
  global _last
  _last = _Passed(what, detail or _last.detail, time.monotonic())


def _watch(over: threading.Event, thread: int) -> None:
  """Waits until `over`, and ends the process if the last barrier is too long ago.

  Args:
    thread: identifier of the thread that runs the program, for the message.
  """
  while (left := _last.at + STUCK_AFTER - time.monotonic()) > 0:
    if over.wait(left):
      return
  _stuck(sys._current_frames().get(thread))


def _stuck(frame: FrameType | None) -> None:
  """Ends the process, after it has told the others where it is.

  Args:
    frame: innermost frame of the stack of the main program.
  """
  own, count = jax.process_index(), jax.process_count()
  step = f' of {_last.detail}' if _last.detail else ''
  client, found = distributed.global_state.client, {}
  found[own] = f'after the barrier {_last.what!r}{step}, {_place(frame)}'
  try:
    client.key_value_set_bytes(f'polgrad/stuck/{own:06}', found[own].encode())
    time.sleep(TELLING)
    told = client.key_value_dir_get_bytes('polgrad/stuck/')
    found |= {int(key.rpartition('/')[2]): text.decode() for key, text in told}
  except jax.errors.JaxRuntimeError:  # process 0, which keeps what is told, is gone
    pass
  traceback.print_stack(frame)
  lines = [f'process {i}: {found.get(i, "has not answered")}' for i in range(count)]
  print(
    f'\nprocess {own} of {count} ends: it has passed no barrier for {STUCK_AFTER:g} seconds '
    '(--stuck_after). Where the processes are:',
    *lines,
    sep='\n  ',
    file=sys.stderr,
    flush=True,
  )
  if own == 0:
    time.sleep(TELLING / 2)  # until the others have read
  os._exit(1)


def _place(frame: FrameType | None) -> str:
  """The innermost line of polgrad in a stack."""
  folder = str(pathlib.Path(__file__).parent)
  while frame is not None:
    code = frame.f_code
    if code.co_filename.startswith(folder):
      file = pathlib.Path(code.co_filename).relative_to(folder)
      return f'in {code.co_name} of polgrad/{file}, line {frame.f_lineno}'
    frame = frame.f_back
  return 'outside of polgrad'
