"""Scoring: weighted sums, and canaries for every way in which a verifier can fail."""

import functools
import gc
import importlib
import multiprocessing
import os
import pathlib
import pickle
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from polgrad.registry import Weighted, bind, find, part, weighted
from polgrad.rewards import combinations, scoring, verifiers, worker

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


def fork(completion):
  os.fork()
  return float(completion)


def uses_a_pool(completion):
  with multiprocessing.get_context('fork').Pool(1) as pool:
    return pool.map(float, [completion])[0] * 2


def starts_a_child(completion, record):
  child = subprocess.Popen(['sleep', '1000'])
  pathlib.Path(record['file']).write_text(str(child.pid))
  child.wait()


def fills_memory(completion):
  return len(bytearray(2**32)) * 0.0


def tells_and(completion, record):
  pathlib.Path(record['file']).write_text(str(os.getpid()))
  return canary(completion, record)


@pytest.fixture(scope='module')
def isolated():
  """A scorer that lives through the whole file: whatever happened before, it goes on working."""
  return scoring.make_scorer({'canary': canary}, timeout_s=1.5, workers=2)


@pytest.fixture
def here():
  return scoring.make_scorer({'canary': canary}, isolate=False)


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
  got = judge(
    scoring.make_scorer({'a': canary, 'b': Weighted(0.0, size)}, isolate=False), 'raise', '2'
  )
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
  with pytest.raises(ValueError, match=r"odd: .*\['prompts'\]; valid: \['completion'.*'tokens'\]"):
    scoring.make_scorer({'odd': lambda prompts, completion: 0.0})


def joined(tokens, prompt):
  return float(prompt + ''.join(map(str, tokens)))


@pytest.mark.parametrize('isolate', [False, True])
def test_prompt_and_tokens_are_made_only_for_verifiers_that_read_them(isolate):
  calls = []
  make = lambda name, values: lambda: calls.append(name) or values
  others = {'prompt': make('prompt', ['1', '2']), 'tokens': make('tokens', [[3, 4], [5]])}
  rows = (['', ''], [{}, {}], [2, 1])
  score = scoring.make_scorer({'size': size, 'joined': joined}, isolate=isolate, workers=1)
  assert score(*rows, others).components['joined'].tolist() == [134, 25]
  assert sorted(calls) == ['prompt', 'tokens']
  scoring.make_scorer({'size': size}, isolate=False)(*rows, others)
  assert len(calls) == 2
  without = score(*rows)
  assert not without.valid.any() and "reads 'tokens'" in without.messages[0]


def test_a_verifier_of_whole_batches_is_called_once_in_this_process():
  calls = []

  def judged(completions, records, lengths, prompt, tokens, *, scale=1.0):
    calls.append((os.getpid(), completions, records, lengths, prompt, tokens))
    return [scale * len(text) for text in completions]

  judged.batched = True
  others = {'prompt': lambda: ['p', 'q'], 'tokens': lambda: [[1], [2]]}
  score = scoring.make_scorer(
    {'judged': Weighted(2.0, functools.partial(judged, scale=3.0)), 'exact': verifiers.exact_match}
  )
  rows = (['abc', 'd'], [{'answer': 'abc'}] * 2, [4, 2])
  assert score(*rows, others).total.tolist() == [19, 6]
  assert calls == [(os.getpid(), *map(list, rows), ['p', 'q'], [[1], [2]])]


def test_failures_within_a_batch_are_counted_and_never_zero():
  def judged(completions):
    return [worker.Failure('Refused', 'no opinion'), None, float('nan'), '2'][: len(completions)]

  judged.batched = True
  score = scoring.make_scorer({'judged': judged})
  got = judge(score, *'abcd')
  np.testing.assert_array_equal(got.total, [np.nan, np.nan, np.nan, 2])
  assert got.valid.tolist() == [False, False, False, True]
  assert got.errors == {'judged/Refused': 1, 'judged/TypeError': 1, 'judged/NotFinite': 1}
  assert got.messages[0] == 'row 0: judged: Refused: no opinion'
  short = judge(score, *'abcde')  # four values for five rows: nobody knows whose they are
  assert short.errors == {'judged/ValueError': 5} and not short.valid.any()
  assert score([], [], []).total.shape == (0,)


def test_a_batch_whose_verifier_raises_has_failed_as_a_whole():
  def judged(completions, records):
    return [records[0]['no such field']]

  judged.batched = True
  got = judge(scoring.make_scorer({'judged': judged}), 'a', 'b')
  assert got.errors == {'judged/KeyError': 2} and not got.valid.any()
  with pytest.raises(ValueError, match=r"cannot read \['completion'\]; valid: \['completions'"):
    odd = lambda completion: [0.0]
    odd.batched = True
    scoring.make_scorer({'odd': odd})


