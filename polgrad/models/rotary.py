"""Rotary positions (arXiv:2104.09864), with the frequencies of longer contexts."""

import jax
import jax.numpy as jnp

Array = jax.Array


def frequencies(head_dim: int, theta: float) -> Array:
  """theta^(-2i / head_dim), radians a token, of pair i; f32[head_dim / 2]."""
  return theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)


def stretch(
  frequency: Array, *, factor: float, low: float, high: float, original_length: int
) -> Array:
  """Frequencies for a context `factor` times as long (Llama 3.1, arXiv:2407.21783).

  A pair that turns fewer than `low` times in `original_length` tokens is slowed down by `factor`,
  one that turns more than `high` times stays, and between the two the mixture is linear in the
  number of turns. With original_length = 0 all are slowed down, which is linear interpolation
  (arXiv:2306.15595); factor = 1 changes nothing.
  """
  turns = original_length * frequency / (2 * jnp.pi)
  kept = jnp.clip((turns - low) / (high - low), 0, 1)
  return kept * frequency + (1 - kept) * frequency / factor


def turns(positions: Array, frequency: Array) -> tuple[Array, Array]:
  """i32[B, T], f32[head_dim / 2] -> cosines and sines f32[B, T, head_dim / 2] of the angles."""
  angles = positions[..., None].astype(jnp.float32) * frequency[None, None]
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, turns: tuple[Array, Array]) -> Array:
  """Rotates the pairs (x[i], x[i + head_dim / 2]) of [B, T, heads, head_dim]."""
  cos, sin = (t[:, :, None] for t in turns)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
