"""Which KL gradient an estimator has in expectation, by enumerating a softmax over three tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad.losses import penalties, surrogates

LOGITS = np.array([0.5, -0.3, 0.1])
REFERENCE = np.log([0.2, 0.5, 0.3])
OLD = np.log([0.6, 0.2, 0.2])

REVERSE = np.array([0.291815, -0.232703, -0.059112])  # grad KL(pi || reference)
FORWARD = np.array([0.271776, -0.288017, 0.016241])  # grad KL(reference || pi)
K2_IN_REWARD = np.array([0.054740, 0.024581, -0.079321])  # grad E_pi[delta^2 / 2]


def as_loss(estimator):
  return lambda logp: estimator(logp, REFERENCE)


def as_reward(estimator):
  """The estimator is a cost: a constant that multiplies the score."""

  def loss(logp):
    return surrogates.reinforce(logp, -jax.lax.stop_gradient(estimator(logp, REFERENCE)))

  return loss


def expected_gradient(loss, sampler):
  """Gradient of E_{token ~ sampler}[loss(token)], the sampler held fixed."""
  probabilities = jnp.exp(sampler)
  mean = lambda logits: jnp.sum(probabilities * loss(jax.nn.log_softmax(logits)))
  return jax.grad(mean)(jnp.asarray(LOGITS))


ON_POLICY = {
  'k1 as a loss': (as_loss(penalties.k1), np.zeros(3)),
  'k2 as a loss': (as_loss(penalties.k2), REVERSE),
  'k3 as a loss': (as_loss(penalties.k3), FORWARD),
  'k1 in the reward': (as_reward(penalties.k1), REVERSE),
  'k2 in the reward': (as_reward(penalties.k2), K2_IN_REWARD),
  'k3 in the reward': (as_reward(penalties.k3), REVERSE - FORWARD),
}


def ratio(logp):
  return logp - OLD


OFF_POLICY = {
  'r k1': (lambda logp: penalties.importance_k1(ratio(logp), logp, REFERENCE), REVERSE),
  'r k3': (lambda logp: penalties.importance_k3(ratio(logp), logp, REFERENCE), REVERSE),
  'detached r k2': (
    lambda logp: jax.lax.stop_gradient(jnp.exp(ratio(logp))) * penalties.k2(logp, REFERENCE),
    REVERSE,
  ),
  'detached r k3': (
    lambda logp: jax.lax.stop_gradient(jnp.exp(ratio(logp))) * penalties.k3(logp, REFERENCE),
    FORWARD,
  ),
}


def test_the_two_kl_gradients_are_those_of_the_exact_divergences(x64):
  logits = jnp.asarray(LOGITS)
  log_softmax = jax.nn.log_softmax
  reverse = lambda z: jnp.sum(jax.nn.softmax(z) * (log_softmax(z) - REFERENCE))
  forward = lambda z: jnp.sum(np.exp(REFERENCE) * (REFERENCE - log_softmax(z)))
  np.testing.assert_allclose([reverse(logits), forward(logits)], [0.239642, 0.241597], atol=1e-6)
  np.testing.assert_allclose(jax.grad(reverse)(logits), REVERSE, atol=1e-6)
  np.testing.assert_allclose(jax.grad(forward)(logits), FORWARD, atol=1e-6)


@pytest.mark.parametrize('name', ON_POLICY)
def test_expected_gradient_on_policy(name, x64):
  loss, expected = ON_POLICY[name]
  got = expected_gradient(loss, jax.nn.log_softmax(jnp.asarray(LOGITS)))
  np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize('name', OFF_POLICY)
def test_expected_gradient_off_policy(name, x64):
  loss, expected = OFF_POLICY[name]
  np.testing.assert_allclose(expected_gradient(loss, OLD), expected, atol=2e-6)


def test_k1_and_k3_are_unbiased_values_and_k2_is_not(x64):
  logp = jax.nn.log_softmax(jnp.asarray(LOGITS))
  mean = lambda estimator: float(jnp.sum(jnp.exp(logp) * estimator(logp, REFERENCE)))
  assert mean(penalties.k1) == pytest.approx(0.239642, abs=1e-6)
  assert mean(penalties.k3) == pytest.approx(0.239642, abs=1e-6)
  assert abs(mean(penalties.k2) - 0.239642) > 1e-3


def test_detaching_the_ratio_of_importance_k3_turns_reverse_into_forward(x64):
  """The same value, another algorithm."""
  detached = lambda logp: penalties.importance_k3(
    jax.lax.stop_gradient(ratio(logp)), logp, REFERENCE
  )
  live = lambda logp: penalties.importance_k3(ratio(logp), logp, REFERENCE)
  logp = jax.nn.log_softmax(jnp.asarray(LOGITS))
  np.testing.assert_array_equal(detached(logp), live(logp))
  np.testing.assert_allclose(expected_gradient(detached, OLD), FORWARD, atol=2e-6)
  np.testing.assert_allclose(expected_gradient(live, OLD), REVERSE, atol=2e-6)


def test_a_limit_of_k3_cuts_value_and_gradient_of_tokens_beyond_it():
  """Ten nats, as several code bases have it: reached where the reference is e^2.6 times as likely."""
  logp = jnp.array([-1.0, -5.0])
  loss = lambda logp: jnp.sum(penalties.k3(logp, jnp.array([-1.5, -1.0]), limit=10.0))
  np.testing.assert_allclose(loss(logp), np.exp(-0.5) - 1 + 0.5 + 10, rtol=1e-6)
  np.testing.assert_allclose(jax.grad(loss)(logp), [1 - np.exp(-0.5), 0], rtol=1e-6)
