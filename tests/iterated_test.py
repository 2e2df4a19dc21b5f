"""Starts from earlier attempts: the buffer, and the collector that fills it."""

import dataclasses
import doctest

import jax
import numpy as np
import pytest

from polgrad import build, collect, phases
from polgrad.collect import replay, starts
from polgrad.data import batching
from polgrad.losses import multipliers
from polgrad.options import from_text
from polgrad.registry import bind, part
from polgrad.rewards.scoring import Scores
from tests import examples
from tests.collect_test import experiment

pytestmark = pytest.mark.usefixtures('samplers_once')
NUMBERS = np.random.default_rng(0)


def one(row, priority, *attempts, depth=1):
  return starts.Start(row, [[*a] for a in attempts] or [[row]], depth, priority)


def entries(memory):
  return [starts.start(memory, int(p)) for p in np.flatnonzero(memory.priorities > 0)]


def filled(*found, capacity=4, shown=2):
  return starts.pushed(starts.empty(capacity, shown, 3), found)


def test_doctests():
  assert not doctest.testmod(starts).failed and not doctest.testmod(replay).failed


def test_priorities_are_variances_of_groups():
  rewards = np.array([[1, 1, 0, 0, 1, 0, 0, 0], [0.1] * 8, [1, 0, 1, 1, 1, 1, 1, 1]])
  valid = np.ones((3, 8), bool)
  valid[2, 1] = False  # the one that differed
  np.testing.assert_allclose(replay.variances(rewards, valid), [0.23438, 0, 0], atol=5e-6)
  assert not replay.variances(rewards, valid & False).any()


def test_the_lowest_priority_leaves_a_full_buffer():
  memory = filled(one(1, 0.2), one(2, 0.1), one(3, 0.25), one(4, 0.15), one(5, 0.05))
  assert [s.row for s in entries(memory)] == [3, 1, 4, 2]
  again = starts.pushed(memory, [one(6, 0.12), one(7, 0.0)])
  assert [s.row for s in entries(again)] == [3, 1, 4, 6]
  # Of equal priorities the older one stays.
  assert [s.row for s in entries(starts.pushed(again, [one(8, 0.12)]))] == [3, 1, 4, 6]
  # A start whose own group did not differ frees its place.
  fallen = starts.pushed(starts.measured(memory, np.array([0, -1]), np.array([0.0, 0.2])), [])
  assert [s.row for s in entries(fallen)] == [1, 4, 2]


def test_laws_of_the_state():
  memory = filled(one(1, 0.2, [5, 6], []), one(2, 0.1))
  for same in (
    starts.pushed(memory, []),
    starts.measured(memory, np.array([-1, -1]), np.array([0.25, 0.2])),
  ):
    jax.tree.map(np.testing.assert_array_equal, same, memory)
  found = [one(3, 0.05), one(4, 0.25), one(5, 0.15), one(6, 0.12)]
  together = starts.pushed(memory, found)
  jax.tree.map(np.testing.assert_array_equal, starts.pushed(memory, found[::-1]), together)
  parts = starts.pushed(starts.pushed(memory, found[:2]), found[2:])
  jax.tree.map(np.testing.assert_array_equal, parts, together)
  # The same attempts at the same row are one start; an empty attempt is an attempt.
  repeated = starts.pushed(memory, [one(1, 0.05, [5, 6], [])])
  assert [(s.row, s.priority) for s in entries(repeated)] == [
    (2, pytest.approx(0.1)),
    (1, pytest.approx(0.05)),
  ]
  assert entries(memory)[0].attempts == [[5, 6], []]


def test_only_the_last_attempts_are_kept():
  start = starts.extended(7, None, [1], 0.2)
  for attempt in ([2], [3, 3]):
    start = starts.extended(7, start, attempt, 0.2)
  (kept,) = entries(filled(start))
  assert kept.attempts == [[2], [3, 3]] and kept.depth == 3


@pytest.mark.parametrize(
  ('how', 'want'),
  [
    (dict(), [0.25, 0.2, 0.05]),
    (dict(exponent=2.0), [0.0625, 0.04, 0.0025]),
    (dict(by='rank'), [1, 1 / 2, 1 / 3]),
    (dict(exponent=0.0), [1, 1, 1]),
  ],
)
def test_starts_are_drawn_by_their_priorities_and_never_at_variance_zero(how, want):
  memory = filled(one(1, 0.25), one(2, 0.2), one(3, 0.05))
  draw = lambda: starts.chosen(memory, 1, NUMBERS, new=0.0, **how)[0]
  found = np.bincount([draw() for _ in range(4000)], minlength=4) / 4000
  np.testing.assert_allclose(found[:3], np.array(want) / np.sum(want), atol=0.03)
  assert not found[3]
  # A step has a start once, and new rows where there are too few.
  five = starts.chosen(memory, 5, NUMBERS, new=0.0, **how)
  assert sorted(five.tolist()) == [-1, -1, 0, 1, 2]
  assert (starts.chosen(memory, 5, NUMBERS, new=1.0, **how) == -1).all()
  half = np.mean([starts.chosen(memory, 2, NUMBERS, new=0.5, **how) < 0 for _ in range(4000)])
  assert half == pytest.approx(0.5, abs=0.03)


