"""Who samples: the logits f32[..., V] of named parameter sets -> logits of the sampling policy.

The names of the positional arguments are the parameter sets that the role reads (the policy, or an
anchor such as `reference`); the sampler keeps one cache for each.
"""

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from polgrad.registry import table

Array = jax.Array


def current(policy: Array) -> Array:
  """The policy itself."""
  return policy


def greedy(policy: Array) -> Array:
  """All mass on the most likely token (the first of equals)."""
  best = jnp.argmax(policy, axis=-1, keepdims=True)
  return jnp.where(jax.nn.one_hot(best[..., 0], policy.shape[-1], dtype=bool), 0.0, -jnp.inf)


def reference(reference: Array) -> Array:
  """The reference itself."""
  return reference


def geometric_mixture(policy: Array, reference: Array, *, reference_weight: float = 0.5) -> Array:
  """Normalised policy^(1 - w) * reference^w, token by token (Nash-MD, arXiv:2312.00886).

  w = `reference_weight`: 0 is the policy, 1 the reference.
  """
  w = reference_weight
  log_policy, log_reference = jax.nn.log_softmax(policy), jax.nn.log_softmax(reference)
  return jax.nn.log_softmax((1 - w) * log_policy + w * log_reference)


TABLE = table('behavior_policies', current, greedy, reference, geometric_mixture)
Part = Annotated[Callable, TABLE]
