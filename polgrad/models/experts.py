"""A mixture of experts, by default without capacity limits, balanced without an auxiliary loss.

Every token goes to the k experts with the highest s + b, where s is the router's score and b a bias of
the expert. The outputs of these experts are added with weights computed from s alone, so the bias only
affects the choice. Each update moves b by u sign(mean load - load), so crowded experts are chosen less
often (arXiv:2408.15664)."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from polgrad.models.quantized import is_quantized, values_of
from polgrad.sharding import mesh_axes, partition_spec

Array = jax.Array


def route(logits: Array, bias: Array, *, k: int, normalize: bool) -> tuple[Array, Array]:
  """Chooses the experts of every token and computes their weights.

  Args:
    logits: f32[N, E], N tokens and E experts; the scores are softmax(logits).
    bias: f32[E], added to the scores for the choice only.
    k: number of experts per token.
    normalize: divide the weights of the chosen experts by their sum.

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
  """Load of each expert minus the mean load, in valid tokens; i32[N, k], bool[N] -> f32[E]."""
  hits = jax.nn.one_hot(chosen, num_experts, dtype=jnp.float32) * valid[:, None, None]
  load = jnp.sum(hits, axis=(0, 1))
  return load - jnp.mean(load)


@jax.custom_vjp
def with_load_gradient(weights: Array, bias: Array, excess: Array) -> Array:
  """Returns `weights`, and reports `excess` as the gradient of the bias, whatever the loss is.

  Loads are thereby summed over micro-batches and devices as gradients are, and the bias is an ordinary
  parameter whose update is a sign step (`optim.balanced`).
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
  x: Array,
  weights: Array,
  chosen: Array,
  gate: Array,
  up: Array,
  down: Array,
  *,
  activation,
  capacity: float = 0.0,
) -> tuple[Array, Array | None]:
  """Sum over the k experts of each token of weight_k down_k(activation(gate_k x) * up_k x).

  Tokens are sorted by expert, so that each expert multiplies a contiguous block of rows
  (`jax.lax.ragged_dot`). Where experts are spread over devices, a device gathers the tokens of all of
  these, multiplies those of the experts that it holds, and the outputs are added up and scattered back.

  Args:
    x: [B, T, D], activations.
    weights: f32[B, T, k], from `route`.
    chosen: i32[B, T, k], from `route`. An entry that is no expert, as of padding, is processed by none.
    gate, up: [E, D, F], matrices of all experts; they may have 8 bits.
    down: [E, F, D].
    activation: function of the gate.
    capacity: 0 drops no token; otherwise an expert processes at most capacity * B * T * k / E tokens, of
      the rows that its device reads, and adds nothing to later ones.

  Returns:
    f32[B, T, D]; and f32[B, T], the number of experts that dropped a token, None without a capacity.
  """
  share = capacity / gate.shape[0]
  run = functools.partial(_mixture, activation=activation, share=share)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return run(x, weights, chosen, gate, up, down)
  # Each device sorts and multiplies rows for its own experts. It gathers activations and matrices along
  # the width. Matrices stay split along `mlp`, except over devices with other tokens, since outputs of
  # different tokens cannot be added up. For the same reason experts are not spread over the positions of
  # a row. `others` are the mesh axes that must not split an axis of the matrices.
  rows = partition_spec(mesh, ('batch', 'length', 'hidden'), x.shape)
  rows = PartitionSpec(*rows[:2], None)
  positions = mesh_axes(rows[1])
  others = {'experts': positions, 'mlp': positions + mesh_axes(rows[0]), 'hidden': mesh.axis_names}

  def place(axes: tuple[str, ...], matrix: Array) -> PartitionSpec:
    def spec(x: Array) -> PartitionSpec:
      pairs = zip(axes, partition_spec(mesh, axes, x.shape), strict=True)
      kept = ([n for n in mesh_axes(e) if n not in others.get(axis, ())] for axis, e in pairs)
      return PartitionSpec(*(tuple(names) or None for names in kept))

    return jax.tree.map(spec, matrix)

  wide, narrow = (
    place(('experts', 'hidden', 'mlp'), gate),
    place(('experts', 'mlp', 'hidden'), down),
  )
  of_values = wide.values if is_quantized(gate) else wide
  spread, split = mesh_axes(of_values[0]), mesh_axes(of_values[2])
  # Devices with other experts have other rows: every device reads the rows of all of them.
  joined = tuple(axis for axis in spread if axis in mesh_axes(rows[0]))
  alike = tuple(axis for axis in spread if axis not in joined)

  def local(x, weights, chosen, gate, up, down):
    gather = lambda x: jax.lax.all_gather(x, joined, axis=0, tiled=True) if joined else x
    x, weights, chosen = map(gather, (x, weights, chosen))
    if alike:
      # Each of them adds to the gradients, which JAX sums only if it is told that they differ.
      x, weights, chosen = (jax.lax.pcast(a, alike, to='varying') for a in (x, weights, chosen))
    first = jax.lax.axis_index(spread) * len(gate) if spread else 0
    total, dropped = run(x, weights, chosen - first, gate, up, down)

    def added(x: Array, axes: tuple[str, ...]) -> Array:
      x = jax.lax.psum(x, axes) if axes else x
      if joined:
        x = jax.lax.psum_scatter(x, joined, scatter_dimension=0, tiled=True)
      return x

    # Devices that split `mlp` have the same experts, and drop the same tokens.
    return added(total, alike + split), jax.tree.map(lambda x: added(x, alike), dropped)

  specs = (rows, rows, rows, wide, wide, narrow)
  out = rows, PartitionSpec(*rows[:2])
  return jax.shard_map(local, in_specs=specs, out_specs=out)(x, weights, chosen, gate, up, down)


def _mixture(x, weights, chosen, gate, up, down, *, activation, share):
  k, num_experts = chosen.shape[-1], len(gate)
  # One entry for each (token, choice), sorted by expert; entry i of a token's list is token i // k. The
  # entries of experts that are elsewhere come last, and are in no block of rows.
  chosen = chosen.reshape(-1)
  chosen = jnp.where((chosen >= 0) & (chosen < num_experts), chosen, num_experts)
  order = jnp.argsort(chosen, stable=True)
  sizes = jnp.bincount(chosen, length=num_experts).astype(jnp.int32)
  dropped = None
  if share:
    # The place of each entry in the queue of its expert; those beyond the capacity are left out.
    most = math.ceil(share * len(chosen))
    begins = jnp.append(jnp.cumsum(sizes) - sizes, -len(chosen))  # of entries elsewhere: beyond
    place = jnp.arange(len(chosen)) - begins[chosen[order]]
    beyond = (place >= most) & (chosen[order] < num_experts)
    dropped = jnp.zeros(len(chosen), jnp.float32).at[order].set(beyond.astype(jnp.float32))
    dropped = jnp.sum(dropped.reshape(*x.shape[:2], k), axis=-1)
    order = order[jnp.argsort(place >= most, stable=True)][: num_experts * most]
    sizes = jnp.minimum(sizes, most)

  expert = jnp.minimum(chosen[order], num_experts - 1)  # of each row; of others, any

  def product(rows, matrices):
    # The TPU kernel rejects 'highest' for bfloat16, whose products are exact in float32 anyway.
    out = jax.lax.ragged_dot(
      rows,
      values_of(matrices, rows.dtype),
      sizes,
      precision='highest' if rows.dtype == jnp.float32 else 'default',
      preferred_element_type=jnp.float32,
    )
    if is_quantized(matrices):
      out = out * matrices.scale[expert, 0]
    return out.astype(rows.dtype)

  rows = x.reshape(-1, x.shape[-1])[order // k]
  inner = activation(product(rows, gate)) * product(rows, up)
  out = product(inner, down).astype(jnp.float32) * weights.reshape(-1)[order][:, None]
  out = jnp.where((jnp.arange(len(out)) < jnp.sum(sizes))[:, None], out, 0)
  # Add the outputs of each token; devices that split `mlp`, or have other experts, hold partial sums.
  total = jnp.zeros((x.shape[0] * x.shape[1], x.shape[-1]), jnp.float32).at[order // k].add(out)
  return total.reshape(x.shape), dropped
