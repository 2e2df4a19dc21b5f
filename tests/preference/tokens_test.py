"""Pair methods that look at tokens, at weights or at the whole batch: published numbers, what they are
without their own knob, and what they make of whole batches."""

import dataclasses
import functools
import itertools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from polgrad import credit, learner, methods, metric_history, optim
from polgrad.data import pair_fields
from polgrad.data.batching import Unusable
from polgrad.losses import logit_stats, pair_selections, pair_weights
from polgrad.models import Policy
from polgrad.objectives import TABLE
from polgrad.reductions import Deviation, Mean
from polgrad.registry import bind
from polgrad.types import Batch, Outputs, TrainState
from tests.preference import harness

DPO = methods.dpo()


def arrays(method, **changes):
  return harness.random_arrays(method) | changes


@pytest.mark.parametrize(
  ('name', 'knobs'),
  [
    ('ld_dpo', dict(damping=1.0)),
    ('humanline_dpo', dict(low=-np.inf, high=np.inf)),
    ('sem_dpo', dict(alpha=0.0)),
    ('beta_dpo', dict(rate=0.0, dropped=0.0)),
    ('sera', dict(fraction=1.0)),
    ('opa_dpo', dict(anchor_coefficient=0.0)),
    ('tdpo', dict(second=True, alpha=0.0)),
    ('wpo', dict(beta=0.1, cap=1.0)),
  ],
)
def test_without_its_own_knob_a_method_is_dpo(name, knobs, x64):
  method = methods.TABLE[name](**knobs)
  x = arrays(method)
  if name == 'tdpo':
    x['reference_logp'] = x['teacher_logp']
  if name == 'opa_dpo':
    x['token_weights'] = np.ones_like(x['logp'])
  if name == 'wpo':  # the law of every token is uniform
    x |= {'logits': np.zeros_like(x['logits']), 'logp': np.full_like(x['logp'], -np.log(7))}
  loss, gradient = harness.value_and_gradient(method, x)
  x.pop('previous_logp', None)
  plain, wanted = harness.value_and_gradient(DPO, x)
  np.testing.assert_allclose(loss, plain, rtol=1e-12)
  np.testing.assert_allclose(gradient['logp'], wanted['logp'], rtol=1e-12, atol=1e-15)


def test_without_bounds_humanline_kto_is_kto(x64):
  kto, ours = (methods.kto(), methods.humanline_kto(low=-np.inf, high=np.inf, desirable=1.0))
  x = arrays(kto)
  got, wanted = (harness.value_and_gradient(method, x) for method in (ours, kto))
  np.testing.assert_allclose(got[0], wanted[0], rtol=1e-12)
  np.testing.assert_allclose(got[1]['logp'], wanted[1]['logp'], rtol=1e-12)


def test_rows_of_equal_length_are_not_sampled_from(x64):
  x = arrays(DPO)
  x['mask'] = np.ones_like(x['mask'])
  for knobs in ({}, {'shared': False}):
    loss, _ = harness.value_and_gradient(methods.sampo(**knobs), x)
    np.testing.assert_allclose(loss, harness.value_and_gradient(DPO, x)[0], rtol=1e-12)


def test_a_batch_of_one_pair_has_nothing_to_sort(x64):
  x = arrays(DPO)
  x['mask'][2:] = False  # pairs without tokens do not count
  wanted = harness.value_and_gradient(DPO, x)
  for method in (methods.aot_paired(beta=0.1), methods.aot_unpaired(beta=0.1)):
    got = harness.value_and_gradient(method, x)
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-12)
    np.testing.assert_allclose(got[1]['logp'], wanted[1]['logp'], rtol=1e-12)


def test_constant_partners_have_value_and_gradient_of_the_sorted_loss(x64):
  """AOT without pairs, differentiated through the sort, with as many good as bad rows."""
  x = arrays(DPO)
  x['mask'] = np.ones_like(x['mask'])
  x['label'] = np.array([1.0, 0, 0, 1, 1, 0, 0, 1])

  def sorted_loss(logp):
    scores = jnp.sum(logp - x['reference_logp'], axis=1)
    good, bad = (jnp.sort(scores[x['label'] == label]) for label in (1, 0))
    return jnp.mean(jax.nn.softplus(-0.01 * (good - bad)))

  wanted, gradient = jax.value_and_grad(sorted_loss)(jnp.asarray(x['logp']))
  got = harness.value_and_gradient(methods.aot_unpaired(), x)
  np.testing.assert_allclose(got[0], wanted, rtol=1e-12)
  np.testing.assert_allclose(got[1]['logp'], gradient, rtol=1e-10)


