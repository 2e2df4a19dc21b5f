"""Rollouts that begin with a part of the answer where all of a group were wrong."""

import dataclasses
import doctest
import itertools

import jax
import numpy as np
import pytest

from polgrad import build, collect, phases
from polgrad.collect import inpainted
from polgrad.data import batching
from polgrad.losses import advantages
from polgrad.options import from_text
from polgrad.registry import bind, part
from polgrad.rewards.scoring import Scores
from tests import examples
from tests.collect_test import experiment
from tests.runs import method_of

pytestmark = pytest.mark.usefixtures('samplers_once')
SIZES = dict(prompts=4, samples_per_prompt=4, prompt_length=6, max_new_tokens=5)


def test_doctests():
  assert not doctest.testmod(inpainted).failed


def test_groups_without_a_right_row():
  rewards = np.array([[0, 0.5, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]])
  valid = np.array([[1, 1, 1], [1, 1, 1], [0, 1, 1], [0, 0, 0]], bool)
  assert inpainted.hopeless(rewards, valid, 1.0).tolist() == [True, False, True, False]
  assert inpainted.hopeless(rewards, valid, 0.5).tolist() == [False, False, True, False]


def test_right_attempts_take_the_places_of_some_rows():
  random = np.random.default_rng(0)
  correct = np.array([[0, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
  seen = set()
  for _ in range(30):
    got = inpainted.replacements(np.array([0, 2, 3]), correct, 4, 2, random)
    assert got.attempts.tolist() == [1, 2, 8]  # the first right ones, at most two of a group
    assert {*got.rows[:2].tolist()} < {*range(4)} and got.rows[2] in range(12, 16)
    assert len({*got.rows.tolist()}) == 3
    seen |= {*got.rows.tolist()}
  assert seen == {*range(4), *range(12, 16)}
  assert not len(inpainted.replacements(np.array([0]), correct[:1], 4, 0, random).rows)


def test_the_expected_update_of_a_group_is_largest_at_one_half():
  """With advantages r - mean, sum_i A_i g_i / n = rho (1 - rho) (g_right - g_wrong)."""
  right, wrong = np.random.default_rng(0).normal(size=(2, 5))
  group_mean = jax.jit(advantages.group_mean)
  found = []
  for number in range(9):
    rewards = (np.arange(8) < number) * 1.0
    rows = np.where(rewards[:, None] > 0, right, wrong)
    credited = np.asarray(group_mean(rewards, np.zeros(8, int), np.ones(8, bool)))
    update = (credited[:, None] * rows).mean(axis=0)
    rho = number / 8
    np.testing.assert_allclose(update, rho * (1 - rho) * (right - wrong), atol=1e-6)
    found.append(np.linalg.norm(update))
  assert np.argmax(found) == 4 and found[0] == found[8] == 0
  np.testing.assert_allclose(found[4], 0.25 * np.linalg.norm(right - wrong), rtol=1e-6)


@pytest.fixture(scope='module')
def run():
  return experiment()


def collected(run, score, **settings):
  """The batch of a step, with what was judged in each call: text, record."""
  settings = dict(shortest=1, longest=1) | settings
  collector = bind(part(collect.Inpainted, **SIZES, **settings), collect.TABLE)
  seen = []

  def noted(texts, records, lengths, others):
    seen.append(list(zip(texts, records)))
    return score(texts, records, len(seen))

  _, objective = method_of('igpo').bound()
  changes = dict(collect=collector, objective=objective, score=noted)
  phase = examples.changed(run.phases['train'], **changes)
  changed = dataclasses.replace(run, phases={'train': phase})
  with jax.set_mesh(run.mesh):
    state = phases.begin(changed, 0, None)
    make = collector.make(phases.context(changed, phase, 0))
    return make(state, phases.Drawer(phase, seed=0, cursor=0), 0), seen


def scored(rewards):
  rewards = np.asarray(rewards, float)
  return Scores(rewards, {'r': rewards}, np.ones(len(rewards), bool), {}, [])


def second_attempts_are_right(texts, records, call):
  """The rows of the first two prompts are wrong; of their attempts with a hint every other is right."""
  if call == 1:
    return scored(np.arange(16) >= 8)
  return scored(np.arange(len(texts)) % 2)


def test_wrong_rows_are_replaced_by_right_ones_that_began_with_the_answer(run):
  got, (first, hinted) = collected(run, second_attempts_are_right)
  batch, tokenizer = got.batch, run.tokenizer
  assert len(hinted) == 8 and got.metrics['hints/hopeless'] == 0.5
  assert got.metrics['hints/rescued'] == 0.5 and got.metrics['hints/rows'] == 4 / 16
  injected, mask = batch['injected'] > 0, batch.mask
  replaced = batch.rewards.reshape(4, 4)[:2].reshape(-1) == 1
  assert replaced.reshape(2, 4).sum(axis=1).tolist() == [2, 2]
  # What begins a replaced row is the answer; the rest was drawn, and both are in the mask.
  answers = {r['id']: batching.completion(r, tokenizer) for _, r in first}
  texts = {text for text, _ in hinted[1::2]}
  for row in range(16):
    given = int(injected[row].sum())
    ids = batch.tokens[row][mask[row]].tolist()
    if row >= 8 or not replaced[row]:
      assert not given
      continue
    assert 1 <= given < len(ids) and injected[row, 6 : 6 + given].all()
    assert ids[:given] == answers[batch.prompt_ids[row]][:given]
    assert tokenizer.decode(ids) in texts
    assert given <= 0.6 * len(answers[batch.prompt_ids[row]]) + 0.5
  # Prompts and groups are those of the rows that they replace.
  np.testing.assert_array_equal(batch.group_ids, np.repeat(np.arange(4), 4))
  assert (batch.prompt_ids.reshape(4, 4) == batch.prompt_ids[::4, None]).all()
  for row, column in itertools.product(range(16), range(6)):
    same = batch.tokens[row, column] == batch.tokens[row // 4 * 4, column]
    assert same and not mask[row, column]
  # Given tokens have log-probs of the policy, and the ratio to the sampler is 1 in all tokens.
  np.testing.assert_allclose(batch.behavior_logp[mask], batch.proximal_logp[mask], atol=2e-5)
  assert (batch.proximal_logp[injected] < 0).all()
  # Advantages are those of the groups with the replaced rows; a curriculum sees what was sampled.
  want = batch.rewards - np.repeat(batch.rewards.reshape(4, 4).mean(axis=1), 4)
  np.testing.assert_allclose(
    batch.advantages[mask], np.broadcast_to(want[:, None], mask.shape)[mask], atol=1e-6
  )
  np.testing.assert_array_equal(got.sampled.rewards, np.arange(16) >= 8)
  np.testing.assert_array_equal(got.terms['r'], batch.rewards)


def test_groups_with_a_right_row_stay_as_they_were_drawn(run):
  one_right = lambda texts, *_: scored(np.arange(16) % 4 == 0)
  got, calls = collected(run, one_right)
  assert len(calls) == 1 and not got.batch['injected'].any()
  assert got.metrics['hints/hopeless'] == got.metrics['hints/rows'] == 0
  # So do groups whose attempts are wrong too, and all groups where nothing is replaced.
  never, calls = collected(run, lambda texts, *_: scored(np.zeros(len(texts))))
  assert len(calls) == 2 and never.metrics['hints/rescued'] == 0
  np.testing.assert_array_equal(never.batch.tokens, got.batch.tokens)
  none, _ = collected(run, second_attempts_are_right, replaced=0.0)
  np.testing.assert_array_equal(none.batch.tokens, got.batch.tokens)


def test_attempts_may_be_drawn_in_several_calls(run):
  whole, _ = collected(run, second_attempts_are_right)
  parts, _ = collected(run, second_attempts_are_right, attempts_at_a_time=4)
  close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5)
  jax.tree.map(close, parts.batch, whole.batch)


@pytest.mark.parametrize(
  ('wrong', 'told'),
  [
    (dict(least=0.7), 'least=0.7 is above most=0.6'),
    (dict(shortest=11), 'shortest=11 is above longest=10'),
    (dict(recompute_proximal=False), 'recompute_proximal must be True'),
  ],
)
def test_settings_that_make_no_hints_are_refused(wrong, told):
  with pytest.raises(ValueError, match=told):
    bind(part(collect.Inpainted, **wrong), collect.TABLE)


def test_records_need_answers_and_no_environment():
  with pytest.raises(ValueError, match='Inpainted: a hint is the beginning of one turn'):
    build.build(from_text('method=igpo,task=guess,model=tiny'))
  settings = bind(part(collect.Inpainted, **SIZES), collect.TABLE)
  with pytest.raises(ValueError, match='answer'):
    settings.lay_out([{'prompt': '1+1=', 'id': 3}], tokenizer=experiment().tokenizer)
