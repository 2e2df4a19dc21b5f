"""Advantages: published numbers, exact zeros, groups as data, least variance."""

import functools
import inspect
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import registry
from polgrad.losses import advantages, baselines, difficulty, logit_stats, strata

R8 = np.array([1.0, 1, 0, 0, 0, 0, 0, 1], np.float32)
ONE_GROUP = np.zeros(8, np.int32)
ALL = np.ones(8, bool)


@pytest.mark.parametrize(
  ('fn', 'knobs', 'high', 'low'),
  [
    (advantages.group_normalized, dict(ddof=1), 1.20761, -0.72457),
    (advantages.group_normalized, dict(ddof=0), 1.29099, -0.77460),
    (advantages.leave_one_out, {}, 0.71429, -0.42857),
    (advantages.group_mean, {}, 0.625, -0.375),
  ],
)
def test_published_numbers_of_eight_binary_rewards(fn, knobs, high, low):
  got = fn(R8, ONE_GROUP, ALL, **knobs)
  np.testing.assert_allclose(got, np.where(R8 == 1, high, low), atol=1e-5)
  np.testing.assert_allclose(jnp.sum(got), 0, atol=1e-5)


CENTERED = [fn for fn in advantages.TABLE.values() if fn is not advantages.raw]
OF_THE_BATCH = (
  *(advantages.batch_mean, advantages.batch_normalized),
  *(baselines.sampled_baseline, baselines.tracked_baseline),
)
GROUPED = [fn for fn in CENTERED if fn not in OF_THE_BATCH]
ABSOLUTE = (
  baselines.nonzero_mean,
  advantages.pass_at_k,
  difficulty.two_sided,
)  # not of differences of rewards alone
SCALED = (
  baselines.informative_mean,
  baselines.nonzero_mean,
  advantages.batch_scaled,
  difficulty.beta_normalized,
  difficulty.two_sided,
)  # by a factor of the whole batch

RNG = np.random.default_rng(0)
LENGTHS = np.array([2, 5, 1, 4, 3, 5, 2, 4])
MASK = np.arange(5) < LENGTHS[:, None]
TOKENS = dict(uniform=RNG.uniform(size=8), mask=MASK, score_norm=RNG.uniform(0, 2, size=(8, 5)))
TOKENS |= dict(stratum_term=np.array([0.0, 1, 0, 1, 0, 0, 1, 0]))
TOKENS |= dict(mode_term=np.array([0.0, 1, 0, 1, 0, 1, 1, 0]))


def run(fn, rewards, group_ids, valid, rows=slice(8)):
  """Calls a function by the names of its inputs; other completions got the best valid reward."""
  arrays = {k: jnp.asarray(x)[rows][: len(rewards)] for k, x in TOKENS.items()}
  arrays |= dict(rewards=jnp.asarray(rewards), group_ids=group_ids, valid=valid)
  best = jnp.max(jnp.where(valid, arrays['rewards'], -jnp.inf))
  arrays['baseline_rewards'] = jnp.full((len(rewards), 2), best)
  arrays['tracked_value'] = jnp.full(len(rewards), 0.25)
  return registry.call(fn, arrays)


@pytest.mark.parametrize('fn', CENTERED)
@pytest.mark.parametrize('reward', [0.1, 1 / 3, 1e6 + 0.1, -7.7])
@pytest.mark.parametrize('size', [3, 7])
def test_equal_rewards_give_exactly_zero_in_float32(fn, reward, size):
  rewards = jnp.full(size, reward, jnp.float32)
  got = run(fn, rewards, jnp.zeros(size, jnp.int32), jnp.ones(size, bool))
  np.testing.assert_array_equal(got, np.zeros(size))


@pytest.mark.parametrize('ddof', [0, 1])
def test_equal_rewards_give_exactly_zero_without_eps(ddof):
  rewards = jnp.full(3, 0.1, jnp.float32)
  args = rewards, jnp.zeros(3, jnp.int32), jnp.ones(3, bool)
  got = advantages.group_normalized(*args, ddof=ddof, eps=0.0)
  np.testing.assert_array_equal(got, np.zeros(3))