def test_scores_without_rows_to_compare_with_have_no_loss(x64):
  x = arrays(DPO)
  x['label'] = np.ones(8)
  loss, gradient = harness.value_and_gradient(methods.aot_unpaired(), x)
  assert loss == 0 and not gradient['logp'].any()


class TestAlignment:
  def test_the_mean_of_exp_a_under_the_policy_is_one(self, x64):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(6, 9)))
    log_probs = jax.nn.log_softmax(logits)
    a = log_probs - logit_stats.log_collision(logits)[:, None]
    np.testing.assert_allclose(jnp.sum(jnp.exp(log_probs + a), axis=1), np.ones(6), rtol=1e-12)

  def test_a_uniform_and_a_deterministic_policy_give_the_weight_one(self):
    mask = jnp.ones((2, 3), bool)
    for logits in (jnp.zeros((2, 3, 5)), 100.0 * jax.nn.one_hot(jnp.zeros((2, 3), int), 5)):
      logp = jax.nn.log_softmax(logits)[..., 0]
      for typical in (logit_stats.log_collision, logit_stats.largest_logp):
        weight = jax.jit(pair_weights.alignment)(logp, jax.jit(typical)(logits), mask)
        np.testing.assert_allclose(weight, [1.0], atol=1e-6)

  def test_statistics_of_a_padded_vocabulary_are_finite(self):
    logits = jnp.array([[1.0, 2.0, -jnp.inf]])
    for statistic in (logit_stats.log_collision, logit_stats.largest_logp):
      assert np.isfinite(jax.jit(statistic)(logits)).all()


def test_a_subset_has_the_length_of_the_shorter_row_and_is_uniform():
  mask = np.arange(6)[None] < np.array([[6], [2]])
  noise = np.random.default_rng(0).random((60, 2, 6), np.float32)
  draw = lambda noise, again: jax.vmap(
    lambda one: pair_selections.shortened(one, mask, again=again)
  )(noise)
  both = jax.jit(lambda noise: [draw(noise, again) for again in (False, True)])
  for kept in both(noise):
    assert np.all(kept.sum(axis=2) == 2)
    counts = kept.sum(axis=0)
    np.testing.assert_array_equal(counts[1], [60, 60, 0, 0, 0, 0])
    assert np.abs(counts[0] - 20).max() < 4 * np.sqrt(60 * 2 / 9)  # four standard deviations


WHOLE = {
  'sampo': {},
  'beta_dpo': {},
  'aot_paired': {},
  'aot_unpaired': {},
  'sera': dict(steps=9, fraction=0.5),
}


def pieces_of(method, x, step):
  """Loss and gradient of the whole batch, and the sum of those of its single pairs."""
  objective = method.bound()[1]
  logp, mask = x.pop('logp'), x.pop('mask')
  tokens = np.zeros(mask.shape, int)
  batch = Batch(tokens=tokens, segment_ids=mask.astype(int), mask=mask).with_arrays(**x)
  state = objective.init()
  cut = [slice(i, i + 2) for i in range(0, len(mask), 2)]

  def terms(logp, batch):
    return objective.apply(Outputs(logp=logp), batch, state, step=step)[0]

  @jax.jit
  def both(logp):
    found = objective.select(Outputs(logp=logp), batch, state, step=step)
    selected = batch.replace(features=batch.features | found)
    [count] = [t.count for t in terms(logp, batch).values()]

    def whole(logp):
      return sum(t.value() for t in terms(logp, batch).values())

    def pieces(logp):
      parts = [terms(logp[rows], jax.tree.map(lambda a, r=rows: a[r], selected)) for rows in cut]
      return sum(Mean(total=t.total, count=count).value() for p in parts for t in p.values())

    return [jax.value_and_grad(function)(logp) for function in (whole, pieces)]

  return both(logp)


