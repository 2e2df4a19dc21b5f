"""Curricula: the laws of their states, the numbers of their papers, and what a step draws."""

import itertools
from math import comb

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import curricula
from polgrad.curricula import trackers
from polgrad.curricula.base import Counts, Observed, Request

SIZE = 12
RECORDS = [
  {'category': 'abc'[i % 3], 'difficulty': float(i), 'return': i / 11, 'rate': i / 11}
  for i in range(SIZE)
]


def embed(records):
  """Three numbers of a record."""
  return np.array([[1.0, r['difficulty'] % 2, r['return']] for r in records], np.float32)


ALL = {
  'epochs': curricula.epochs(),
  'uniform': curricula.uniform(),
  'mixed': curricula.mixed(weights={'a': 1.0, 'c': 3.0}),
  'vade': curricula.vade(decay_all=1.0),
  'spo': curricula.spo(),
  'spo_from_rates': curricula.spo(rate_field='rate'),
  'spo_of_drift': curricula.spo(slow_decay=0.96),
  'window': curricula.window(),
  'target': curricula.target(),
  'budget': curricula.budget(),
  'v0': curricula.v0(embed=embed, context=4, memory=8, features=2, updates=1),
  'stages': curricula.stages(number=3, steps=2),
  'sec': curricula.sec(),
  'revisit': curricula.revisit(capacity=3),
  'returns': curricula.returns(),
}
ALL['v0'] = ALL['v0']._replace(update=jax.jit(ALL['v0'].update))  # one compilation for all tests
every = pytest.mark.parametrize('name', ALL)
learning = pytest.mark.parametrize('name', [n for n, one in ALL.items() if one.reads])


def asked(count=4, **changes):
  return Request(
    **{'count': count, 'size': SIZE, 'cursor': 8, 'seed': 0, 'records': RECORDS} | changes
  )


def seen(rows, rewards, valid=None, magnitudes=None):
  """What a step observes in which every row was sampled and trained on."""
  rows = np.asarray(rows, np.int32)
  valid = np.ones(len(rows), bool) if valid is None else np.asarray(valid)
  rewards = np.asarray(rewards, np.float32)
  magnitudes = rewards if magnitudes is None else np.asarray(magnitudes, np.float32)
  drift = (0.002 * (rows % 7)).astype(np.float32)
  found = embed([RECORDS[row % SIZE] for row in rows]).reshape(-1, 3)
  return Observed(rows, rewards, valid, {'exact': rewards}, rows, magnitudes, valid, drift, found)


STEP = seen([3, 3, 5, 5, 0, 0], [1, 0, 1, 1, 0, 0])
NEXT = seen([3, 3, 1, 1, 7, 7], [1, 1, 0, 1, 0, 0])


def same(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)


@learning
def test_a_step_without_valid_rows_changes_nothing(name):
  one = ALL[name]
  state = one.update(one.init(RECORDS), STEP)
  same(one.update(state, seen([], [])), state)
  same(
    one.update(state, NEXT._replace(valid=NEXT.valid & False, trained_valid=NEXT.valid & False)),
    state,
  )


@learning
def test_two_updates_in_one_jitted_scan_are_two_calls(name):
  one = ALL[name]
  begun = jax.tree.map(jnp.asarray, one.init(RECORDS))
  steps = jax.tree.map(lambda *x: jnp.stack(x), STEP, NEXT)
  scanned = jax.jit(lambda s: jax.lax.scan(lambda s, x: (one.update(s, x), None), s, steps)[0])
  same(scanned(begun), one.update(one.update(begun, STEP), NEXT))


@learning
def test_the_order_of_rows_does_not_matter_and_failed_ones_are_ignored(name):
  one = ALL[name]
  state = one.init(RECORDS)
  order = np.array([4, 1, 0, 5, 3, 2])
  turned = jax.tree.map(lambda x: x[order], STEP)
  same(one.update(state, turned), one.update(state, STEP))
  valid = [True] * 6 + [False] * 2
  rewards = [1, 0, 1, 1, 0, 0, np.nan, 1]
  failed = seen([3, 3, 5, 5, 0, 0, 2, 3], rewards, valid)
  same(one.update(state, failed), one.update(state, STEP))


