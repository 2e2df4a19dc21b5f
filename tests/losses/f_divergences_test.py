"""Generators and costs: what they multiply the score with is the gradient of their divergence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad.losses import f_divergences, reward_penalties

TARGET = np.exp([0.1, 0.9, -0.4, 0.3]) / np.sum(np.exp([0.1, 0.9, -0.4, 0.3]))
LOGITS = np.array([0.5, -0.2, 0.2, 0.0])


def kl(p, q):
  return jnp.sum(p * jnp.log(p / q))


def chi_square(p, q):
  return jnp.sum(p**2 / q) - 1


# generator -> (divergence of policy and target, its value)
DIVERGENCES = {
  f_divergences.forward_kl: (lambda pi, p: kl(p, pi), 0.230892),
  f_divergences.reverse_kl: (lambda pi, p: kl(pi, p), 0.215777),
  f_divergences.jensen_shannon: (
    lambda pi, p: kl(pi, (pi + p) / 2) + kl(p, (pi + p) / 2),
    0.108604,
  ),
  f_divergences.total_variation: (lambda pi, p: jnp.sum(jnp.abs(pi - p)) / 2, 0.294210),
  f_divergences.forward_chi_square: (lambda pi, p: chi_square(p, pi), 0.551322),
  f_divergences.reverse_chi_square: (lambda pi, p: chi_square(pi, p), 0.447592),
}


@pytest.mark.parametrize('fn', f_divergences.TABLE.values(), ids=lambda fn: fn.__name__)
def test_generator_times_score_is_the_gradient_of_the_divergence(fn, x64):
  divergence, value = DIVERGENCES[fn]
  logits = jnp.asarray(LOGITS)
  exact = lambda z: divergence(jax.nn.softmax(z), TARGET)
  np.testing.assert_allclose(exact(logits), value, atol=1e-6)
  pi = jax.nn.softmax(logits)
  expected = jax.grad(exact)(logits)
  got = (pi * fn(jnp.log(pi / TARGET))) @ (jnp.eye(4) - pi[None, :])
  np.testing.assert_allclose(got, expected, atol=1e-12)


@pytest.mark.parametrize('fn', f_divergences.TABLE.values(), ids=lambda fn: fn.__name__)
def test_generators_increase_with_the_ratio_and_stay_finite(fn):
  got = fn(jnp.array([-jnp.inf, -1e3, -20.0, -1.0, 0.0, 1.0, 20.0, 1e3, jnp.inf]))
  assert np.all(np.isfinite(got))
  assert np.all(np.diff(got) >= 0)
  assert got[3] < got[5]


BANDIT = jnp.array([0.5, -0.3, 0.1])
REFERENCE = jnp.array([0.2, 0.5, 0.3])


def test_half_the_gradient_of_chi_square_is_cost_times_score(x64):
  pi = jax.nn.softmax(jnp.asarray(BANDIT, jnp.float64))
  cost = reward_penalties.chi_square(jnp.log(pi / np.array(REFERENCE, np.float64)), limit=1e6)
  assert pi @ cost == pytest.approx(0.536099, abs=1e-6)
  gradient = 2 * (pi * cost) @ (jnp.eye(3) - pi[None, :])
  np.testing.assert_allclose(gradient, [0.776338, -0.471506, -0.304832], atol=1e-6)


def test_the_gradient_of_root_chi_square_is_cost_times_score(x64):
  """Ten samples in exactly the frequencies of the policy."""
  counts, reference = np.array([5, 3, 2]), np.array([0.2, 0.5, 0.3])
  pi, arms = counts / 10, np.repeat(np.arange(3), counts)
  exact = lambda z: jnp.sqrt(chi_square(jax.nn.softmax(z), reference))
  cost = reward_penalties.root_chi_square(
    jnp.log(pi / reference)[arms], jnp.ones(10, bool), limit=1e6
  )
  got = jnp.mean(cost[:, None] * (np.eye(3) - pi)[arms], axis=0)
  np.testing.assert_allclose(got, jax.grad(exact)(jnp.log(pi)), atol=1e-12)


def test_a_policy_that_agrees_with_the_reference_pays_nothing():
  zeros, valid = jnp.zeros(4), jnp.ones(4, bool)
  np.testing.assert_array_equal(reward_penalties.chi_square(zeros), zeros)
  np.testing.assert_array_equal(reward_penalties.root_chi_square(zeros, valid), zeros)
  np.testing.assert_array_equal(reward_penalties.root_chi_square(zeros + 1, ~valid), zeros)


def test_the_ratio_of_a_row_is_clipped_on_both_sides():
  far = jnp.array([-50.0, 0.0, 50.0])
  np.testing.assert_allclose(reward_penalties.chi_square(far, limit=4.0), [-0.75, 0, 3], rtol=1e-6)
  np.testing.assert_allclose(
    reward_penalties.root_chi_square(far, jnp.ones(3, bool), limit=4.0),
    np.array([-0.75, 0, 3]) / np.sqrt(2 * 9 / 4 / 3),
    rtol=1e-6,
  )
