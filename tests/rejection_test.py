"""Learning from right samples: RFT's distinct rows, STaR's hints, and the gradients of both."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import build, collect, methods, phases
from polgrad.collect import hinted, picks
from polgrad.options import from_text
from polgrad.registry import bind, part
from polgrad.rewards import scoring
from polgrad.tabular import enumerable
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
  settings = phase.collect
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


def test_every_iteration_begins_with_the_base_model_and_is_longer():
  method = methods.star(steps=364, iterations=3, growth=1.2)
  sizes = [one.steps for one in method.before.values()] + [method.steps]
  assert sizes == [100, 120, 144]
  assert all(one.restart for one in (*method.before.values(), method))
  config = from_text('method=star,task=addition,model=tiny,steps=91,iterations=2')
  assert list(config.order) == ['warm_start', 'iteration_1', 'train']
  assert config.phases.train.collect.choose.name == 'picks.above'
  kept = dataclasses.asdict(bind(config.phases.train.collect, collect.TABLE))
  assert kept['threshold'] == 1.0
