"""How arrays are sharded: one mesh of devices, and rules from the logical axes of arrays to mesh axes.

The mesh has five axes. Rows of a batch are sharded over `data`, `fsdp` and `expert`, and the positions
of a row over `context`. Parameters are sharded along the model width over `fsdp`, `context` and
`expert`, and along heads, feed-forward width and vocabulary over `tensor`; `data` replicates them. The
experts of a mixture are spread over `expert`. `RULES` says the same for each logical axis, and
`make_mesh` takes other rules. A dimension that its mesh axes do not divide is sharded over the first of
them alone that do, or replicated, so every model runs on every mesh. A mesh with other rules has a sixth
axis, of size 1, whose name says them: a program is traced for the names and sizes of axes, and thereby
for the rules.

Inside of attention a row is whole and heads are sharded over `tensor` and `context` instead: an
all-to-all exchanges positions for heads and back (arXiv:2309.14509). Where these do not divide the
heads, each device attends with the queries of its positions, to keys and values that it gathers.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import linear_call
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from polgrad.compiling import jit
from polgrad.registry import suggest

# Neighbours on the last axes are nearest, so those that exchange most come last.
AXES = ('data', 'fsdp', 'expert', 'context', 'tensor')
# Logical axis of an array -> the mesh axes that shard it; () is replicated. An array uses a mesh axis
# once, for the first of its dimensions that names it.
RULES = {
  'batch': ('data', 'fsdp', 'expert'),
  'copied_batch': ('data',),  # rows of an array that the others shard along the model width
  'length': ('context',),  # positions of a row
  'hidden': (),  # the width of an activation
  'experts': ('expert',),
  'embed': ('context', 'fsdp', 'expert'),  # the width of a parameter
  # The width of embeddings that were looked up: `context` moves to positions after the others have moved
  # to rows, because no single all-to-all does both.
  'looked_up': ('context',),
  'heads': ('tensor',),
  'kv_heads': ('tensor',),
  'head_dim': (),
  'mlp': ('tensor',),
  'vocab': ('tensor',),
  'layers': (),
  'rank': (),  # of an adapter
  # Queries, keys and values inside of attention, and the cache of decoding.
  'attention_length': (),
  'attention_heads': ('tensor', 'context'),
  'attention_kv_heads': ('tensor', 'context'),
}
Rules = Mapping[str, tuple[str, ...]]

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


def make_mesh(
  *,
  data: int = 1,
  fsdp: int = 1,
  tensor: int = 1,
  context: int = 1,
  expert: int = 1,
  slices: dict = {},  # noqa: B006
  rules: dict = {},  # noqa: B006
) -> Mesh:
  """A mesh of data * fsdp * expert * context * tensor devices.

  Args:
    data: number of copies of the parameters; -1 takes all devices that the others leave.
    fsdp: number of shards of the parameters along the model width.
    tensor: number of shards along heads, feed-forward width and vocabulary.
    context: number of pieces of each row.
    expert: number of shards of the experts, each of which has whole experts; rows are sharded over it
      too.
    slices: into how many parts, on different slices, an axis is cut, by its name: `{'data': 2}`. Slices
      are connected by the slower network of a data center. The product is the number of slices. Devices
      that do not say which slice they are on (CPUs, GPUs) are cut into as many consecutive pieces.
    rules: mesh axes by logical axis, in place of those of `RULES`: `{'vocab': ('tensor', 'fsdp')}`. A
      text names them with commas between them, and '' replicates.

  Raises:
    ValueError: a size is below 1; or the mesh has more devices than there are; or it has fewer, which
      are not the same number of each process; or slices do not fit the devices; or an unknown axis.
  """
  sizes = dict(data=data, fsdp=fsdp, tensor=tensor, context=context, expert=expert)
  return _mesh_of(_DEVICES.get() or jax.devices(), sizes, slices, checked(rules))


def shared(mesh: Mesh) -> Mesh:
  """Samples on the devices that train."""
  return mesh


def beside(
  mesh: Mesh,
  *,
  data: int = 1,
  fsdp: int = 1,
  tensor: int = 1,
  context: int = 1,
  expert: int = 1,
  slices: dict = {},  # noqa: B006
  rules: dict = {},  # noqa: B006
) -> Mesh:
  """A mesh of devices behind those of `mesh`, which do not train, see `make_mesh`.

  Its rules are those of `mesh`, in which `rules` replaces some; parameters are cut by the axes that cut
  them on `mesh`. Each of several processes gives the same number of its devices to both meshes, so that
  it copies parameters between its own devices and takes part in every step.

  Raises:
    ValueError: they do not fit, or `mesh` leaves none.
  """
  training, every = {*mesh.devices.flat}, _DEVICES.get() or jax.devices()
  there = [device for device in every if device not in training]
  if not there:
    raise ValueError(f'mesh has all {len(every)} devices, and leaves none; make it smaller')
  sizes = dict(data=data, fsdp=fsdp, tensor=tensor, context=context, expert=expert)
  return _mesh_of(there, sizes, slices, checked(rules, rules_of(mesh)))


def checked(rules: Mapping[str, Any], base: Rules = RULES) -> Rules:
  """The rules of `base`, some of them replaced.

  >>> checked({'vocab': 'tensor,fsdp'})['vocab']
  ('tensor', 'fsdp')

  Raises:
    ValueError: an unknown logical or mesh axis, or a mesh axis that is named twice.
  """
  found = dict(base)
  for logical, names in rules.items():
    if logical not in RULES:
      raise ValueError(f'rules: unknown logical axis {logical!r}{suggest(logical, RULES)}')
    names = [n.strip() for n in names.split(',') if n.strip()] if isinstance(names, str) else names
    if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
      raise ValueError(f'rules.{logical}: expected names of mesh axes, got {names!r}')
    for name in names:
      if name not in AXES:
        raise ValueError(f'rules.{logical}: unknown mesh axis {name!r}{suggest(name, AXES)}')
    if len({*names}) < len(names):
      raise ValueError(f'rules.{logical}: {tuple(names)} names a mesh axis twice')
    found[logical] = tuple(names)
  return found


def rules_of(mesh: Any) -> Rules:
  """The rules of a mesh of `make_mesh`."""
  return _read(mesh.axis_names[len(AXES)]) if len(mesh.axis_names) > len(AXES) else RULES


def sizes_of(mesh: Any) -> dict[str, int]:
  """The sizes of the axes of a mesh by name, without the one that says its rules."""
  return {axis: size for axis, size in mesh.shape.items() if axis in AXES}


def _name(rules: Rules) -> str:
  """The name of an axis that says which rules are not those of `RULES`; '' if all are.

  >>> _name(RULES | {'vocab': ('tensor', 'fsdp'), 'embed': ()})
  'embed=,vocab=tensor+fsdp'
  """
  others = {logical: axes for logical, axes in rules.items() if axes != RULES[logical]}
  return ','.join(f'{logical}={"+".join(axes)}' for logical, axes in sorted(others.items()))


@functools.cache
def _read(name: str) -> Rules:
  """The inverse of `_name`."""
  pairs = (one.split('=') for one in name.split(','))
  return RULES | {logical: tuple(axes.split('+')) if axes else () for logical, axes in pairs}


def _mesh_of(
  there: Sequence[jax.Device],
  sizes: Mapping[str, int],
  slices: Mapping[str, int],
  rules: Rules,
) -> Mesh:
  """A mesh of the first of these devices, the same number of each process, with these rules."""
  sizes = {axis: sizes[axis] for axis in AXES}
  devices, others = len(there), math.prod(size for axis, size in sizes.items() if axis != 'data')
  if sizes['data'] == -1 and others > 0 and devices % others == 0:
    sizes['data'] = devices // others
  size = math.prod(sizes.values())
  # In one process the first devices, whichever hosts of a topology they are on.
  processes = len({device.process_index for device in there}) if jax.process_count() > 1 else 1
  if min(sizes.values()) < 1 or size > devices:
    raise ValueError(f'mesh {_written(sizes)} does not fit {devices} devices')
  if size % processes:
    raise ValueError(
      f'mesh {_written(sizes)} has {size} devices, which do not divide by {processes} processes: each '
      'gives the same number of its devices'
    )
  mesh = _arranged(_first_of_each(there, size // processes), sizes, slices)
  name = _name(rules)
  if not name:
    return mesh
  types = (AxisType.Auto,) * (len(AXES) + 1)
  return Mesh(mesh.devices[..., None], (*AXES, name), axis_types=types)


def _first_of_each(there: Sequence[jax.Device], number: int) -> list[jax.Device]:
  """The first devices of each process, that number of each; in one process the first ones of all."""
  if jax.process_count() == 1:
    return list(there[:number])
  own = {}
  for device in there:
    own.setdefault(device.process_index, []).append(device)
  return [device for process in sorted(own) for device in own[process][:number]]


def _written(sizes: Mapping[str, int]) -> str:
  """Axes and their sizes, without those of size 1.

  >>> _written({'data': 4, 'fsdp': 1, 'tensor': 2})
  'data=4 x tensor=2'
  """
  written = ' x '.join(f'{axis}={size}' for axis, size in sizes.items() if size != 1)
  return written or 'data=1'


@dataclasses.dataclass
class _OnSlice:
  """A device, and the slice that it counts as part of."""

  device: Any
  slice_index: int

  def __getattr__(self, name: str) -> Any:
    return getattr(self.device, name)


def _arranged(
  devices: Sequence[jax.Device], sizes: Mapping[str, int], slices: Mapping[str, int]
) -> Mesh:
  """The mesh of these devices, the nearest ones along the last axes.

  Raises:
    ValueError: `slices` names an unknown axis, does not divide its size, or is another number of slices
      than the devices are on.
  """
  for axis, count in slices.items():
    if axis not in AXES:
      raise ValueError(f'slices: unknown mesh axis {axis!r}{suggest(axis, AXES)}')
    if not isinstance(count, int) or count < 1 or sizes[axis] % count:
      raise ValueError(f'slices.{axis}: {count!r} does not divide {axis}={sizes[axis]}')
  count = math.prod(slices.values())
  known = {getattr(device, 'slice_index', None) for device in devices} - {None}
  if len(known) > 1 and count != len(known):
    raise ValueError(
      f'slices: the devices are on {len(known)} slices, but {dict(slices)} makes {count}; say which '
      f'axis lies across them, as in slices.data={len(known)}'
    )
  types = (AxisType.Auto,) * len(AXES)
  if count == 1:
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)
  if len(known) < 2:
    each = len(devices) // count
    devices = [_OnSlice(device, i // each) for i, device in enumerate(devices)]
  across = [slices.get(axis, 1) for axis in AXES]
  within = [size // n for size, n in zip(sizes.values(), across)]
  # As `jax.make_mesh`: slices of these chips have two dimensions, fewer than the mesh.
  flat = 'lite' in devices[0].device_kind or 'v5e' in devices[0].device_kind
  found = mesh_utils.create_hybrid_device_mesh(
    within, across, devices, allow_split_physical_axes=flat
  )
  bare = lambda device: device.device if isinstance(device, _OnSlice) else device
  return Mesh(np.vectorize(bare, otypes=[object])(found), AXES, axis_types=types)


def partition_spec(mesh: Any, axes: Sequence[str], shape: Sequence[int]) -> PartitionSpec:
  """The sharding of one array by the rules of the mesh.

  A dimension is sharded over the longest beginning of its mesh axes that divides it. Within a
  `jax.shard_map` arrays are already cut over its axes, which are left out.

  Args:
    axes: logical axis names, one a dimension of `shape`.
  """
  if len(axes) != len(shape):
    raise ValueError(f'logical axes {tuple(axes)} do not fit shape {tuple(shape)}')
  rules, used, found = rules_of(mesh), {*_manual(mesh)}, []
  for axis, size in zip(axes, shape):
    names = _dividing(mesh, [n for n in rules[axis] if n not in used], size)
    used |= {*names}
    found.append(names or None)
  return PartitionSpec(*found)


def _manual(mesh: Any) -> tuple[str, ...]:
  """The axes of the `jax.shard_map` around, if the mesh is that of `jax.set_mesh`."""
  return getattr(mesh, 'manual_axes', ())


def mesh_axes(entry: Any) -> tuple[str, ...]:
  """The mesh axes that one entry of a `PartitionSpec` names."""
  return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _dividing(mesh: Any, names: Sequence[str], size: int) -> tuple[str, ...]:
  """The longest beginning of these mesh axes that divides a dimension of this size."""
  names = tuple(names)
  while size % math.prod(mesh.shape[n] for n in names):
    names = names[:-1]
  return names


def row_axes(mesh: Any) -> tuple[str, ...]:
  """The mesh axes that rows of a batch are sharded over."""
  return rules_of(mesh)['batch']


def cut_along(
  mesh: Any, names: Sequence[str], axes: Sequence[str], shape: Sequence[int]
) -> PartitionSpec:
  """`partition_spec` with these mesh axes only."""
  spec = partition_spec(mesh, axes, shape)
  return PartitionSpec(*(tuple(n for n in mesh_axes(e) if n in names) or None for e in spec))


def param_shardings(mesh: Mesh, axes: Any, params: Any) -> Any:
  """A NamedSharding for every parameter (or its shape); `axes` is `policy.axes(params)`.

  A parameter may be several arrays with these axes, such as values and their scales.
  """
  place = lambda names, x: NamedSharding(mesh, partition_spec(mesh, names, x.shape))
  names_axes = lambda x: isinstance(x, tuple) and all(isinstance(name, str) for name in x)
  return jax.tree.map(
    lambda names, p: jax.tree.map(functools.partial(place, names), p),
    axes,
    params,
    is_leaf=names_axes,
  )


def batch_sharding(mesh: Mesh, rank: int) -> NamedSharding:
  """The sharding of a batch's array with `rank` dimensions: its rows by the rule of `batch`."""
  return NamedSharding(mesh, PartitionSpec(rules_of(mesh)['batch'], *(None,) * (rank - 1)))


