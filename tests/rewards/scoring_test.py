"""Scoring: weighted sums, and canaries for every way in which a verifier can fail."""

import functools
import gc
import multiprocessing
import os
import pathlib
import pickle
import subprocess
import sys
import textwrap
import time
import types

import numpy as np
import pytest

from polgrad.registry import Weighted, bind, part, weighted
from polgrad.rewards import scoring, verifiers

ROOT = pathlib.Path(__file__).parents[2]


def canary(completion, record):
  """Does what the completion says; any other text is its own reward."""
  actions = {
    'raise': lambda: 1 / 0,
    'missing': lambda: record['no such field'],
    'hang': lambda: time.sleep(1000),
    'spin': lambda: any(iter(int, 1)),
    'die': lambda: os._exit(0),
    'exit': lambda: sys.exit(0),
    'none': lambda: None,
    'nan': lambda: float('nan'),
    'inf': lambda: float('inf'),
    'deep': lambda: pickle.dumps(functools.reduce(lambda x, _: [x], range(10**5), [])),
  }
  return actions[completion]() if completion in actions else float(completion)


def size(length):
  return length


def process(completion):
  return os.getpid()


def sees_jax():
  return 'jax' in sys.modules


@pytest.fixture(scope='module')
def isolated():
  """A scorer that lives through the whole file: whatever happened before, it goes on working."""
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT)  # workers import this file by name
    yield scoring.make_scorer({'canary': canary}, timeout_s=1.5, workers=2, isolate=True)


@pytest.fixture
def here():
  return scoring.make_scorer({'canary': canary})


def judge(score, *completions):
  return score(list(completions), [{'answer': 'x'}] * len(completions), [1] * len(completions))


FAILURES = [
  ('raise', 'ZeroDivisionError', 'division by zero'),
  ('missing', 'KeyError', 'no such field'),
  ('exit', 'SystemExit', '0'),
  ('none', 'TypeError', 'NoneType'),
  ('nan', 'NotFinite', 'nan'),
  ('inf', 'NotFinite', 'inf'),
  ('deep', 'RecursionError', 'recursion'),
]
ENDINGS = [
  ('hang', 'Timeout', 'no answer in 1.5 s'),
  ('spin', 'Timeout', 'no answer in 1.5 s'),
  ('die', 'Died', 'process ended'),
]


def assert_contained(got, kind, reason):
  assert got.valid.tolist() == [True, False, True]
  np.testing.assert_array_equal(got.total, [1, np.nan, 0])
  np.testing.assert_array_equal(got.components['canary'], [1, np.nan, 0])
  assert got.errors == {f'canary/{kind}': 1}
  (message,) = got.messages
  assert message.startswith(f'row 1: canary: {kind}: ') and reason in message


@pytest.mark.parametrize(('action', 'kind', 'reason'), FAILURES)
def test_a_failing_verifier_is_an_error_and_never_zero(here, action, kind, reason):
  assert_contained(judge(here, '1', action, '0'), kind, reason)


@pytest.mark.parametrize(('action', 'kind', 'reason'), FAILURES + ENDINGS)
def test_isolation_contains_failures_hangs_and_deaths(isolated, action, kind, reason):
  assert_contained(judge(isolated, '1', action, '0'), kind, reason)
  assert judge(isolated, '2', '3').total.tolist() == [2, 3]


def test_every_worker_may_go_at_once(isolated):
  got = judge(isolated, 'die', 'hang', '1', 'die', 'raise', '2')
  assert got.valid.tolist() == [False, False, True, False, False, True]
  assert got.total[got.valid].tolist() == [1, 2]
  assert got.errors == {'canary/Died': 2, 'canary/Timeout': 1, 'canary/ZeroDivisionError': 1}


def test_a_record_that_cannot_be_sent_is_an_error(isolated):
  got = isolated(['1', '2'], [{}, {'lock': multiprocessing.Lock()}], [1, 1])
  assert got.valid.tolist() == [True, False]
  assert sum(got.errors.values()) == 1


def test_one_failed_term_invalidates_the_row_but_not_the_other_terms():
  got = judge(scoring.make_scorer({'a': canary, 'b': Weighted(0.0, size)}), 'raise', '2')
  assert got.valid.tolist() == [False, True]
  assert got.components['b'].tolist() == [1, 1]


def test_only_the_first_messages_are_kept_and_all_errors_are_counted(here):
  got = judge(here, *['raise'] * 9)
  assert got.errors == {'canary/ZeroDivisionError': 9}
  assert len(got.messages) == scoring.MESSAGES


