"""Environments in the loop: batches of episodes, what they earn, failures, seeds, metrics, storage."""

import dataclasses
import functools
import json
import random
import re
import time
import types
from typing import ClassVar

import jax
import numpy as np
import pytest

from polgrad import (
  build,
  collect,
  credit,
  environments,
  inspect,
  methods,
  objectives,
  packing,
  phases,
  presets,
  row_files,
  tasks,
)
from polgrad.collect import beginnings, drawn, scored
from polgrad.compose import compose
from polgrad.data import sources
from polgrad.environments import Environment, Step, toolbox
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods import Method
from polgrad.options import from_text
from polgrad.registry import part, weighted
from polgrad.rewards import verifiers, worker
from polgrad.rewards.scoring import Scores
from polgrad.sampling import behavior_policies, engines
from polgrad.types import Layout, turns
from polgrad.view import runs
from tests.runs import method_of

pytestmark = pytest.mark.usefixtures('samplers_once', 'undrawn')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Echo(Environment):
  """Answers with a digit of its seed, pays half a point a character, and fails at one of them."""

  IN_PROCESS: ClassVar[bool] = True
  max_turns: int = 3
  fails_at: str = ''

  def reset(self, record, seed):
    return seed, 0

  def step(self, state, text):
    seed, taken = state
    if self.fails_at and self.fails_at in text:
      raise LookupError(f'no {self.fails_at}')
    metrics = {'long': float(len(text) > 1)} if taken else {}
    return Step((seed, taken + 1), str(seed % 10), 0.5 * len(text), metrics=metrics)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Late(Echo):
  """The same in separate processes, whose answers take a time that depends on no seed."""

  IN_PROCESS: ClassVar[bool] = False

  def step(self, state, text):
    time.sleep(0.01 * random.SystemRandom().random())
    return super().step(state, text)


class Deaf(Echo):
  """Fails at every turn."""

  def step(self, state, text):
    raise LookupError('nothing')


def config(environment=None, rewards=None, kind=collect.Rollouts, **rollouts):
  """A smoke run of group means on the task `guess`, with another environment."""
  method = Method(
    collect=functools.partial(kind, **rollouts),
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.token_mean),
    ),
  )
  task = tasks.guess(guesses=3)
  task = dataclasses.replace(
    task, environment=environment or part(Echo), turn_tokens=3, rewards=rewards or {}
  )
  return compose(method, task, presets.tiny(alphabet=task.alphabet), warm_start=0, smoke=True)


def collected(run, steps=1, first=0):
  """What is collected in these steps, with the parameters at the start."""
  phase = run.phases['train']
  found = []
  with jax.set_mesh(run.mesh):
    state = phases.begin(run, 0, None)
    make = phase.collect.make(phases.context(run, phase, 0))
    for step in range(first, steps):
      draw = phases.Drawer(phase, seed=0, cursor=step * phase.collect.prompts)
      got = make(state, draw, step).finished()
      found.append(got)
      state = phases.advance(run.mesh, state, got, draw.cursor)
  return found


@pytest.fixture(scope='module')
def plain():
  return collected(build.build(config()), steps=2)


def test_a_batch_has_the_reward_of_each_turn_at_its_last_token(plain):
  batch, episodes = plain[0].batch, plain[0].episodes
  assert batch.valid.all() and len(episodes) == len(batch.tokens)
  for row, episode in enumerate(episodes):
    spans = turns(batch.mask[row])
    assert len(spans) == len(episode.rewards) == 3
    at = [s.stop - 1 for s in spans]
    np.testing.assert_array_equal(batch['turn_rewards'][row, at], episode.rewards)
    assert np.count_nonzero(batch['turn_rewards'][row]) <= len(spans)
  np.testing.assert_allclose(batch.rewards, batch['turn_rewards'].sum(axis=1))
  np.testing.assert_array_equal(batch['turn_rewards'][~batch.mask], 0)
  np.testing.assert_array_equal(batch.advantages[~batch.mask], 0)


def test_the_environment_s_term_is_the_exact_sum_that_the_evaluation_has_too(plain):
  [batch, *_], episodes = plain[0], plain[0].episodes
  found = plain[0].terms['environment']
  assert found.dtype == np.float64
  np.testing.assert_array_equal(found, [sum(one.rewards) for one in episodes])
  np.testing.assert_array_equal(found, drawn.earned(drawn.Drawn(batch, episodes)))