def constrain(x: jax.Array, axes: Sequence[str]) -> jax.Array:
  """Constrains an activation to its sharding by the rules, if `jax.set_mesh` has set a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(x, partition_spec(mesh, axes, x.shape))


class Group(NamedTuple):
  """Groups of `size` devices of a mesh axis, `stride` apart, that exchange with each other."""

  size: int
  stride: int = 1

  def members(self, devices: int) -> list[list[int]]:
    """The places of the devices of each group along the axis.

    >>> Group(2).members(4), Group(2, stride=2).members(4)
    ([[0, 1], [2, 3]], [[0, 2], [1, 3]])
    """
    firsts = [i for i in range(devices) if i // self.stride % self.size == 0]
    return [[i + k * self.stride for k in range(self.size)] for i in firsts]


def gather(
  x: jax.Array, names: tuple[str, ...], dimension: int, group: Group | None = None
) -> jax.Array:
  """All pieces of an array along a dimension, in float32, inside of `jax.shard_map` over mesh axes.

  The gradient is added up over the devices and scattered in the type of `x`. On a TPU it goes around a
  ring: the compiler would write a scatter as an all-reduce, which receives twice the bytes.

  Args:
    group: the groups of devices that gather their pieces, with only one axis; None: all devices.
  """

  def whole(_, x: jax.Array) -> jax.Array:
    groups = group and group.members(jax.lax.axis_size(names[0]))
    exchange = dict(tiled=True, axis_index_groups=groups)
    return jax.lax.all_gather(x, names, axis=dimension, **exchange).astype(jnp.float32)

  def scatter(_, gradient: jax.Array) -> jax.Array:
    for name in names:  # pieces are in the order of the axes
      options = dict(name=name, dimension=dimension, dtype=x.dtype, group=group)
      ways = dict(tpu=ring_scatter, cpu=_wide_scatter, default=_plain_scatter)
      ways = {where: functools.partial(way, **options) for where, way in ways.items()}
      gradient = jax.lax.platform_dependent(gradient, **ways)
    return gradient

  return linear_call(whole, scatter, (), x)


def _plain_scatter(
  x: jax.Array, *, name: str, dimension: int, dtype: Any, group: Group | None
) -> jax.Array:
  groups = group and group.members(jax.lax.axis_size(name))
  exchange = dict(tiled=True, axis_index_groups=groups)
  return jax.lax.psum_scatter(x.astype(dtype), name, scatter_dimension=dimension, **exchange)


def _wide_scatter(x: jax.Array, *, dtype: Any, **options: Any) -> jax.Array:
  # XLA for CPUs aborts the process where bfloat16 is added up over devices.
  return _plain_scatter(x, dtype=jnp.float32, **options).astype(dtype)


def added_up_wide(tree: Any) -> Any:
  """Arrays of bfloat16 in float32 on CPUs, where XLA aborts the process if bfloat16 is added up over
  devices. `jax.shard_map` adds up gradients of what several devices have; no value changes."""
  narrow = lambda x: x.dtype == jnp.bfloat16 and platform() == 'cpu'
  return jax.tree.map(lambda x: x.astype(jnp.float32) if narrow(x) else x, tree)


def ring_scatter(
  x: jax.Array, *, name: str, dimension: int, dtype: Any, group: Group | None = None
) -> jax.Array:
  """`jax.lax.psum_scatter` over a mesh axis, tiled, by sums that are passed to the next device.

  A device receives (n - 1) / n of the entries of `x`, with n devices, in this type.

  Args:
    group: the groups of devices, each of which adds up its own; None: one of all devices.
  """
  devices, own = jax.lax.axis_size(name), jax.lax.axis_index(name)
  n, stride = group or Group(devices)
  own = own if n == devices else own // stride % n
  size = x.shape[dimension] // n

  def piece(i: jax.Array) -> jax.Array:
    # Cast by pieces, so that no copy of all in this type is in memory.
    return jax.lax.dynamic_slice_in_dim(x, (i % n) * size, size, axis=dimension).astype(dtype)

  every = Group(n, stride).members(devices)
  ring = [(one[i], one[(i + 1) % n]) for one in every for i in range(n)]
  # After step s a device has the sum of s + 1 devices for the piece of the device n - 1 - s behind it.
  add = lambda s, total: jax.lax.ppermute(total, name, ring) + piece(own - s - 1)
  return jax.lax.fori_loop(1, n, add, piece(own - 1))


def gathered(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """A parameter whose pieces on devices with other tokens are put together, for all its products.

  Left to itself the compiler gathers it for every product that reads it. Experts remain where they are,
  and the gradient is cut as the parameter is. Where devices with other tokens have no pieces, nothing
  happens; elsewhere `jax.vmap` over a gradient is not possible.

  Args:
    axes: logical axis names.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  rules, spec = rules_of(mesh), partition_spec(mesh, axes, x.shape)
  tokens = {n for n in (*rules['batch'], *rules['length']) if mesh.shape[n] > 1}
  without = lambda entry: tuple(n for n in mesh_axes(entry) if n not in tokens)
  kept = [
    mesh_axes(entry) if axis == 'experts' else without(entry)
    for axis, entry in zip(axes, spec, strict=True)
  ]
  if kept == [mesh_axes(entry) for entry in spec]:
    return x
  whole = PartitionSpec(*(names or None for names in kept))
  return linear_call(
    lambda _, x: jax.lax.with_sharding_constraint(x, whole),
    lambda _, gradient: constrain(gradient, axes),
    (),
    x,
  )


