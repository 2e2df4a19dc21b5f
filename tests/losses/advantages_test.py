"""Advantages and returns: published numbers, exact zeros, groups as data, holes in rows."""

import jax.numpy as jnp
import numpy as np
import pytest

from polgrad.losses import advantages, returns

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


GROUPED = [
  fn
  for fn in advantages.TABLE.values()
  if fn not in (advantages.raw, advantages.batch_mean, advantages.batch_normalized)
]
CENTERED = [fn for fn in advantages.TABLE.values() if fn is not advantages.raw]


@pytest.mark.parametrize('fn', CENTERED)
@pytest.mark.parametrize('reward', [0.1, 1 / 3, 1e6 + 0.1, -7.7])
@pytest.mark.parametrize('size', [3, 7])
def test_trap_21_equal_rewards_give_exactly_zero_in_float32(fn, reward, size):
  rewards = jnp.full(size, reward, jnp.float32)
  got = fn(rewards, jnp.zeros(size, jnp.int32), jnp.ones(size, bool))
  np.testing.assert_array_equal(got, np.zeros(size))


@pytest.mark.parametrize('ddof', [0, 1])
def test_trap_21_equal_rewards_give_exactly_zero_without_eps(ddof):
  rewards = jnp.full(3, 0.1, jnp.float32)
  args = rewards, jnp.zeros(3, jnp.int32), jnp.ones(3, bool)
  got = advantages.group_normalized(*args, ddof=ddof, eps=0.0)
  np.testing.assert_array_equal(got, np.zeros(3))


@pytest.mark.parametrize('fn', GROUPED)
def test_trap_21_a_group_of_one_gets_zero(fn):
  rewards = jnp.array([5.0, 1.0, 0.0])
  got = fn(rewards, jnp.array([0, 1, 1]), jnp.ones(3, bool))
  assert got[0] == 0
  assert np.all(got[1:] != 0)


def test_trap_21_equal_advantages_are_whitened_to_exactly_zero():
  mask = jnp.array([[True, True, False], [True, False, True]])
  for value in (0.1, 1e6 + 0.1):
    got = advantages.whiten(jnp.full((2, 3), value, jnp.float32), mask)
    np.testing.assert_array_equal(got, np.zeros((2, 3)))


@pytest.mark.parametrize('fn', GROUPED)
def test_trap_20_groups_may_be_scattered_and_uneven(fn):
  """Three interleaved groups of sizes 3, 2 and 1 give what each gives alone."""
  rewards = jnp.array([0.3, 1.0, -2.0, 0.5, 4.0, 0.9])
  groups = np.array([5, 0, 5, 0, 9, 5])
  together = fn(rewards, jnp.asarray(groups), jnp.ones(6, bool))
  for group in np.unique(groups):
    at = np.flatnonzero(groups == group)
    alone = fn(rewards[at], jnp.zeros(len(at), jnp.int32), jnp.ones(len(at), bool))
    np.testing.assert_allclose(together[at], alone, rtol=1e-6)


@pytest.mark.parametrize('fn', CENTERED)
def test_invalid_rows_leave_the_statistics(fn):
  rewards = jnp.array([0.3, 1.0, np.nan, -2.0])
  valid = jnp.array([True, True, False, True])
  got = fn(rewards, jnp.zeros(4, jnp.int32), valid)
  kept = jnp.array([0, 1, 3])
  np.testing.assert_allclose(
    got[kept], fn(rewards[kept], jnp.zeros(3, jnp.int32), jnp.ones(3, bool)), rtol=1e-6
  )
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


@pytest.mark.parametrize('fn', CENTERED)
def test_a_constant_added_to_every_reward_changes_nothing(fn):
  np.testing.assert_allclose(
    fn(R8 + 3, ONE_GROUP, ALL), fn(R8, ONE_GROUP, ALL), rtol=1e-6, atol=1e-6
  )


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


REWARDS = jnp.array([[0.0, 0, 0, 1, 0]])
VALUES = jnp.array([[0.5, 0.4, 0.9, 0.6, 0.3]])
HOLES = jnp.array([[True, True, False, True, False]])


def test_gae_skips_a_hole_in_the_middle():
  got = returns.gae(REWARDS, VALUES, HOLES, discount=0.9, trace=0.8)
  np.testing.assert_allclose(got, [[0.16816, 0.428, 0, 0.4, 0]], atol=1e-6)


def test_gae_with_full_trace_is_the_return_minus_the_value():
  got = returns.gae(REWARDS, VALUES, HOLES, discount=0.9, trace=1.0)
  expected = returns.reward_to_go(REWARDS, HOLES, discount=0.9) - jnp.where(HOLES, VALUES, 0)
  np.testing.assert_allclose(got, expected, atol=1e-6)


def test_gae_without_trace_is_the_one_step_error():
  got = returns.gae(REWARDS, VALUES, HOLES, discount=0.9, trace=0.0)
  expected = [[0.9 * 0.4 - 0.5, 0.9 * 0.6 - 0.4, 0, 1 - 0.6, 0]]
  np.testing.assert_allclose(got, expected, atol=1e-6)


def insert_holes(x, at, junk):
  return jnp.asarray(np.insert(np.asarray(x), at, junk, axis=-1))


@pytest.mark.parametrize('at', [[0, 0], [1, 3], [0, 4], [4, 4]])
def test_trap_17_masked_tokens_anywhere_leave_the_others_alone(at):
  rng = np.random.default_rng(0)
  rewards, values = rng.normal(size=(2, 3, 4)).astype(np.float32)
  mask = np.ones((3, 4), bool)
  rewards2, values2 = insert_holes(rewards, at, np.nan), insert_holes(values, at, 1e9)
  mask2 = insert_holes(mask, at, False)
  for fn, plain, holed in (
    (returns.reward_to_go, (rewards, mask), (rewards2, mask2)),
    (returns.gae, (rewards, values, mask), (rewards2, values2, mask2)),
  ):
    got = fn(*holed, discount=0.9)
    np.testing.assert_array_equal(got[mask2].reshape(3, 4), fn(*plain, discount=0.9))
    np.testing.assert_array_equal(got[~mask2], 0)


def test_the_reward_of_a_row_lands_on_its_last_token():
  mask = jnp.array([[True, False, True, False], [False] * 4, [False, True, True, True]])
  got = returns.place_last(jnp.array([2.0, 3.0, 4.0]), mask)
  np.testing.assert_array_equal(got, [[0, 0, 2, 0], [0, 0, 0, 0], [0, 0, 0, 4]])


def test_an_undiscounted_terminal_reward_reaches_every_token():
  mask = jnp.array([[True, False, True, True]])
  got = returns.reward_to_go(returns.place_last(jnp.array([2.5]), mask), mask)
  np.testing.assert_array_equal(got, [[2.5, 0, 2.5, 2.5]])
