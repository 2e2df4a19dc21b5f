"""From records to a batch, on the host: groups, failures, truncation, dynamic sampling."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from polgrad import build, collect, credit, curricula, learner, objectives, phases
from polgrad.collect import scored as judging
from polgrad.data import tokenizers
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods import Method
from polgrad.registry import part, weighted
from polgrad.rewards import verifiers
from polgrad.rewards.scoring import Scores
from polgrad.types import Batch, Outputs
from tests import examples
from tests.runs import addition, method_of

pytestmark = pytest.mark.usefixtures('samplers_once')


def judged(rewards, *, first=0, valid=None):
  """Groups of two rows with these rewards; row i is made of token first + i."""
  rewards = np.asarray(rewards, np.float32)
  rows = len(rewards)
  valid = np.ones(rows, bool) if valid is None else np.asarray(valid)
  made = first + np.arange(rows, dtype=np.int32)
  batch = Batch(
    tokens=np.repeat(made[:, None], 3, axis=1),
    segment_ids=np.ones((rows, 3), np.int32),
    mask=np.tile([False, True, True], (rows, 1)),
    behavior_logp=np.zeros((rows, 3), np.float32),
    finished=np.ones(rows, bool),
    prompt_ids=made // 2,
    group_ids=np.arange(rows, dtype=np.int32) // 2,
    rewards=rewards,
    valid=valid,
  )
  scores = Scores(rewards.astype(float), {'r': rewards.astype(float)}, valid, {'r/X': 1}, ['m'])
  records = [{'prompt': str(i)} for i in range(first // 2, first // 2 + rows // 2)]
  return batch, judging.Texts([str(i) for i in made], records, scores)


@pytest.mark.parametrize('one', collect.TABLE.values(), ids=lambda one: one.__name__)
def test_a_setting_is_declared_again_only_to_change_its_default(one):
  fields = {field.name: field.default for field in dataclasses.fields(one)}
  for base in filter(dataclasses.is_dataclass, one.__mro__[1:]):
    inherited = {field.name: field.default for field in dataclasses.fields(base)}
    repeated = set(one.__annotations__) & inherited.keys()
    assert not {name for name in repeated if inherited[name] == fields[name]}
  # A setting hides a method of its name, because it is an attribute of the object.
  assert not {
    name for name in fields if callable(vars(one).get(name)) and name not in one.__annotations__
  }


def test_informative_groups_are_those_whose_valid_rewards_differ():
  got = judged([0, 0, 1, 0, 1, 1, 1, 0], valid=[1, 1, 1, 1, 1, 1, 1, 0])
  np.testing.assert_array_equal(judging.informative(*got, 2), [False, True, False, False])
  none = judged([0, 1], valid=[0, 0])
  np.testing.assert_array_equal(judging.informative(*none, 2), [False])


def shaped(right, length, *, first=0):
  """`judged` with a reward of two terms, of which one is a penalty of length."""
  batch, texts = judged(np.add(right, length), first=first)
  terms = {'right': np.asarray(right, float), 'overlong': np.asarray(length, float)}
  return batch, texts._replace(scores=texts.scores._replace(components=terms))


def test_groups_are_compared_by_correctness_and_not_by_a_term_that_is_ignored():
  old = shaped([1, 1, 0, 1, 0, 0], [-1, 0, 0, -1, 0, -0.5])
  useful = judging.informative(*old, 2, ('overlong',))
  np.testing.assert_array_equal(useful, [False, True, False])
  # The second group has equal rewards but not equal correctness; without the name it is the dull one.
  np.testing.assert_array_equal(judging.informative(*old, 2), [True, False, True])
  new = shaped([1, 1, 1, 0], [-1, 0, 0, 0], first=10)
  batch, _ = judging.replace_groups(old, new, useful, 2, ('overlong',))
  np.testing.assert_array_equal(batch.tokens[:, 0], [12, 13, 2, 3, 4, 5])


@pytest.mark.parametrize(
  ('ignored', 'told'), [(('overlog',), 'exact.*overlong'), (('exact', 'overlong'), 'leave another')]
)
def test_a_term_that_is_ignored_must_be_one_of_the_reward_and_leave_another(ignored, told):
  config = addition(method_of('dapo'))
  config.phases.train.collect.resample_ignores = ignored
  with pytest.raises(ValueError, match=told):
    build.build(config)
  config.phases.train.collect.max_resamples = 0
  build.build(config)  # nothing is compared


def test_terms_that_are_read_must_be_of_the_reward():
  config = addition(method_of('stratified_grpo'))
  config.phases.train.collect.terms = ('stratun',)
  with pytest.raises(
    ValueError, match="'stratun' is no term of the reward; did you mean 'stratum'"
  ):
    build.build(config)
  config.phases.train.collect.terms = ()
  with pytest.raises(ValueError, match='stratum_term'):
    build.build(config)


def test_noted_terms_are_remembered_beside_the_rewards():
  settings = collect.Rollouts(terms=('kind',), lag=1)
  assert 'kind_term' in settings.provides
  memory = jax.tree_util.tree_leaves_with_path(settings.init())
  shapes = {jax.tree_util.keystr(path): x.shape for path, x in memory}
  (kind,) = (x for name, x in shapes.items() if 'kind_term' in name)
  (rewards,) = (x for name, x in shapes.items() if name.endswith('.rewards'))
  assert kind == rewards


def test_dynamic_sampling_puts_fresh_groups_in_place_of_dull_ones():
  old, new = judged([0, 0, 1, 0, 1, 1]), judged([1, 1, 0, 1, 0, 0], first=10)
  useful = judging.informative(*old, 2)
  batch, got = judging.replace_groups(old, new, useful, 2)
  np.testing.assert_array_equal(batch.tokens[:, 0], [12, 13, 2, 3, 4, 5])
  np.testing.assert_array_equal(batch.rewards, [0, 1, 1, 0, 1, 1])
  np.testing.assert_array_equal(batch.group_ids, [0, 0, 1, 1, 2, 2])
  np.testing.assert_array_equal(got.scores.total, batch.rewards)
  assert got.completions == ['12', '13', '2', '3', '4', '5']
  assert [r['prompt'] for r in got.records] == ['6', '1', '2']
  assert got.scores.errors == {'r/X': 2}


def test_prompts_that_stand_twice_draw_other_noise():
  ids = judging.distinct(np.array([5, 7, 5, 5], np.int32))
  assert len(set(ids.tolist())) == 4 and ids[0] == 5 and ids[1] == 7
  assert (ids >= 0).all()
  again = judging.distinct(np.array([5, 8], np.int32), before=[5, 7, 5, 5])
  assert again[1] == 8 and again[0] not in ids


def experiment(anchors=None, **rollouts):
  method = Method(
    collect=functools.partial(collect.Rollouts, **rollouts),
    anchors=anchors or {},
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.token_mean),
    ),
  )
  short = weighted(1.0, part(verifiers.soft_overlong, max_length=5, cache=4))
  return build.build(addition(method, rewards={'short': short}))


def collected(run, **changes):
  phase = examples.changed(run.phases['train'], **changes)
  with jax.set_mesh(run.mesh):
    state = phases.begin(run, 0, None)
    make = phase.collect.make(phases.context(run, phase, 0))
    drawer = phases.Drawer(phase, seed=0, cursor=0)
    return make(state, drawer, 0), drawer


@pytest.fixture(scope='module')
def plain():
  return collected(experiment())[0]


def test_truncated_rows_leave_the_denominator_only_where_that_is_named(plain):
  kept = plain.batch
  masked = collected(experiment(mask_truncated=True))[0].batch
  cut = kept.mask.any(axis=1) & ~masked.mask.any(axis=1)
  assert 0 < cut.sum() < len(cut)
  np.testing.assert_array_equal(masked.mask, kept.mask & ~cut[:, None])
  # They stay in the statistics of their group, ...
  np.testing.assert_array_equal(masked.advantages, kept.advantages)
  # ... and in the denominator of the one aggregation that counts rows as they were sampled.
  loss = np.ones(kept.mask.shape, np.float32)
  constant = lambda where: aggregation.constant_length(loss, where, length=5).count
  assert constant(masked.mask) == constant(kept.mask)
  for other in (aggregation.token_mean, aggregation.sequence_mean, aggregation.sequence_sum):
    assert other(loss, masked.mask).count < other(loss, kept.mask).count


def test_failed_verifiers_leave_loss_and_statistics(plain):
  run = experiment()
  real = run.phases['train'].score

  def sometimes(completions, records, lengths, others):
    scores = real(completions, records, lengths)
    bad = np.arange(len(completions)) % 4 == 1
    return scores._replace(
      total=np.where(bad, np.nan, scores.total),
      valid=~bad,
      errors={'short/ValueError': int(bad.sum())},
      messages=['row 1: short: ValueError: no'],
    )

  got, _ = collected(run, score=sometimes)
  bad = np.arange(16) % 4 == 1
  np.testing.assert_array_equal(got.batch.tokens, plain.batch.tokens)
  assert not got.batch.mask[bad].any() and got.batch.mask[~bad].any(axis=1).all()
  assert np.isfinite(got.batch.rewards).all() and not got.batch.advantages[bad].any()
  rewards = np.where(bad, np.nan, got.batch.rewards).reshape(4, 4)
  want = rewards - np.nanmean(rewards, axis=1, keepdims=True)
  found = np.array([a[m][0] for a, m in zip(got.batch.advantages[~bad], got.batch.mask[~bad])])
  np.testing.assert_allclose(found, want.reshape(-1)[~bad], atol=1e-6)
  assert got.metrics['verifier_errors'] == 4
  assert got.metrics['verifier_errors/short/ValueError'] == 4
  assert got.messages == ['row 1: short: ValueError: no']


def test_resampling_draws_on_and_the_cursor_knows():
  run = experiment(max_resamples=3)
  always_same = lambda texts, *_: Scores(
    np.zeros(len(texts)), {'r': np.zeros(len(texts))}, np.ones(len(texts), bool), {}, []
  )
  got, drawer = collected(run, score=always_same, curriculum=curricula.uniform())
  assert drawer.cursor == 4 * 4  # three more tries, then what is dull stays
  # A curriculum proposes other prompts for the further tries, and learns of all of them.
  assert len({*drawer.taken}) == 16
  np.testing.assert_array_equal(got.sampled.rows, np.repeat(drawer.taken, 4))
  np.testing.assert_array_equal(got.sampled.replaced, np.arange(64) >= 16)
  assert got.metrics['reward/same_in_group'] == 1.0 and not got.batch.advantages.any()
  assert got.batch.mask.any(axis=1).all()


def test_a_prompt_that_is_drawn_again_within_a_step_draws_other_noise():
  run = experiment(max_resamples=1)
  source = [run.phases['train'].source[i] for i in range(4)]  # each prompt comes in both attempts
  attempts = []

  def dull_at_first(texts, *_):
    attempts.append(texts)
    rewards = np.arange(len(texts)) % 4 * float(len(attempts) > 1)
    return Scores(rewards, {'r': rewards}, np.ones(len(texts), bool), {}, [])

  step = collected(run, score=dull_at_first, source=source)[0]
  got = step.batch
  found = curricula.observed(got, step.sampled)
  np.testing.assert_array_equal(
    found.trained_rows, np.append(got.prompt_ids, step.sampled.rows[:16])
  )
  assert found.magnitudes[:16].all() and not found.magnitudes[16:].any()
  assert found.trained_valid.all() and len(found.rewards) == 32
  first = collected(experiment(), source=source)[0].batch
  for prompt in range(4):
    drawn = [b.tokens[b.prompt_ids == prompt] for b in (first, got)]
    assert drawn[0].shape == drawn[1].shape and not np.array_equal(*drawn)
  # The first attempt is that of a step without others.
  assert attempts[0] == collect.completions(first, source, run.tokenizer)


def test_completions_are_the_sampler_s_ids(plain):
  """Texts are for verifiers only: the batch holds the tokens that were drawn."""
  tokenizer = tokenizers.characters(alphabet='0123456789+=')
  texts = [text for _, text, _ in plain.samples]
  for row, text in zip(range(16), texts):
    ids = plain.batch.tokens[row][plain.batch.mask[row]].tolist()
    assert tokenizer.decode(ids) == text
  assert (plain.batch.behavior_logp[plain.batch.mask] < 0).all()


def test_a_completion_of_messages_begins_with_what_the_prompt_opened():
  tokenizer = tokenizers.byte()._replace(opening='<think>\n')
  said = np.array([tokenizer.encode('so</think>4')] * 4, np.int32)
  batch = Batch(
    tokens=said,
    segment_ids=np.ones_like(said),
    mask=np.ones(said.shape, bool),
    finished=np.zeros(4, bool),
  )
  records = [{'messages': [{'role': 'user', 'content': '2+2'}]}, {'prompt': '2+2'}]
  texts = collect.completions(batch, records, tokenizer)
  assert texts == ['<think>\nso</think>4'] * 2 + ['so</think>4'] * 2


def test_annotations_are_taken_in_pieces_without_a_trace(plain):
  run = experiment()
  params = run.policy.init(jax.random.key(0))
  made = [
    learner.forward_in_pieces(run.policy, params, plain.batch, micro_batches=m) for m in (1, 4)
  ]
  assert isinstance(made[0], Outputs)
  np.testing.assert_allclose(made[0].logp, made[1].logp, atol=1e-5)


def test_own_verifiers_can_be_named_in_a_configuration():
  def starts_with_one(completion):
    return float(completion.startswith('1'))

  config = addition(method_of('grpo'), rewards={'one': weighted(2.0, part(starts_with_one))})
  run = build.build(json.loads(config.to_json()))
  assert run.phases['train'].score(['12', '21'], [{}, {}], [2, 2]).total.tolist() == [2.0, 0.0]