def test_turns_have_one_number_where_the_policy_has_read_the_same(plain):
  batch, episodes = plain[0].batch, plain[0].episodes
  ids = batch['observation_ids']
  assert ids.dtype == np.int32 and (ids >= 0).all()
  np.testing.assert_array_equal(ids[~batch.mask], 0)
  stop = {}  # whether the policy drew the stop token decides what is appended; here nothing is
  for row, episode in enumerate(episodes):
    for number, span in enumerate(turns(batch.mask[row])):
      [own] = set(ids[row, span])
      read = int(batch.group_ids[row]) if number == 0 else episode.observations[number - 1]
      assert stop.setdefault((number > 0, read), own) == own
  assert len(set(stop.values())) == len(stop)


def test_what_the_policy_drew_is_what_the_environment_was_told(plain):
  run = build.build(config())
  batch, episodes = plain[0].batch, plain[0].episodes
  for row, episode in enumerate(episodes):
    said = [batch.tokens[row, span].tolist() for span in turns(batch.mask[row])]
    ids = [x[:-1] if x[-1] in run.tokenizer.stop_ids else x for x in said]
    assert [run.tokenizer.decode(x) for x in ids] == episode.turns
  texts = collect.completions(batch, [{'prompt': ''}] * 4, run.tokenizer)
  assert texts == [episode.turns[-1] for episode in episodes]  # verifiers judge the last turn
  # A prefix begins the first turn alone, so no verifier finds it in the last one.
  begun = run.tokenizer.sampling('A:', ())
  assert collect.completions(batch, [{'prompt': ''}] * 4, begun, episodes) == texts


def test_packed_rows_and_shared_prompts_leave_loss_and_gradient_of_turns_unchanged(plain):
  run = build.build(config())
  phase = run.phases['train']
  batch = plain[0].batch
  size = batch.tokens.shape[1]
  wide = lambda x: np.pad(x, ((0, 0), (0, size))) if x.shape[1:] == (size,) else x
  batch = jax.tree.map(wide, batch)
  numbers = np.random.default_rng(0).normal(size=batch.mask.shape).astype(np.float32)
  batch = batch.replace(advantages=np.where(batch.mask, numbers, np.float32(0)))
  assert all(len(turns(mask)) == 3 for mask in batch.mask)
  made = phase.learner(run.policy)

  with jax.set_mesh(run.mesh):
    state = phases.begin(run, 0, None)
    packed = packing.pack(batch.replace(layout=Layout(pack=4)))
    gradient = jax.jit(made.gradient)
    (loss, _), grads = gradient(state, state.params, batch)
    (loss_packed, _), grads_packed = gradient(state, state.params, packed)
    shared = Layout(phase.collect.prompt_length, phase.collect.rows_per_prompt)
    rows = batch.replace(layout=shared)
    loss_shared, _ = jax.jit(made.loss)(state, state.params, rows, {})
  assert 0 < packed.layout.rows < len(batch.tokens) and shared.shared > 1
  assert abs(float(loss)) > 1e-2
  np.testing.assert_allclose([loss_packed, loss_shared], [loss, loss], rtol=1e-5)
  same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  jax.tree.map(same, grads_packed, grads)


def test_metrics_are_means_by_turn(plain):
  got, batch, episodes = plain[0].metrics, plain[0].batch, plain[0].episodes
  assert got['turns'] == 3 and got['turns/3/share'] == 1
  assert got['turns/2/reward'] == pytest.approx(np.mean([e.rewards[1] for e in episodes]))
  lengths = [turns(row)[0].stop - turns(row)[0].start for row in batch.mask]
  assert got['turns/1/length'] == pytest.approx(np.mean(lengths))
  long = [m['long'] for e in episodes for m in e.metrics[1:]]
  assert got['environment/long'] == pytest.approx(np.mean(long))
  assert got['reward/environment'] == got['reward'] and got['environment_errors'] == 0


@pytest.fixture(scope='module')
def judged():
  """Episodes that fail at a character, and a verifier of two points for short ones."""
  short = {'short': weighted(2.0, part(verifiers.soft_overlong, max_length=7, cache=4))}
  return collected(build.build(config(part(Echo, fails_at='3'), rewards=short)))[0]


