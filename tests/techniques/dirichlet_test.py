"""The Dirichlet policy: against SciPy, by its moments, and its gradient on a known reward."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from polgrad.techniques.dirichlet_policy import (
  concentration,
  draw,
  entropy,
  explored_log_prob,
  log_prob,
  policy_loss,
)

ALPHA = np.array([[1.5, 2.0, 4.0], [1.0, 1.0, 1.0]])
ACTION = np.array([[0.2, 0.3, 0.5], [0.7, 0.2, 0.1]])


def test_density_and_entropy_are_those_of_scipy():
  known = [scipy.stats.dirichlet(a) for a in ALPHA]
  with jax.enable_x64(True):
    own = [k.logpdf(x) for k, x in zip(known, ACTION)]
    np.testing.assert_allclose(log_prob(jnp.asarray(ACTION), jnp.asarray(ALPHA)), own, rtol=1e-12)
    np.testing.assert_allclose(
      entropy(jnp.asarray(ALPHA)), [k.entropy() for k in known], rtol=1e-10
    )
    uniform = scipy.stats.dirichlet(np.ones(3)).logpdf(ACTION.T)
    for eps, expected in (
      (0.0, own),
      (0.3, np.log(0.7 * np.exp(own) + 0.3 * np.exp(uniform))),
      (1.0, uniform),
    ):
      found = explored_log_prob(jnp.asarray(ACTION), jnp.asarray(ALPHA), eps=eps)
      np.testing.assert_allclose(found, expected, rtol=1e-6)
    z = np.array([-2.0, 0.0, 3.0])
    np.testing.assert_allclose(concentration(jnp.asarray(z)), 1 + np.log1p(np.exp(z)), rtol=1e-12)
    # One latent state leaves nothing to choose.
    np.testing.assert_allclose(log_prob(jnp.ones((1, 1)), jnp.full((1, 1), 2.5)), 0, atol=1e-12)


def test_draws_have_the_mean_of_the_mixture_and_the_loss_its_gradient():
  n, eps = 20000, 0.4
  alpha = jnp.asarray(np.broadcast_to(ALPHA[0], (n, 3)), jnp.float32)
  found = np.asarray(draw(jax.random.key(1), alpha, eps=eps))
  mean = ALPHA[0] / ALPHA[0].sum()
  np.testing.assert_allclose(found.mean(0), (1 - eps) * mean + eps / 3, atol=0.006)
  # E[a_3 grad log p] is the gradient of the mean of a_3; the mean of the reward is its baseline.
  action = draw(jax.random.key(2), alpha, eps=0.0)
  advantages = action[:, 2] - mean[2]
  loss = lambda a: policy_loss(
    action, jnp.broadcast_to(a, (n, 3)), advantages, entropy_coefficient=0
  )
  gradient = -jax.grad(lambda a: loss(a[None]))(alpha[0])
  exact = jax.grad(lambda a: a[2] / jnp.sum(a))(alpha[0])
  np.testing.assert_allclose(gradient, exact, atol=0.004)
  bonus = lambda a: policy_loss(action[:1], a[None], jnp.zeros(1), entropy_coefficient=0.5)
  np.testing.assert_allclose(
    jax.grad(bonus)(alpha[0]), -0.5 * jax.grad(lambda a: entropy(a))(alpha[0]), rtol=1e-6
  )
