"""Weighted likelihoods: their gradients in closed form."""

import jax
import jax.numpy as jnp
import numpy as np

from polgrad.losses import weights


def test_probability_weighting_descends_the_negative_probability(x64):
  logits = jnp.array([0.3, -1.0, 0.8])

  def weighted(x):
    logp = jax.nn.log_softmax(x)[1]
    return -weights.probability(logp) * logp

  expected = jax.grad(lambda x: -jax.nn.softmax(x)[1])(logits)
  np.testing.assert_allclose(jax.grad(weighted)(logits), expected, atol=1e-15)
