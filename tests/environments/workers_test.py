"""What an environment does in its process harms neither the run nor other rows."""

import re
import subprocess
import sys
import textwrap
import time

import pytest

from polgrad.environments import Guess, search, workers
from polgrad.environments.workers import Pool, Reply
from polgrad.registry import bind
from polgrad.rewards.worker import START_S, Failure
from tests.environments.attacks import Attack
from tests.rewards.scoring_test import ROOT, assert_ends


@pytest.fixture(scope='module')
def pool():
  """It is used by the whole file: whatever happened before, it still answers."""
  made = Pool(Attack(), timeout_s=2.5, workers=2, memory_gib=2)
  yield made
  made.close()


def assert_alive(pool):
  """All workers answer, each to whom it was asked by."""
  state = pool.reset({}, 5).result()
  answers = [pool.step(state, f'say {i}') for i in range(6)]
  for i, answer in enumerate(answers):
    assert answer.result()[1:5] == (f'say {i} 5', 5.0, False, {})


@pytest.mark.parametrize(
  ('text', 'kind', 'reason'),
  [
    ('raise', 'ZeroDivisionError', 'division by zero'),
    ('exit', 'SystemExit', '0'),
    ('fill', 'MemoryError', ''),
    ('none', 'NotAStep', 'returned NoneType, expected environments.Step'),
    ('tuple', 'NotAStep', 'returned tuple'),
    ('nan', 'NotFinite', 'reward: returned nan'),
    ('word', 'ValueError', 'reward: could not convert'),
    ('huge', 'TooLarge', 'an observation of 1000001 characters; the limit is 1000000'),
    ('bytes', 'NotAnObservation', "a text or messages, got b'bytes'"),
    ('self', 'NotAnObservation', "not from 'assistant'"),
    ('content', 'NotAnObservation', 'a role and a text as content'),
    ('done', 'NotAStep', 'done must be True or False, got str'),
    ('metrics', 'NotAStep', "'n' must be a text and have a finite number"),
    ('lock', 'NotPicklable', 'cannot be sent between processes .* set isolate_environment=False'),
    ('loop', 'Timeout', 'no answer in 2.5 s'),
    ('late', 'Timeout', 'no answer in 2.5 s'),
    ('die', 'Died', 'process ended'),
    ('segfault', 'Died', 'process ended'),
    ('kill', 'Died', 'process ended'),
    ('garbage', 'Died', 'sent what is no answer'),
  ],
)
def test_a_step_that_fails_is_contained(pool, text, kind, reason):
  found = pool.step(pool.reset({}, 1).result(), text).result()
  assert isinstance(found, Failure) and found.kind == kind
  assert re.search(reason, found.reason)
  assert_alive(pool)


def test_what_a_step_prints_is_thrown_away(pool, capfd):
  found = pool.step(pool.reset({}, 1).result(), 'print').result()
  assert found.observation == 'printed'
  assert capfd.readouterr() == ('', '')


def test_the_copy_of_a_step_that_forks_answers_nobody(pool):
  states = [pool.reset({}, i).result() for i in range(4)]
  answers = [pool.step(state, 'fork') for state in states]
  assert [a.result().observation for a in answers] == [f'fork {i}' for i in range(4)]
  assert_alive(pool)


def test_code_in_an_observation_does_not_run_in_the_trainer(pool):
  found = pool.step(pool.reset({}, 1).result(), 'code').result()
  assert found.observation == 'read me' and type(found.observation) is str


def test_a_reset_that_fails_is_contained(pool):
  found = pool.reset({'reset': 'raise'}, 1).result()
  assert found == Failure('ZeroDivisionError', 'division by zero')


@pytest.mark.parametrize('text', ['raise', 'exit', 'nan', 'bytes'])
def test_failures_in_this_process_are_contained_too(text):
  here = Pool(Attack(), isolate=False)
  assert isinstance(here.step(0, text).result(), Failure)
  assert here.step(3, 'hi').result() == Reply(4, 'hi 3', 3.0, False, {})