def test_an_episode_that_fails_is_invalid_and_counted_and_never_0(plain, judged):
  batch, bad = judged.batch, ~judged.batch.valid
  np.testing.assert_array_equal(bad, [any('3' in t for t in e.turns) for e in plain[0].episodes])
  assert 0 < bad.sum() < len(bad)
  assert (batch.rewards[bad] == 0).all() and not batch['turn_rewards'][bad].any()
  assert not batch.mask[bad].any() and not batch.advantages[bad].any()
  got = judged.metrics
  assert got['environment_errors'] == got['environment_errors/LookupError'] == bad.sum()
  assert got['verifier_errors'] == 0
  assert got['reward'] == pytest.approx(batch.rewards[~bad].mean())
  assert 'LookupError: no 3' in judged.messages[0]
  assert np.isnan(judged.terms['environment'][bad]).all()


def test_rewards_of_verifiers_are_added_at_the_last_token(plain, judged):
  good = judged.batch.valid
  rows = np.arange(good.sum())
  extra = (judged.batch['turn_rewards'] - plain[0].batch['turn_rewards'])[good]
  last = np.array([turns(row)[-1].stop - 1 for row in judged.batch.mask[good]])
  np.testing.assert_allclose(extra[rows, last], 2 * judged.terms['short'][good], atol=1e-6)
  sums = judged.batch['turn_rewards'].sum(axis=1)
  np.testing.assert_allclose(judged.batch.rewards, sums, atol=1e-6)
  extra[rows, last] = 0
  assert not extra.any() and judged.terms['short'][good].any()


def test_episodes_have_seeds_that_a_resumed_run_has_too(plain, judged):
  good = judged.batch.valid
  np.testing.assert_array_equal(judged.batch.tokens[good], plain[0].batch.tokens[good])
  said = lambda got: [e.observations[0] for e in got.episodes if e.observations]
  assert said(plain[0]) != said(plain[1])
  assert len(set(engines.row_seeds(0, 1, range(50), 4))) == 200
  assert engines.row_seeds(-1, 1, [3], 1) != engines.row_seeds(0, 1, [3], 1)


def test_a_run_that_begins_again_has_the_same_bits_whenever_answers_come(plain):
  got = collected(build.build(config(part(Late))), steps=2, first=1)[0]
  assert got.episodes == plain[1].episodes
  same = lambda a, b: np.testing.assert_array_equal(a, b)
  jax.tree.map(same, got.batch, plain[1].batch)


def test_every_row_of_a_group_is_an_episode_also_in_a_memory(plain):
  greedy = part(behavior_policies.greedy)
  made = config(opponents=1, opponent_policy=greedy, lag=1, overlap=True)
  first, second = collected(build.build(made), steps=2)
  assert len(first.episodes) == len(first.batch.tokens) == 20
  for row, episode in enumerate(first.episodes):
    at = [s.stop - 1 for s in turns(first.batch.mask[row])]
    np.testing.assert_array_equal(first.batch['turn_rewards'][row, at], episode.rewards)
  for got in (first, second):  # the second step uses the first batch once more
    own = got.batch['opponent'] == 0
    for name in ('turn_rewards', 'observation_ids', 'rewards'):
      np.testing.assert_array_equal(got.batch[name][own], plain[0].batch[name])
  assert [e.turns for e in second.episodes] != [e.turns for e in first.episodes]  # those are fresh


def test_replaced_groups_bring_their_episodes(plain):
  episodes = plain[0].episodes
  batch = plain[0].batch
  half = lambda rows: jax.tree.map(lambda x: x[rows], batch)
  scores = Scores(batch.rewards[:8], {}, batch.valid[:8], {}, [])
  texts = lambda rows: scored.Texts([''] * 8, [{}, {}], scores, episodes[rows])
  old, new = slice(0, 8), slice(8, 16)
  useful = np.array([True, False])
  got, said = scored.replace_groups((half(old), texts(old)), (half(new), texts(new)), useful, 4)
  begin = 8 + 4 * int(np.argmax(scored.informative(half(new), texts(new), 4)))
  assert list(said.episodes) == [*episodes[:4], *episodes[begin : begin + 4]]
  expected = batch['turn_rewards'][begin : begin + 4]
  np.testing.assert_array_equal(got['turn_rewards'][4:], expected)


@pytest.mark.parametrize(
  ('settings', 'told'),
  [
    (dict(demonstrations=1), 'demonstrations=1 adds completions of the data.*no turns'),
    (dict(beginning=beginnings.uniform), 'beginning=True'),
    (dict(preferences=1), 'preferences=1'),
    (dict(environment=environments.OneTurn()), 'turn_tokens is a budget of turns.*no environment'),
  ],
)
def test_what_has_no_meaning_with_an_environment_is_refused(settings, told):
  with pytest.raises(ValueError, match=told):
    collect.Rollouts(**{'environment': Echo(), 'turn_tokens': 3, **settings})


