"""A mixture of experts without capacity limits, and its auxiliary-loss-free balance.

Every token goes to the K experts with the highest score s + b, and their outputs are added with
weights from s alone. The bias b only steers the choice: after each update it moves by
u sign(mean load - load), so crowded experts are chosen less (arXiv:2408.15664). No loss is added."""

import jax
import jax.numpy as jnp

from polgrad.sharding import partition_spec

Array = jax.Array


def route(logits: Array, bias: Array, *, k: int, normalize: bool) -> tuple[Array, Array]:
  """The experts of every token and their weights.

  Args:
    logits: f32[N, E]; the scores are softmax(logits).
    bias: f32[E], added to the scores for the choice only.
    k: experts a token.
    normalize: the weights of the chosen experts add up to 1.

  Returns:
    weights f32[N, k] and chosen i32[N, k].
  """
  scores = jax.nn.softmax(logits, axis=-1)
  _, chosen = jax.lax.top_k(jax.lax.stop_gradient(scores) + bias[None], k)
  weights = jnp.take_along_axis(scores, chosen, axis=-1)
  if normalize:
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
  return weights, chosen


def excess(chosen: Array, valid: Array, num_experts: int) -> Array:
  """Tokens of every expert above the mean load, over valid tokens; i32[N, k], bool[N] -> f32[E]."""
  hits = jax.nn.one_hot(chosen, num_experts, dtype=jnp.float32) * valid[:, None, None]
  load = jnp.sum(hits, axis=(0, 1))
  return load - jnp.mean(load)


@jax.custom_vjp
def with_load_gradient(weights: Array, bias: Array, excess: Array) -> Array:
  """`weights` themselves, but the "gradient" of the bias is the excess load.

  So loads leave the model as gradients do, summed over micro-batches and devices, and the bias is
  an ordinary parameter whose update is a sign step (`optim.balanced`). The loss does not matter.
  """
  del bias, excess
  return weights


def _forward(weights, bias, excess):
  del bias
  return weights, excess


def _backward(excess, cotangent):
  return cotangent, excess, jnp.zeros_like(excess)


with_load_gradient.defvjp(_forward, _backward)


def mixture(
  x: Array, weights: Array, chosen: Array, gate: Array, up: Array, down: Array, *, activation
) -> Array:
  """sum_k weight_k down_k(activation(gate_k x) * up_k x), each token through its own experts.

  Tokens are sorted by expert, so that each expert's matrix meets a contiguous block of rows
  (`jax.lax.ragged_dot`); none is dropped.

  Args:
    x: [B, T, D].
    weights: f32[B, T, k].
    chosen: i32[B, T, k].
    gate, up: [E, D, F].
    down: [E, F, D].

  Returns:
    f32[B, T, D]
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return _mixture(x, weights, chosen, gate, up, down, activation=activation, split=())
  # Each device sorts its own rows; the matrices are whole along the width, cut along `mlp`.
  rows = partition_spec(mesh, ('batch', 'length', 'hidden'), x.shape)
  wide = partition_spec(mesh, ('experts', 'hidden', 'mlp'), gate.shape)
  narrow = partition_spec(mesh, ('experts', 'mlp', 'hidden'), down.shape)
  split = wide[2] or ()

  def local(*arrays):
    return _mixture(*arrays, activation=activation, split=split)

  specs = (rows, rows, rows, wide, wide, narrow)
  return jax.shard_map(local, in_specs=specs, out_specs=rows)(x, weights, chosen, gate, up, down)


def _mixture(x, weights, chosen, gate, up, down, *, activation, split):
  k, num_experts = chosen.shape[-1], gate.shape[0]
  order = jnp.argsort(chosen.reshape(-1), stable=True)
  sizes = jnp.bincount(chosen.reshape(-1), length=num_experts).astype(jnp.int32)

  def product(rows, matrices):
    # The TPU's kernel refuses 'highest' for bfloat16, whose products are exact in float32 anyway.
    out = jax.lax.ragged_dot(
      rows,
      matrices.astype(rows.dtype),
      sizes,
      precision='highest' if rows.dtype == jnp.float32 else 'default',
      preferred_element_type=jnp.float32,
    )
    return out.astype(rows.dtype)

  rows = x.reshape(-1, x.shape[-1])[order // k]
  inner = activation(product(rows, gate)) * product(rows, up)
  out = product(inner, down).astype(jnp.float32) * weights.reshape(-1)[order][:, None]
  total = jnp.zeros((x.shape[0] * x.shape[1], x.shape[-1]), jnp.float32).at[order // k].add(out)
  total = jax.lax.psum(total, split) if split else total
  return total.reshape(x.shape)
