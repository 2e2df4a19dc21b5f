"""Reward models of users and of samples: their rows, what the heads compute, and their folders."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import build, collect, convert, learner, methods, packing, reward_models
from polgrad.checks import tracing
from polgrad.data import batching, sources, tokenizers
from polgrad.losses import score_penalties
from polgrad.models import heads as files
from polgrad.objectives import heads
from polgrad.options import from_text
from polgrad.registry import bind, part
from polgrad.rewards.scoring import Failure
from polgrad.types import Layout
from tests import hub
from tests.models import tiny

BYTES = tokenizers.byte()
SMALL = dict(latent=3, hidden=5)


def pair(i, user, **others):
  return dict(prompt='How?', chosen=f'good {i}', rejected=f'bad {i}', user=user, **others)


def source_of(records, **knobs):
  """The source of these records, each with its context."""
  given = sources.Source(len(records), records.__getitem__)
  return sources.with_context(source=given, **{'more': sources.nothing(), **knobs})


def rows(source, **knobs):
  collector = collect.UserPreferences(length=32, **knobs)
  return collector.lay_out([{**source[i], 'id': i} for i in range(len(source))], tokenizer=BYTES)


def test_the_context_of_a_pair_is_of_other_pairs_of_its_user():
  records = [pair(i, 'ab'[i % 2]) for i in range(8)]
  more = sources.Source(2, [pair(8, 'a'), pair(9, 'c')].__getitem__)
  source = source_of(records, pairs=3)
  for i in range(8):
    others = [record['chosen'] for record in source[i]['context']]
    assert set(others) <= {f'good {j}' for j in range(i % 2, 8, 2) if j != i}
    assert len(set(others)) == 3 and source[i] == source[i]
  wide = source_of(records, pairs=9, more=more)
  assert {r['chosen'] for r in wide[0]['context']} == {f'good {j}' for j in (2, 4, 6, 8)}
  assert len(wide[1]['context']) == 3


def test_rows_of_the_context_are_read_and_not_trained_and_missing_ones_are_empty():
  batch = rows(source_of([pair(i, 'a') for i in range(3)], pairs=2), context=3)
  seen, trained = (x.any(axis=1).reshape(3, 8) for x in (batch.segment_ids, batch.mask))
  assert (seen == [True] * 6 + [False] * 2).all()
  assert (trained == [True] * 2 + [False] * 6).all()
  assert batch.group_ids.tolist() == np.repeat([0, 1, 2], 8).tolist()
  decoded = BYTES.decode([t for t, s in zip(batch.tokens[10], batch.segment_ids[10]) if s])
  assert decoded.startswith('How?good ')


@pytest.mark.parametrize(
  ('records', 'message'),
  [
    ([{**pair(0, 'a'), 'user': ''}], "record 0: no 'user', only"),
    ([pair(0, 'a'), pair(1, 'b'), pair(2, 'a')], "record 1: the user 'b' has no other pair"),
    ([pair(0, 'a'), {**pair(1, 'a'), 'chosen': ' '}], "record 0: 'chosen' is empty"),
  ],
)
def test_records_without_a_user_or_with_a_single_pair_are_unusable(records, message):
  with pytest.raises(batching.Unusable, match=message):
    rows(source_of(records))


def test_samples_follow_their_pair_and_are_not_trained():
  record = dict(id=0, prompt='How?', chosen='a', rejected='b', samples=['c', 'd', 'e'])
  lay_out = functools.partial(collect.SampledPreferences(length=16).lay_out, tokenizer=BYTES)
  batch = lay_out([record, record])
  said = [chr(row[s > 0][5]) for row, s in zip(batch.tokens, batch.segment_ids)]
  assert ''.join(said) == 'abcdabcd'
  assert batch.mask.any(axis=1).tolist() == [True, True, False, False] * 2
  for samples in (None, ['c'], ['c', ' ']):
    with pytest.raises(batching.Unusable, match="'samples' must be"):
      lay_out([record | {'samples': samples}])


def linear(layer, x):
  return x @ layer['weight'] + layer['bias']


def mlp(layers, x):
  for i in range(len(layers)):
    x = linear(layers[str(i)], np.where(x > 0, x, 0.2 * x) if i else x)
  return x


def draw(head, groups, seed=0):
  """Random parameters, states and a batch of `groups` records, in float64."""
  random = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda: head.init(jax.random.key(0), 4))
  params = jax.tree.map(lambda x: 0.5 * random.normal(size=x.shape), shapes)
  count = groups * head.rows_per_prompt
  there = jnp.ones((count, 2), jnp.int32)
  batch = learner.Batch(tokens=there, segment_ids=there, mask=there > 0)
  return params, random.normal(size=(count, 4)), batch.with_arrays(uniform=jnp.zeros(count))


def test_the_score_of_a_user_is_that_of_the_equations(x64):
  head = heads.LatentUser(context=2, **SMALL)
  params, states, batch = draw(head, 2)
  empty = jnp.arange(12) == 4  # of the first record only one pair is there
  batch = batch.replace(segment_ids=jnp.where((empty | jnp.roll(empty, 1))[:, None], 0, 1))
  found = jax.jit(functools.partial(head.read, sampled=False))(params, states, batch)
  encoder = params['encoder']
  for i, group in enumerate(states.reshape(2, 6, 4)):
    known = [np.concatenate(group[j : j + 2]) for j in ((2,) if i == 0 else (2, 4))]
    codes = mlp(encoder['pair'], np.stack(known))
    query, key, value = (
      linear(encoder['attention'][name], codes) for name in ('query', 'key', 'value')
    )
    looks = np.exp(query @ key.T / np.sqrt(3))
    pooled = (looks / looks.sum(axis=1, keepdims=True) @ value).mean(axis=0)
    mean, variance = (np.clip(linear(encoder[n], pooled), -1, 1) for n in ('mean', 'log_variance'))
    z = mean / np.linalg.norm(mean) * np.sqrt(3)
    scores = [mlp(params['decoder'], np.concatenate([y, z]))[0] for y in group[:2]]
    # States are read in float32.
    np.testing.assert_allclose(found['user_score'].reshape(2, 6)[i, :2], scores, rtol=1e-5)
    kl = 0.5 * np.sum(np.exp(variance) + mean**2 - 1 - variance)
    np.testing.assert_allclose(found['user_kl'].reshape(2, 6)[i], kl, rtol=1e-5)


def test_the_loss_of_two_views_is_that_of_the_equations_and_blocks_do_not_meet(x64):
  head = heads.SharedViews(block=2, code=3, hidden=5)
  params, states, batch = draw(head, 4)
  read = jax.jit(functools.partial(head.read, sampled=False))
  found = read(params, states, batch)['view_loss']
  views = states.reshape(4, 4, 4)[:, 2:]
  mean = mlp(params['mean'], views)
  std = np.exp(np.clip(mlp(params['log_std'], views), -5, 2))
  softplus = lambda x: np.log1p(np.exp(x))
  score = lambda i, j: mlp(params['critic'], np.concatenate([mean[i, 0], mean[j, 1]]))[0]

  def kl(i, a, b):
    m, n, s, t = mean[i, a], mean[i, b], std[i, a], std[i, b]
    return np.sum(np.log(t / s) + (s**2 + (m - n) ** 2) / (2 * t**2) - 0.5)

  for i in range(4):
    other = i ^ 1  # the record with which it is in a block
    wanted = 0.5 * (kl(i, 0, 1) + kl(i, 1, 0)) + softplus(-score(i, i)) + softplus(score(i, other))
    np.testing.assert_allclose(found[4 * i : 4 * i + 4], wanted, rtol=1e-4)


def test_the_losses_from_arrays_are_those_of_the_docstrings(x64):
  random = np.random.default_rng(0)
  score, kl, views = random.normal(size=(3, 8))
  mask = np.ones((8, 3), bool)
  mask[2:4] = False  # of this pair no loss is taken
  arrays = dict(mask=mask, logp=np.zeros(mask.shape), label=np.tile([1.0, 0.0], 4))
  gap = (score[::2] - score[1::2])[[0, 2, 3]]
  plain = np.mean(np.log1p(np.exp(-gap)))
  method = methods.vpl(context=3, kl_weight=0.3)
  loss, _ = jax.jit(method.loss)(user_score=score, user_kl=kl, **arrays)
  np.testing.assert_allclose(loss, plain + 0.3 * np.mean(kl[[0, 4, 6]]))
  values = np.repeat(score[:, None], 3, axis=1)
  loss, _ = jax.jit(methods.rlp_uml(view_weight=0.2).loss)(
    values_after=values, view_loss=views, **arrays
  )
  np.testing.assert_allclose(loss, plain + 0.2 * np.mean(views[[0, 4, 6]]))


def test_the_weight_of_the_divergence_rises_in_each_period():
  weight = lambda step: score_penalties.user_divergence(jnp.ones(2), step, period=100)[0]
  weights = jax.jit(jax.vmap(weight))(jnp.array([0.0, 50.0, 99.999, 100.0]))
  np.testing.assert_allclose(weights, [0.1, 0.55, 1.0, 0.1], atol=1e-4)


def test_neither_packing_nor_the_order_of_a_context_nor_a_cut_changes_what_a_head_reads():
  head = heads.LatentUser(context=2, **SMALL)
  policy = files.with_head(tiny.policy(num_layers=1), head.init)
  params = policy.init(jax.random.key(0))
  random = np.random.default_rng(0)
  lengths = random.integers(3, 8, size=12)
  there = np.arange(16) < lengths[:, None]
  batch = learner.Batch(
    tokens=np.where(there, random.integers(0, tiny.VOCAB, there.shape), 0).astype(np.int32),
    segment_ids=there.astype(np.int32),
    mask=there & (np.arange(12) % 6 < 2)[:, None] & (np.arange(16) > 0),
  ).with_arrays(uniform=random.random(12, np.float32))
  packed = packing.pack(batch.replace(layout=Layout(pack=1)), rows_per_prompt=6)
  assert packed.layout.rows < 12
  turned = jax.tree.map(lambda x: x[[0, 1, 4, 5, 2, 3, *range(6, 12)]], batch)

  @jax.jit
  def scores(params):
    read = functools.partial(head.read, sampled=True)
    return [
      learner.forward(policy, params, one, head=read).user_score for one in (batch, packed, turned)
    ]

  plain, *others = scores(params)
  for other in others:
    np.testing.assert_allclose(other, plain, atol=1e-5)
  assert np.abs(plain).min(where=np.arange(12) % 6 < 2, initial=1) > 1e-4


@pytest.mark.parametrize('method', ['vpl', 'rlp_uml'])
def test_an_update_of_the_whole_model_can_be_traced(method):
  run = build.build(from_text(f'method={method},task=tastes,model=tiny,smoke'))
  assert not build.check_data(run)
  tracing.trace_update('train', run.phases['train'], run.policy, run.mesh)
  assert 'head' in run.policy.shapes()


def test_a_block_of_prompts_must_divide_the_batch():
  with pytest.raises(ValueError, match='do not divide into'):
    build.build(from_text('method=rlp_uml,task=tastes,model=tiny,block=3,smoke'))


LISTS = [
  dict(prompt='1', completions=['x 4', 'y 4', 'z 5'], rewards=[0.1, 0.9, 2.0]),
  dict(prompt='2', completions=['x 4', 'y 5', 'z 6'], rewards=[0.1, 0.9, 2.0]),
  dict(prompt='3', chosen='yes', rejected='no'),
  dict(prompt='4', completions=['a', 'b'], rewards=[1, 2], clusters=['same', 'same']),
  dict(prompt='5'),
]


def test_lists_of_which_most_say_the_same_become_pairs_beside_the_given_ones():
  of = lambda records, **knobs: sources.confident_pairs(
    source=sources.Source(len(records), records.__getitem__, irregular=True), **knobs
  )
  made = of(LISTS, answer=r'(\d)')
  assert [(r['prompt'], r['chosen'], r['rejected']) for r in map(made.__getitem__, range(2))] == [
    ('1', 'y 4', 'z 5'),
    ('3', 'yes', 'no'),
  ]
  assert len(made) == 2 and made.place(1) == 'row 2'
  with pytest.raises(ValueError, match='none of 2 records is a pair'):
    of(LISTS[:2])
  with pytest.raises(ValueError, match='row 0: completions, rewards and clusters must be lists'):
    of([LISTS[0] | {'rewards': [1.0]}])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'completions': 'abc'}, "completions must be a list of texts, got 'abc'"),
    ({'completions': ['a', 'a', 3]}, 'completions must be a list of texts'),
    ({'rewards': ['1', '2', '3']}, 'rewards must be a list of finite numbers'),
    ({'rewards': [1.0, float('nan'), 2.0]}, 'rewards must be a list of finite numbers'),
    ({'clusters': 3}, 'clusters must be lists of one length'),
  ],
)
def test_lists_that_are_no_samples_with_scores_are_refused(changes, message):
  source = sources.Source(1, [LISTS[0] | changes].__getitem__, irregular=True)
  with pytest.raises(ValueError, match=f'row 0: .*{message}'):
    sources.confident_pairs(source=source)


def test_a_pattern_of_what_samples_say_must_be_a_regular_expression():
  spec = part(sources.confident_pairs, source=part(sources.seeds), answer='(is').to_dict()
  with pytest.raises(ValueError, match='source: not a regular expression: missing'):
    bind(spec, sources.TABLE, 'source')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder of a model of users with random parameters, its run, and a file of labelled pairs."""
  home = tmp_path_factory.mktemp('users')
  start = hub.small('qwen3', home)
  data = home / 'pairs.jsonl'
  data.write_text(''.join(json.dumps(pair(i, 'ab'[i % 2])) + '\n' for i in range(40)))
  options = 'context=2,latent=3,hidden=5,' + f'task=jsonl,data={data}'
  text = f'method=vpl,{options},model=hf,path={start},prompt_length=32,max_new_tokens=32'
  run = build.build(from_text(text))
  params = run.policy.init(jax.random.key(0))
  out = str(home / 'out')
  convert.export(run, params, out, source=start, reward_model=True)
  return out, text.replace(start, out), run, params, str(data)