def test_the_row_that_extends_a_history_is_valid():
  rewards = np.array([[0.0, 1.0, 1.0, 0.5]])
  valid = np.array([[False, True, False, True]])
  pick = lambda extend: {
    int(starts.picked(rewards, valid, NUMBERS, extend=extend)[0]) for _ in range(60)
  }
  assert pick('random') == {1, 3} and pick('best') == {1} and pick('worst') == {3}


# The collector.


def run_of(**settings):
  run = experiment()
  sizes = dict(prompts=4, samples_per_prompt=4, prompt_length=26, max_new_tokens=5)
  collector = bind(part(collect.Iterated, **sizes | settings), collect.TABLE)
  return dataclasses.replace(
    run, phases={'train': examples.changed(run.phases['train'], collect=collector)}
  )


def steps_of(run, number, score=None):
  """What the collector makes in consecutive steps, with the records that were judged."""
  phase = run.phases['train']
  seen = []

  def noted(texts, records, lengths, others):
    seen.append([{**r, 'text': t} for t, r in zip(texts, records)])
    return (score or phase.score)(texts, records, lengths, others)

  run = dataclasses.replace(run, phases={'train': examples.changed(phase, score=noted)})
  found = []
  with jax.set_mesh(run.mesh):
    state = phases.begin(run, 0, None)
    make = phase.collect.make(phases.context(run, run.phases['train'], 0))
    for step in range(number):
      drawer = phases.Drawer(phase, seed=0, cursor=int(state.cursor))
      got = make(state, drawer, step)
      found.append((got, drawer, seen[-1]))
      state = phases.advance(run.mesh, state, got, drawer.cursor)
  return found


def alternating(texts, *_):
  """Every group has the rewards 0, 1, 0, 1."""
  rewards = np.arange(len(texts)) % 2 * 1.0
  return Scores(rewards, {'r': rewards}, np.ones(len(texts), bool), {}, [])


def test_new_rows_alone_are_plain_rollouts():
  run = run_of(new=1.0)
  got, drawer, _ = steps_of(run, 1)[0]
  plain = dataclasses.replace(
    run,
    phases={
      'train': examples.changed(
        run.phases['train'],
        collect=bind(
          part(
            collect.Rollouts, prompts=4, samples_per_prompt=4, prompt_length=26, max_new_tokens=5
          ),
          collect.TABLE,
        ),
      )
    },
  )
  want, other, _ = steps_of(plain, 1)[0]
  jax.tree.map(np.testing.assert_array_equal, got.batch, want.batch)
  assert drawer.cursor == other.cursor == 4


def test_prompts_show_attempts_and_ask_again():
  run = run_of(new=0.0, shown=1, divergence=0.5, extend='worst')
  tokenizer, source = run.tokenizer, run.phases['train'].source
  first, second, third = steps_of(run, 3, alternating)
  # The first step has no attempts, so all its rows are new ones.
  assert first[1].cursor == 4 and first[0].metrics['starts/new'] == 1
  (memory,) = [first[0].collect_state]
  kept = entries(memory)
  assert len(kept) == 4 and {s.priority for s in kept} == {0.25} and {s.depth for s in kept} == {1}
  attempts = {}
  for reward, record in zip(first[0].batch.rewards, first[2]):
    if not reward:
      attempts.setdefault(record['id'], set()).add(record['text'])
  # All groups of the second step start from them, and no data row is drawn.
  assert second[1].cursor == 4 and second[0].metrics['starts/new'] == 0
  asked = set()
  for record in second[2]:
    base = source[record['id']]['prompt']
    shown = [
      (text, ask)
      for text in attempts[record['id']]
      for ask in (base, base + base)
      if record['prompt'] == base + text + ask
    ]
    assert shown and record['answer'] == source[record['id']]['answer']
    asked.add(shown[0][1] == base)
  assert asked == {True, False}
  # What is trained is the completion alone; the prompt is as it was judged.
  for row, record in enumerate(second[2]):
    ids = tokenizer.encode(record['prompt'])
    assert second[0].batch.tokens[row, 26 - len(ids) : 26].tolist() == ids
    assert not second[0].batch.mask[row, :26].any()
  assert second[0].sampled.valid.sum() == 0  # a curriculum does not see these rows
  assert 'started' not in second[0].batch
  # The buffer grows, and the next step may start from attempts at an attempt.
  assert {s.depth for s in entries(second[0].collect_state)} == {1, 2}
  assert third[0].metrics['starts/depth'] >= 1