def test_isolation_refuses_what_cannot_be_sent():
  lock = threading.Lock()
  with pytest.raises(
    TypeError, match=r'f: verifiers run in other processes.*isolate_verifiers=False'
  ):
    scoring.make_scorer({'f': lambda completion: float(lock.locked())})


def test_functions_that_no_module_has_can_be_isolated(tmp_path):
  file = tmp_path / 'mine.py'
  file.write_text(
    'FACTOR = 3\n\ndef reward(completion, *, more=1):\n  return FACTOR * len(completion) + more\n'
  )
  own = bind(part(find(f'{file}:reward', verifiers.TABLE, 'x'), more=2), verifiers.TABLE)
  closure = (lambda factor: lambda length: factor * length)(0.5)
  got = judge(scoring.make_scorer({'own': own, 'closure': closure}), 'aa')
  assert got.components['own'].tolist() == [8] and got.components['closure'].tolist() == [0.5]


def test_what_a_verifier_names_as_its_imports_takes_none_of_its_time(monkeypatch, tmp_path):
  (tmp_path / 'slow_to_import.py').write_text('import time\ntime.sleep(1)\nGIVEN = 0.5\n')
  monkeypatch.syspath_prepend(tmp_path)

  def verifier(completion):
    import slow_to_import

    return slow_to_import.GIVEN

  verifier.imports = ('slow_to_import',)
  assert judge(scoring.make_scorer({'a': verifier}, timeout_s=0.9, workers=1), 'x').total == [0.5]


def test_workers_are_other_processes_that_do_not_load_jax_and_end_with_the_scorer():
  score = scoring.make_scorer({'process': process, 'jax': sees_jax}, workers=1)
  first, again = judge(score, 'a', 'b'), judge(score, 'c', 'd')
  pid = int(first.components['process'][0])
  for got in (first, again):
    assert got.components['process'].tolist() == [pid] * 2 != [os.getpid()] * 2
    assert not got.components['jax'].any()
  del score
  gc.collect()
  assert_ends(pid)


def test_workers_may_start_before_the_first_row(tmp_path):
  started = tmp_path / 'started'

  def verifier(completion):
    return 0.5

  verifier.prepare = lambda: started.open('a').write('once ')
  score = scoring.make_scorer({'a': verifier}, workers=1)
  score.begin(rows=8)
  deadline = time.monotonic() + worker.START_S
  while not started.exists() and time.monotonic() < deadline:
    time.sleep(0.02)
  assert started.exists()
  assert judge(score, 'x', 'y').total.tolist() == [0.5, 0.5]
  assert started.read_text() == 'once '


def test_what_needs_no_process_has_none():
  score = scoring.make_scorer({'exact': verifiers.exact_match, 'process': process})
  assert score(['a'], [{'answer': 'a'}], [1]).components['exact'].tolist() == [1]
  before = threading.active_count()
  alone = scoring.make_scorer({'exact': verifiers.exact_match}, timeout_s=1e-9)
  assert alone(['a'], [{'answer': 'a'}], [1]).total.tolist() == [1]
  assert threading.active_count() == before


def test_functions_of_modules_that_a_worker_would_not_find_travel_whole(monkeypatch, tmp_path):
  (tmp_path / 'gone_in_workers.py').write_text('def verifier(completion): return 0.5')
  with monkeypatch.context() as patch:
    patch.syspath_prepend(tmp_path)
    module = importlib.import_module('gone_in_workers')
  assert judge(scoring.make_scorer({'a': module.verifier}, workers=1), 'x').total.tolist() == [0.5]


def test_workers_that_cannot_start_stop_the_run(monkeypatch, capfd):
  monkeypatch.setattr(worker, 'START', 'raise SystemExit("why it failed")')
  with pytest.raises(RuntimeError, match='ended before its first task'):
    score = scoring.make_scorer({'a': process}, workers=1)
    score.begin(1)  # a failure here is that of the first task
    judge(score, 'a')
  assert 'why it failed' in capfd.readouterr().err


@pytest.mark.parametrize('isolate', [False, True])
def test_a_fork_inside_a_verifier_is_not_a_second_trainer(isolate):
  """Its copy would answer later rows, or train."""
  score = scoring.make_scorer({'fork': fork}, workers=1, isolate=isolate)
  for _ in range(3):
    assert judge(score, '1', '2', '3').total.tolist() == [1, 2, 3]


