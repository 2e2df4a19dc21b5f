"""The flags of a run of several processes: what does not fit is refused before JAX waits."""

import os
import threading
import time
from concurrent import futures

import jax
import numpy as np
import pytest
from absl import app, flags
from absl.testing import flagsaver

from polgrad import barriers, cli, exchanges


@pytest.fixture(autouse=True)
def parsed():
  flags.FLAGS.mark_as_parsed()


@pytest.mark.parametrize(
  ('given', 'said'),
  [
    (dict(coordinator='a:1'), '--coordinator needs --num_processes and --process_id beside it'),
    (dict(num_processes=2, process_id=0), '--num_processes needs --coordinator'),
    (dict(coordinator='a:1', num_processes=2, process_id=2), '--process_id=2: the 2 .* are 0 to 1'),
    (dict(coordinator='a', num_processes=2, process_id=1), '--coordinator=a: expected HOST:PORT'),
  ],
)
def test_flags_that_do_not_fit_are_refused(given, said):
  with flagsaver.flagsaver(**given), pytest.raises(app.UsageError, match=said):
    cli.join()


@pytest.mark.parametrize(
  ('given', 'asked'),
  [
    ({}, None),
    (dict(distributed=True), (None, None, None, 100)),
    (dict(coordinator='a:1', num_processes=2, process_id=1, lost_after=7), ('a:1', 2, 1, 7)),
  ],
)
def test_jax_is_asked_with_the_flags(monkeypatch, given, asked):
  calls = []
  take = lambda *args, heartbeat_timeout_seconds: calls.append((*args, heartbeat_timeout_seconds))
  monkeypatch.setattr(jax.distributed, 'initialize', take)
  with flagsaver.flagsaver(**given):
    cli.join()
  assert calls == ([asked] if asked else [])


class Service:
  """JAX's coordination service as process 0 of three sees it."""

  def __init__(self, said='', sent=()):
    self.said, self.waits, self.stored = said, [], dict(sent)

  def key_value_set_bytes(self, key, value):
    self.stored[key] = value

  def key_value_dir_get_bytes(self, folder):
    return [(key, value) for key, value in self.stored.items() if key.startswith(folder)]

  def wait_at_barrier(self, name, timeout_in_ms):
    self.waits.append((name, timeout_in_ms))
    if self.said:
      raise jax.errors.JaxRuntimeError(self.said)


LATE = """DEADLINE_EXCEEDED: Barrier timed out. Id: polgrad/rewards::0. This usually happens ...
# of tasks that reached the barrier: 1/3.
The first task at the barrier: 0. Some timed out task names:
1
2
RPC: /xla.coordination.CoordinationService/Barrier [type.googleapis.com/...]"""


def played(monkeypatch, service):
  monkeypatch.setattr(jax, 'process_count', lambda: 3)
  monkeypatch.setattr(jax, 'process_index', lambda: 0)
  monkeypatch.setattr(barriers.distributed.global_state, 'client', service)
  monkeypatch.setattr(barriers, 'WAIT_AT_MOST', 7.0)
  return service


def test_processes_that_do_not_arrive_at_a_barrier_are_named(monkeypatch, capsys):
  codes = []
  monkeypatch.setattr(os, '_exit', codes.append)
  service = played(monkeypatch, Service(LATE))
  barriers.together('rewards')
  assert codes == [1] and service.waits == [('polgrad/rewards', 7000)]
  said = "process 0 of 3 ends: it has waited 7 seconds for process 1, 2 at the barrier 'rewards'"
  assert said in capsys.readouterr().err

  # Other errors, such as that of a lost process, are raised.
  played(monkeypatch, Service('UNAVAILABLE: tasks are unhealthy'))
  with pytest.raises(jax.errors.JaxRuntimeError, match='unhealthy'):
    barriers.together('rewards')
  assert codes == [1]


def test_processes_that_pass_no_barrier_say_where_they_are(monkeypatch, capsys):
  ended, others = threading.Event(), {'polgrad/stuck/000002': b'after another'}
  monkeypatch.setattr(os, '_exit', lambda code: ended.set())
  monkeypatch.setattr(barriers, 'STUCK_AFTER', 0.3)
  monkeypatch.setattr(barriers, 'TELLING', 0.01)
  played(monkeypatch, Service(sent=others))

  def pass_barriers():
    with barriers.watched():
      for _ in range(4):  # no longer than the limit apart
        time.sleep(0.1)
        barriers.together('rewards', detail='step 3')
      assert not ended.is_set() and ended.wait(20)

  # In a thread, since tests run inside of `compiling.in_one_chunk`, a function of polgrad.
  with futures.ThreadPoolExecutor(1) as threads:
    threads.submit(pass_barriers).result()
  said = capsys.readouterr().err
  assert 'process 0 of 3 ends: it has passed no barrier for 0.3 seconds (--stuck_after)' in said
  assert "process 0: after the barrier 'rewards' of step 3, outside of polgrad" in said
  assert 'process 1: has not answered\n  process 2: after another\n' in said
  assert 'ended.wait(20)' in said  # of the stack

  monkeypatch.setattr(barriers, 'STUCK_AFTER', 0.0)
  with barriers.watched():
    assert not [one for one in threading.enumerate() if one.name == 'watch']


def test_an_error_of_one_process_is_raised_by_all(monkeypatch):
  service = played(monkeypatch, Service())
  barriers.together('records')
  with pytest.raises(ValueError, match='record 7: too long'):
    barriers.together('records', ValueError('record 7: too long'))
  failures = {key.replace('000000', '000002'): value for key, value in service.stored.items()}
  played(monkeypatch, Service(sent=failures))
  with pytest.raises(ValueError, match='record 7: too long') as error:
    barriers.together('records')
  assert error.value.__notes__ == ['process 2 of 3 has failed']


def test_rows_that_processes_share_are_put_together_in_their_order(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 3)
  parts = []
  for process in range(3):
    monkeypatch.setattr(jax, 'process_index', lambda own=process: own)
    parts.append((np.array(exchanges.strided(range(7))), [*exchanges.share(7)]))
  strided, shares = zip(*parts)
  np.testing.assert_array_equal(exchanges.interleaved(strided), np.arange(7))
  assert shares == ([0, 1, 2], [3, 4, 5], [6])


def test_one_process_alone_keeps_its_error():
  with pytest.raises(ValueError, match='UNKNOWN: mine'), cli.ending_together():
    raise ValueError('UNKNOWN: mine')