def test_counts_are_those_of_the_data_rows():
  found = curricula.counts(seen([3, 3, 5, 3], [1, 0.5, -2, 7]), SIZE)
  np.testing.assert_allclose(found.hits, np.eye(SIZE)[3] * 2.5)  # rewards are cut to [0, 1]
  np.testing.assert_allclose(found.total, np.eye(SIZE)[3] * 3 + np.eye(SIZE)[5])
  term = seen([3], [0])._replace(terms={'exact': np.ones(1, np.float32)})
  assert curricula.counts(term, SIZE, 'exact').hits[3] == 1


def test_a_decay_of_one_counts_exactly_and_one_of_zero_remembers_the_last_step_alone():
  one = curricula.spo(decay=1.0)
  state = one.update(one.update(one.init(RECORDS), STEP), NEXT)
  want = np.full(SIZE, 0.5)
  want[[3, 5, 1]] += [3, 2, 1]
  np.testing.assert_allclose(state.alpha, want)
  assert state.beta[3] == 1.5 and state.beta[7] == 2.5 and state.beta[8] == 0.5
  one = curricula.spo(decay=0.0)
  state = one.update(one.update(one.init(RECORDS), STEP), NEXT)
  assert (float(state.alpha[3]), float(state.beta[3])) == (2.0, 0.0)
  assert (float(state.alpha[5]), float(state.beta[5])) == (2.0, 0.0)


@every
def test_rows_are_different_ones_of_the_data_and_depend_on_state_and_cursor_alone(name):
  one = ALL[name]
  state = one.update(one.init(RECORDS), STEP)
  rows = one.propose(state, asked())
  assert len(rows) == 4 and set(rows.tolist()) <= set(range(SIZE))
  if name not in ('returns', 'budget', 'v0'):  # these may draw a row several times
    assert len(set(rows.tolist())) == 4
  np.testing.assert_array_equal(one.propose(state, asked()), rows)
  assert any((one.propose(state, asked(cursor=c)) != rows).any() for c in (12, 16, 20))
  assert len(one.propose(state, asked(count=30))) == 30  # more than there are


# The rows of `epochs` come in a given order, those of `returns` with replacement.
@pytest.mark.parametrize('name', [name for name in ALL if name not in ('epochs', 'returns')])
def test_a_row_that_the_step_has_drawn_comes_again_only_when_no_other_is_left(name):
  one = ALL[name]
  state = one.init(RECORDS)
  first = one.propose(state, asked(count=3)).tolist()
  second = one.propose(state, asked(count=3, cursor=11, taken=tuple(first))).tolist()
  if name != 'stages':  # a stage has four rows
    assert not {*first} & {*second}
  assert one.propose(state, asked(count=2, taken=tuple(range(SIZE)))).shape == (2,)


def test_epochs_hold_every_row_once():
  one = curricula.epochs()
  rows = [one.propose((), asked(count=3, cursor=c)) for c in (0, 3, 6, 9)]
  assert sorted(np.concatenate(rows).tolist()) == list(range(SIZE))
  assert one.propose((), asked(cursor=2, shuffle=False)).tolist() == [2, 3, 4, 5]


def test_weighted_rows_come_as_often_as_their_weights_say():
  weights = np.array([1.0, 2.0, 5.0, 0.0])
  draw = lambda cursor, **how: curricula.drawn(weights, asked(1, size=4, cursor=cursor), **how)
  for how in ({}, {'repeated': True}):
    found = np.bincount([int(draw(c, **how)[0]) for c in range(2000)], minlength=4) / 2000
    np.testing.assert_allclose(found, weights / 8, atol=0.035)
    assert not found[3]
  assert sorted(curricula.drawn(np.zeros(4), asked(4, size=4)).tolist()) == [0, 1, 2, 3]


