"""A policy over distributions: actions are points of a simplex, drawn from a Dirichlet distribution.

It is the policy head of CTRLS (arXiv:2507.08182), in which an action says how a chain of thought moves
between K latent states. The state encoder, the transitions and the language model that is conditioned on
them are not here: the paper's text beyond its introduction could not be read.
"""

import chex
import jax
import jax.numpy as jnp

from polgrad.types import Array

sg = jax.lax.stop_gradient


def concentration(outputs: Array) -> Array:
  """softplus(outputs) + 1, [..., K]: above 1, so the density has no pole at the edge of the simplex.

  Confidence: MEMORY.

  >>> print(concentration(jnp.zeros(2)).round(4))
  [1.6931 1.6931]
  """
  return jax.nn.softplus(outputs) + 1


def log_prob(action: Array, alpha: Array) -> Array:
  """Log-density of an action, [..., K] -> [...]: sum_k (alpha_k - 1) log a_k - log B(alpha).

  >>> abs(round(float(log_prob(jnp.array([0.2, 0.8]), jnp.ones(2))), 4))
  0.0
  """
  chex.assert_equal_shape([action, alpha])
  gammaln = jax.scipy.special.gammaln
  norm = jnp.sum(gammaln(alpha), -1) - gammaln(jnp.sum(alpha, -1))
  return jnp.sum((alpha - 1) * jnp.log(action), -1) - norm


def entropy(alpha: Array) -> Array:
  """Differential entropy in nats, [..., K] -> [...]; 0 is that of the uniform density for K = 2.

  >>> abs(round(float(entropy(jnp.ones(2))), 4))
  0.0
  """
  gammaln, digamma = jax.scipy.special.gammaln, jax.scipy.special.digamma
  total = jnp.sum(alpha, -1)
  norm = jnp.sum(gammaln(alpha), -1) - gammaln(total)
  spread = (total - alpha.shape[-1]) * digamma(total)
  return norm + spread - jnp.sum((alpha - 1) * digamma(alpha), -1)


def explored_log_prob(action: Array, alpha: Array, *, eps: float = 0.1) -> Array:
  """log((1 - eps) Dirichlet(alpha) + eps Dirichlet(1)) of an action, [..., K] -> [...].

  This is the density that `draw` samples from, so ratios to it correct for the exploration. It carries
  gradient into alpha.

  Confidence: DERIVED. Whether the paper corrects for its exploration is not known.

  >>> alpha = jnp.array([3.0, 2.0])
  >>> abs(round(float(explored_log_prob(jnp.array([0.5, 0.5]), alpha, eps=1.0)), 4))
  0.0
  """
  uniform = log_prob(action, jnp.ones_like(alpha))
  own = log_prob(action, alpha)
  return jnp.logaddexp(jnp.log1p(-jnp.float32(eps)) + own, jnp.log(jnp.float32(eps)) + uniform)


def draw(key: Array, alpha: Array, *, eps: float = 0.1) -> Array:
  """An action [..., K] of Dirichlet(alpha), or with probability eps a uniform one; without gradient.

  Confidence: MEMORY.

  >>> action = draw(jax.random.key(0), jnp.ones((3, 4)))
  >>> print(action.shape, jnp.allclose(action.sum(-1), 1))
  (3, 4) True
  """
  first, second = jax.random.split(key)
  shape = alpha.shape[:-1]
  explore = jax.random.bernoulli(first, eps, shape)[..., None]
  used = jnp.where(explore, 1, sg(alpha))
  action = jax.random.dirichlet(second, used, shape, dtype=alpha.dtype)
  edge = jnp.finfo(alpha.dtype).tiny
  return jnp.maximum(action, edge)  # its logarithm is finite


def policy_loss(
  action: Array, alpha: Array, advantages: Array, *, entropy_coefficient: float = 0.01
) -> Array:
  """-mean(advantage log p(action) + c H): REINFORCE with an entropy bonus.

  Confidence: MEMORY.

  >>> alpha, action = jnp.ones((2, 2)), jnp.full((2, 2), 0.5)
  >>> abs(float(policy_loss(action, alpha, jnp.array([1.0, -1.0]), entropy_coefficient=0.0)))
  0.0

  Args:
    action: [B, K], from `draw`.
    alpha: [B, K]; carries gradient.
    advantages: [B], of the terminal reward.
    entropy_coefficient: c.
  """
  chex.assert_equal_shape([action, alpha])
  chex.assert_equal_shape_prefix([action, advantages], 1)
  gain = sg(advantages) * log_prob(sg(action), alpha)
  return -jnp.mean(gain + entropy_coefficient * entropy(alpha))