def test_a_state_that_cannot_travel_stays_in_this_process():
  here = Pool(Attack(), isolate=False)
  assert type(here.step(0, 'lock').result().state).__name__ == 'lock'


def test_a_state_that_is_too_large_to_travel_is_refused(monkeypatch):
  monkeypatch.setattr(workers, 'LARGEST_STATE', 1000)
  state = workers.respond(Attack(), ('reset', {}, 1))
  found = workers.respond(Attack(), ('step', state, 'large'))
  assert found.kind == 'TooLarge' and 'a state of 20' in found.reason


def test_quick_environments_run_in_this_process():
  assert not Pool(Guess()).isolated and Pool(Attack(), workers=1).isolated


def test_processes_may_start_before_the_first_call(tmp_path):
  file = tmp_path / 'started'
  numbers = lambda: file.read_text().split() if file.exists() else []
  pool = Pool(Attack(prepared=str(file)), workers=2)
  pool.begin(rows=1)
  assert pool.reset({}, 1).result()
  assert len(numbers()) == 1  # the call has waited for the process that had begun
  pool.begin(rows=8)
  deadline = time.monotonic() + START_S
  while len(numbers()) < 2 and time.monotonic() < deadline:
    time.sleep(0.02)
  assert_alive(pool)
  assert len(set(numbers())) == len(numbers()) == 2
  pool.close()
  for number in numbers():
    assert_ends(int(number))


def test_processes_that_start_end_with_the_run_that_is_killed(tmp_path):
  file = tmp_path / 'started'
  code = f"""
    import os, signal, time
    from polgrad.environments.workers import Pool
    from tests.environments.attacks import Attack
    pool = Pool(Attack(prepared='{file}', then='late'), workers=1)
    pool.begin(1)
    while not os.path.exists('{file}') or not open('{file}').read():
      time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)
  """
  subprocess.run([sys.executable, '-c', textwrap.dedent(code)], cwd=ROOT, timeout=60)
  assert_ends(int(file.read_text()))


def test_calls_are_answered_at_the_same_time(pool):
  states = [pool.reset({}, i).result() for i in range(2)]
  begin = time.monotonic()
  for answer in [pool.step(state, 'late') for state in states]:
    assert answer.result().kind == 'Timeout'
  assert time.monotonic() - begin < 4.9


@pytest.mark.parametrize('limit', [{'timeout_s': 0}, {'workers': 0}, {'memory_gib': -1}])
def test_a_limit_that_is_not_positive_is_refused(limit):
  with pytest.raises(ValueError, match='must be positive'):
    Pool(Guess(), **limit)


def test_an_environment_of_a_config_file_travels_whole(tmp_path):
  file = tmp_path / 'mine.py'
  file.write_text(
    'import dataclasses\n'
    'from polgrad.environments import Environment, Step\n'
    'class State:\n'
    '  seen = 0\n'
    '@dataclasses.dataclass(frozen=True, kw_only=True)\n'
    'class Mine(Environment):\n'
    '  word: str = "a"\n'
    '  def reset(self, record, seed):\n'
    '    return State()\n'
    '  def step(self, state, text):\n'
    '    assert isinstance(state, State)\n'
    '    state.seen += 1\n'
    '    return Step(state, f"{self.word} {state.seen}")\n'
  )
  mine = bind({'name': f'{file}:Mine', 'word': 'b'}, {}, 'config')
  pool = Pool(mine, workers=2)
  state = pool.reset({}, 0).result()
  for n in (1, 2):
    answers = [pool.step(state, '') for _ in range(2)]
    assert [a.result().observation for a in answers] == [f'b {n}'] * 2
    state = answers[1].result().state
  pool.close()


def test_an_environment_that_cannot_start_says_why(tmp_path):
  pool = Pool(search(corpus=str(tmp_path / 'missing.txt')), workers=1)
  pool.begin(rows=1)  # its failure is that of the first call
  with pytest.raises(RuntimeError, match=r'cannot start: FileNotFoundError: .*missing\.txt'):
    pool.reset({}, 0).result()
