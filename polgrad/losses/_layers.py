"""Small multi-layer perceptrons as nested dicts of arrays."""

import jax
import jax.numpy as jnp

from polgrad.types import Array, Params


def layer(key: Array, inputs: int, outputs: int) -> Params:
  """Random weights f32[inputs, outputs] with the variance 2 / inputs, and biases of zero."""
  weight = jax.random.normal(key, (inputs, outputs), jnp.float32) * (2 / inputs) ** 0.5
  return {'weight': weight, 'bias': jnp.zeros(outputs, jnp.float32)}


def layers(key: Array, *sizes: int) -> Params:
  """The layers of a perceptron, {'0': ..., '1': ...}; `sizes` are its widths from input to output."""
  keys = jax.random.split(key, len(sizes) - 1)
  return {str(i): layer(k, *sizes[i : i + 2]) for i, k in enumerate(keys)}


def linear(params: Params, x: Array) -> Array:
  """x W + b, [..., inputs] -> [..., outputs]."""
  out = x @ params['weight']
  return out + jnp.broadcast_to(params['bias'], out.shape)


def mlp(params: Params, x: Array) -> Array:
  """All layers, with a leaky ReLU of slope 0.2 between them."""
  for i in range(len(params)):
    x = linear(params[str(i)], jax.nn.leaky_relu(x, 0.2) if i else x)
  return x
