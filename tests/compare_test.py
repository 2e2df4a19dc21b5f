"""Two models are compared on the held-out problems; what failed is neither won nor lost."""

import json
import math
import types

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from polgrad import checkpoint, cli, compare, evaluate, sharding
from polgrad.build import HeldOut
from polgrad.collect import Drawn
from polgrad.data import sources
from polgrad.rewards import comparisons
from polgrad.types import Outputs
from tests.evaluate_test import TOKENIZER, WIDTH, moody, rollout

BETTER = {'a': ['a', 'x'], 'b': ['bb', 'b'], 'c': ['c', '?']}
WORSE = {'a': ['x', 'x'], 'b': ['b', 'b'], 'c': ['?', 'c']}


def experiment(comparison=comparisons.larger_reward, **phases):
  problems = [{'prompt': p, 'answer': p, 'given': p + p} for p in 'abc']
  plan = HeldOut(
    every=1,
    source=sources.Source(len(problems), problems.__getitem__),
    reward={'moody': moody},
    problems=9,
    batch=2,
    prompt_length=2,
    max_new_tokens=WIDTH,
    comparison=comparison,
    isolate_verifiers=False,
  )
  return types.SimpleNamespace(
    **{'evaluation': plan, 'policy': (), 'tokenizer': TOKENIZER, 'mesh': None, 'seed': 0},
    **{'phases': phases, 'order': tuple(phases), 'show_samples': 0},
  )


def sampler(one, samples, behavior_policy):
  def sample(params, prompts, records, ids, *, seed, step):
    texts = [t for i in ids for t in params['policy']['abc'[int(i)]][:samples]]
    return Drawn(rollout(texts, prompts.tokens))

  return sample


def made(one, texts, samples=2):
  return compare.make(one, sampler(one, samples, None), texts, samples)


def test_the_larger_reward_wins_ties_count_half_and_failures_do_not_count():
  one = experiment()
  better, worse = made(one, BETTER), made(one, WORSE)
  assert better.prompts == ['a', 'b', 'c'] and better.texts == list(BETTER.values())
  wins, messages = compare.wins_of(one, better, worse)
  np.testing.assert_array_equal(wins, [[1, 0.5], [0, 0.5], [np.nan, np.nan]])
  found, _ = compare.measure(one, better, worse)
  assert found['win_rate'] == pytest.approx((0.75 + 0.25) / 2)
  assert found['win_rate_low'] <= found['win_rate'] <= found['win_rate_high']
  assert (found['prompts'], found['failed_comparisons']) == (2, 2)
  assert found['characters'] == pytest.approx(7 / 6) and not messages


def test_another_comparison_is_asked_about_texts_with_their_prompt():
  def asked(first, second, prompt):
    assert prompt in 'abc'
    if '?' in first:
      raise RuntimeError('unreadable')
    return float(len(first) > len(second))

  one = experiment(asked)
  wins, messages = compare.wins_of(one, made(one, BETTER), made(one, WORSE))
  np.testing.assert_array_equal(wins[:2], [[0, 0], [1, 0]])
  assert not messages  # the pair with an unreadable completion has no rewards, so nobody is asked


def test_texts_of_the_records_can_be_the_other_model():
  one = experiment()
  better = made(one, BETTER)
  given = compare.of_field(one, better, 'given')
  assert given.texts == [['aa', 'aa'], ['bb', 'bb'], ['cc', 'cc']] and not given.scores.any()
  np.testing.assert_array_equal(given.lengths, np.full((3, 2), 2.0))
  with pytest.raises(ValueError, match='field:no: record 0 has no such text; its fields'):
    compare.of_field(one, better, 'no')


