"""Preferences between images of a diffusion model, from its denoising errors (call it yourself).

polgrad has no diffusion policy: the errors are those of your own model. The error of a sample is the
mean squared difference between the noise that was added to it and the noise that the model predicts, at
a random time. A small error means a large likelihood.
"""

import chex
import jax
import jax.numpy as jnp

from polgrad.registry import Positive
from polgrad.types import Array


def odds(error: Array, *, scale: Positive = 0.5) -> Array:
  """s e / (exp(s e) - 1): the odds of a sample with the likelihood exp(-s e), times s e
  (arXiv:2406.06424).

  It falls from 1 at e = 0 towards 0.

  Args:
    error: [...], e, at least 0.
    scale: s, a signal-to-noise ratio.

  Returns:
    [...].
  """
  x = scale * error
  near = jnp.abs(x) < 1e-3  # where exp(x) - 1 has no digits left
  safe = jnp.where(near, 1.0, x)
  far = -safe * jnp.exp(-safe) / jnp.expm1(-safe)  # exp(x) would overflow, and its gradient be NaN
  return jnp.where(near, 1 - x / 2 + jnp.square(x) / 12, far)


def mapo(
  chosen_error: Array,
  rejected_error: Array,
  *,
  beta: float = 0.1,
  scale: Positive = 0.5,
  temperature: Positive = 1000.0,
) -> Array:
  """e_w - beta log sigmoid(T (g(e_w) - g(e_l))), g the `odds`: MaPO (arXiv:2406.06424).

  There is no reference model. The first term is the usual loss of the chosen image; ORPO has the same
  two terms for text. The published loss is the mean over pairs.

  Args:
    chosen_error: [...], e_w.
    rejected_error: [...], e_l, of the same noise and time.
    beta: weight of the preference.
    scale: s in g.
    temperature: T; the authors take the number of time steps of the noise.

  Returns:
    [...].
  """
  chex.assert_equal_shape([chosen_error, rejected_error])
  gap = odds(chosen_error, scale=scale) - odds(rejected_error, scale=scale)
  return chosen_error + beta * jax.nn.softplus(-temperature * gap)