def test_the_total_is_the_weighted_sum_of_bare_components():
  terms = {
    'exact': bind(weighted(2.0, part(verifiers.exact_match)), verifiers.TABLE),
    'length': Weighted(-0.25, size),
    'lambda': lambda completion: len(completion) / 2,
  }
  got = scoring.make_scorer(terms)(['46', 'a'], [{'answer': '46'}] * 2, [3, 8])
  assert got.components['exact'].tolist() == [1, 0]
  assert got.components['length'].tolist() == [3, 8]
  assert got.total.tolist() == [2 - 0.75 + 1, -2 + 0.5]
  assert got.total.dtype == np.float64 and got.valid.all() and not got.errors


def test_isolated_and_local_scores_agree(here, isolated):
  texts = [str(i / 7) for i in range(20)]
  for ours, theirs in zip(judge(here, *texts), judge(isolated, *texts)):
    np.testing.assert_equal(ours, theirs)


def test_without_terms_every_reward_is_zero_and_valid():
  got = scoring.make_scorer({})(['a', 'b'], [{}, {}], [1, 1])
  assert got.total.tolist() == [0, 0] and got.valid.tolist() == [True, True]


@pytest.mark.parametrize('isolate', [False, True])
def test_an_empty_batch_scores_to_nothing(isolate):
  assert scoring.make_scorer({'a': canary}, isolate=isolate)([], [], []).total.shape == (0,)


def test_lists_of_unequal_length_are_refused(here):
  with pytest.raises(ValueError, match='shorter'):
    here(['1', '2'], [{}], [1, 1])


def test_a_verifier_that_reads_something_else_is_refused():
  with pytest.raises(ValueError, match=r"odd: .*\['prompt'\]; valid: \['completion'"):
    scoring.make_scorer({'odd': lambda prompt, completion: 0.0})


@pytest.mark.parametrize('fn', [lambda completion: 0.0, functools.partial(lambda length: 0.0)])
def test_isolation_refuses_what_cannot_be_pickled(fn):
  with pytest.raises(TypeError, match=r'f: isolated verifiers .* top of a module'):
    scoring.make_scorer({'f': fn}, isolate=True)


def test_workers_are_other_processes_that_do_not_load_jax_and_end_with_the_scorer(monkeypatch):
  monkeypatch.syspath_prepend(ROOT)
  before = set(multiprocessing.active_children())
  score = scoring.make_scorer({'process': process, 'jax': sees_jax}, workers=1, isolate=True)
  first, again = judge(score, 'a', 'b'), judge(score, 'c', 'd')
  (worker,) = set(multiprocessing.active_children()) - before
  for got in (first, again):
    assert got.components['process'].tolist() == [worker.pid] * 2 != [os.getpid()] * 2
    assert not got.components['jax'].any()
  del score
  gc.collect()
  worker.join(timeout=30)
  assert not worker.is_alive()


def test_verifiers_that_workers_cannot_import_stop_the_run(monkeypatch, capfd):
  module = types.ModuleType('known_to_the_parent_only')
  exec('def verifier(completion): return 0.0', module.__dict__)
  monkeypatch.setitem(sys.modules, module.__name__, module)
  score = scoring.make_scorer({'a': module.verifier}, workers=1, isolate=True)
  with pytest.raises(RuntimeError, match='ended before its first task'):
    judge(score, 'a')
  assert 'known_to_the_parent_only' in capfd.readouterr().err


def test_workers_end_when_the_parent_is_killed():
  code = """
    import os, signal, multiprocessing
    from polgrad.rewards import scoring, verifiers
    if __name__ == '__main__':
      score = scoring.make_scorer({'a': verifiers.exact_match}, workers=1, isolate=True)
      score(['a'], [{'answer': 'a'}], [1])
      print(multiprocessing.active_children()[0].pid, flush=True)
      os.kill(os.getpid(), signal.SIGKILL)
  """
  done = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(code)],
    stdout=subprocess.PIPE,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    timeout=60,
  )
  pid = int(done.stdout)
  for _ in range(100):
    if not alive(pid):
      break
    time.sleep(0.1)
  assert not alive(pid)


def alive(pid):
  """Whether a process runs; one that ended and waits to be reaped does not."""
  try:
    return pathlib.Path(f'/proc/{pid}/stat').read_text().split()[2] != 'Z'
  except FileNotFoundError:
    return False
