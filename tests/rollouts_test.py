"""What stands in a rollout batch beside fresh samples: the past, baselines, demonstrations, features."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from polgrad import collect, credit, learner, optim, phases
from polgrad.collect import replay
from polgrad.losses import logit_stats, selections
from polgrad.registry import bind, part
from polgrad.sampling import behavior_policies, processors
from polgrad.types import Batch
from tests import examples
from tests.collect_test import collected, experiment

pytestmark = pytest.mark.usefixtures('samplers_once')


def run_steps(steps, *, change=lambda state: state, seed=0, requires=(), **settings):
  """Batches of some steps in a row; `change` stands for the updates between them."""
  run = experiment(**settings)
  phase = run.phases['train']
  objective = examples.changed(phase.objective, requires=phase.objective.requires | set(requires))
  phase = dataclasses.replace(phase, objective=objective)
  run = dataclasses.replace(run, phases={'train': phase}, seed=seed)
  found = []
  with jax.set_mesh(run.mesh):
    state = phases.begin(run, 0, None)
    make = phase.collect.make(phases.context(run, phase, 0))
    for step in range(steps):
      draw = phases.Drawer(phase, seed=0, cursor=int(state.cursor))
      got = make(state, draw, step)
      found.append((state, got))
      state = change(phases.advance(run.mesh, state, got, draw.cursor))
  return run, found


@pytest.fixture(scope='module')
def fresh():
  return [got.batch for _, got in run_steps(4)[1]]


def forward(run, params, batch, **more):
  with jax.set_mesh(run.mesh):
    return learner.forward(run.policy, params, batch, **more)


def louder(state):
  """An update that every log-prob notices."""
  return state.replace(params=jax.tree.map(lambda x: 1.3 * x, state.params))


class TestLag:
  def test_a_batch_is_used_so_many_batches_later_and_the_first_until_then(self, fresh):
    _, found = run_steps(4, lag=2)
    for step, (_, got) in enumerate(found):
      used = max(step - 2, 0)
      np.testing.assert_array_equal(got.batch.tokens, fresh[used].tokens)
      np.testing.assert_array_equal(got.batch.advantages, fresh[used].advantages)
      assert got.metrics['staleness'] == step - used
      assert (got.batch.staleness == step - used).all()

  def test_what_depends_on_the_live_policy_is_computed_when_the_batch_is_used(self):
    settings = dict(lag=1, recompute_proximal=True, requires={'proximal_logp'})
    run, found = run_steps(2, change=louder, **settings)
    (old, _), (live, got) = found
    live, old = (forward(run, state.params, got.batch).logp for state in (live, old))
    where = got.batch.mask
    np.testing.assert_allclose(got.batch.behavior_logp[where], old[where], atol=1e-5)
    np.testing.assert_allclose(got.batch.proximal_logp[where], live[where], atol=1e-5)
    assert np.abs(live - old)[where].max() > 1e-2

  def test_samples_shown_are_fresh(self, fresh):
    _, found = run_steps(3, lag=2)
    shown = [text for _, text, _ in found[-1][1].samples]
    _, plain = run_steps(3)
    assert shown == [text for _, text, _ in plain[-1][1].samples]


class TestReplay:
  def test_a_share_of_the_groups_comes_whole_from_earlier_batches(self, fresh):
    _, found = run_steps(4, replay=2, replay_fraction=0.5)
    for step, (_, got) in enumerate(found):
      batch, age = got.batch, got.batch.staleness.reshape(4, 4)
      assert (age == age[:, :1]).all() and set(age.flat) <= {0, 1, 2}
      assert (age[:, 0] > 0).sum() == (2 if step else 0)
      np.testing.assert_array_equal(batch.group_ids, np.arange(16) // 4)
      for row in range(16):
        old = fresh[step - int(age[row // 4, 0])]
        same = (old.tokens == batch.tokens[row]).all(axis=1)
        same &= (old.behavior_logp == batch.behavior_logp[row]).all(axis=1)
        assert same.any()

  def test_advantages_are_those_of_the_group(self):
    batch = run_steps(3, replay=2, replay_fraction=0.5)[1][-1][1].batch
    rewards = batch.rewards.reshape(4, 4)
    want = np.repeat((rewards - rewards.mean(axis=1, keepdims=True)).reshape(-1, 1), 11, axis=1)
    np.testing.assert_allclose(batch.advantages, np.where(batch.mask, want, 0), atol=1e-6)

  def test_groups_drawn_by_priority_have_weights_whose_exponent_rises(self):
    """b = 0.4, 0.7, 1: (n P)^-b over the largest one, of all remembered groups."""
    settings = dict(replay=2, replay_fraction=0.5, replay_priority=part(replay.deviation))
    settings |= dict(replay_exponent=0.6, replay_correction=0.4, replay_correction_steps=2)
    _, found = run_steps(4, **settings)
    for step, (state, got) in enumerate(found):
      batch, old = got.batch, state.collect_state.batches
      weights, age = (batch[name].reshape(4, 4) for name in ('replay_weight', 'staleness'))
      assert (weights[age == 0] == 1).all() and (weights == weights[:, :1]).all()
      if not step:
        continue
      stored = [(step - n, old.rewards[n % 4]) for n in range(max(step - 3, 0), step)][-2 - 1 :]
      p = {(n, g): np.std(r.reshape(-1, 4)[g]) + 1e-3 for n, r in stored for g in range(4)}
      chances = {key: x**0.6 / sum(y**0.6 for y in p.values()) for key, x in p.items()}
      raw = {key: (len(p) * x) ** -min(0.4 + 0.3 * step, 1.0) for key, x in chances.items()}
      allowed = [x / max(raw.values()) for x in raw.values()]
      for weight in weights[age > 0]:
        assert min(abs(weight - x) for x in allowed) < 1e-5


def test_memory_has_the_shapes_of_what_is_put_into_it():
  settings = dict(lag=1, replay=1, replay_fraction=0.5, baseline_samples=1, demonstrations=1)
  _, found = run_steps(2, compare=('wins', 'baseline_wins'), **settings)
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  (before, got), (after, _) = found
  assert shapes(before.collect_state) == shapes(got.collect_state) == shapes(after.collect_state)
  assert int(after.collect_state.count) == 1
  assert run_steps(1)[1][0][0].collect_state == ()


class TestBaseline:
  def test_rewards_of_other_completions_stand_beside_every_row_of_their_prompt(self, fresh):
    _, found = run_steps(1, baseline_samples=1)
    greedy = run_steps(1, behavior_policy=part(behavior_policies.greedy), recompute_proximal=True)[
      1
    ][0][1].batch
    batch = found[0][1].batch
    got = batch.baseline_rewards
    assert got.shape == (16, 1) and got.dtype == np.float32
    np.testing.assert_allclose(got[:, 0], greedy.rewards)
    np.testing.assert_array_equal(batch.tokens, fresh[0].tokens)
    np.testing.assert_array_equal(batch.advantages, fresh[0].advantages)

  def test_noise_is_not_that_of_the_group(self):
    batch = run_steps(1, baseline_samples=4, baseline_policy=part(behavior_policies.current))[1][0][
      1
    ].batch
    got = batch.baseline_rewards.reshape(4, 4, 4)
    np.testing.assert_array_equal(got, np.broadcast_to(got[:, :1], got.shape))
    assert not np.array_equal(got[:, 0], batch.rewards.reshape(4, 4))

  def test_the_reference_draws_with_its_own_parameters(self):
    settings = dict(baseline_samples=2, baseline_policy=part(behavior_policies.reference))
    anchors = {'reference': part(optim.fixed)}
    kept = run_steps(2, change=louder, anchors=anchors, **settings)[1][-1][1].batch
    moved = run_steps(2, anchors=anchors, **settings)[1][-1][1].batch
    np.testing.assert_array_equal(kept['baseline_rewards'], moved['baseline_rewards'])
    assert not np.array_equal(kept.tokens, moved.tokens)

  def test_a_prompt_whose_baseline_failed_leaves_the_loss(self):
    run = experiment(baseline_samples=1)
    real = run.phases['train'].score

    def fails_on_baselines(texts, records, lengths, others):
      scores = real(texts, records, lengths)
      if len(texts) > 4:
        return scores
      valid = np.arange(4) != 2
      return scores._replace(total=np.where(valid, scores.total, np.nan), valid=valid)

    got, _ = collected(run, score=fails_on_baselines)
    bad = np.arange(16) // 4 == 2
    np.testing.assert_array_equal(got.batch.mask.any(axis=1), ~bad)
    np.testing.assert_array_equal(got.batch.valid, ~bad)
    assert got.metrics['verifier_errors'] == 1
    assert np.isfinite(got.batch.baseline_rewards).all()


class TestDemonstrations:
  def test_each_group_has_the_answer_laid_out_like_a_sample(self, fresh):
    run, found = run_steps(1, demonstrations=1)
    got = found[0][1]
    batch, shown = got.batch, np.arange(20) % 5 == 4
    np.testing.assert_array_equal(batch.stream, np.where(shown, 0, 1))
    np.testing.assert_array_equal(batch.group_ids, np.arange(20) // 5)
    np.testing.assert_array_equal(batch.tokens[~shown], fresh[0].tokens)
    np.testing.assert_array_equal(batch.behavior_logp[~shown], fresh[0].behavior_logp)
    assert not batch.behavior_logp[shown].any()
    records = phases.Drawer(run.phases['train'], seed=0, cursor=0)(4)
    tokenizer = run.tokenizer
    for row, record in zip(np.flatnonzero(shown), records):
      want = [*tokenizer.encode(record['answer']), tokenizer.stop_ids[0]]
      assert batch.tokens[row][batch.mask[row]].tolist() == want
      assert batch.mask[row, 6 : 6 + len(want)].all()
      prompt = batch.segment_ids[row, :6] > 0
      assert batch.tokens[row, :6][prompt].tolist() == tokenizer.encode(record['prompt'])
    assert len(got.samples) == 16

  def test_verifiers_judge_them_and_group_statistics_count_them(self):
    got = run_steps(1, demonstrations=1)[1][0][1]
    rewards = got.batch.rewards.reshape(4, 5)
    assert got.metrics['reward'] == pytest.approx(rewards[:, :4].mean())
    assert got.metrics['reward_of_demonstration'] == pytest.approx(rewards[:, 4].mean())
    gap = got.batch.advantages[4::5, 6] - (rewards[:, 4] - rewards.mean(axis=1))
    np.testing.assert_allclose(gap, 0, atol=1e-6)

  @pytest.mark.parametrize(
    'change, words',
    [
      (lambda r: {**r, 'prompt': '1234+1='}, 'record .*7 tokens, longer than the limit of 6'),
      (
        lambda r: {**r, 'prompt': '1+', 'answer': '123456'},
        'record .*answer and its stop token are 7 tokens, more than max_new_tokens 5',
      ),
      (lambda r: {k: v for k, v in r.items() if k != 'answer'}, "record .*no 'answer'"),
    ],
  )
  def test_answers_that_do_not_fit_are_refused_with_their_record(self, change, words):
    phase = experiment(demonstrations=1).phases['train']
    source = [change(phase.source[i]) for i in range(64)]
    with pytest.raises(ValueError, match=words):
      collected(experiment(demonstrations=1), source=source)


class TestFeatures:
  def test_statistics_are_those_of_the_live_policy_on_old_rows(self):
    stats = {'spread': part(logit_stats.entropy)}
    run, found = run_steps(2, change=louder, lag=1, stats=stats)
    state, got = found[-1]
    want = forward(run, state.params, got.batch, fields=frozenset({'entropy'})).entropy
    where = got.batch.mask
    np.testing.assert_allclose(got.batch.features['spread'][where], want[where], atol=1e-5)
    assert not got.batch.features['spread'][:, 0].any()  # prompts are not scored

  def test_statistics_may_compare_the_live_policy_with_a_teacher(self):
    """The value of the prefix before each token, as CD-Q needs it."""
    stats = {'state_value': part(logit_stats.expected_logit)}
    anchors = {'teacher': part(optim.fixed)}
    run, found = run_steps(2, change=louder, lag=1, stats=stats, anchors=anchors)
    (first, _), (state, got) = found
    rows = got.batch.tokens, got.batch.segment_ids
    with jax.set_mesh(run.mesh):
      full = jax.jit(lambda params: run.policy.unembed(params, run.policy.hidden(params, *rows)))
      logits, teacher = full(state.params), full(first.params)
    want = np.sum(np.asarray(jax.nn.softmax(teacher)) * logits, axis=-1)[:, :-1]
    where = got.batch.mask[:, 1:]
    found = got.batch.features['state_value'][:, 1:]
    np.testing.assert_allclose(found[where], want[where], atol=1e-5)

  def test_credit_reads_features_by_name(self):
    def apply(x, state):
      advantages = x['spread'] * x['uniform'][:, None]
      return x.with_arrays(advantages=advantages, surprise=x.rewards), state

    run = experiment(stats={'spread': part(logit_stats.entropy)})
    estimator = credit.Estimator(
      apply=apply,
      requires=frozenset({'spread', 'uniform'}),
      provides=frozenset({'advantages', 'surprise'}),
    )
    batch = collected(run, credit=estimator)[0].batch
    features = batch.features
    want = np.where(batch.mask, features['spread'] * features['uniform'][:, None], 0)
    np.testing.assert_allclose(batch.advantages * batch.mask, want, rtol=1e-5)
    np.testing.assert_array_equal(features['surprise'], batch.rewards)

  def test_log_probs_of_any_anchor_are_there_by_its_name(self):
    anchors = dict.fromkeys(('previous', 'reference'), part(optim.fixed))
    reads = {'previous_logp', 'reference_logp'}
    run, found = run_steps(2, change=louder, anchors=anchors, requires=reads)
    (first, _), (_, got) = found
    want = forward(run, first.params, got.batch).logp
    for found in (got.batch.features['previous_logp'], got.batch.reference_logp):
      where = got.batch.mask
      np.testing.assert_allclose(found[where], want[where], atol=1e-5)
    assert 'reference_logp' not in got.batch.features

  def test_a_random_number_a_row_comes_from_seed_and_step(self, fresh):
    draws = [batch.features['uniform'] for batch in fresh]
    draws.append(run_steps(1, seed=1)[1][0][1].batch.features['uniform'])
    assert all((u >= 0).all() and (u < 1).all() and u.dtype == np.float32 for u in draws)
    assert len(np.unique(np.stack(draws))) == 5 * 16
    again = run_steps(1)[1][0][1].batch.features['uniform']
    np.testing.assert_array_equal(draws[0], again)

  def test_every_feature_is_cut_with_its_rows(self, fresh):
    for cut in collect.minibatches(fresh[0], epochs=1, parts=2, rows_per_prompt=4, seed=(0,)):
      at = [np.flatnonzero(fresh[0].features['uniform'] == u)[0] for u in cut.features['uniform']]
      np.testing.assert_array_equal(cut.rewards, fresh[0].rewards[at])


@pytest.mark.parametrize(
  'wrong, words',
  [
    (dict(lag=-1), 'lag: expected a number at least 0'),
    (dict(replay=-1), 'replay: expected a number at least 0'),
    (dict(replay=2), 'replay_fraction must be'),
    (dict(replay_fraction=0.5), 'replay_fraction must be'),
    (
      dict(replay=2, replay_fraction=1.5),
      'replay_fraction: expected a number at least 0 and at most 1',
    ),
    (dict(replay=2, replay_fraction=0.5, replay_keep='best'), 'a replay_priority that reads'),
    (dict(replay_correction=0.4), 'so it needs replay'),
    (
      dict(replay=2, replay_fraction=0.5, replay_correction=0.4, replay_exponent=math.inf),
      'nothing is drawn',
    ),
    (dict(baseline_samples=-1), 'baseline_samples: expected a number at least 0'),
    (dict(baseline_policy=part(behavior_policies.reference)), 'baseline_samples is 0'),
    (dict(demonstrations=2), 'demonstrations must be 0 or 1'),
    (dict(stats={'rewards': part(logit_stats.entropy)}), 'stats.rewards: the name is taken'),
    (dict(stats={'finished': part(logit_stats.entropy)}), 'stats.finished: the name is taken'),
    (dict(stats={'staleness': part(logit_stats.entropy)}), 'stats.staleness: the name is taken'),
  ],
)
def test_settings_that_cannot_be_are_refused(wrong, words):
  with pytest.raises(ValueError, match=words):
    bind(part(collect.Rollouts, **wrong), collect.TABLE)


def test_a_collector_says_what_it_provides():
  settings = dict(
    prompts=4,
    samples_per_prompt=3,
    baseline_samples=2,
    baseline_policy=part(behavior_policies.reference),
    demonstrations=1,
    stats={'spread': part(logit_stats.entropy)},
  )
  got = bind(part(collect.Rollouts, **settings), collect.TABLE)
  assert (
    got.rows == 16
    and got.rows_per_prompt == 4
    and got.anchors_read == {'reference'}
    and not got.filtered
  )
  named = {'valid', 'staleness', 'uniform', 'baseline_rewards', 'spread', 'stream'}
  assert named <= got.provides
  assert got.provides - Batch.__dataclass_fields__.keys() == {'uniform', 'spread'}


def test_the_sampler_gets_the_entropies_of_the_batch_before():
  heated = functools.partial(processors.entropy_scaled, strength=0.5)
  settings = dict(
    token_temperature=part(processors.entropy_scaled, strength=0.5),
    stats={'old_entropy': part(logit_stats.entropy)},
  )
  _, found = run_steps(2, lag=1, recompute_proximal=True, **settings)
  (before, first), (after, _) = found
  assert before.collect_state.entropy_levels.tolist() == [0, 0, 0]
  want = selections.entropy_levels(first.batch['old_entropy'], first.batch.mask)
  np.testing.assert_array_equal(after.collect_state.entropy_levels, want)
  assert want[1] > 0 and int(after.collect_state.memory.count) == 1
  # In the first step they are zeros, so the rows are those of a single temperature.
  plain = run_steps(1)[1][0][1].batch
  np.testing.assert_array_equal(first.batch.tokens, plain.tokens)
  stats = {'old_entropy': logit_stats.entropy}
  assert collect.Rollouts(token_temperature=heated, stats=stats).filtered
  with pytest.raises(ValueError, match='stats must have old_entropy'):
    collect.Rollouts(token_temperature=heated)
