"""Losses of a pair from its margin z (chosen minus rejected, beta and offsets inside).

A link l is soft-labelled as p l(z) + (1 - p) l(-z), p the probability that the first row is the
better one. p = 1 - eps is conservative DPO; p = (1 - eps)/(1 - 2 eps) > 1 is robust DPO
(arXiv:2403.00409), so labels are not confined to [0, 1]. Labels are data.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from polgrad.registry import table
from polgrad.types import Array


def logistic(margin: Array, label: Array) -> Array:
  """l(z) = log(1 + exp(-z)): Bradley-Terry, DPO (arXiv:2305.18290).

  The minimiser is z = log(p / (1 - p)) for p in (0, 1).

  Args:
    margin: [...].
    label: [...].

  Returns:
    [...].
  """
  chex.assert_equal_shape([margin, label])
  return label * jax.nn.softplus(-margin) + (1 - label) * jax.nn.softplus(margin)


def squared(margin: Array, label: Array, *, target: float = 1.0) -> Array:
  """l(z) = (target - z)^2: IPO (arXiv:2310.12036).

  IPO with temperature tau on the log-ratio margin h is target = 1/(2 tau) at z = h, or 4 tau^2
  times that: target = 1 at z = 2 tau h. The minimiser is z = (2 p - 1) target. IPO sums token
  log-ratios; some code bases average them.

  Args:
    margin: [...].
    label: [...].
    target: where a margin with p = 1 should stand.

  Returns:
    [...].
  """
  chex.assert_equal_shape([margin, label])
  return label * jnp.square(target - margin) + (1 - label) * jnp.square(target + margin)


def hinge(margin: Array, label: Array, *, threshold: float = 1.0) -> Array:
  """l(z) = max(0, threshold - z): SLiC-HF (arXiv:2305.10425).

  Args:
    margin: [...].
    label: [...].
    threshold: the margin beyond which a pair with p = 1 is left alone.

  Returns:
    [...].
  """
  chex.assert_equal_shape([margin, label])
  return label * jax.nn.relu(threshold - margin) + (1 - label) * jax.nn.relu(threshold + margin)


TABLE = table('preference_losses', logistic, squared, hinge)
Part = Annotated[Callable, TABLE]
