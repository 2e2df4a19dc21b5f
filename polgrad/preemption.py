"""The request to stop, SIGTERM, which a cluster sends before it takes a machine away.

A run that is asked to stop saves its state after the step that it is in, and ends with exit code
`CODE`; started again, it goes on from there. All processes of a pod stop at the same step, although
only one of them may have been asked.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

CODE = (
  75  # exit code of a run that has saved and wants to be started again: EX_TEMPFAIL of sysexits.h
)
_asked = threading.Event()


@contextlib.contextmanager
def heeded() -> Iterator[None]:
  """Inside, SIGTERM only notes the request. A second SIGTERM ends the process as usual.

  In several processes JAX notes it, from `jax.distributed.initialize` on. In a thread that is not the
  main one, where Python allows no handlers, signals keep their effect.
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


def asked(step: int) -> bool:
  """Whether to stop after this step.

  Args:
    step: a number that grows with every call, the same in all processes, each of which asks after each
      step. Their request is answered True at one common number, soon after one of them was asked.
  """
  if jax.process_count() > 1:
    return multihost_utils.reached_preemption_sync_point(step)
  return _asked.is_set()