def constrain_near(x: jax.Array, near: int, last: bool = False) -> jax.Array:
  """An array whose rows are sharded over `data` and `fsdp`, resharded for groups of devices.

  Each group of `near` consecutive devices of `fsdp` shares its rows: every device of it has all of them,
  or with `last` all of them for a piece of the last dimension. No mesh axis says this, so the sharding
  constraint is one on a mesh of the same devices, with `fsdp` cut into two axes.
  """
  mesh = jax.sharding.get_abstract_mesh()
  sizes = {}
  for axis, size in mesh.shape.items():
    sizes |= {'fsdp': size // near, 'near': near} if axis == 'fsdp' else {axis: size}
  types = (AxisType.Auto,) * len(sizes)
  spec = PartitionSpec(('data', 'fsdp'), *(None,) * (x.ndim - 2), *(('near',) if last else ()))
  with jax.sharding.use_abstract_mesh(
    AbstractMesh((*sizes.values(),), (*sizes,), axis_types=types)
  ):
    return jax.lax.with_sharding_constraint(x, spec)


def shards(axis: str, size: int, mesh: Any = None) -> int:
  """Number of shards of a dimension of this size by the rule of a logical axis.

  Args:
    mesh: that of `jax.set_mesh` by default; without one, the number is 1.
  """
  mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
  if mesh.empty:
    return 1
  return math.prod(mesh.shape[n] for n in mesh_axes(partition_spec(mesh, (axis,), (size,))[0]))


def exchanges_heads(length: int, heads: int) -> bool:
  """Whether attention exchanges the positions of a row for heads.

  It does where every mesh axis that cuts positions cuts heads too; these are given by
  `attention_heads`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return False
  over = lambda axis, size: {*mesh_axes(partition_spec(mesh, (axis,), (size,))[0])}
  positions = over('length', length)
  return bool(positions) and positions <= over('attention_heads', heads)


def kept_cut(length: int, heads: int) -> tuple[str, ...]:
  """The mesh axes that cut the positions of queries inside of attention too, without an exchange."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or exchanges_heads(length, heads):
    return ()
  return mesh_axes(partition_spec(mesh, ('length',), (length,))[0])


def pieces_of_a_row(length: int) -> int:
  """Number of shards of the positions of a row of this length on the mesh of `jax.set_mesh`."""
  return shards('length', length)


def merge_positions(x: jax.Array) -> jax.Array:
  """[B, T, ...] -> [B * T, ...], the tokens of all rows in one dimension, without moving any.

  Where positions are sharded, the pieces of all rows come one after another: no other order would leave
  each token on its device. `split_positions` is the inverse.
  """
  rows, length = x.shape[:2]
  pieces = pieces_of_a_row(length)
  if pieces == 1:
    return x.reshape(-1, *x.shape[2:])
  mesh, free = jax.sharding.get_abstract_mesh(), (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 2)
  spec = partition_spec(mesh, ('batch', 'length'), (rows, length))
  x = jax.lax.with_sharding_constraint(x, PartitionSpec(*spec, *free))
  x = x.reshape(rows, pieces, -1, *x.shape[2:]).swapaxes(0, 1)
  x = jax.lax.with_sharding_constraint(x, PartitionSpec(spec[1], spec[0], None, *free))
  x = x.reshape(-1, *x.shape[3:])
  tokens = mesh_axes(spec[1]) + mesh_axes(spec[0])
  return jax.lax.with_sharding_constraint(x, PartitionSpec(tokens, *free))


def split_positions(x: jax.Array, rows: int, length: int) -> jax.Array:
  """[B * T, ...] of `merge_positions` -> [B, T, ...]."""
  pieces = pieces_of_a_row(length)
  if pieces == 1:
    return x.reshape(rows, length, *x.shape[1:])
  mesh, free = jax.sharding.get_abstract_mesh(), (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
  spec = partition_spec(mesh, ('batch', 'length'), (rows, length))
  tokens = mesh_axes(spec[1]) + mesh_axes(spec[0])
  x = jax.lax.with_sharding_constraint(x, PartitionSpec(tokens, *free))
  x = x.reshape(pieces, rows, -1, *x.shape[1:])
  x = jax.lax.with_sharding_constraint(x, PartitionSpec(spec[1], spec[0], None, *free))
  x = x.swapaxes(0, 1).reshape(rows, length, *x.shape[3:])
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec, *free))