@pytest.mark.parametrize('name', WHOLE)
def test_single_pairs_add_up_to_what_the_whole_batch_decides(name, x64):
  method = methods.TABLE[name](**WHOLE[name])
  whole, pieces = pieces_of(method, arrays(method), step=5)
  np.testing.assert_allclose(pieces[0], whole[0], rtol=1e-10)
  np.testing.assert_allclose(pieces[1], whole[1], rtol=1e-8, atol=1e-14)


def test_moving_averages_are_of_whole_batches_and_skip_empty_ones():
  average = metric_history.average(metrics=('margin', 'margin_std'), decay=0.9)
  x = np.array([1.0, 3.0, 8.0])

  @jax.jit
  def after(state, where):
    metrics = {
      'margin': Mean(total=jnp.sum(jnp.where(where, x, 0)), count=jnp.sum(where, dtype=float)),
      'margin_std': Deviation.of(x[:1], where[:1]) + Deviation.of(x[1:], where[1:]),
    }
    return average.advance(state, metrics)

  state = after(average.init(), np.ones(3, bool))
  np.testing.assert_allclose(average.value(state), [0.4, 0.1 * np.std(x, ddof=1)], rtol=1e-6)
  np.testing.assert_array_equal(after(state, np.zeros(3, bool)), state)


def test_beta_follows_the_margins_of_the_batch_and_stays_positive():
  still = jax.jit(functools.partial(pair_selections.adaptive_beta, dropped=0.0))
  others = np.ones((6, 1), bool), np.full((6, 1), 0.5), np.array([1.0, 2.0]), np.zeros(())
  beta = lambda gap: still(np.repeat(gap, 2), *others)
  # M = 0.9 * 1 + 0.1 * mean, so mean - M = 0.9 * (mean - 1).
  np.testing.assert_allclose(beta([1.0, 2.0, 3.0]), 0.1 * (1 + 0.6 * 0.9), rtol=1e-6)
  np.testing.assert_allclose(beta([-9.0, -9.0, -9.0]), 1e-3)


def test_pairs_far_from_the_average_are_seldom_drawn():
  gap = jnp.repeat(jnp.array([0.0, 0.1, -0.1, 0.2, 9.0]), 2)
  mask = jnp.ones((10, 1), bool)
  draw = lambda noise: pair_selections.near_average(
    gap, mask, noise, jnp.array([0.0, 1.0]), jnp.zeros(())
  )
  noise = jax.random.uniform(jax.random.key(0), (50, 10, 1))
  shares = jax.jit(jax.vmap(draw))(noise)
  np.testing.assert_allclose(shares.sum(axis=1), np.full(50, 5.0), rtol=1e-6)
  assert np.all((shares > 0).sum(axis=1) == 4)
  assert (shares[:, 4] > 0).sum() < 5


def bandit(seed=0, prompts=20, actions=4, pairs=40, flips=0.2):
  """Comparisons of actions with Bradley-Terry labels, a part of which are turned round: the prompts,
  the preferred and the other actions, and which labels are wrong."""
  rng = np.random.default_rng(seed)
  rewards = 6 * rng.normal(size=(prompts, actions))
  prompt = np.repeat(np.arange(prompts), pairs)
  first, shift = rng.integers(0, actions, len(prompt)), rng.integers(1, actions, len(prompt))
  second = (first + shift) % actions
  gap = rewards[prompt, first] - rewards[prompt, second]
  wins = rng.random(len(prompt)) < harness.sigmoid(gap)
  flipped = rng.random(len(prompt)) < flips
  wins ^= flipped
  return prompt, np.where(wins, first, second), np.where(wins, second, first), flipped


def test_pairs_with_small_margins_have_the_wrong_labels():
  """SeRA on a tabular problem with 20% flips: few of the pairs with the largest margins are wrong."""
  prompt, chosen, rejected, flipped = bandit()
  rows = np.stack([chosen, rejected], axis=1).reshape(-1)
  where = np.repeat(prompt, 2)
  reference = jnp.full((len(rows), 1), -np.log(4.0))
  mask, preferred = jnp.ones((len(rows), 1), bool), jnp.tile(jnp.array([True, False]), len(prompt))
  logp = lambda theta: jax.nn.log_softmax(theta)[where, rows][:, None]
  label = preferred.astype(jnp.float32)
  method = methods.dpo(beta=1.0)
  loss = lambda theta: method.loss(
    mask=mask, logp=logp(theta), reference_logp=reference, label=label
  )[0]
  step = lambda _, theta: theta - 20 * jax.grad(loss)(theta)
  theta = jax.jit(lambda t: jax.lax.fori_loop(0, 50, step, t))(jnp.zeros((20, 4)))
  gap = jnp.repeat(logp(theta)[::2, 0] - logp(theta)[1::2, 0], 2)
  arguments = gap, logp(theta), reference, preferred, mask, jnp.zeros(())
  select = jax.jit(functools.partial(pair_selections.largest_gaps, fraction=0.7))
  kept = np.asarray(select(*arguments)) > 0
  assert kept.sum() == 0.7 * len(prompt)
  assert flipped.mean() > 0.17
  assert flipped[kept].mean() < 0.05