@pytest.mark.parametrize('fn', GROUPED)
def test_a_group_of_one_gets_zero(fn):
  rewards = jnp.array([5.0, 1.0, 0.0, 0.0])
  got = run(fn, rewards, jnp.array([0, 1, 1, 1]), jnp.ones(4, bool))
  assert got[0] == 0
  assert np.sum(got[1:] != 0) >= 1  # some functions drop bad rows, or credit the best one alone


def test_equal_advantages_are_whitened_to_exactly_zero():
  mask = jnp.array([[True, True, False], [True, False, True]])
  for value in (0.1, 1e6 + 0.1):
    got = advantages.whiten(jnp.full((2, 3), value, jnp.float32), mask)
    np.testing.assert_array_equal(got, np.zeros((2, 3)))


@pytest.mark.parametrize('fn', [fn for fn in GROUPED if fn not in SCALED])
def test_groups_may_be_scattered_and_uneven(fn):
  """Three interleaved groups of sizes 3, 2 and 1 give what each gives alone."""
  rewards = jnp.array([0.3, 1.0, -2.0, 0.5, 4.0, 0.9])
  groups = np.array([5, 0, 5, 0, 9, 5])
  together = run(fn, rewards, jnp.asarray(groups), jnp.ones(6, bool))
  for group in np.unique(groups):
    at = np.flatnonzero(groups == group)
    alone = run(fn, rewards[at], jnp.zeros(len(at), jnp.int32), jnp.ones(len(at), bool), rows=at)
    np.testing.assert_allclose(together[at], alone, rtol=1e-6)


@pytest.mark.parametrize('fn', CENTERED)
def test_invalid_rows_leave_the_statistics(fn):
  rewards = jnp.array([0.3, 1.0, np.nan, -2.0])
  valid = jnp.array([True, True, False, True])
  got = run(fn, rewards, jnp.zeros(4, jnp.int32), valid)
  kept = jnp.array([0, 1, 3])
  without = run(fn, rewards[kept], jnp.zeros(3, jnp.int32), jnp.ones(3, bool), rows=kept)
  np.testing.assert_allclose(got[kept], without, rtol=1e-6)
  assert got[2] == 0


def test_leave_one_out_is_the_group_mean_times_g_over_g_minus_one():
  rng = np.random.default_rng(0)
  args = rng.normal(size=6).astype(np.float32), np.zeros(6, np.int32), np.ones(6, bool)
  expected = 6 / 5 * advantages.group_mean(*args)
  np.testing.assert_allclose(advantages.leave_one_out(*args), expected, rtol=1e-6)


def test_group_normalized_ignores_positive_affine_maps():
  args = ONE_GROUP, ALL
  got = advantages.group_normalized(3 * R8 - 2, *args, eps=0.0)
  np.testing.assert_allclose(got, advantages.group_normalized(R8, *args, eps=0.0), rtol=1e-5)


@pytest.mark.parametrize('fn', [fn for fn in CENTERED if fn not in ABSOLUTE])
def test_a_constant_added_to_every_reward_changes_nothing(fn):
  np.testing.assert_allclose(
    run(fn, R8 + 3, ONE_GROUP, ALL), run(fn, R8, ONE_GROUP, ALL), rtol=1e-6, atol=1e-6
  )


@pytest.mark.parametrize(
  ('right', 'k', 'high', 'low'),
  [
    *((1, 4, 1.0, -0.14286), (2, 4, 0.52223, -0.17408), (3, 2, 0.74536, -0.44721)),
    *((4, 4, 0.12039, -0.12039), (5, 4, 0, 0), (0, 4, 0, 0), (8, 4, 0, 0), (1, 9, 0, 0)),
  ],
)
def test_pass_at_k_of_eight_binary_rewards(right, k, high, low):
  rewards = (jnp.arange(8) < right).astype(jnp.float32)
  got = advantages.pass_at_k(rewards, ONE_GROUP, ALL, k=k)
  np.testing.assert_allclose(got, np.where(np.arange(8) < right, high, low), atol=1e-5)


def by_subsets(right, k, eps=1e-6):
  """The mean normalised advantage of the subsets of k rows that a row is in."""
  subsets = list(itertools.combinations(range(len(right)), k))
  passed = np.array([right[list(rows)].max() for rows in subsets])
  advantage = (passed - passed.mean()) / (passed.std() + eps)
  return [advantage[[i in rows for rows in subsets]].mean() for i in range(len(right))]