def platform() -> str:
  """The platform of the mesh that is set, 'cpu' or 'tpu' for example, or else that of JAX."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.abstract_device.platform if mesh.abstract_device else jax.default_backend()


def ambient_data_parallel_size() -> int:
  """The `data_parallel_size` of the mesh of `jax.set_mesh`; 1 without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else data_parallel_size(mesh)


def data_parallel_size(mesh: Any) -> int:
  """Number of shards of a batch, data * fsdp * expert; the number of its rows must be a multiple."""
  return most_shards(mesh, 'batch')


def most_shards(mesh: Any, axis: str) -> int:
  """Number of shards of a logical axis whose size the mesh axes divide."""
  return math.prod(mesh.shape[name] for name in rules_of(mesh)[axis])


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
  """Puts host arrays on devices, their rows sharded by the rule of `batch`.

  Args:
    tree: arrays [B, ...], of which every process holds all rows.

  Raises:
    ValueError: B is no multiple of `data_parallel_size`.
  """
  size = data_parallel_size(mesh)

  def sharding(x):
    if len(x) % size:
      sizes = _written({axis: mesh.shape[axis] for axis in rules_of(mesh)['batch']})
      raise ValueError(f'{len(x)} rows do not divide over {sizes} = {size}')
    return batch_sharding(mesh, x.ndim)

  return place(tree, jax.tree.map(sharding, tree))