# SPO.


@pytest.mark.parametrize(
  ('hits', 'want'), [(0, (0.4444, 7.5556)), (4, (4, 4)), (8, (7.5556, 0.4444))]
)
def test_spo_begins_with_earlier_rollouts(hits, want):
  state = curricula.spo(rate_field='rate').init([{'rate': hits / 8}])
  np.testing.assert_allclose([state.alpha[0], state.beta[0]], want, atol=1e-4)


@pytest.mark.parametrize(
  ('decay', 'alpha', 'beta', 'v'), [(0.875, 4.5, 3.5, 0.5625), (0.96, 4.84, 3.84, 0.55760)]
)
def test_spo_after_a_success(decay, alpha, beta, v):
  one = curricula.spo(decay=decay, rate_field='rate')
  begun = trackers.DiscountedBeta(np.full(1, 4.0, np.float32), np.full(1, 4.0, np.float32))
  state = one.update(begun, seen([0], [1]))
  np.testing.assert_allclose([state.alpha[0], state.beta[0]], [alpha, beta], rtol=1e-6)
  np.testing.assert_allclose(trackers.value(state), [v], atol=1e-5)
  # Rows are told the rate from before the update.
  np.testing.assert_allclose(one.features(begun, np.array([0, 0]))['tracked_value'], [0.5, 0.5])


def test_spo_prefers_rows_that_are_solved_half_of_the_time():
  v = np.array([0, 0.1, 0.5, 0.9, 1])
  state = trackers.DiscountedBeta(v, 1 - v)
  weights = np.array([0.05, 0.35, 0.55, 0.35, 0.05])
  one = curricula.spo()
  first = [one.propose(state, asked(1, size=5, cursor=c))[0] for c in range(3000)]
  np.testing.assert_allclose(np.bincount(first) / 3000, weights / weights.sum(), atol=0.03)


def test_the_tracked_rate_of_a_policy_at_rest_has_the_error_of_the_theory():
  """RMSE sqrt((1 - d) / (1 + d) p (1 - p)), of 2000 rows that are all drawn in every step."""
  rows, random = np.arange(2000), np.random.default_rng(0)
  for decay, error in [(0.875, 0.1291), (0.96, 0.0714)]:
    state = trackers.DiscountedBeta(*np.full((2, 2000), 0.5 / (1 - decay)))
    for _ in range(60):
      hits = (random.random(2000) < 0.5).astype(float)
      state = trackers.DiscountedBeta(decay * state.alpha + hits, decay * state.beta + 1 - hits)
    one = curricula.spo(decay=decay)
    after = one.update(state, seen(rows, hits))  # once with the function itself
    np.testing.assert_allclose(after.alpha, decay * state.alpha + hits, rtol=1e-5)
    assert np.sqrt(np.mean((trackers.value(state) - 0.5) ** 2)) == pytest.approx(error, rel=0.05)
    # The variance of R - v: less than that of a leave-one-out baseline of 8 rows with decay 0.875.
    fresh = (random.random(2000) < 0.5) - trackers.value(state)
    want = 0.25 * (1 + (1 - decay) / (1 + decay))
    assert np.mean(fresh**2) == pytest.approx(want, rel=0.05)
    assert decay > 0.9 or (want == pytest.approx(0.26667, abs=1e-5) and want < 0.25 * 8 / 7)


# VADE.


def test_the_score_of_vade_is_largest_at_one_third_and_has_the_means_of_the_beta_law():
  theta = np.linspace(0, 1, 3001)
  score = theta * (1 - theta) ** 2
  assert theta[score.argmax()] == pytest.approx(1 / 3) and score.max() == pytest.approx(4 / 27)
  random = np.random.default_rng(0)
  for (a, b), want in {(1, 1): 0.083333, (3, 6): 0.127273, (9, 1): 0.013636}.items():
    theta = random.beta(a, b, 200_000)
    assert np.mean(theta * (1 - theta) ** 2) == pytest.approx(want, abs=4e-4)
    assert a * b * (b + 1) / ((a + b) * (a + b + 1) * (a + b + 2)) == pytest.approx(want, abs=1e-6)