@pytest.mark.parametrize('k', [1, 2, 3])
def test_pass_at_k_is_the_mean_over_subsets_in_scattered_groups_of_traced_sizes(k, x64):
  rng = np.random.default_rng(0)
  groups = rng.choice(3, size=24, p=[0.5, 0.3, 0.2])
  valid, rewards = rng.uniform(size=24) < 0.8, rng.choice([0.0, 1.0], size=24, p=[0.7, 0.3])
  got = jax.jit(functools.partial(advantages.pass_at_k, k=k))(rewards, groups, valid)
  expected = np.zeros(24)
  for group in np.unique(groups):
    at = np.flatnonzero((groups == group) & valid)
    expected[at] = by_subsets(rewards[at], k)
  assert np.any(expected != 0)
  np.testing.assert_allclose(got, expected, atol=1e-9)
  if k == 1:
    plain = advantages.group_normalized(rewards, groups, valid, ddof=0)
    np.testing.assert_allclose(got, plain, atol=1e-12)


def test_pass_at_k_counts_a_reward_as_right_from_its_least_on():
  args = jnp.array([0.4, 0.5, 0.0, 0.1]), *ONE_ROW
  got = advantages.pass_at_k(*args, least=0.5)
  np.testing.assert_allclose(got, advantages.pass_at_k(jnp.array([0.0, 1, 0, 0]), *ONE_ROW))


def test_pass_at_no_rows_is_refused():
  with pytest.raises(ValueError, match='at least 1'):
    advantages.pass_at_k(R8, ONE_GROUP, ALL, k=0)


def test_reinforce_plus_plus_baseline_on_two_groups():
  rewards = jnp.array([1.0, 0, 0, 1, 1, 1, 1, 0])
  groups = jnp.array([0, 0, 0, 0, 1, 1, 1, 1])
  centered = advantages.group_mean(rewards, groups, jnp.ones(8, bool))
  got = advantages.whiten(centered[:, None], jnp.ones((8, 1), bool))
  expected = np.array([1, -1, -1, 1, 0.5, 0.5, 0.5, -1.5])
  np.testing.assert_allclose(got[:, 0], expected * 0.5 / np.std(expected / 2, ddof=1), rtol=1e-5)


def test_whitening_counts_tokens_not_rows():
  mask = jnp.array([[True, False, False], [True, True, True]])
  got = advantages.whiten(jnp.array([[0.5] * 3, [-0.5] * 3]), mask)
  np.testing.assert_allclose(got, [[1.5, 0, 0], [-0.5, -0.5, -0.5]], rtol=1e-5)


@pytest.mark.parametrize(
  ('p', 'size', 'expected'),
  [
    *((0.1, 4, 0.1521), (0.1, 8, 0.2095), (0.1, 64, 0.2929), (0.3, 4, 0.3433), (0.3, 8, 0.4122)),
    *((0.3, 64, 0.4539), (0.5, 4, 0.4040), (0.5, 8, 0.4639), (0.5, 64, 0.4960)),
  ],
)
def test_the_expected_step_of_grpo_on_binary_rewards(p, size, expected, x64):
  """E[A grad log pi] = c_G(p) / (p (1 - p)) grad p, by enumerating the number of successes."""
  got = 0.0
  for k in range(size + 1):
    rewards = (jnp.arange(size) < k).astype(float)
    ids, valid = jnp.zeros(size, jnp.int32), jnp.ones(size, bool)
    a = advantages.group_normalized(rewards, ids, valid, ddof=0, eps=0.0)
    score = rewards / p - (1 - rewards) / (1 - p)
    got += math.comb(size, k) * p**k * (1 - p) ** (size - k) * jnp.mean(a * score)
  np.testing.assert_allclose(got * p * (1 - p), expected, atol=5e-5)


ONE_RIGHT = jnp.array([1.0, 0, 0, 0])
ONE_ROW = jnp.zeros(4, jnp.int32), jnp.ones(4, bool)


def test_exponential_weights_have_the_published_numbers():
  derived = baselines.exponential_group_mean(ONE_RIGHT, *ONE_ROW)
  np.testing.assert_allclose(derived, [1.1106, *[-0.3702] * 3], atol=5e-5)
  assert jnp.sum(derived) == pytest.approx(0, abs=1e-6)
  implemented = baselines.exponential_times_advantage(ONE_RIGHT, *ONE_ROW)
  assert jnp.sum(implemented) == pytest.approx(1.0036, abs=5e-5)


