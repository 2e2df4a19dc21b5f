"""Barriers across processes, with a time limit and a message that names who is late."""

import os
import pickle
import re
import sys

import jax
from jax._src import distributed

# Seconds that a process waits at a barrier; the flag --wait_at_most sets it.
WAIT_AT_MOST = 1800.0

_LATE = re.compile(r'timed out task names:((?:\s+\d+)+)')


def together(what: str, failure: Exception | None = None) -> None:
  """Barrier across processes; `what` names it and must be the same in all of them.

  It is one of JAX's coordination service, so it needs no device and can be used in any thread. After
  `WAIT_AT_MOST` seconds the process ends, with a message that names the barrier and the processes that
  are alive but have not arrived. Those that are lost end the others by themselves, see `cli.join`.

  Args:
    failure: an error of this process, which all processes then raise. Of several, that of the process
      with the lowest number.
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
    f'process {jax.process_index()} of {jax.process_count()} ends: it has waited {seconds:g} seconds '
    f'for process {late} at the barrier {what!r} (--wait_at_most)',
    file=sys.stderr,
    flush=True,
  )
  os._exit(1)