def test_a_method_that_adds_answers_to_groups_is_refused_by_name():
  with pytest.raises(ValueError, match=r'demonstrations.*no turns of the task'):
    from_text('method=luffy,task=guess,model=tiny')


def test_a_verifier_cannot_have_the_name_of_the_environment():
  made = config(rewards={'environment': weighted(1.0, part(verifiers.exact_match))})
  with pytest.raises(ValueError, match='no verifier can have that name'):
    build.build(made)


def test_an_environment_that_never_answers_is_refused_before_a_run():
  with pytest.raises(ValueError, match=r'collect.environment: it fails on all of 4.*LookupError'):
    build.check_data(build.build(config(part(Deaf))))


def length_of(completion):
  return float(len(completion))


def longer(first, second):
  return float(len(first) > len(second))


def whole(completion):
  return [(0, len(completion), 1.0)]


def test_processes_begin_with_a_phase_where_they_are_used(monkeypatch):
  begun = []
  note = lambda self, tasks: begun.append((len(self._workers), tasks))
  monkeypatch.setattr(worker.Workers, 'begin', note)
  run = build.build(config(part(Late)))
  own = dict(reward={'length': length_of}, comparison=longer, spans=whole, verifier_workers=3)
  phase = dataclasses.replace(run.phases['train'], **own)
  assert phase.collect.rows == 16
  update = types.SimpleNamespace(ahead=lambda *_: None)
  doing = types.SimpleNamespace(phase=phase, update=update, experiment=run)

  def begins(step):
    begun.clear()
    phases.PhaseRun.work_ahead(doing, types.SimpleNamespace(phase_step=step))
    return begun

  assert begins(0) == [(3, 16), (3, 16), (3, 16), (2, 16)]
  assert begins(phase.steps) == []
  # Of 20 processes the first one talks to the environment, and each of 16 judges a row.
  monkeypatch.setattr(jax, 'process_count', lambda: 20)
  for index, judged in ((1, 1), (15, 1), (16, 0)):
    monkeypatch.setattr(jax, 'process_index', lambda index=index: index)
    assert begins(0) == [(3, judged)] * 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broken(Echo):
  """Fails where its settings say."""

  prepares: bool = True
  opens: str = 'prompt'
  says: str = '1'

  def prepare(self):
    if not self.prepares:
      raise KeyError('corpus')

  def opened(self, record):
    return {self.opens: record[self.opens or 'absent']}

  def step(self, state, text):
    return Step(state, self.says)


@pytest.mark.parametrize(
  ('settings', 'told'),
  [
    ({'prepares': False}, "prepare: KeyError: 'corpus'"),
    ({'opens': ''}, "record 0: Broken.opened: KeyError: 'absent'"),
    ({'opens': 'answer'}, 'record 0: Broken.opened: expected a record with a prompt or messages'),
    (
      {'says': ''},
      'it fails on all of 4 .*Unreadable: .*without any token.*needs something to read',
    ),
    ({'says': 'é'}, 'it fails on all of 4 .*Unreadable: .*is not in the alphabet'),
  ],
)
def test_an_environment_that_cannot_begin_is_refused_with_its_field(settings, told):
  with pytest.raises((ValueError, RuntimeError), match=rf'^config.*collect.environment: {told}'):
    build.check_data(build.build(config(part(Broken, **settings))))


def test_what_is_said_after_the_last_turn_need_not_be_readable():
  build.check_data(build.build(config(part(Broken, says='', max_turns=1))))


@pytest.fixture(scope='module')
def rows(judged):
  run = build.build(config())
  table = row_files.table_of(
    'train',
    1,
    judged.batch,
    16,
    tokenizer=run.tokenizer,
    terms=judged.terms,
    episodes=judged.episodes,
  )
  return table.to_pylist()


