"""Barriers across processes, with a time limit."""

import os
import sys
import threading

import jax
from jax.experimental import multihost_utils

# Seconds that a process waits at a barrier; the flag --wait_at_most sets it.
WAIT_AT_MOST = 1800.0


def together(what: str) -> None:
  """Barrier across processes; `what` names it and must be the same in all of them.

  After `WAIT_AT_MOST` seconds the process ends, with a message that names the barrier: another process
  is alive but does not arrive. Those that are lost end the others by themselves, see `cli.join`.
  """
  if jax.process_count() == 1:
    return
  limit = threading.Timer(WAIT_AT_MOST, _never_together, (what, WAIT_AT_MOST))
  limit.daemon = True
  limit.start()
  try:
    multihost_utils.sync_global_devices(what)
  finally:
    limit.cancel()


def _never_together(what: str, seconds: float) -> None:
  """Ends the process, which the others then lose."""
  print(
    f'process {jax.process_index()} of {jax.process_count()} ends: it has waited {seconds:g} seconds '
    f'for the others at the barrier {what!r} (--wait_at_most)',
    file=sys.stderr,
    flush=True,
  )
  os._exit(1)
