"""Where arrays live: one mesh, one table of rules from logical axes to mesh axes.

The mesh has the axes `data` (copies of the parameters), `fsdp` (parameters cut along the model
width) and `tensor` (cut along heads, feed-forward and vocabulary). Batches are cut over `data` and
`fsdp`. A dimension that its mesh axes do not divide is replicated, so every model runs on every
mesh."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH = ('data', 'fsdp')
RULES = {
  'batch': BATCH,
  'length': (),
  'hidden': (),  # the width of an activation
  'embed': ('fsdp',),  # the width of a parameter
  'heads': ('tensor',),
  'kv_heads': ('tensor',),
  'head_dim': (),
  'mlp': ('tensor',),
  'vocab': ('tensor',),
  'layers': (),
  'experts': (),
  'rank': (),  # of an adapter
}


def make_mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
  """A mesh with the axes data, fsdp and tensor.

  One process may use fewer devices than it has; several processes use all of theirs.

  Args:
    data: number of parameter copies; -1 takes all devices that the other two leave.
    fsdp: number of parts that the parameters are cut into along their width.
    tensor: number of parts along heads, feed-forward and vocabulary.

  Raises:
    ValueError: the sizes multiply to more than the number of devices (several processes: to less).
  """
  devices = jax.device_count()
  if data == -1 and fsdp * tensor > 0 and devices % (fsdp * tensor) == 0:
    data = devices // (fsdp * tensor)
  size = data * fsdp * tensor
  if min(data, fsdp, tensor) < 1 or size > devices or (size < devices and jax.process_count() > 1):
    raise ValueError(
      f'mesh data={data} x fsdp={fsdp} x tensor={tensor} does not fit {devices} devices'
    )
  return jax.make_mesh(
    (data, fsdp, tensor),
    ('data', 'fsdp', 'tensor'),
    axis_types=(AxisType.Auto,) * 3,
    devices=jax.devices()[:size],
  )


def partition_spec(mesh: Any, axes: Sequence[str], shape: Sequence[int]) -> PartitionSpec:
  """The rules for one array: a mesh axis where it divides the dimension, else replicated."""
  if len(axes) != len(shape):
    raise ValueError(f'logical axes {tuple(axes)} do not fit shape {tuple(shape)}')

  def cut(axis, size):
    names = RULES[axis]
    return names if names and size % math.prod(mesh.shape[n] for n in names) == 0 else None

  return PartitionSpec(*map(cut, axes, shape))


def param_shardings(mesh: Mesh, axes: Any, params: Any) -> Any:
  """A NamedSharding for every parameter; `axes` is `policy.axes(params)`."""
  return jax.tree.map(
    lambda p, a: NamedSharding(mesh, partition_spec(mesh, a, p.shape)), params, axes
  )


def batch_sharding(mesh: Mesh, rank: int) -> NamedSharding:
  """First axis over data and fsdp, the others whole."""
  return NamedSharding(mesh, PartitionSpec(BATCH, *(None,) * (rank - 1)))


def constrain(x: jax.Array, axes: Sequence[str]) -> jax.Array:
  """Pins an activation to the rules of the mesh of `jax.set_mesh`; without a mesh, `x` itself."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(x, partition_spec(mesh, axes, x.shape))


def ambient_data_parallel_size() -> int:
  """The `data_parallel_size` of the mesh of `jax.set_mesh`; 1 without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else data_parallel_size(mesh)


def data_parallel_size(mesh: Any) -> int:
  """Number of parts that a batch is cut into; its rows must be a multiple."""
  return math.prod(mesh.shape[name] for name in BATCH)


def place(tree: Any, shardings: Any) -> Any:
  """Puts host values, whole and equal in every process, where `shardings` says."""

  def put(x, sharding):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  return jax.tree.map(put, tree, shardings)


def replicate(mesh: Mesh, tree: Any) -> Any:
  """Puts host values, equal in every process, whole on every device."""
  return place(tree, jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree))


def place_batch(mesh: Mesh, tree: Any) -> Any:
  """Cuts host arrays, whole and equal in every process, along their rows over data and fsdp.

  Raises:
    ValueError: the rows do not divide over data x fsdp.
  """
  size = data_parallel_size(mesh)

  def sharding(x):
    if len(x) % size:
      sizes = f'data={mesh.shape["data"]} x fsdp={mesh.shape["fsdp"]}'
      raise ValueError(f'{len(x)} rows do not divide over {sizes} = {size}')
    return batch_sharding(mesh, x.ndim)

  return place(tree, jax.tree.map(sharding, tree))


def to_host(tree: Any) -> Any:
  """NumPy copies of global arrays, whole on every process."""

  def fetch(x):
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
      return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)

  return jax.tree.map(fetch, tree)


def together(what: str) -> None:
  """Waits until all processes have come here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)