def test_groups_whose_rewards_are_equal_leave_nothing_behind():
  equal = lambda texts, *_: alternating(texts)._replace(total=np.ones(len(texts)))
  got = steps_of(run_of(), 1, equal)[0][0]
  assert not entries(got.collect_state)
  jax.tree.map(
    np.testing.assert_array_equal, got.collect_state, run_of().phases['train'].collect.init()
  )


def test_a_start_whose_verifiers_failed_keeps_its_priority():
  calls = []

  def failing(texts, *_):
    calls.append(len(texts))
    found = alternating(texts)
    return found if len(calls) == 1 else found._replace(valid=np.arange(len(texts)) % 4 == 0)

  (first, _, _), (second, _, _) = steps_of(run_of(new=0.0), 2, failing)
  assert second.metrics['starts/new'] == 0 and len(entries(first.collect_state)) == 4
  jax.tree.map(np.testing.assert_array_equal, second.collect_state, first.collect_state)


def test_starts_without_room_are_counted():
  (first, _, _), (second, _, _) = steps_of(run_of(prompt_length=8, new=0.0), 2, alternating)
  assert not entries(first.collect_state) and first.metrics['starts/too_long'] == 0
  assert second.metrics['starts/too_long'] == 4 and second.metrics['starts/new'] == 1


def test_the_state_decides_what_a_resumed_run_draws():
  run = run_of(new=0.3)
  phase = run.phases['train']
  whole = steps_of(run, 3, alternating)
  with jax.set_mesh(run.mesh):
    state = phases.begin(run, 0, None)
    for got, drawer, _ in whole[:2]:  # as a checkpoint keeps them
      state = phases.advance(run.mesh, state, got, drawer.cursor)
    again = examples.changed(phase, score=lambda texts, *_: alternating(texts))
    make = again.collect.make(phases.context(run, again, 0))
    got = make(state, phases.Drawer(again, seed=0, cursor=int(state.cursor)), 2)
  jax.tree.map(np.testing.assert_array_equal, got.batch, whole[2][0].batch)
  jax.tree.map(np.testing.assert_array_equal, got.collect_state, whole[2][0].collect_state)


def test_a_buffer_of_other_data_is_refused():
  run = run_of()
  memory = filled(one(8_000_000, 0.2), capacity=256, shown=1)
  with jax.set_mesh(run.mesh):
    context = phases.context(run, run.phases['train'], 0)
    state = phases.begin(run, 0, None).replace(collect_state=memory)
    with pytest.raises(ValueError, match='row 8000000 of the data, but the source has'):
      run.phases['train'].collect.make(context)(state, lambda n: [], 0)


def test_a_conversation_shows_the_attempt_as_a_turn():
  settings = bind(part(collect.Iterated, request='Again.', diverge='Differently.'), collect.TABLE)
  run = experiment()
  base = {'messages': [{'role': 'user', 'content': '1+1?'}], 'answer': '2'}
  context = phases.context(run, run.phases['train'], 0)._replace(source=[base])
  ids = [run.tokenizer.encode(text) for text in ('3', '4')]
  record = settings.record(starts.Start(0, ids, 2, 0.1), context, diverge=True)
  said = [(m['role'], m['content']) for m in record['messages']]
  assert said == [
    ('user', '1+1?'),
    ('assistant', '3'),
    ('user', 'Again.'),
    ('assistant', '4'),
    ('user', 'Differently.'),
  ]
  assert record['answer'] == '2' and base['messages'] == [{'role': 'user', 'content': '1+1?'}]
  plain = bind(part(collect.Iterated), collect.TABLE)
  asked = plain.record(starts.Start(0, ids, 2, 0.1), context)['messages'][-1]['content']
  assert asked == batching.REQUEST


def test_an_environment_is_refused():
  with pytest.raises(ValueError, match='Iterated: an attempt is a completion of one turn'):
    build.build(from_text('method=exit_iteration,task=guess,model=tiny'))


def test_prompts_of_a_run_have_room_for_attempts():
  config = from_text('method=exit_iteration,task=addition,model=tiny')
  collector = config.phases.train.collect
  assert collector.prompt_length == 6 + 5 + 2 * 6
  assert config.model.max_length >= collector.prompt_length + collector.max_new_tokens
  assert isinstance(build.build(config).phases['train'].collect, collect.Iterated)


def test_factors_of_diversity_have_the_mean_one():
  tokens = np.array([[1, 2, 3], [1, 2, 3], [1, 2, 9], [7, 8, 9], [4, 4, 4], [4, 4, 4]])
  groups, valid = np.array([0, 0, 0, 0, 1, 1]), np.ones(6, bool)
  factor = jax.jit(multipliers.different)
  got = np.asarray(factor(tokens, np.ones((6, 3), bool), groups, valid))
  assert got[:4].mean() == pytest.approx(1, abs=1e-6) and got[3] == got[:4].max()
  assert got[0] == got[1] and (got[4:] == 1).all()  # equal rows of a group
  alone = factor(tokens, np.ones((6, 3), bool), np.arange(6), valid)
  np.testing.assert_array_equal(alone, np.ones(6))  # groups of one row
