"""The flags of a run of several processes: what does not fit is refused before JAX waits."""

import jax
import pytest
from absl import app, flags
from absl.testing import flagsaver

from polgrad import cli


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


def test_one_process_alone_keeps_its_error():
  with pytest.raises(ValueError, match='UNKNOWN: mine'), cli.ending_together():
    raise ValueError('UNKNOWN: mine')