@pytest.fixture
def models(monkeypatch):
  """Checkpoints 2 and 4 whose parameters are texts; each has an anchor from step 4 on."""

  def restore(one, folder, step, name='policy'):
    if name != 'policy' and step < 4:
      raise ValueError(f'checkpoint {step} has no anchor {name!r}')
    return BETTER if name == 'policy' else WORSE

  manager = types.SimpleNamespace(all_steps=lambda: [2, 4])
  monkeypatch.setattr(evaluate, 'restore_params', restore)
  monkeypatch.setattr(evaluate, 'sampler', sampler)
  monkeypatch.setattr(checkpoint, 'manager', lambda folder: manager)
  kl = compare.numbers.Divergence(1.0, 0.1, 1.1, 0.2)
  monkeypatch.setattr(compare, 'make_divergence', lambda one: lambda *arguments: kl)


def run(one, monkeypatch, **given):
  flags.FLAGS.mark_as_parsed()
  monkeypatch.setattr(compare, 'build', lambda config: one)
  monkeypatch.setattr(cli, 'config', lambda table: None)
  monkeypatch.setattr(cli, 'start', lambda argv, needed: None)
  monkeypatch.setattr(compare.jax, 'set_mesh', lambda mesh: flagsaver.flagsaver())
  with flagsaver.flagsaver(**given):
    compare.main(['compare'])


def test_the_command_prints_the_numbers_and_draws_the_curve(models, monkeypatch, tmp_path, capsys):
  (tmp_path / 'checkpoints').mkdir()
  proxy = experiment().evaluation
  run(experiment(train=proxy), monkeypatch, workdir=str(tmp_path), samples=2)
  found = json.loads(capsys.readouterr().out)
  assert (found['step'], found['kl'], found['win_rate']) == (4, 1.0, 0.5)
  assert found['proxy_reward'] == found['reward'] == pytest.approx(3 / 5)
  run(experiment(train=proxy), monkeypatch, workdir=str(tmp_path), curve=True)
  told = capsys.readouterr()
  assert [row['step'] for row in json.loads(told.out)] == [4]
  assert "left out: checkpoint 2 has no anchor 'reference'" in told.err
  assert json.loads((tmp_path / 'overoptimization.json').read_text())[0]['kl_k3'] == 1.1
  assert (tmp_path / 'overoptimization.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'


@pytest.mark.parametrize(
  ('given', 'said'),
  [
    ({'workdir': None}, 'name the run by --workdir'),
    ({'workdir': '/no/run'}, '/no/run/checkpoints: expected the checkpoints of a run'),
    ({'curve': True, 'step': 2}, '--curve measures all checkpoints, so it takes no --step'),
    ({'curve': True, 'against': 'field:given'}, '--curve needs --workdir'),
    ({'against': '/no/run'}, '--against=/no/run: there is no such folder'),
    ({'against': 'field:no'}, 'record 0 has no such text'),
    ({'against': 'teacher', 'step': 2}, "checkpoint 2 has no anchor 'teacher'"),
  ],
)
def test_other_choices_are_refused_in_one_line(models, given, said, monkeypatch, tmp_path, capsys):
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(SystemExit) as ended:
    run(experiment(), monkeypatch, **{'workdir': str(tmp_path), **given})
  told = capsys.readouterr().err
  assert ended.value.code == 2 and said in told and told.count('\n') == 1


def test_the_kl_is_that_of_the_own_samples_without_filled_up_rows(monkeypatch):
  """The log-prob of a token is its id times the parameter."""
  one = experiment()
  monkeypatch.setattr(sharding, 'place_batch', lambda mesh, batch: batch)
  monkeypatch.setattr(
    compare,
    'forward_in_pieces',
    lambda policy, params, batch, **settings: Outputs(logp=params * jnp.asarray(batch.tokens)),
  )
  found = compare.make_divergence(one)(made(one, BETTER, samples=1), -0.25, -0.5)
  ids = [[*TOKENIZER.encode(row[0]), TOKENIZER.stop_ids[0]] for row in BETTER.values()]
  sums = [0.25 * sum(row) for row in ids]
  assert found.k1 == pytest.approx(np.mean(sums))
  assert found.k1_error == pytest.approx(np.std(sums, ddof=1) / math.sqrt(3))
