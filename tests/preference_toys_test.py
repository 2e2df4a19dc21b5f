"""Small worlds in which preference learning goes wrong, with the numbers that they are known for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize_scalar

from polgrad import methods


class TestPairsThatDoNotCoverAllResponses:
  """Three responses with logits theta (1, 0, 2), and the data says only that the first beats the second.

  DPO's margin is theta, so theta and the probability of the third response, which the data lacks, grow
  without bound. A KL to the reference or the likelihood of the chosen response stops that.
  """

  def log_pi(self, theta):
    return jax.nn.log_softmax(theta * jnp.array([1.0, 0.0, 2.0]))

  def dpo(self, theta):
    loss, _ = methods.dpo(beta=1.0).loss(
      logp=self.log_pi(theta)[:2, None],
      reference_logp=jnp.full((2, 1), -jnp.log(3.0)),
      label=jnp.array([1.0, 0.0]),
      mask=jnp.ones((2, 1), bool),
    )
    return loss

  def kl(self, theta):
    log_pi = self.log_pi(theta)
    return jnp.sum(jnp.exp(log_pi) * (log_pi + jnp.log(3.0)))

  def nll(self, theta):
    loss, _ = methods.sft().loss(logp=self.log_pi(theta)[:1, None], mask=jnp.ones((1, 1), bool))
    return loss

  def test_dpo_moves_all_mass_to_the_response_that_was_never_seen(self):
    loss, slope = jax.jit(jax.vmap(jax.value_and_grad(self.dpo)))(jnp.array([0.0, 1.0, 5.0, 20.0]))
    assert (slope < 0).all() and (jnp.diff(loss) < 0).all()
    assert np.exp(20 * 2) / np.exp([20, 0, 20 * 2]).sum() > 0.999

  @pytest.mark.parametrize(
    ('term', 'weight', 'theta', 'pi'),
    [
      ('kl', 0.1, 9.9986, None),
      ('kl', 0.5, 1.3218, (0.1993, 0.0531, 0.7475)),
      ('nll', 0.1, 2.321, None),
      ('nll', 0.5, 0.955, (0.2510, 0.0966, 0.6524)),
    ],
  )
  def test_with_a_kl_or_a_likelihood_there_is_an_optimum(self, term, weight, theta, pi):
    with jax.enable_x64(True):
      weights = (weight, 0.0) if term == 'kl' else (0.0, weight)
      loss = functools.partial(total, *weights)
      found = minimize_scalar(loss, bounds=(0, 30), method='bounded', options={'xatol': 1e-6}).x
      np.testing.assert_allclose(found, theta, atol=5e-3)
      if pi:
        logits = found * np.array([1, 0, 2])
        np.testing.assert_allclose(np.exp(logits) / np.exp(logits).sum(), pi, atol=2e-4)


@jax.jit
def total(kl, nll, theta):
  world = TestPairsThatDoNotCoverAllResponses()
  return world.dpo(theta) + kl * world.kl(theta) + nll * world.nll(theta)


ARMS = 100
REWARDS = np.exp(-(((np.arange(ARMS) - 70) / 10) ** 2))  # the best arms are far from the data


def behavior() -> np.ndarray:
  """Histogram of 10,000 draws of tanh(Cauchy(-0.7, 0.4)) over 100 bins of [-1, 1]."""
  draws = np.tanh(-0.7 + 0.4 * np.random.default_rng(0).standard_cauchy(10_000))
  counts, _ = np.histogram(draws, ARMS, (-1, 1))
  return (counts + 0.1) / (counts + 0.1).sum()


def bandit_loss(name, logits, best, worst):
  log_pi = jax.nn.log_softmax(logits)
  mask = jnp.ones((2 * len(best), 1), bool)
  arms = jnp.stack([best, worst], axis=1).ravel()
  if name == 'ipo':  # (h - 10)^2
    return methods.ipo(tau=0.05).loss(
      logp=log_pi[arms][:, None],
      reference_logp=jnp.asarray(np.log(behavior()))[arms][:, None],
      label=jnp.tile(jnp.array([1.0, 0.0]), len(best)),
      mask=mask,
    )[0]
  return methods.sft().loss(logp=log_pi[best][:, None], mask=mask[: len(best)])[0]


@functools.cache
def value(name: str, rounds: int) -> float:
  """E[R] after 200 steps of Adam on the best (and the worst) of 10 samples of 100 contexts.

  One round: all samples are those of the behavior policy. Ten: fresh ones of the policy every 20 steps.
  """
  optimizer, random = optax.adam(0.05), np.random.default_rng(1)

  @jax.jit
  def step(logits, state, best, worst):
    gradient = jax.grad(functools.partial(bandit_loss, name))(logits, best, worst)
    updates, state = optimizer.update(gradient, state)
    return logits + updates, state

  logits = jnp.asarray(np.log(behavior()))
  state = optimizer.init(logits)
  for _ in range(rounds):
    p = np.asarray(jax.nn.softmax(logits), float)
    arms = random.choice(ARMS, (100, 10), p=p / p.sum())
    rows = np.arange(100)
    best, worst = (arms[rows, pick(REWARDS[arms], axis=1)] for pick in (np.argmax, np.argmin))
    for _ in range(200 // rounds):
      logits, state = step(logits, state, best, worst)
  return float(np.asarray(jax.nn.softmax(logits)) @ REWARDS)


class TestOwnSamplesAgainstAFixedDataSet:
  """A bandit whose best arms the data hardly has (arXiv:2404.14367)."""

  @pytest.mark.parametrize('name', ['ipo', 'nll'])
  def test_own_samples_find_the_best_arms_and_fixed_data_does_not(self, name):
    assert behavior() @ REWARDS < 0.1
    assert value(name, 1) < 0.6 and value(name, 10) > 0.9

  def test_with_own_samples_pushing_down_the_worst_is_at_least_as_good(self):
    assert value('ipo', 10) >= value('nll', 10)
