"""The request to stop, SIGTERM, which a cluster sends before it takes a machine away.

A run that is asked to stop saves its state after the step that it is in, and ends with exit code
`CODE`; started again, it resumes from there. All processes of a pod stop at the same step, even if only
one of them was asked.
"""

import contextlib
import itertools
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

# Exit code of a run that has saved and wants to be started again: EX_TEMPFAIL of sysexits.h.
CODE = 75
_asked = threading.Event()
_calls = itertools.count(1)


@contextlib.contextmanager
def heeded() -> Iterator[None]:
  """Within this context SIGTERM only notes the request. A second SIGTERM ends the process as usual.

  Python looks at signals between its own instructions, so two of them within one compilation or one
  compiled step count as one.

  In a run of several processes JAX notes it, from `jax.distributed.initialize` on, and this context
  changes nothing. In a thread that is not the main one, where Python allows no handlers, SIGTERM keeps
  its effect.
  """
  if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
    yield
    return
  before = signal.getsignal(signal.SIGTERM)

  def note(number, frame):
    signal.signal(number, before)
    _asked.set()

  signal.signal(signal.SIGTERM, note)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)
    _asked.clear()  # the request was to this run, not to the next one of the process


def asked() -> bool:
  """Whether to stop now. All processes call this after each of their steps.

  They get True after the same step, soon after one of them has received SIGTERM: JAX chooses the number
  of a call that all of them still have before them. So calls are numbered 1, 2, 3, ... from the start of
  the processes: a number that is left out could be the chosen one.
  """
  if jax.process_count() > 1:
    return multihost_utils.reached_preemption_sync_point(next(_calls))
  return _asked.is_set()
