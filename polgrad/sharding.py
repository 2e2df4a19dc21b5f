"""How arrays are sharded: one mesh of devices, and one table of rules from logical to mesh axes.

The mesh has three axes. `data` replicates the parameters, `fsdp` shards them along the model width,
and `tensor` shards them along heads, feed-forward width and vocabulary. Rows of a batch are sharded
over `data` and `fsdp`. A dimension that its mesh axes do not divide is replicated, so every model
runs on every mesh.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH = ('data', 'fsdp')
# Logical axis of an array -> the mesh axes that shard it; () is replicated.
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


# Devices that meshes are made of instead of those of JAX, see `compiling_for`.
_DEVICES = contextvars.ContextVar('devices', default=())


@contextlib.contextmanager
def compiling_for(devices: Sequence[jax.Device]) -> Iterator[None]:
  """Within, `make_mesh` takes these devices, for example those of a topology that is not there."""
  token = _DEVICES.set(tuple(devices))
  try:
    yield
  finally:
    _DEVICES.reset(token)


def make_mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
  """A mesh of data * fsdp * tensor devices.

  Args:
    data: number of copies of the parameters; -1 takes all devices that the other two leave.
    fsdp: number of shards of the parameters along the model width.
    tensor: number of shards along heads, feed-forward width and vocabulary.

  Raises:
    ValueError: a size is below 1; or the mesh has more devices than there are; or it has fewer, and
      there are several processes, which must use all devices.
  """
  there = _DEVICES.get() or jax.devices()
  return _mesh_of(there, data=data, fsdp=fsdp, tensor=tensor)


def shared(mesh: Mesh) -> Mesh:
  """Samples on the devices that train."""
  return mesh


def beside(mesh: Mesh, *, data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
  """A mesh of the devices behind those of `mesh`, which do not train, see `make_mesh`.

  Raises:
    ValueError: they do not fit, or there are several processes.
  """
  there = _DEVICES.get() or jax.devices()
  if jax.process_count() > 1:
    raise ValueError('devices beside those that train are those of one process')
  return _mesh_of(there[mesh.size :], data=data, fsdp=fsdp, tensor=tensor)


def _mesh_of(there: Sequence[jax.Device], *, data: int, fsdp: int, tensor: int) -> Mesh:
  """A mesh of the first of these devices."""
  devices = len(there)
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
    devices=there[:size],
  )


def partition_spec(mesh: Any, axes: Sequence[str], shape: Sequence[int]) -> PartitionSpec:
  """The sharding of one array by `RULES`; dimensions that their mesh axes do not divide are replicated.

  Args:
    axes: logical axis names, one a dimension of `shape`.
  """
  if len(axes) != len(shape):
    raise ValueError(f'logical axes {tuple(axes)} do not fit shape {tuple(shape)}')

  def cut(axis, size):
    names = RULES[axis]
    return names if names and size % math.prod(mesh.shape[n] for n in names) == 0 else None

  return PartitionSpec(*map(cut, axes, shape))


def param_shardings(mesh: Mesh, axes: Any, params: Any) -> Any:
  """A NamedSharding for every parameter (or its shape); `axes` is `policy.axes(params)`."""
  return jax.tree.map(
    lambda p, a: NamedSharding(mesh, partition_spec(mesh, a, p.shape)), params, axes
  )


def batch_sharding(mesh: Mesh, rank: int) -> NamedSharding:
  """The sharding of a batch's array with `rank` dimensions: its rows over data and fsdp."""
  return NamedSharding(mesh, PartitionSpec(BATCH, *(None,) * (rank - 1)))


def constrain(x: jax.Array, axes: Sequence[str]) -> jax.Array:
  """Constrains an activation to its sharding by `RULES`, if `jax.set_mesh` has set a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(x, partition_spec(mesh, axes, x.shape))


def ambient_data_parallel_size() -> int:
  """The `data_parallel_size` of the mesh of `jax.set_mesh`; 1 without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else data_parallel_size(mesh)


def data_parallel_size(mesh: Any) -> int:
  """Number of shards of a batch, data * fsdp; the number of its rows must be a multiple."""
  return math.prod(mesh.shape[name] for name in BATCH)


def place(tree: Any, shardings: Any) -> Any:
  """Puts host values on devices, as `shardings` says; every process holds all of each value."""

  def put(x, sharding):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  return jax.tree.map(put, tree, shardings)


def replicate(mesh: Mesh, tree: Any) -> Any:
  """Puts a copy of host values, which are equal in every process, on every device."""
  return place(tree, jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree))


def place_batch(mesh: Mesh, tree: Any) -> Any:
  """Puts host arrays on devices, their rows sharded over data and fsdp.

  Args:
    tree: arrays [B, ...], of which every process holds all rows.

  Raises:
    ValueError: B is no multiple of data * fsdp.
  """
  size = data_parallel_size(mesh)

  def sharding(x):
    if len(x) % size:
      sizes = f'data={mesh.shape["data"]} x fsdp={mesh.shape["fsdp"]}'
      raise ValueError(f'{len(x)} rows do not divide over {sizes} = {size}')
    return batch_sharding(mesh, x.ndim)

  return place(tree, jax.tree.map(sharding, tree))


def copied(mesh: Mesh, tree: Any) -> Any:
  """Copies of arrays on the devices of another mesh, or of their own, sharded by the same axes.

  A dimension that the axes do not divide there is replicated.
  """

  def copy(x):
    cut = lambda size, names: size % math.prod(mesh.shape[n] for n in names) == 0
    spec = [
      names if names and cut(size, names if isinstance(names, tuple) else (names,)) else None
      for size, names in zip(x.shape, x.sharding.spec)
    ]
    place = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.device_put(x, place, may_alias=False)

  return jax.tree.map(copy, tree)


def to_host(tree: Any) -> Any:
  """NumPy copies of global arrays; every process gets all of each array."""

  def fetch(x):
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
      return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)

  return jax.tree.map(fetch, tree)


def together(what: str) -> None:
  """Barrier across processes; `what` names it and must be the same in all of them."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


def last_devices(devices: int, fsdp: int) -> Mesh:
  """A mesh of the last devices of this process.

  Raises:
    ValueError: more devices than there are, or a number that `fsdp` does not divide.
  """
  own = jax.local_devices()
  count = devices or len(own) // fsdp * fsdp
  if not 0 < count <= len(own) or count % fsdp:
    raise ValueError(
      f'devices={devices} and fsdp={fsdp} do not fit the {len(own)} devices of a process'
    )
  return jax.make_mesh(
    (count // fsdp, fsdp, 1),
    ('data', 'fsdp', 'tensor'),
    axis_types=(AxisType.Auto,) * 3,
    devices=own[-count:],
  )