def test_a_folder_has_the_layers_and_a_run_that_begins_with_it_reads_them(folder):
  out, text, _, params, _ = folder
  again = build.build(from_text(text)).policy.init(jax.random.key(1))
  jax.tree.map(np.testing.assert_array_equal, again, params)
  assert json.loads((pathlib.Path(out) / 'head.json').read_text())['latent'] == 3
  with pytest.raises(ValueError, match='has shape'):
    build.build(from_text(text.replace('latent=3', 'latent=4'))).policy.init(jax.random.key(1))


def verifier(path, **knobs):
  return bind(part(reward_models.user_reward_model, path=path, **knobs), reward_models.REWARDS)


def test_a_verifier_gives_the_rewards_of_a_user_and_fails_for_an_unknown_one(folder):
  out, _, run, params, data = folder
  judge = verifier(out, pairs=data, batch=4)
  asked = [dict(prompt='How?', user=name) for name in ('a', 'b', 'c')]
  a, b, unknown = judge(['good 1'] * 3, asked)
  assert a != b and isinstance(unknown, Failure)
  assert "the user 'c' has no labelled pair" in unknown.reason and "['a', 'b']" in unknown.reason
  [nobody] = judge(['good 1'], [dict(prompt='How?', user=None)])
  assert nobody.reason == 'the record names no user'
  [of_b] = verifier(out, pairs=data, user='b', batch=4, mean=b, std=2.0)(['good 1'], asked[:1])
  assert of_b == 0
  [mean] = verifier(out, unknown='prior', batch=4)(['good 1'], asked[2:])
  assert np.isfinite(mean) and mean not in (a, b)
  # The reward is what the evaluation of a run computes.
  chats = [
    {'id': 0, **pair(1, 'a'), 'messages': [{'role': 'user', 'content': 'How?'}]},
    *({**pair(i, 'a'), 'messages': [{'role': 'user', 'content': 'How?'}]} for i in (0, 2)),
  ]
  batch = rows_of(chats, run.tokenizer)
  read = functools.partial(run.phases['train'].objective.head.read, sampled=False)
  found = jax.jit(lambda p: learner.forward(run.policy, p, batch, head=read).user_score)(params)
  np.testing.assert_allclose(a, found[0], atol=1e-5)


def rows_of(records, tokenizer):
  for one in records:
    one.pop('prompt')
  collector = collect.UserPreferences(length=64, context=2)
  return collector.lay_out([{**records[0], 'context': records[1:]}], tokenizer=tokenizer)


def test_what_is_no_model_of_users_is_refused(folder):
  out, _, _, _, data = folder
  with pytest.raises(ValueError, match=r"the user 'd' has no labelled pair.*\['a', 'b'\]"):
    verifier(out, pairs=data, user='d')
  with pytest.raises(ValueError, match='holds no reward model of users'):
    verifier(str(pathlib.Path(out).parent / 'source'))
  with pytest.raises(ValueError, match=r"pairs.jsonl:1: no 'name', only"):
    verifier(out, pairs=data, field='name')