def copied(mesh: Mesh, tree: Any) -> Any:
  """Copies of arrays on the devices of another mesh, or of their own, sharded by the same axes.

  A dimension is sharded over the first of the axes that divide it there.
  """

  def copy(x):
    pairs = zip(x.shape, x.sharding.spec)
    spec = [_dividing(mesh, mesh_axes(names), size) or None for size, names in pairs]
    place = NamedSharding(mesh, PartitionSpec(*spec))
    if x.is_fully_addressable:
      return jax.device_put(x, place, may_alias=False)
    return _copied_within_processes(x, place)

  return jax.tree.map(copy, tree)


def _copied_within_processes(x: jax.Array, place: NamedSharding) -> jax.Array:
  """A copy on other devices, where each process copies between its own devices.

  `jax.device_put` refuses arrays of several processes whose devices are not the same. A process that
  lacks a piece that it needs has it from the others first: by a program on the devices of `x`, after
  which each of these has the whole array.
  """

  def pieces(sharding: NamedSharding) -> set:
    found = sharding.devices_indices_map(x.shape)
    return {(device.process_index, _piece(index, x.shape)) for device, index in found.items()}

  if not pieces(place) <= pieces(x.sharding):
    with jax.set_mesh(x.sharding.mesh):
      x = _whole(x.sharding.mesh)(x)
  held = {_piece(one.index, x.shape): one.data for one in x.addressable_shards}
  copies = []
  for device, index in place.addressable_devices_indices_map(x.shape).items():
    found = held.get(_piece(index, x.shape))
    found = x.addressable_data(0)[index] if found is None else found
    copies.append(jax.device_put(found, device, may_alias=False))
  return jax.make_array_from_single_device_arrays(x.shape, place, copies)


def _piece(index: tuple[slice, ...], shape: Sequence[int]) -> tuple:
  """A piece of an array, as bounds of each dimension."""
  return tuple(one.indices(size)[:2] for one, size in zip(index, shape))


@functools.cache
def _whole(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
  """Gathers an array of this mesh on each of its devices, compiled."""
  return jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


def to_host(tree: Any) -> Any:
  """NumPy copies of global arrays; every process gets all of each array."""

  def fetch(x):
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
      with jax.set_mesh(x.sharding.mesh):  # which may not be the mesh of the run
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)

  return jax.tree.map(fetch, tree)


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
  sizes = dict.fromkeys(AXES, 1) | dict(data=count // fsdp, fsdp=fsdp)
  return _mesh_of(own[-count:], sizes, {}, RULES)