@pytest.mark.parametrize(
  'fn', [baselines.exponential_group_mean, baselines.exponential_times_advantage]
)
def test_exponential_weights_tend_to_the_group_mean_and_stay_finite(fn):
  np.testing.assert_allclose(
    fn(R8, ONE_GROUP, ALL, temperature=1e6), advantages.group_mean(R8, ONE_GROUP, ALL), rtol=1e-5
  )
  assert np.all(np.isfinite(fn(1e4 * R8, ONE_GROUP, ALL, temperature=1e-3)))


def test_the_two_factors_of_gpg_differ():
  rewards = jnp.array([1.0, 0, 0, 0, 1, 1, 1, 1])
  groups = jnp.array([0, 0, 0, 0, 1, 1, 1, 1])
  plain = advantages.group_mean(rewards, groups, jnp.ones(8, bool))
  paper = baselines.informative_mean(rewards, groups, jnp.ones(8, bool))
  code = baselines.nonzero_mean(rewards, groups, jnp.ones(8, bool))
  np.testing.assert_allclose(paper, 2 * plain, rtol=1e-6)
  np.testing.assert_allclose(code, 1.6 * plain, rtol=1e-6)


@pytest.mark.parametrize('fn', SCALED)
def test_nothing_informative_gives_zero_instead_of_a_division_by_zero(fn):
  np.testing.assert_array_equal(fn(jnp.zeros(8), ONE_GROUP, ALL), np.zeros(8))
  np.testing.assert_array_equal(fn(R8, ONE_GROUP, ~ALL), np.zeros(8))


def test_the_length_weighted_advantage_sums_to_zero_over_tokens():
  groups = jnp.array([0, 1, 0, 1, 1, 0, 0, 1])
  got = baselines.length_weighted(R8, MASK, groups, ALL)
  for group in (0, 1):
    assert np.sum((LENGTHS * got)[groups == group]) == pytest.approx(0, abs=1e-6)
  equal = baselines.length_weighted(R8, np.ones((8, 3), bool), groups, ALL)
  np.testing.assert_allclose(equal, advantages.group_mean(R8, groups, ALL), atol=1e-6)


def balanced_by_hand(rewards, groups, uniform):
  out = np.zeros(len(rewards))
  for group in np.unique(groups):
    at = np.flatnonzero(groups == group)
    above = [i for i in at if rewards[i] >= rewards[at].mean()]
    below = sorted((i for i in at if i not in above), key=lambda i: uniform[i])
    kept = above + below[: len(above)]
    out[kept] = rewards[kept] - rewards[kept].mean()
  return out


@pytest.mark.parametrize('seed', range(4))
def test_balancing_drops_only_the_surplus_of_bad_rows_at_random(seed):
  rng = np.random.default_rng(seed)
  rewards = rng.exponential(size=20).astype(np.float32)  # most lie below the mean
  groups, uniform = rng.integers(0, 3, size=20), rng.uniform(size=20).astype(np.float32)
  got = baselines.balanced_group_mean(rewards, groups, np.ones(20, bool), uniform)
  np.testing.assert_allclose(got, balanced_by_hand(rewards, groups, uniform), atol=1e-6)
  assert np.any(got == 0)


def test_balancing_keeps_bad_rows_while_they_are_the_fewer():
  uniform = TOKENS['uniform']
  got = baselines.balanced_group_mean(-R8, ONE_GROUP, ALL, uniform)
  np.testing.assert_array_equal(got, advantages.group_mean(-R8, ONE_GROUP, ALL))


def test_the_gradient_weighted_baseline_has_the_least_variance(x64):
  """Enumerated: a row per arm, whose token statistic carries the probability of the arm."""
  logits, rewards = jnp.array([1.0, 0.2, -0.5, -1.0]), jnp.array([1.0, 0.5, 0.0, 2.0])
  pi = jax.nn.softmax(logits)
  norms = logit_stats.score_norm(jnp.broadcast_to(logits, (4, 4)), jnp.arange(4))
  weighted = baselines.gradient_weighted(
    rewards, (pi * norms)[:, None], jnp.ones((4, 1), bool), *ONE_ROW
  )
  best = rewards - weighted
  np.testing.assert_allclose(best, [0.739991] * 4, atol=1e-6)

  def variance(baseline):
    gradient = (rewards - baseline)[:, None] * (jnp.eye(4) - pi[None, :])
    return pi @ jnp.sum(gradient**2, axis=1) - jnp.sum((pi @ gradient) ** 2)

  got = [variance(b) for b in (0.0, pi @ rewards, best[0])]
  np.testing.assert_allclose(got, [0.548638, 0.218490, 0.213844], atol=1e-6)
  assert jax.grad(variance)(best[0]) == pytest.approx(0, abs=1e-12)


