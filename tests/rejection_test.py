"""Learning from right samples: RFT's distinct rows, STaR's hints, and the gradients of both."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import build, collect, curricula, methods, phases, speed
from polgrad.collect import hinted, picks, sampled_first
from polgrad.collect.steps import Report
from polgrad.options import from_text
from polgrad.registry import bind, part
from polgrad.rewards import scoring
from polgrad.tabular import enumerable
from polgrad.types import Batch
from tests.runs import method_of

POLICY = enumerable.table(3, 3)


@pytest.mark.parametrize('name', ['rft', 'star'])
def test_right_samples_have_the_gradient_of_the_probability_to_be_right(name):
  """By enumeration; divided by the number of right samples it is that of its logarithm."""
  method = method_of(name)

  def of_row(params, row):  # the loss of one row of three tokens
    logp = enumerable.logp(POLICY, params)[row]
    return 3 * method.loss(mask=np.ones((1, 3), bool), logp=logp[None])[0]

  def chance(params, right):
    return jnp.sum(jnp.exp(jnp.sum(enumerable.logp(POLICY, params), axis=1)) * right)

  with jax.enable_x64(True):
    random = np.random.default_rng(4)
    params = jnp.asarray(random.normal(size=(13, 3)))
    each = jax.vmap(jax.grad(of_row), (None, 0))(params, jnp.arange(27))
    p = jnp.exp(jnp.sum(enumerable.logp(POLICY, params), axis=1))
    right = random.random(27) < 0.3
    found = -jnp.einsum('s,s...->...', p * right, each)
    value, gradient = jax.value_and_grad(chance)(params, right)
    np.testing.assert_allclose(found, gradient, atol=1e-12)
    logarithm = jax.grad(lambda x: jnp.log(chance(x, right)))(params)
    np.testing.assert_allclose(found / value, logarithm, atol=1e-12)
    # All are right: the expected gradient is 0.
    np.testing.assert_allclose(jnp.einsum('s,s...->...', p, each), 0, atol=1e-12)


TEXTS = np.array(
  [
    ['3*4=12 so 12', '3 * 4 = 12, hence', 'two', '4*3=12', 'two  '],
    ['a', 'b', 'a', 'c', 'a'],
    ['x', 'x', 'x', 'x', 'x'],
  ],
  object,
)
REWARDS = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 1, 1], [0, 0, 0, 0, 0]], float)


def usable(got):
  return [tuple(rows[ok]) for rows, ok in zip(got.rows, got.usable)]


def distinct(**knobs):
  fn = bind(part(picks.distinct, **knobs), picks.TABLE)
  arrays = dict(rewards=REWARDS, valid=np.arange(5) < np.array([[5], [4], [5]]), texts=TEXTS)
  found = picks.choose(fn, arrays, np.random.default_rng(0))
  assert found.rows.shape[1] == picks.rows_of(fn, 5)
  return usable(found)


def test_right_rows_that_say_different_things():
  equations = r'\d+ ?\* ?\d+ ?= ?\d+'
  assert distinct(pattern=equations) == [(0, 2, 3), (0, 3), ()]
  assert distinct() == [(0, 1, 2, 3), (0, 3), ()]
  assert distinct(rows=2) == [(0, 1), (0, 3), ()]
  assert distinct(threshold=0.0)[2] == (0,)


def test_a_hint_is_in_the_prompt_or_the_last_turn():
  hint = '{prompt} ({answer})'
  record = {'id': 3, 'prompt': 'a{answer}', 'answer': 'b'}
  assert hinted.hinted(record, hint, 'answer')['prompt'] == 'a{answer} (b)'
  turns = [{'role': 'system', 'content': 's'}, {'role': 'user', 'content': 'u'}]
  found = hinted.hinted({'id': 3, 'messages': turns, 'answer': 'b'}, hint, 'answer')
  assert found['messages'] == [turns[0], {'role': 'user', 'content': 'u (b)'}]
  with pytest.raises(ValueError, match=r"record 3: no text 'gold' for the hint"):
    hinted.hinted(record, hint, 'gold')
  for knobs, message in (
    (dict(hint='x'), r'must have \{prompt\} and \{answer\}'),
    (dict(max_resamples=1), r"so \['max_resamples'\] cannot be set"),
  ):
    with pytest.raises(ValueError, match=message):
      collect.Hinted(**knobs)


def test_a_hint_that_cannot_be_written_is_refused_by_its_field():
  run = build.build(from_text('method=star,task=addition,model=tiny,smoke,warm_start=0'))
  with pytest.raises(ValueError, match=r'iteration_1.collect.hint: \[.* is not in the alphabet'):
    build.check_texts(run)


def test_wrong_prompts_are_asked_again_and_the_hint_is_removed():
  """Every second prompt is right at once; of the others, what was drawn with the hint is right."""
  config = from_text(
    'method=star,task=addition,model=tiny,smoke,warm_start=0,hint={prompt}{answer}+'
  )
  run = build.build(config)
  phase = run.phases['train']
  settings = dataclasses.replace(phase.collect, sample_first=0, sample_first_most=0)
  asked = []

  def score(texts, records, lengths, others):
    prompts = others['prompt']()
    asked.append((list(texts), prompts))
    reward = np.array([float(len(asked) > 1 or r['id'] % 2 == 0) for r in records])
    return scoring.Scores(reward, {'exact': reward}, np.ones(len(reward), bool), {}, [])

  source = [{'id': i, 'prompt': f'{i}+{i}=', 'answer': str(2 * i)} for i in range(8)]
  with jax.set_mesh(run.mesh):
    state = phases.begin(run, run.order.index('train'), None)
    context = phases.context(run, phase, 0)._replace(score=score)
    steps = settings.make(context).__self__
    rows, records = steps.sample(state, lambda n: source[:n], 0)
    first = rows.batch
    batch, report = steps.score(rows, records, state, None, 0)
    hints = steps.draw_hinted(
      state, [hinted.hinted(r, settings.hint, 'answer') for r in records], 0
    )
  assert len(asked) == 2 and asked[1][1] == asked[0][1]  # judged behind the prompt without the hint
  np.testing.assert_array_equal(batch['hinted'], [0, 1, 0, 1])
  assert report.metrics['hinted'] == 0.5 and batch.valid.all() and (batch.rewards == 1).all()
  begin = settings.prompt_length
  for row in range(4):
    np.testing.assert_array_equal(batch.tokens[row, :begin], first.tokens[row, :begin])
    made = hints.batch.tokens[row, begin + settings.hint_length :] if row % 2 else None
    want = first.tokens[row, begin:] if made is None else made
    np.testing.assert_array_equal(batch.tokens[row, begin:], want)
  np.testing.assert_array_equal(batch.prompt_ids, first.prompt_ids)
  assert (batch.segment_ids > 0).sum() == (batch.mask | (first.segment_ids > 0)).sum() - (
    first.mask & ~batch.mask
  ).sum()


def rows_of(first, valid, seen=True):
  """Rows whose tokens are their numbers."""
  number = np.arange(first, first + len(valid), dtype=np.int32)
  ones = np.ones((len(valid), 1), np.int32)
  return Batch(
    tokens=number[:, None],
    segment_ids=ones,
    mask=np.broadcast_to(np.asarray(seen, bool), (len(valid),))[:, None].copy(),
    valid=np.array(valid, bool),
    sampled_at=np.full(len(valid), 7, np.int32),
    group_ids=number // 2,
  )


class Sampling:
  """Steps of batches of four rows, of which some are kept, without a model."""

  def __init__(self, valid, records, first=2, most=9):
    self.valid, self.numbers, self.meter, self.influences = valid, [], speed.Meter(), None
    blank = jax.tree.map(np.zeros_like, rows_of(0, [True] * 4))
    empty = lambda: sampled_first.empty(blank, first)
    self.settings = types.SimpleNamespace(rows=4, prompts=2, init=empty, sample_first_most=most)
    self.context = types.SimpleNamespace(source=range(records), seed=3)
    self.annotate = types.SimpleNamespace(flops=lambda batch: 0.0)

  lent = staticmethod(lambda state: state)
  random = staticmethod(lambda step: None)
  annotated = staticmethod(
    lambda batch, state, step, random: batch.with_arrays(
      staleness=(step - batch.sampled_at).astype(np.float32)
    )
  )
  credit = staticmethod(lambda batch, state: (batch, ()))

  def fresh(self, state, draw, step):
    self.numbers.append(step)
    batch = rows_of(4 * step, self.valid)
    none = np.zeros(4, np.float32)
    sampled = curricula.Sampled(batch.tokens[:, 0], none, none < 1, {}, none > 0)
    return batch, Report({'reward': float(step)}, [('', '', 0.0)], [], {}, (), sampled)


def steps_of(sampling, count):
  collect, state, found = sampled_first.sampled_first(sampling), None, []
  state = types.SimpleNamespace(collect_state=sampling.settings.init())
  for step in range(count):
    found.append(collect(state, None, step))
    state = types.SimpleNamespace(collect_state=found[-1].collect_state)
  return found


def test_an_iteration_samples_first_and_makes_epochs_over_what_is_kept():
  sampling = Sampling([True, False, True, True], records=100)
  found = steps_of(sampling, 6)
  assert sampling.numbers == [0, 1, 2]  # until eight rows are kept, each batch with its own noise
  kept = [0, 2, 3, 4, 6, 7, 8, 10]
  rows = [one.batch.tokens[:, 0].tolist() for one in found]
  for epoch in range(3):
    assert sorted(rows[2 * epoch] + rows[2 * epoch + 1]) == kept
  assert len({tuple(rows[2 * e] + rows[2 * e + 1]) for e in range(3)}) == 3  # shuffled anew
  assert all((one.batch.group_ids == np.arange(4)).all() for one in found)
  assert [one.metrics['staleness'] for one in found] == [0, 1, 2, 3, 4, 5]
  first = found[0]
  assert first.metrics['sampled_first/kept'] == 8 and first.metrics['sampled_first/batches'] == 3
  assert first.metrics['reward'] == 1.0 and len(first.sampled.rows) == 12
  assert 'reward' not in found[1].metrics and found[1].sampled is None
  # A resumed run goes through the rows in the same order.
  again = types.SimpleNamespace(collect_state=jax.tree.map(np.copy, found[2].collect_state))
  other = sampled_first.sampled_first(Sampling([True] * 4, records=100))(again, None, 3)
  np.testing.assert_array_equal(other.batch.tokens, found[3].batch.tokens)


def test_sampling_ends_with_the_data_or_the_bound_and_may_keep_nothing():
  once = Sampling([True, False, False, False], records=3)
  [found] = steps_of(once, 1)
  assert sorted(found.batch.tokens[:2, 0].tolist()) == [0, 4]
  assert once.numbers == [0, 1]  # three records are two batches of two
  bound = Sampling([False] * 4, records=100, most=3)
  [found] = steps_of(bound, 1)
  assert bound.numbers == [0, 1, 2] and not found.batch.valid.any()
  assert found.messages == [
    'sample_first: no completion of 6 prompts is kept, so the steps of this phase have nothing to learn'
  ]
  memory = sampled_first.added(bound.settings.init(), rows_of(0, [True] * 4, [1, 0, 1, 1]))
  assert int(memory.count) == 3 and memory.rows.tokens[:3, 0].tolist() == [0, 2, 3]


def test_rows_that_were_sampled_first_are_compared_with_no_group():
  for knobs, message in (
    (dict(sample_first=2), 'sample_first=2, sample_first_most=0'),
    (dict(sample_first=2, sample_first_most=2, lag=1), r"\['lag'\] cannot be set beside it"),
  ):
    with pytest.raises(ValueError, match=message):
      collect.Rollouts(**knobs)
  config = from_text('method=grpo,task=addition,model=tiny,smoke,warm_start=0')
  config.phases.train.collect.update(sample_first=2, sample_first_most=2)
  with pytest.raises(ValueError, match='its rows are single ones of different prompts'):
    build.build(config)
  config = from_text('method=rft,task=addition,model=tiny,steps=10,prompts=4')
  settings = config.phases.train.collect
  assert (settings.sample_first, settings.sample_first_most) == (4, 10)


def test_every_iteration_begins_with_the_base_model_and_is_longer():
  method = methods.star(steps=364, iterations=3, growth=1.2)
  sizes = [one.steps for one in method.before.values()] + [method.steps]
  assert sizes == [100, 120, 144]
  for one, size in zip((*method.before.values(), method), sizes):
    assert one.collect.keywords['sample_first'] == one.collect.keywords['sample_first_most'] == size
  other = methods.star(steps=364, epochs=3, restart=False)
  assert other.collect.keywords['sample_first'] == 48 and not other.restart
  assert all(one.restart for one in (*method.before.values(), method))
  config = from_text('method=star,task=addition,model=tiny,steps=91,iterations=2')
  assert list(config.order) == ['warm_start', 'iteration_1', 'train']
  assert config.phases.train.collect.choose.name == 'picks.above'
  kept = dataclasses.asdict(bind(config.phases.train.collect, collect.TABLE))
  assert kept['threshold'] == 1.0