def test_sera_makes_no_pairs_while_the_previous_policy_is_the_reference():
  """Then all given pairs are trained; later the fraction with the largest margins, of both kinds."""
  estimator = credit.bootstrapped_pairs(fraction=0.5, ensemble=0.0)
  rows, mask = 8, jnp.ones((8, 1), bool)
  batch = Batch(
    tokens=jnp.zeros((rows, 1), jnp.int32), segment_ids=mask.astype(jnp.int32), mask=mask
  )
  batch = batch.with_arrays(
    valid=jnp.ones(rows, bool).at[6].set(False),  # of the second prompt the chosen row has failed
    group_ids=jnp.repeat(jnp.arange(2), 4),
    stream=jnp.tile(jnp.array([1, 1, 0, 0]), 2),
    label=jnp.tile(jnp.array([0.0, 0, 1, 0]), 2),
    reference_logp=jnp.zeros((rows, 1)),
    proximal_logp=jnp.zeros((rows, 1)),
  )
  first, _ = estimator.apply(batch.with_arrays(previous_logp=jnp.zeros((rows, 1))), ())
  assert first['given_side'].tolist() == [0, 0, 1, -1, 0, 0, 0, 0]
  assert not first['pair_side'].any()
  assert first.mask[:, 0].tolist() == [False, False, True, True] + [False] * 4
  before = jnp.array([0.0, -1, 1, 3, -2, 0, 9, 1])[:, None]  # margins 4 and -2; 3
  later, _ = estimator.apply(batch.with_arrays(previous_logp=before), ())
  assert later['pair_side'].tolist() == [0, -1, 0, 1, -1, 0, 0, 1]
  assert not later['given_side'].any()


def test_after_the_first_iteration_sera_is_dpo_on_the_kept_pairs(x64):
  """The margins of the present and of the previous policy count one half each."""
  method = methods.sera(steps=9, iterations=3, fraction=0.5, ensemble=0.5)
  x = arrays(method)
  margin = lambda logp: np.subtract(
    *harness.pair(harness.total(logp - x['reference_logp'], x['mask']), x)
  )
  h, where = margin(x['logp']), np.array([0, 1, 3])  # pair 2 has a row without tokens
  both = (h + margin(x['previous_logp'])) / 2
  kept = where[np.argsort(-both[where])[:2]]  # one half of three pairs, rounded up
  z, p = 0.1 * h[kept], harness.confidence(x)[kept]
  wanted = np.mean(p * harness.logistic(z) + (1 - p) * harness.logistic(-z))
  np.testing.assert_allclose(method.loss(step=3, **x)[0], wanted, rtol=1e-10)


def test_the_margin_of_the_earlier_policy_counts():
  gap = jnp.repeat(jnp.array([1.0, 2.0, 3.0]), 2)
  previous = jnp.array([[9.0], [0.0], [0.0], [0.0], [0.0], [0.0]])
  zeros, mask = jnp.zeros((6, 1)), jnp.ones((6, 1), bool)
  preferred = jnp.tile(jnp.array([True, False]), 3)
  select = lambda **knobs: jax.jit(
    functools.partial(pair_selections.largest_gaps, fraction=0.3, **knobs)
  )
  kept = lambda **knobs: select(**knobs)(
    gap, previous, zeros, preferred, mask, np.int32(7)
  ).tolist()
  assert kept(ensemble=1.0) == [0, 0, 3] and kept(ensemble=0.5) == [3, 0, 0]
  assert kept(begin=8) == [1, 1, 1]


# A policy of bigrams, on which a learner compiles quickly.


