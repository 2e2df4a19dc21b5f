"""Returns and off-policy targets: published numbers, reductions, holes in rows."""

import jax.numpy as jnp
import numpy as np
import pytest

from polgrad.losses import returns

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
def test_masked_tokens_anywhere_leave_the_others_alone(at):
  rng = np.random.default_rng(0)
  rewards, values = rng.normal(size=(2, 3, 4)).astype(np.float32)
  mask = np.ones((3, 4), bool)
  rewards2, values2 = insert_holes(rewards, at, np.nan), insert_holes(values, at, 1e9)
  mask2 = insert_holes(mask, at, False)
  log_rho = rng.normal(size=(3, 4)).astype(np.float32)
  off_policy = rewards, values, log_rho, mask
  off_policy2 = rewards2, values2, insert_holes(log_rho, at, np.nan), mask2
  for fn, plain, holed in (
    (returns.reward_to_go, (rewards, mask), (rewards2, mask2)),
    (returns.gae, (rewards, values, mask), (rewards2, values2, mask2)),
    (returns.vtrace_targets, off_policy, off_policy2),
    (returns.vtrace_advantages, off_policy, off_policy2),
    (returns.retrace_targets, off_policy, off_policy2),
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


ON_POLICY = REWARDS, VALUES, jnp.zeros((1, 5)), HOLES
NEVER = REWARDS, VALUES, jnp.full((1, 5), -1e3), HOLES


@pytest.mark.parametrize('trace', [0.0, 0.8, 1.0])
def test_vtrace_on_policy_is_gae(trace):
  knobs = dict(discount=0.9, trace=trace)
  gae = returns.gae(REWARDS, VALUES, HOLES, **knobs)
  np.testing.assert_allclose(returns.vtrace_advantages(*ON_POLICY, **knobs), gae, atol=1e-6)
  targets = jnp.where(HOLES, gae + VALUES, 0)
  np.testing.assert_allclose(returns.vtrace_targets(*ON_POLICY, **knobs), targets, atol=1e-6)


def test_retrace_on_policy_is_the_reward_to_go():
  got = returns.retrace_targets(*ON_POLICY, discount=0.9)
  expected = returns.reward_to_go(REWARDS, HOLES, discount=0.9)
  np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize('args', [ON_POLICY, NEVER])
def test_retrace_cut_off_is_the_one_step_target(args):
  trace = 0.0 if args is ON_POLICY else 1.0
  got = returns.retrace_targets(*args, discount=0.9, trace=trace)
  np.testing.assert_allclose(got, [[0.9 * 0.4, 0.9 * 0.6, 0, 1, 0]], atol=1e-6)


def test_what_the_policy_would_never_do_teaches_vtrace_nothing():
  values = jnp.where(HOLES, VALUES, 0)
  np.testing.assert_allclose(returns.vtrace_targets(*NEVER), values, atol=1e-6)
  np.testing.assert_allclose(returns.vtrace_advantages(*NEVER), jnp.zeros((1, 5)), atol=1e-6)


@pytest.mark.parametrize(('rho_bar', 'expected'), [(1.0, 5 / 6), (2.0, 1.0), (np.inf, 1.3)])
def test_the_clip_of_vtrace_decides_whose_value_is_learnt(rho_bar, expected, x64):
  """One step, three arms: E_mu[target] = V at the value of the policy ~ min(rho_bar mu, pi)."""
  mu, pi, rewards = np.array([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5], [0, 1, 2.0]])
  targets = returns.vtrace_targets(
    jnp.array(rewards)[:, None],
    jnp.full((3, 1), expected),
    jnp.log(pi / mu)[:, None],
    jnp.ones((3, 1), bool),
    rho_bar=rho_bar,
  )
  np.testing.assert_allclose(mu @ targets[:, 0], expected, atol=1e-12)


def test_scores_of_steps_look_ahead_over_holes_and_the_end():
  scores = jnp.array([[1.0, 3.0, 99.0, 7.0, 15.0]])
  got = returns.td_lookahead(scores, HOLES.at[0, 4].set(True), steps=2, rate=0.5)
  np.testing.assert_allclose(got, [[4, 9, 0, 11, 15]])  # 1 looks at 7; 3, 7 and 15 at 15
  same = returns.td_lookahead(scores, HOLES, rate=0.0)
  np.testing.assert_allclose(same, [[1, 3, 0, 7, 0]])