def test_verifiers_may_use_processes():
  assert judge(scoring.make_scorer({'a': uses_a_pool}, workers=1), '1', '2').total.tolist() == [
    2,
    4,
  ]


def test_the_children_of_a_killed_worker_die_with_it(tmp_path):
  score = scoring.make_scorer({'a': starts_a_child}, workers=1, timeout_s=2.0)
  file = tmp_path / 'pid'
  assert score(['a'], [{'file': str(file)}], [1]).errors == {'a/Timeout': 1}
  assert_ends(int(file.read_text()))


class Unsayable(Exception):
  def __str__(self):
    raise RuntimeError('no words')


def says_nothing(completion):
  raise Unsayable


@pytest.mark.parametrize('isolate', [False, True])
def test_an_error_that_cannot_be_shown_is_contained(isolate):
  got = judge(scoring.make_scorer({'a': says_nothing}, isolate=isolate, workers=1), 'x')
  assert got.errors == {'a/Unsayable': 1}


def stops_reading(completion, record):
  """Leaves a copy that holds the pipe, and dies: nobody reads the next record."""
  if completion == 'leave':
    if os.fork():
      os._exit(0)
    time.sleep(1000)
  return 1.0


def test_a_record_that_nobody_reads_does_not_hang_the_trainer():
  score = scoring.make_scorer({'a': stops_reading}, workers=1, timeout_s=2.0)
  large = {'text': 'x' * 2_000_000}
  got = score(['leave', 'b', 'c'], [large] * 3, [1] * 3)
  assert got.valid.tolist()[0] is False and got.valid.tolist()[-1] is True


def test_memory_is_limited():
  score = scoring.make_scorer({'a': fills_memory, 'b': canary}, workers=1, memory_gib=1.0)
  got = judge(score, '5')
  assert got.errors == {'a/MemoryError': 1} and got.components['b'].tolist() == [5]


@pytest.mark.parametrize('limits', [dict(timeout_s=0.0), dict(workers=0), dict(memory_gib=-1.0)])
def test_limits_without_a_meaning_are_refused(limits):
  with pytest.raises(ValueError, match='must be positive'):
    scoring.make_scorer({'a': canary}, **limits)


@pytest.mark.parametrize('verifier', ['spin', 'hang'])
def test_workers_end_when_the_parent_is_killed_whatever_they_do(verifier, tmp_path):
  file = tmp_path / 'pid'
  code = f"""
    import os, signal, threading, time
    from polgrad.rewards import scoring
    from tests.rewards.scoring_test import tells_and
    score = scoring.make_scorer({{'a': tells_and}}, workers=1, timeout_s=1000.0)
    row = ['{verifier}'], [{{'file': '{file}'}}], [1]
    threading.Thread(target=score, args=row, daemon=True).start()
    while not os.path.exists('{file}') or not open('{file}').read():
      time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)
  """
  subprocess.run([sys.executable, '-c', textwrap.dedent(code)], cwd=ROOT, timeout=60)
  assert_ends(int(file.read_text()))


def assert_ends(pid):
  for _ in range(100):
    if not alive(pid):
      return
    time.sleep(0.1)
  raise AssertionError(f'process {pid} lives')


def alive(pid):
  """Whether a process runs; one that ended and waits to be reaped does not."""
  try:
    return pathlib.Path(f'/proc/{pid}/stat').read_text().split()[2] != 'Z'
  except FileNotFoundError:
    return False


def test_the_product_of_scores_is_low_where_one_is_and_none_where_one_is_negative():
  score = lambda combine: scoring.make_scorer(
    {
      'style': Weighted(1.0, lambda completion, record: record['style']),
      'fluency': Weighted(2.0, lambda completion, record: record['fluency']),
    },
    combine=combine,
    isolate=False,
  )(
    ['a', 'b', 'c'],
    [dict(style=x, fluency=y) for x, y in ((0.5, 0.8), (0.9, 0.0), (-1.0, 0.5))],
    [1] * 3,
  )
  found = score(combinations.product)
  np.testing.assert_allclose(found.total, [0.5 * 0.64, 0.0, np.nan])
  assert found.valid.tolist() == [True, True, False]
  assert found.errors == {'combine/NoNumber': 1}
  assert found.messages == [
    "row 2: combine: product of {'style': -1.0, 'fluency': 0.5} is no number"
  ]
  np.testing.assert_allclose(score(combinations.weighted_sum).total, [2.1, 0.9, 0.0])