def test_without_data_vade_forgets_to_its_prior():
  one = curricula.vade(decay_all=0.5)
  state = one.update(one.init(RECORDS), STEP)
  for _ in range(40):
    state = one.update(state, seen([], []))
  np.testing.assert_allclose(state.alpha, 1.0, atol=1e-6)
  np.testing.assert_allclose(state.beta, 1.0, atol=1e-6)


@pytest.mark.parametrize(
  ('one', 'first', 'last'),
  [
    (curricula.uniform(), 0.176, 0.186),
    (curricula.vade(decay=1.0, decay_all=1.0), 0.39, 0.91),
    (curricula.vade(), 0.37, 0.66),
  ],
  ids=['uniform', 'vade', 'vade_that_forgets'],
)
def test_vade_finds_the_prompts_whose_groups_are_informative(one, first, last):
  """2000 prompts: 40% never and 40% always solved; eight completions of 64 prompts in each step."""
  random = np.random.default_rng(0)
  p = np.concatenate([np.zeros(800), np.ones(800), random.uniform(0.2, 0.8, 400)])
  state, found = one.init([{}] * 2000), []
  update = jax.jit(one.update)
  for step in range(200):
    rows = one.propose(state, Request(64, 2000, 64 * step, 0))
    hits = random.binomial(8, p[rows])
    found.append(np.mean((hits > 0) & (hits < 8)))
    rewards = (np.arange(8) < hits[:, None]).reshape(-1)
    state = jax.device_get(update(state, seen(np.repeat(rows, 8), rewards)))
  got = np.mean(found[:50]), np.mean(found[-50:])
  np.testing.assert_allclose(got, [first, last], atol=0.04)


# SEC and other categories.


def test_sec_moves_values_and_probabilities_as_published():
  one = curricula.sec()
  state = one.init(RECORDS)
  for rewards, want in [
    ((0.9, 0.5, 0.1), (0.45, 0.25, 0.05)),
    ((0.8, 0.6, 0.1), (0.625, 0.425, 0.075)),
  ]:
    state = one.update(state, seen([0, 1, 2], np.zeros(3), magnitudes=rewards))
    np.testing.assert_allclose(state.value, want, rtol=1e-6)
  for temperature, want in [
    (1.0, (0.41742, 0.34175, 0.24083)),
    (0.1, (0.87764, 0.11878, 0.00359)),
  ]:
    got = curricula.sec(temperature=temperature).report(state)['probability']
    np.testing.assert_allclose(got, want, atol=1e-5)
  assert one.names(RECORDS) == ('a', 'b', 'c')
  # A category that was not in the step keeps its value.
  after = one.update(state, seen([0], [0.0], magnitudes=[1.0]))
  np.testing.assert_array_equal(after.value[1:], state.value[1:])


def test_categories_are_drawn_by_their_probabilities_and_rows_of_one_differ():
  records = [{'category': 'a' if i < 200 else 'b'} for i in range(1000)]
  one = curricula.mixed(weights={'a': 3, 'b': 1})
  rows = one.propose(one.init(records), Request(100, 1000, 0, 0))
  assert len({*rows.tolist()}) == 100
  assert np.mean(rows < 200) == pytest.approx(0.75, abs=0.1)
  with pytest.raises(ValueError, match=r"the categories are \['a', 'b'\]"):
    curricula.mixed(weights={'c': 1}).init(records)
  with pytest.raises(ValueError, match='weights must be numbers by category'):
    curricula.mixed(weights='a')


@pytest.mark.parametrize('wrong', [np.nan, -1.0, np.inf])
def test_weights_of_rows_that_are_no_weights_are_named(wrong):
  with pytest.raises(ValueError, match=f'row 1 has {wrong}'):
    curricula.drawn([1.0, wrong, 2.0], Request(2, 3, 0, 0))