def test_the_optimal_token_baseline_weighs_by_the_score_so_far():
  """Weights 0.4, 1.3, 1.32 against 1, 1, 1 of a row without reward."""
  pi, square = np.array([0.5, 0.2, 0.9]), np.array([0.4, 0.3, 0.82])
  norms = jnp.array([1 - 2 * pi + square, [1.0, 0, 0]])
  got = baselines.optimal_token_baseline(
    jnp.array([[1.0] * 3, [0.0] * 3]),
    norms,
    jnp.ones((2, 3), bool),
    jnp.zeros(2, jnp.int32),
    jnp.ones(2, bool),
  )
  weight = np.array([0.4, 1.3, 1.32])
  np.testing.assert_allclose(got, [1 / (1 + weight), -weight / (1 + weight)], rtol=1e-5)


def test_a_token_without_company_has_no_baseline_or_is_its_own():
  """A group of one, and the tail of the longest row; equal returns are exactly zero."""
  mask = jnp.array([[True, True, True], [True, True, False], [True, True, True]])
  args = jnp.full((3, 3), 0.7), mask, jnp.array([0, 0, 1]), jnp.ones(3, bool)
  reward = jnp.array([[0.1, 0.2, 5.0], [0.3, -0.2, 0.0], [3.0, 4.0, 5.0]])
  got = baselines.optimal_token_baseline(reward, *args, lone_baseline=True)
  assert np.array_equal(got != 0, [[True, True, False], [True, True, False], [False] * 3])
  # In the first columns the two rows of the first group weigh the same, so b is their mean.
  expected = [[-0.1, 0.2, 5.0], [0.1, -0.2, 0.0], [3.0, 4.0, 5.0]]
  np.testing.assert_allclose(
    baselines.optimal_token_baseline(reward, *args), expected, rtol=1e-5, atol=1e-7
  )
  equal = jnp.full((3, 3), 1e6 + 0.1)
  equal = baselines.optimal_token_baseline(equal, *args, lone_baseline=True)
  np.testing.assert_array_equal(equal, np.zeros((3, 3)))


def test_a_batch_scale_ranks_prompts_by_the_spread_of_their_rewards():
  """A group whose rewards hardly differ is not enlarged, as it is by its own standard deviation."""
  rewards = jnp.array([1.0, 1.0, 1.0, 0.9, 1.0, 0.0, 1.0, 0.0])
  ids, valid = jnp.repeat(jnp.arange(2), 4), jnp.ones(8, bool)
  spread = lambda fn: np.abs(fn(rewards, ids, valid)).reshape(2, 4).max(1)
  assert spread(advantages.group_normalized)[0] > 1
  narrow, wide = spread(advantages.batch_scaled)
  np.testing.assert_allclose(wide / narrow, 0.5 / 0.075, rtol=1e-5)


def test_the_scale_of_a_row_does_not_depend_on_its_own_reward():
  ids, valid = jnp.zeros(5, jnp.int32), jnp.ones(5, bool)
  rewards = jnp.array([0.3, 1.0, -0.4, 0.2, 0.9])
  others = np.asarray(rewards[1:], float)
  for own in (0.3, 2.0, -7.0):
    got = advantages.leave_one_out_normalized(rewards.at[0].set(own), ids, valid, eps=0.0)
    np.testing.assert_allclose(got[0], (own - others.mean()) / others.std(ddof=1), rtol=1e-5)


