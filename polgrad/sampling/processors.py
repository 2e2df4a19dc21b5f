"""Processors: functions of logits that reshape a distribution before a token is drawn from it.

Each takes logits f32[..., V] and returns logits f32[..., V]. A token with logit -inf is never drawn.
`make_sampler` applies temperature, then top-k, then top-p.
"""

import jax
import jax.numpy as jnp

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