@dataclasses.dataclass(frozen=True)
class Sizes:
  vocab_size: int = 5
  width: int = 5
  value_head: bool = False


def bigrams() -> Policy:
  missing = dict.fromkeys(Policy._fields)
  hidden = lambda params, tokens, segment_ids: jax.nn.one_hot(tokens, 5)
  return Policy(**missing)._replace(
    config=Sizes(),
    hidden=hidden,
    unembed=lambda params, hidden: hidden @ params['table'],
    readout=lambda params: params,
    labels=lambda params: jax.tree.map(lambda _: 'train', params),
  )


def first_state(objective, anchors, optimizer) -> TrainState:
  zero = jnp.int32(0)
  params = {'table': jnp.asarray(np.random.default_rng(0).normal(size=(5, 5)), jnp.float32)}
  return TrainState(
    **dict.fromkeys(('step', 'phase', 'phase_step', 'update', 'cursor', 'skipped'), zero),
    params=params,
    opt_state=optimizer.init(params),
    anchors={name: params for name in anchors},
    **dict.fromkeys(('collect_state', 'credit_state'), ()),
    objective_state=objective.init(),
  )


def pairs_of_tokens() -> Batch:
  rng = np.random.default_rng(1)
  mask = np.arange(6)[None] < rng.integers(3, 7, (8, 1))
  mask[:, 0] = False
  return Batch(
    tokens=jnp.asarray(rng.integers(0, 5, (8, 6)), jnp.int32),
    segment_ids=jnp.ones((8, 6), jnp.int32),
    mask=jnp.asarray(mask),
    reference_logp=jnp.full((8, 6), -1.6),
    label=jnp.tile(jnp.array([1.0, 0.0]), 4),
  )


def test_micro_batches_do_not_change_an_update_of_beta_dpo():
  objective = bind(methods.beta_dpo(beta=1.0).objective, TABLE)
  optimizer, batch = optax.sgd(0.1), pairs_of_tokens()
  moved = []
  for micro_batches in (1, 4):
    made = learner.Learner(bigrams(), objective, optimizer, micro_batches=micro_batches)
    state, update = first_state(objective, (), optimizer), jax.jit(made.update)
    for _ in range(2):  # the second one reads the averages of the first
      state, metrics = update(state, batch)
    moved.append((state.params, state.objective_state, metrics['loss']))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), *moved)
  assert float(moved[0][1]['gap_average'][1]) > 0


def test_the_reference_of_humanline_is_the_policy_before_the_last_update():
  """A copy taken after the update would be the policy itself, and all log-ratios would be 0."""
  method = methods.humanline_dpo()
  objective = method.bound()[1]
  optimizer, batch = optax.sgd(0.1), pairs_of_tokens()
  rules = {
    'reference': bind(method.anchors['reference'], optim.ANCHORS),
    'now': lambda anchor, params, step: optim.sync(anchor, params, step, every=1),
    'third': lambda anchor, previous, step: optim.sync_before(anchor, previous, step, every=3),
  }
  made = learner.Learner(bigrams(), objective, optimizer, anchors=rules)
  state, update, path = first_state(objective, rules, optimizer), jax.jit(made.update), []
  for _ in range(4):
    path.append(state)
    state, _ = update(state, batch)
  same = lambda a, b: np.array_equal(a['table'], b['table'])
  assert same(path[0].anchors['reference'], path[0].params)
  for before, after in itertools.pairwise(path):
    assert not same(before.params, after.params)
    assert same(after.anchors['reference'], before.params)
    assert same(after.anchors['now'], after.params)
  assert same(path[3].anchors['third'], path[2].params)
  assert same(state.anchors['third'], path[2].params)