# Difficulty.


def test_windows_and_targets_are_uniform_where_all_rates_are_equal():
  one, state = curricula.uniform(), trackers.begin(SIZE)
  for other in (curricula.window(), curricula.target(), curricula.window(low=0, high=1)):
    np.testing.assert_array_equal(other.propose(state, asked()), one.propose((), asked()))


def test_a_window_draws_what_lies_in_it_and_a_target_what_is_near():
  v = np.linspace(0, 1, SIZE)
  state = trackers.DiscountedBeta(v, 1 - v)
  rows = curricula.window(low=0.2, high=0.5).propose(state, asked(3))
  assert set(rows.tolist()) <= {3, 4, 5}
  near = curricula.target(rate=0.75, width=0.05)
  first = [int(near.propose(state, asked(1, cursor=c))[0]) for c in range(50)]
  assert {*first} <= {7, 8, 9} and max(first, key=first.count) == 8


@pytest.mark.parametrize(('cumulative', 'least'), [(False, 8), (True, 0)])
def test_stages_go_from_easy_to_hard(cumulative, least):
  one = curricula.stages(number=3, steps=2, cumulative=cumulative)
  state = one.init(RECORDS)
  assert {*one.propose(state, asked(4)).tolist()} == {0, 1, 2, 3}
  for _ in range(9):  # beyond the last stage
    state = one.update(state, STEP)
  found = {int(r) for c in range(20) for r in one.propose(state, asked(4, cursor=c))}
  assert found == set(range(least, SIZE)) and one.report(state) == {'stage': 2.0}
  flat = curricula.stages().init([{'difficulty': 1.0}] * SIZE)
  np.testing.assert_array_equal(
    curricula.stages().propose(flat, asked()), curricula.uniform().propose((), asked())
  )


# Revisited prompts.


def test_revisited_rows_are_those_whose_rewards_differed():
  one = curricula.revisit(new=0.5)
  state = one.update(
    one.init(RECORDS), seen([2] * 8 + [4] * 8 + [5] * 2, [1] * 3 + [0] * 5 + [1] * 10)
  )
  np.testing.assert_allclose(state['priority'], np.eye(SIZE)[2] * 0.234375)
  rows = one.propose(state, asked(4)).tolist()
  assert rows.count(2) == 1 and not {4, 5} & {*rows}  # one row has a priority, the others are new
  never = curricula.revisit(new=1.0)
  state = never.init(RECORDS)
  for step in range(3):  # every row once
    rows = never.propose(state, asked(4, cursor=4 * step))
    state = never.update(state, seen(rows, [1, 0, 1, 0]))
  np.testing.assert_array_equal(state['visits'], 1)


def test_a_full_buffer_keeps_the_largest_priorities():
  one = curricula.revisit(capacity=1)
  state = one.update(one.init(RECORDS), seen([1] * 4 + [2] * 4, [1, 0, 0, 0, 1, 1, 0, 0]))
  np.testing.assert_allclose(state['priority'], np.eye(SIZE)[2] * 0.25)


# Returns of given completions.


def test_returns_weigh_rows_as_published():
  got = curricula.return_weights(np.array([0, 0.5, 1]), np.array([10, 10, 5]), temperature=0.1)
  np.testing.assert_allclose(got, [0.00009, 0.01330, 0.98661], atol=1e-5)
  wide = curricula.return_weights(np.array([0, 0.5, 1]), np.array([10, 10, 5]), temperature=1e9)
  np.testing.assert_allclose(wide, [0.4, 0.4, 0.2], atol=1e-6)
  np.testing.assert_allclose(curricula.return_weights(np.ones(4), np.ones(4)), 0.25)
  returns = np.random.default_rng(0).normal(size=50)
  means = [
    curricula.return_weights(returns, np.ones(50), temperature=t) @ returns
    for t in (2, 1, 0.5, 0.1, 0.01)
  ]
  assert means == sorted(means)
  assert curricula.returns(top=0.25).init(RECORDS).tolist() == [0.0] * 9 + [1.0] * 3
  centred = curricula.returns(baseline_field='return').init(RECORDS)
  np.testing.assert_allclose(centred, 1 / SIZE)


