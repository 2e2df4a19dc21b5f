"""Rotary positions (arXiv:2104.09864): pairs of features are rotated by angles that grow with position.

A model of longer contexts rotates more slowly, see `stretch`."""

import jax
import jax.numpy as jnp

Array = jax.Array


def frequencies(head_dim: int, theta: float) -> Array:
  """theta^(-2i / head_dim) for each pair i of features, in radians per token; f32[head_dim / 2]."""
  return theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)


def stretch(
  frequency: Array, *, factor: float, low: float, high: float, original_length: int
) -> Array:
  """Frequencies for a context `factor` times as long (Llama 3.1, arXiv:2407.21783).

  The frequency of a pair that turns fewer than `low` times in `original_length` tokens is divided by
  `factor`. A pair that turns more than `high` times keeps its frequency. In between, the result is
  interpolated linearly in the number of turns. With original_length = 0 all frequencies are divided by
  `factor`, which is linear interpolation of positions (arXiv:2306.15595); factor = 1 changes nothing.
  """
  turns = original_length * frequency / (2 * jnp.pi)
  kept = jnp.clip((turns - low) / (high - low), 0, 1)
  return kept * frequency + (1 - kept) * frequency / factor


def turns(positions: Array, frequency: Array) -> tuple[Array, Array]:
  """Cosines and sines of the angles: i32[B, T], f32[head_dim / 2] -> two f32[B, T, head_dim / 2]."""
  angles = positions[..., None].astype(jnp.float32) * frequency[None, None]
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, turns: tuple[Array, Array]) -> Array:
  """Rotates the pairs (i, i + head_dim / 2) of the last axis of x [B, T, heads, head_dim]."""
  cos, sin = (t[:, :, None] for t in turns)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
