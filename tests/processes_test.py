"""The flags of a run of several processes: what does not fit is refused before JAX waits."""

import os
import threading

import jax
import pytest
from absl import app, flags
from absl.testing import flagsaver

from polgrad import barriers, cli


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


def test_a_process_that_nobody_joins_at_a_barrier_ends_and_names_it(monkeypatch, capsys):
  ended = threading.Event()
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(os, '_exit', lambda code: ended.set())
  monkeypatch.setattr(barriers, 'WAIT_AT_MOST', 0.05)
  wait = lambda what: ended.wait(30)
  monkeypatch.setattr(barriers.multihost_utils, 'sync_global_devices', wait)
  barriers.together('written')
  assert ended.is_set()
  said = "process 0 of 2 ends: it has waited 0.05 seconds for the others at the barrier 'written'"
  assert said in capsys.readouterr().err

  ended.clear()
  monkeypatch.setattr(barriers.multihost_utils, 'sync_global_devices', lambda what: None)
  barriers.together('at once')
  assert not ended.wait(0.1)


def test_one_process_alone_keeps_its_error():
  with pytest.raises(ValueError, match='UNKNOWN: mine'), cli.ending_together():
    raise ValueError('UNKNOWN: mine')
