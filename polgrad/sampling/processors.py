"""What happens to logits before a token is drawn: f32[..., V] -> f32[..., V], -inf never drawn."""

import jax
import jax.numpy as jnp

Array = jax.Array


def temperature(logits: Array, *, value: float = 1.0) -> Array:
  """logits / value."""
  return logits / value


def top_k(logits: Array, *, k: int = 50) -> Array:
  """Keeps the k most likely tokens, and all that tie with the last of them (arXiv:1805.04833)."""
  kth = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
  return jnp.where(logits >= kth, logits, -jnp.inf)


def top_p(logits: Array, *, p: float = 0.95) -> Array:
  """Keeps the smallest set of most likely tokens with mass at least p (arXiv:1904.09751).

  At least one token stays; tokens that tie with the last one stay too.
  """
  ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
  probs = jax.nn.softmax(ordered, axis=-1)
  before = jnp.cumsum(probs, axis=-1) - probs  # the mass of strictly better ranks
  least = jnp.min(jnp.where(before < p, ordered, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(logits >= least, logits, -jnp.inf)
