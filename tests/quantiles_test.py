"""Quark: quantiles of a pool, labels that only the policy reads, and the loss of its paper."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import build, collect, learner, phases
from polgrad.collect import quantiles
from polgrad.data import batching, tokenizers
from polgrad.losses import divergences
from polgrad.methods.supervised.quark import quark
from polgrad.options import from_text
from polgrad.reductions import Mean
from polgrad.rewards import scoring
from polgrad.types import Batch, Outputs, Prompts


def log_softmax(x):
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_the_loss_is_that_of_the_paper():
  random = np.random.default_rng(0)
  logits, reference = random.normal(size=(2, 3, 5, 4))
  tokens = random.integers(4, size=(3, 5))
  mask = np.arange(5) < np.array([[5], [3], [1]])
  own, other = log_softmax(logits), log_softmax(reference)
  logp = np.take_along_axis(own, tokens[..., None], -1)[..., 0]
  kl = (np.exp(own) * (own - other)).sum(-1)
  entropy = -(np.exp(own) * own).sum(-1)
  want = (-logp + 0.05 * kl - 0.06 * entropy)[mask].mean()
  with jax.enable_x64(True):
    arrays = dict(mask=mask, tokens=tokens, logp=logp, entropy=entropy, logits=logits)
    arrays |= dict(teacher_logits=reference)
    found, _ = quark(max_new_tokens=5).loss(**arrays)
    np.testing.assert_allclose(found, want, rtol=1e-6)
    plain, _ = quark(max_new_tokens=5, quantiles=1, kl=0.0, entropy=0.0).loss(**arrays)
  np.testing.assert_allclose(plain, -logp[mask].mean(), rtol=1e-6)


def test_coefficients_adapt_to_their_targets():
  """c <- c (1 + clip(x / target - 1, -.2, .2) n / 2500), x of a completion of five tokens."""
  rates = dict(kl_rate=128 / 2500, kl_target=3.0, entropy_rate=128 / 2500, entropy_target=4.0)
  _, objective = quark(max_new_tokens=5, **rates).bound()
  mean = lambda x: Mean(total=jnp.asarray(x), count=jnp.asarray(1.0))
  state, kl, entropy = objective.init(), 1.0, 1.0
  for found, h in ((0.9, 0.88), (0.1, 0.5), (0.63, 2.0)):  # nats a token
    state = objective.advance(state, {'kl': mean(found), 'entropy': mean(h)})
    kl *= 1 + np.clip((5 * found - 3) / 3, -0.2, 0.2) * 128 / 2500
    entropy *= 1 - np.clip((5 * h - 4) / 4, -0.2, 0.2) * 128 / 2500
    np.testing.assert_allclose(state['kl_coefficient'], kl, rtol=1e-6)
    np.testing.assert_allclose(state['entropy_coefficient'], entropy, rtol=1e-6)
  ones = np.ones((1, 2), int)
  outputs = Outputs(logp=0.0 * ones, entropy=0.7 * ones, stats={'kl': 0.3 * ones})
  rows = Batch(tokens=ones, segment_ids=ones, mask=ones > 0)
  terms, _ = objective.apply(outputs, rows, state, step=3)
  np.testing.assert_allclose(terms['kl'].value(), 0.05 * kl * 0.3, rtol=1e-6)
  np.testing.assert_allclose(terms['bonus'].value(), -0.06 * entropy * 0.7, rtol=1e-6)


def test_parts_have_equal_sizes_and_the_best_comes_first():
  rewards = np.random.default_rng(1).random(23)
  found = quantiles.quantile_labels(rewards, 5)
  assert sorted(np.bincount(found)) == [4, 4, 5, 5, 5]
  for k in range(4):
    assert rewards[found == k].min() > rewards[found == k + 1].max()
  assert (quantiles.quantile_labels(rewards, 1) == 0).all()
  np.testing.assert_array_equal(np.sort(quantiles.quantile_labels(np.ones(4), 2)), [0, 0, 1, 1])


def test_a_bandit_of_twenty_arms_reaches_the_best_one():
  """Tabular: behind a label, the policy says what the pool has behind it, so it is a count."""
  means = []
  for seed in range(5):
    random = np.random.default_rng(seed)
    pool, policy = np.zeros(0, int), np.ones(20) / 20
    for _ in range(4):
      drawn = random.choice(20, size=500, p=policy)
      means.append(drawn.mean() / 19)
      pool = np.concatenate([pool, drawn])
      best = pool[quantiles.quantile_labels(pool / 19, 5) == 0]
      policy = np.bincount(best, minlength=20) / len(best)
  found = np.reshape(means, (5, 4)).mean(0)
  np.testing.assert_allclose(found, [0.516, 0.933, 0.990, 1.0], atol=0.02)


TOKENIZER = tokenizers.characters(alphabet='0123456789+=')


def test_labels_stand_before_the_prompt_and_can_be_taken_away():
  tokens = np.array([[0, 0, 0, 5, 6, 7], [0, 0, 8, 9, 10, 1]], np.int32)
  seen = (tokens > 0).astype(np.int32)
  batch = Batch(tokens=tokens, segment_ids=seen, mask=seen > 9)
  found = quantiles.labelled(batch, [[3, 4], [2]])
  np.testing.assert_array_equal(found.tokens, [[0, 3, 4, 5, 6, 7], [0, 2, 8, 9, 10, 1]])
  np.testing.assert_array_equal(found['policy_only'], [[0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0]])
  np.testing.assert_array_equal(found.segment_ids, found.tokens > 0)
  plain = learner.read_by_anchors(found)
  np.testing.assert_array_equal(plain.segment_ids, seen)
  best = batching.behind(Prompts(tokens=tokens, mask=seen > 0, ids=np.arange(2)), [3, 4])
  again = quantiles.unlabelled(
    Batch(tokens=best.tokens, segment_ids=best.mask * 1, mask=seen > 9), 2, 0
  )
  np.testing.assert_array_equal(again.tokens, tokens)
  np.testing.assert_array_equal(again.segment_ids, seen)


def test_each_term_has_its_own_quantile_and_the_best_label_has_all_zeros():
  random = np.random.default_rng(2)
  first, second = random.random((2, 24))
  found = quantiles.combined_labels([first, second], 3)
  expected = [3 * (np.sum(first > a) // 8) + np.sum(second > b) // 8 for a, b in zip(first, second)]
  np.testing.assert_array_equal(found, expected)
  settings = collect.Quantiles(
    samples_per_prompt=1, terms=('exact', 'short'), label='{exact}+{short}=', quantiles=2
  )
  assert settings.labels(TOKENIZER) == [
    TOKENIZER.encode(text) for text in ('0+0=', '0+1=', '1+0=', '1+1=')
  ]
  with pytest.raises(ValueError, match='must have'):
    collect.Quantiles(samples_per_prompt=1, terms=('exact', 'short'), label='{exact}=')


def test_each_style_has_its_own_quantiles():
  random = np.random.default_rng(3)
  scores, styles = random.random((2, 24)), random.permutation(np.repeat(['dry', 'wet'], 12))
  found = quantiles.stratified_labels(scores, styles, 3)
  for i, style in enumerate(styles):
    above = [np.sum(one[styles == style] > one[i]) // 4 for one in scores]
    assert found[i] == 3 * above[0] + above[1]
  whole = quantiles.stratified_labels(scores, [''] * 24, 3)
  np.testing.assert_array_equal(whole, quantiles.combined_labels(scores, 3))
  records = [{'style': 'dry', 'prompt': 'a'}, {'style': 'wet', 'prompt': 'b'}, {'prompt': 'c'}]
  steps = lambda name: types.SimpleNamespace(
    settings=types.SimpleNamespace(strata_field=name),
    context=types.SimpleNamespace(source=records),
  )
  strata = quantiles.QuantileSteps._strata
  assert strata(steps('style'), np.array([1, 0, 1])) == ['wet', 'dry', 'wet']
  assert strata(steps(''), np.array([1, 0])) == ['', '']
  with pytest.raises(ValueError, match="strata_field: record 2 has no 'style'"):
    strata(steps('style'), np.array([1, 2]))


BAD = {
  'no number': (dict(label='x'), 'label=.x. must have {k}'),
  'several samples': (dict(samples_per_prompt=2), 'samples_per_prompt=2'),
  'no room': (dict(prompt_length=8), 'leaves no room'),
  'too many labels': (
    dict(quantiles=30, terms=('a', 'b', 'c'), label='{a}{b}{c}'),
    r"quantiles=30 for each of \['a', 'b', 'c'\] make 27000 labels, more than 10000",
  ),
  'memory': (dict(lag=1), r"\['lag'\]"),
}


@pytest.mark.parametrize('name', BAD)
def test_settings_that_make_no_sense_are_refused(name):
  knobs, message = BAD[name]
  with pytest.raises(ValueError, match=message):
    collect.Quantiles(**{'samples_per_prompt': 1} | knobs)


def test_labels_that_do_not_fit_are_refused():
  make = lambda **knobs: collect.Quantiles(samples_per_prompt=1, **knobs).labels(TOKENIZER)
  assert make(label='{k}=', quantiles=3) == [[2, 13], [3, 13], [4, 13]]
  with pytest.raises(ValueError, match='a label has 3 tokens, but label_length is 2'):
    make(label='{k}==', label_length=2)
  with pytest.raises(ValueError, match='not in the alphabet'):
    make()


def test_a_pool_of_own_samples_behind_their_labels():
  """Two steps: the first samples without a label; every second step samples, behind the best."""
  options = 'label={k}=,label_length=2,interval=2,pool=3'
  config = from_text(f'method=quark,task=addition,model=tiny,smoke,warm_start=0,{options}')
  run = build.build(config)
  phase = run.phases['train']
  settings = phase.collect
  asked = []

  def score(texts, records, lengths, others):
    asked.append(others['prompt']())
    reward = np.array([float(r['id']) for r in records])
    return scoring.Scores(reward, {'exact': reward}, np.ones(len(reward), bool), {}, [])

  source = [{'id': i, 'prompt': f'{i}+{i}=', 'answer': str(2 * i)} for i in range(8)]
  start = iter(range(0, 8, 4))

  def draw(count):
    first = next(start)
    return source[first : first + count]

  found = []
  with jax.set_mesh(run.mesh):
    state = phases.begin(run, 0, None)
    steps = settings.make(phases.context(run, phase, 0)._replace(score=score)).__self__
    for step in range(3):
      one = steps.collect(state, draw, step)
      found.append(one.batch)
      state = state.replace(collect_state=one.collect_state)
    assert asked == [[r['prompt'] for r in source[:4]], [r['prompt'] for r in source[4:]]]
    assert int(state.collect_state.count) == 2
    ids = settings.labels(run.tokenizer)
    for step, batch in enumerate(found):
      known = 4 if step < 2 else 8
      labels = quantiles.quantile_labels(np.arange(float(known)), 5)
      for row in range(4):
        where = batch['policy_only'][row] > 0
        assert batch.tokens[row, where].tolist() == ids[labels[batch.prompt_ids[row]]]
        assert not (where & batch.mask[row]).any()
    assert {*found[1].prompt_ids} == {0, 1, 2, 3} and len({*found[2].prompt_ids}) == 4

    # The reference reads the rows as if they had no label.
    batch = found[2]
    bare = learner.read_by_anchors(batch)
    tokens = np.where(batch['policy_only'] > 0, run.tokenizer.pad_id, batch.tokens)
    plain = Batch(tokens=tokens, segment_ids=np.asarray(bare.segment_ids), mask=batch.mask)
    other = jax.tree.map(
      lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size).reshape(x.shape)), state.params
    )
    look = lambda rows, params: learner.forward(
      run.policy,
      params,
      rows,
      stats={'kl': divergences.reverse_kl},
      teacher=(run.policy, other),
    ).stats['kl']
    # With the policy's own input equal too, only the label could make a difference.
    with_label = jax.jit(look)(batch, other)
    without = jax.jit(lambda rows: learner.forward(run.policy, other, rows).logp)
    own, reference = without(batch), without(plain)
    assert float(jnp.max(jnp.where(batch.mask, with_label, 0))) > 1e-4  # the policy reads the label
    again = without(bare.replace(tokens=batch.tokens))
    np.testing.assert_allclose(
      np.where(batch.mask, again, 0), np.where(batch.mask, reference, 0), atol=1e-5
    )
    assert np.abs(np.where(batch.mask, own - reference, 0)).max() > 1e-4


def test_evaluations_ask_behind_the_best_label():
  options = 'label={k}=,label_length=2,interval=2,pool=3'
  config = from_text(f'method=quark,task=addition,model=tiny,smoke,warm_start=0,{options}')
  run = build.build(config)
  plan, bare = run.evaluation, run.tokenizer
  records = [{**plan.source[i], 'id': i} for i in range(3)]
  found = plan.lay_out(records, tokenizer=bare)
  label = bare.encode('0=')
  assert found.tokens.shape == (3, plan.prompt_length)
  for row, seen, record in zip(found.tokens, found.mask, records):
    assert row[seen].tolist() == label + bare.encode(record['prompt'])
  plain = from_text('method=grpo,task=addition,model=tiny,smoke,warm_start=0').evaluation
  assert (plain.label, plain.label_length) == ('', 0)
  assert plan.prompt_length == plain.prompt_length + 2
  settings = dict(terms=('exact', 'short'), label='{exact}+{short}=')
  assert collect.Quantiles.asks_behind(settings) == {'label': '0+0=', 'label_length': 8}
  # A phase that learns no labels, such as a warm start, is asked without one, in the same columns.
  assert plan.label_phases == ('train',) and plan.in_phase('train') is plan
  without = plan.in_phase('warm_start').lay_out(records, tokenizer=bare)
  assert without.tokens.shape == found.tokens.shape
  for row, seen, record in zip(without.tokens, without.mask, records):
    assert row[seen].tolist() == bare.encode(record['prompt'])


TEXTS = {
  'config.evaluation.label: a label has 4 tokens': ('evaluation', 'label', '0=0='),
  'config.evaluation.label: .* not in the alphabet': ('evaluation', 'label', 'a'),
  'config.evaluation.label_phases: .* did you mean .train': (
    'evaluation',
    'label_phases',
    ('trian',),
  ),
  'config.phases.train.collect.label: .* not in the alphabet': ('train', 'label', '{k}a'),
  'config.phases.train.collect.label: a label has 3': ('train', 'label', '{k}=='),
}


@pytest.mark.parametrize('message', TEXTS)
def test_texts_that_cannot_be_written_are_refused_by_their_field(message):
  options = 'label={k}=,label_length=2'
  config = from_text(f'method=quark,task=addition,model=tiny,smoke,warm_start=0,{options}')
  section, field, value = TEXTS[message]
  place = config.phases.train.collect if section == 'train' else config.evaluation
  place[field] = value
  with pytest.raises(ValueError, match=message):
    build.check_texts(build.build(config))