class TestStored:
  """Rows of episodes in files and on pages."""

  def test_say_who_said_what_and_what_it_was_worth(self, rows, judged):
    for row, episode in zip(rows, judged.episodes):
      own = [part for part in row['turns'] if part['who'] == 'policy']
      read = [part['text'] for part in row['turns'] if part['who'] == 'environment']
      assert [part['text'] for part in own] == episode.turns
      assert read == episode.observations
      assert [json.loads(part['metrics']) for part in own][
        : len(episode.metrics)
      ] == episode.metrics
      if episode.valid:
        assert sum(part['reward'] for part in own) == pytest.approx(row['rewards'])
      assert row['failure'] == ('' if episode.valid else 'LookupError: no 3')
      ends = [part['begin'] + part['length'] for part in row['turns']]
      assert [part['begin'] for part in row['turns']] == [row['start'], *ends[:-1]]

  def test_are_shown_turn_by_turn(self, rows):
    row = next(row for row in rows if not row['failure'])
    said = runs.said(row, 1000, row['start'])
    assert [one.title for one in said] == ['turn 1', 'read', 'turn 2', 'read', 'turn 3']
    assert ''.join(t.text for one in said for t in one.tokens) == ''.join(
      row['pieces'][row['start'] :]
    )
    assert said[2].facts[1][0] == 'long' and ('turns', '3') in runs.facts(row)
    bad = next(row for row in rows if row['failure'])
    assert ('failed', 'LookupError: no 3') in runs.facts(bad)
    view = inspect.View('a row', 'a note', [row])
    assert inspect.html(view).count('class="turn read"') == 2
    printed = inspect.painted(row, [0] * len(row['pieces'])).plain
    assert '[turn 2: reward ' in printed and printed.count('[read]') == 2

  def test_of_a_memory_have_the_tokens_of_turns_and_no_more(self, judged):
    old = judged.batch.with_arrays(staleness=np.ones(16, np.float32))
    tokenizer = build.build(config()).tokenizer
    table = row_files.table_of('t', 1, old, 2, tokenizer=tokenizer, episodes=judged.episodes)
    first = table.to_pylist()[0]
    assert first['failure'] is None and first['turns'][0]['metrics'] == '{}'


def test_an_environment_is_an_option_of_any_task():
  made = from_text('method=grpo,task=addition,model=tiny,environment=Guess,environment.high=5')
  own = made.phases.train.collect.environment
  assert (own.name, own.high) == ('environments.Guess', 5)
  made = from_text('method=grpo,task=guess,model=tiny,environment.max_turns=2')
  assert made.evaluation.environment.max_turns == 2
  with pytest.raises(ValueError, match='name it with environment='):
    from_text('method=grpo,task=addition,model=tiny,environment.high=5')
  with pytest.raises(ValueError, match="unknown 'hihg'; did you mean 'high'"):
    from_text('method=grpo,task=guess,model=tiny,environment.hihg=5')


def test_every_method_that_samples_alone_takes_an_environment():
  refused, taken = set(), set()
  for name in methods.TABLE:
    made = method_of(name)
    if made.needs == 'problems' and issubclass(made.collect.func, collect.Sampling):
      try:
        compose(made, tasks.guess(), presets.tiny(alphabet='01'), smoke=True)
        taken.add(name)
      except ValueError as error:
        assert 'no turns of' in str(error), error
        refused.add(name)
  assert refused == {
    *(
      'chord',
      'dno_prct',
      'dr_po',
      'dypo',
      'gad',
      'hnpg',
      'hpt',
      'iq_learn_online',
      'luffy',
      'rft',
    ),
    *('spin', 'srft', 'tempsamp_r1', 'uft', 'unlikelihood_sequence'),
  }
  assert len(taken) > 90


@pytest.mark.parametrize('option', ['task=guess,guesses', 'task=simple_equations,tries'])
def test_a_task_of_no_turns_is_refused_by_its_option(option):
  name = option.rpartition(',')[2]
  with pytest.raises(ValueError, match=f'^{name}: expected a number at least 1, got 0'):
    from_text(f'method=grpo,model=tiny,{option}=0')


def test_problems_of_the_tasks_are_right_and_held_out_by_their_numbers():
  for make in (sources.word_problems, sources.hidden_numbers):
    train, held = (list(map(make(split=s).record, range(20))) for s in ('train', 'heldout'))
    numbers = lambda record: tuple(re.findall(r'\d+', record['prompt']))
    assert not set(map(numbers, train)) & set(map(numbers, held))
    with pytest.raises(ValueError, match='split'):
      make(split='test')
  for record in train:
    low, high = map(int, numbers(record))
    assert low <= int(record['answer']) <= high
  for record in map(sources.word_problems(digits=2).record, range(20)):
    assert toolbox.calculate(record['expression']) == record['answer']
    assert set(re.findall(r'\d+', record['expression'])) <= set(numbers(record))
  both = sources.calls_and_answers(source=sources.word_problems())
  call, answer = both[6], both[7]
  assert call['answer'] == f'<{call["expression"]}>'
  assert answer['previous_steps'] == f'{call["answer"]}{answer["answer"]}>'
