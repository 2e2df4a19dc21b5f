"""The gradient through the solution of an inner problem agrees with finite differences."""

import jax
import jax.numpy as jnp
import numpy as np

from polgrad.tabular.bilevel import hypergradient

ARMS, FEATURES, ENTROPY = 4, 3, 0.7
RANDOM = np.random.default_rng(0)
X, LABELS = RANDOM.normal(size=(ARMS, FEATURES)), RANDOM.normal(size=ARMS)
NU = RANDOM.normal(size=FEATURES)


def lower(nu, logits):
  """Reward of the policy with an entropy bonus."""
  log_pi = jax.nn.log_softmax(logits)
  return jnp.exp(log_pi) @ (X @ nu - ENTROPY * log_pi)


def solve(nu):
  return X @ nu / ENTROPY


def upper(nu, logits):
  """Cross-entropy of preferences, on pairs that the policy samples."""
  pi, rewards = jax.nn.softmax(logits), X @ nu
  target = jax.nn.sigmoid(LABELS[:, None] - LABELS[None, :])
  margin = rewards[:, None] - rewards[None, :]
  losses = -target * jax.nn.log_sigmoid(margin) - (1 - target) * jax.nn.log_sigmoid(-margin)
  return pi @ losses @ pi


def test_direct_and_implicit_terms_together_are_the_gradient(x64):
  nu = jnp.asarray(NU)
  value, found = jax.jit(hypergradient(upper, lower, solve))(nu)
  whole = jax.jit(lambda nu: upper(nu, solve(nu)))
  steps = 1e-5 * np.eye(FEATURES)
  differences = [(whole(nu + d) - whole(nu - d)) / 2e-5 for d in steps]
  assert value == whole(nu)
  np.testing.assert_allclose(found, differences, atol=1e-8)
  # What usual reinforcement learning from feedback follows is another direction.
  direct = jax.jit(jax.grad(upper))(nu, solve(nu))
  assert np.max(np.abs(direct - found)) > 0.02


def test_damping_and_trees(x64):
  tree = {'w': jnp.asarray(NU)}
  own = lambda f: lambda nu, theta: f(nu['w'], theta['logits'])
  inner = lambda nu: {'logits': solve(nu['w'])}
  found = jax.jit(
    lambda damping: hypergradient(own(upper), own(lower), inner, damping=damping)(tree)[1]['w']
  )
  exact = jax.jit(hypergradient(upper, lower, solve))(tree['w'])[1]
  np.testing.assert_allclose(found(0.0), exact, atol=1e-10)
  np.testing.assert_allclose(found(1e-6), exact, atol=1e-5)
  # A large damping leaves the direct term.
  np.testing.assert_allclose(
    found(1e9), jax.jit(jax.grad(upper))(tree['w'], solve(tree['w'])), atol=1e-8
  )