@pytest.mark.parametrize(
  ('one', 'record', 'said'),
  [
    (curricula.sec(), {'prompt': ''}, "record 0: no field 'category', only"),
    (curricula.stages(), {'difficulty': 'hard'}, "'difficulty' is no finite number: 'hard'"),
  ],
)
def test_records_that_lack_what_is_read_are_named(one, record, said):
  with pytest.raises(ValueError, match=said):
    one.init([record])


# Budgets.


def test_the_contrast_of_a_budget_is_the_expected_number_of_wrong_rows_beside_right_ones():
  for p, most in itertools.product((0.05, 0.3, 0.9), (2, 5, 8)):
    want = sum(comb(most, k) * p**k * (1 - p) ** (most - k) * (most - k) for k in range(1, most))
    assert curricula.expected_contrast(np.array([p]), most)[0, most] == pytest.approx(want)
  easy, middle = np.diff(curricula.expected_contrast(np.array([0.9, 0.3]), 8)[:, 1:])
  np.testing.assert_allclose(easy[:3], [0.18, 0.117, 0.1026], atol=1e-5)
  np.testing.assert_allclose(middle[:6], [0.42, 0.651, 0.769, 0.820, 0.835, 0.829], atol=1e-3)


def test_budgets_are_those_of_trying_all():
  random = np.random.default_rng(0)
  for low, high, total in [(0, 4, 7), (1, 3, 6), (2, 4, 8)]:
    gains = random.normal(size=(3, 5))
    tried = [n for n in itertools.product(range(low, high + 1), repeat=3) if sum(n) == total]
    worth = lambda n, gains=gains: sum(gains[i, k] for i, k in enumerate(n))
    got = curricula.allocate_budget(gains, total, low=low, high=high)
    assert got.sum() == total and worth(got) == pytest.approx(max(map(worth, tried)))
  with pytest.raises(ValueError, match='cannot have 13 together'):
    curricula.allocate_budget(np.zeros((3, 5)), 13)


def test_a_greedy_budget_may_be_wrong_because_gains_first_rise():
  gains = curricula.expected_contrast(np.array([0.9, 0.1]), 8)
  greedy = [1, 1]
  for _ in range(6):
    more = [gains[i, greedy[i] + 1] - gains[i, greedy[i]] for i in range(2)]
    greedy[int(np.argmax(more))] += 1
  best = curricula.allocate_budget(gains, 8, low=1)
  worth = lambda n: gains[0, n[0]] + gains[1, n[1]]
  assert worth(best) > worth(greedy)


def test_a_budget_gives_groups_to_rows_that_are_sometimes_solved():
  one = curricula.budget(prompts=0.5, most=4)
  state = trackers.DiscountedBeta(np.array([0.0, 1, 0.1, 1]), np.array([1.0, 0, 0.9, 0]))
  rows = one.propose(state, Request(8, 4, 0, 0, samples_per_prompt=4))
  assert (
    sorted(np.bincount(rows, minlength=4).tolist()) == [1, 1, 2, 4] and rows.tolist().count(2) == 4
  )
  alone = curricula.budget(prompts=1.0, most=4).propose(state, Request(4, 4, 0, 0))
  assert sorted(alone.tolist()) == [0, 1, 2, 3]
  with pytest.raises(ValueError, match='must be at least 1'):
    curricula.budget(prompts=0.2, most=4)


def test_tracker_counts_of_rows_without_history_are_half():
  assert trackers.value(trackers.DiscountedBeta(np.zeros(2), np.zeros(2))).tolist() == [0.5, 0.5]
  assert Counts(1, 2).total == 2