# What holds for which advantages, of sixteen rows in four groups: a constant added to the rewards of a
# group changes nothing; neither does a positive factor; the sum over each group is 0.
SHIFT, SCALE, ZERO = 'shift', 'scale', 'zero'
HOLDS = {
  advantages.raw: set(),
  advantages.group_mean: {SHIFT, ZERO},
  advantages.group_normalized: {SHIFT, SCALE, ZERO},
  advantages.batch_scaled: {ZERO},
  advantages.leave_one_out: {SHIFT, ZERO},
  advantages.leave_one_out_normalized: {SHIFT, SCALE},
  advantages.pass_at_k: {ZERO},
  advantages.batch_mean: set(),
  advantages.batch_normalized: set(),
  baselines.sampled_baseline: set(),
  baselines.length_weighted: {SHIFT},
  baselines.gradient_weighted: {SHIFT},
  baselines.informative_mean: {SHIFT, ZERO},
  baselines.nonzero_mean: {ZERO},
  baselines.tracked_baseline: set(),
  baselines.token_normalized: {SHIFT, SCALE},
  baselines.balanced_group_mean: {SHIFT, ZERO},
  baselines.exponential_group_mean: {SHIFT, ZERO},
  baselines.exponential_times_advantage: {SHIFT},
  difficulty.beta_normalized: {ZERO},
  difficulty.two_sided: {ZERO},
  difficulty.max_at_k: {SHIFT},
  difficulty.best_only: {SHIFT},
  strata.stratified: {SHIFT, SCALE, ZERO},
  strata.mode_choice: {SCALE},
}


@pytest.mark.parametrize('fn', advantages.TABLE.values(), ids=lambda fn: fn.__name__)
def test_which_changes_of_rewards_change_which_advantages(fn, x64):
  rng = np.random.default_rng(1)
  rewards = rng.choice([0.0, 0.5, 1.0, 2.0], size=16)
  rewards[:4] = [1.0, 0.9, 0.9, 1.0]  # 'on' is hardly better than 'off'
  group = np.repeat(np.arange(4), 4)
  arrays = dict(
    group_ids=group,
    valid=np.ones(16, bool),
    uniform=rng.uniform(size=16),
    mask=np.arange(5) < rng.integers(1, 6, 16)[:, None],
    score_norm=rng.uniform(0, 2, size=(16, 5)),
    stratum_term=np.tile([0.0, 1.0, 1.0, 0.0], 4),
    mode_term=np.tile([1.0, 0.0, 0.0, 1.0], 4),
    baseline_rewards=rng.uniform(size=(16, 2)),
    tracked_value=rng.uniform(size=16),
  )
  exact = {'eps': 0.0} if 'eps' in inspect.signature(fn).parameters else {}

  def of(rewards):
    return np.asarray(registry.call(functools.partial(fn, **exact), arrays | {'rewards': rewards}))

  a, factor, shift = of(rewards), rng.uniform(0.3, 3, 4)[group], rng.uniform(0.5, 3, 4)[group]
  close = lambda x, y: np.allclose(x, y, rtol=1e-6, atol=1e-9)
  found = {
    SHIFT: close(of(rewards + shift), a),
    SCALE: close(of(factor * rewards), a),
    ZERO: close(a.reshape(4, 4).sum(axis=1), 0),
  }
  assert {name for name, holds in found.items() if holds} == HOLDS[fn]


@pytest.mark.parametrize(
  ('fn', 'factor'),
  [
    (advantages.raw, 1),
    (advantages.group_mean, 2 / 3),
    (advantages.leave_one_out, 1),
    (advantages.batch_mean, 2 / 3),
    (baselines.sampled_baseline, 1),
    (functools.partial(difficulty.max_at_k, k=1), 1),
  ],
)
def test_the_expected_gradient_on_a_bandit_is_a_known_part_of_the_true_one(fn, factor, x64):
  """All groups of three draws of three arms."""
  rewards, logits = jnp.array([0.1, 0.7, 0.4]), jnp.array([0.2, -0.1, 0.5])
  pi = jax.nn.softmax(logits)
  draws = jnp.array(list(itertools.product(range(3), repeat=3)))
  fixed = dict(group_ids=jnp.zeros(3, int), valid=jnp.ones(3, bool))
  fixed['baseline_rewards'] = jnp.full((3, 2), 0.3)
  a = jax.vmap(lambda rows: registry.call(fn, fixed | {'rewards': rewards[rows]}))(draws)
  scores = jax.nn.one_hot(draws, 3) - pi[None, None]
  got = jnp.einsum('d,di,dia->a', jnp.prod(pi[draws], axis=1), a / 3, scores)
  np.testing.assert_allclose(got, factor * pi * (rewards - pi @ rewards), atol=1e-9)