class TestFieldsOfRecords:
  def test_numbers_are_those_of_both_rows(self):
    records = [{'id': 4, 'similarity': 0.5}, {'id': 5, 'similarity': 1}]
    found = pair_fields.numbers(records, {'similarity': 'similarity'})
    np.testing.assert_array_equal(found['similarity'], np.float32([0.5, 0.5, 1, 1]))

  @pytest.mark.parametrize(
    ('record', 'words'),
    [
      ({'similarit': 1.0}, "record 4: there is no 'similarity' here"),
      ({'similarity': 'high'}, "record 4: similarity must be a finite number, got 'high'"),
      ({'similarity': float('nan')}, 'record 4: similarity must be a finite number'),
    ],
  )
  def test_a_missing_number_is_named(self, record, words):
    with pytest.raises(Unusable, match=words):
      pair_fields.numbers([{'id': 4, **record}], {'similarity': 'similarity'})

  MASK = np.array([[False, True, True, True], [False, True, True, False]])

  def test_weights_lie_at_the_trained_tokens(self):
    records = [{'id': 0, 'chosen_weights': [2.5, 1.5]}]
    weights = pair_fields.token_weights(records, self.MASK, cut=False)
    np.testing.assert_array_equal(weights, [[1, 2.5, 1.5, 1], [1, 1, 1, 1]])
    records = [{'id': 0, 'rejected_weights': [2, 3, 4, 5]}]
    weights = pair_fields.token_weights(records, self.MASK, cut=True)
    np.testing.assert_array_equal(weights, [[1, 1, 1, 1], [1, 2, 3, 1]])

  def test_a_list_of_another_length_is_named(self):
    for found in ([1.0], [1.0] * 4):
      with pytest.raises(Unusable, match=r'record 0: chosen_weights has . numbers, but .* 3 tok'):
        pair_fields.token_weights([{'id': 0, 'chosen_weights': found}], self.MASK, cut=False)
    with pytest.raises(Unusable, match='rejected_weights must be a list'):
      pair_fields.token_weights([{'id': 0, 'rejected_weights': 2}], self.MASK, cut=False)


class TestSelfConsistency:
  """CREAM's pairs and labels: two groups of four rows of one token, and reference_logp = -1."""

  NOW = np.array([1.0, 3.0, 2.0, -1.0, 0.5, 0.1, 0.2, 0.9])
  BEFORE = np.array([1.0, 2.0, 3.0, -2.0, 0.1, 0.5, 0.4, 0.0])

  ASSIGN: typing.ClassVar = {
    average: jax.jit(functools.partial(credit.assign, credit.self_consistency(average=average)))
    for average in (True, False)
  }

  def credited(self, now=NOW, before=BEFORE, valid=None, **knobs):
    ones = np.ones((8, 1))
    batch = Batch(
      tokens=ones.astype(int),
      segment_ids=ones.astype(int),
      mask=ones > 0,
      valid=np.ones(8, bool) if valid is None else valid,
      group_ids=np.repeat([0, 1], 4),
      reference_logp=-ones,
      proximal_logp=now[:, None] - 1,
    ).with_arrays(previous_logp=before[:, None] - 1)
    return self.ASSIGN[knobs.get('average', True)](batch, ())[0]

  def test_the_best_and_the_worst_row_are_a_pair_and_the_label_is_the_agreement(self):
    found = self.credited(average=False)
    np.testing.assert_array_equal(found['pair_side'], [0, 1, 0, -1, 0, -1, 0, 1])
    np.testing.assert_array_equal(found.mask[:, 0], np.abs(found['pair_side']) > 0)
    taus = [stats.kendalltau(self.NOW[i], self.BEFORE[i])[0] for i in (slice(0, 4), slice(4, 8))]
    np.testing.assert_allclose(found.label[::4], [(t + 1) / 2 for t in taus], rtol=1e-6)
    np.testing.assert_allclose(self.credited().label, np.full(8, found.label[::4].mean()))

  def test_rows_that_failed_are_neither_ranked_nor_chosen(self):
    valid = np.arange(8) != 1
    found = self.credited(valid=valid, average=False)
    np.testing.assert_array_equal(found['pair_side'], [0, 0, 1, -1, 0, -1, 0, 1])
    tau = stats.kendalltau(self.NOW[[0, 2, 3]], self.BEFORE[[0, 2, 3]])[0]
    np.testing.assert_allclose(found.label[0], (tau + 1) / 2, rtol=1e-6)

  def test_a_policy_that_is_the_reference_is_ranked_by_its_log_probs(self):
    """At the start all log-ratios are 0; the two policies then agree."""
    zero = np.zeros(8)
    assert not self.credited(zero, zero).mask.any()  # all log-probs are equal here
    batch = self.credited(self.NOW, zero, average=False)
    np.testing.assert_allclose(
      batch.label[0], 0.5 * (1 + stats.kendalltau(self.NOW[:4], range(4))[0])
    )
