"""Processors: functions of logits that reshape a distribution before a token is drawn from it.

Each takes logits f32[..., V] and returns logits f32[..., V]. A token with logit -inf is never drawn.
`make_sampler` applies temperature, then the temperature of the token, then top-k, then top-p.

A function of `TABLE` is a temperature of the token: it may differ between the tokens of a row. It may
also read `entropy_levels` f32[3], which the collector measures on the batch before, see
`selections.entropy_levels`; they are 0 in the first step.
"""

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from polgrad.losses import logit_stats, selections
from polgrad.registry import Range, table

Array = jax.Array


def temperature(logits: Array, *, value: float = 1.0) -> Array:
  """logits / value: below 1 sharpens the distribution, above 1 flattens it."""
  return logits / value


def top_k(logits: Array, *, k: int = 50) -> Array:
  """Keeps the k most likely tokens (arXiv:1805.04833).

  Tokens as likely as the k-th are kept too. A k above the size of the vocabulary keeps all.
  """
  kth = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
  return jnp.where(logits >= kth, logits, -jnp.inf)


def top_p(logits: Array, *, p: float = 0.95) -> Array:
  """Keeps the smallest set of most likely tokens with probability at least p (arXiv:1904.09751).

  At least one token is kept. Tokens as likely as the last one in the set are kept too.
  """
  ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
  probs = jax.nn.softmax(ordered, axis=-1)
  # A token belongs to the set if the tokens ranked above it do not reach p yet.
  above = jnp.cumsum(probs, axis=-1) - probs
  least = jnp.min(jnp.where(above < p, ordered, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(logits >= least, logits, -jnp.inf)


def unchanged(logits: Array) -> Array:
  """The logits: all tokens have the same temperature."""
  return logits


def entropy_scaled(
  logits: Array,
  entropy_levels: Array,
  *,
  strength: Annotated[float, Range(at_least=0, below=1)] = 0.05,
) -> Array:
  """logits / (1 + strength clip(h, -1, 1)): HAPO (arXiv:2509.16591).

  h says how far the logarithm of the entropy of softmax(logits) lies above or below a quantile, see
  `selections.scaled_entropy`. So uncertain tokens are sampled at a higher temperature than others.

  Args:
    logits: f32[..., V], already divided by the temperature that all tokens have.
    entropy_levels: f32[3]; zeros change nothing.
    strength: largest relative change of the temperature; 0 changes nothing.
  """
  h = selections.scaled_entropy(logit_stats.entropy(logits), entropy_levels)
  return logits / (1 + strength * jnp.clip(h, -1, 1))[..., None]


TABLE = table('processors', unchanged, entropy_scaled)
Part = Annotated[Callable, TABLE]
