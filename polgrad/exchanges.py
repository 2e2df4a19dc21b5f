"""What the processes of a run tell each other on the host: rows that each has laid out, scores, plans.

All processes call these functions in the same order, and wait for each other at a barrier with a time
limit before (`barriers.together`). Values travel as bytes, over one device of each process, so they are
the same bits everywhere. An error in one process is raised in all of them.
"""

import contextlib
import contextvars
import functools
import itertools
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from polgrad import barriers

SHORT = 4092  # bytes of a message that is exchanged at once
# The devices that values travel over, see `on`; (): all of the run.
_DEVICES = contextvars.ContextVar('devices', default=())


@contextlib.contextmanager
def on(mesh: Mesh) -> Iterator[None]:
  """Within, values travel over devices of this mesh.

  A thread that runs programs beside others needs this: programs on a device must start in the same order
  in all processes.
  """
  token = _DEVICES.set(tuple(mesh.devices.flat))
  try:
    yield
  finally:
    _DEVICES.reset(token)


@functools.cache
def meet(mesh: Mesh) -> None:
  """Connects the CPU devices of several processes by a tiny program; others need none.

  CPU devices connect in the first program in which they exchange something, and wait 30 seconds for each
  other there, for which JAX has no setting. Times to compile a real program can differ by more: on a
  busy machine, or where one process finds the program in its cache. So all processes first start a tiny
  program at the same time, behind a barrier. In it each group of devices along axes of the mesh, for
  every combination of axes, adds up a number.
  """
  if jax.process_count() == 1 or jax.default_backend() != 'cpu':
    return
  axes = [name for name, size in mesh.shape.items() if size > 1]
  groups = [g for n in range(1, len(axes) + 1) for g in itertools.combinations(axes, n)]
  everywhere = PartitionSpec(axes)
  add = lambda x: sum((jax.lax.psum(x, group) for group in groups), x)
  add = jax.shard_map(add, mesh=mesh, in_specs=everywhere, out_specs=everywhere)
  sharding = NamedSharding(mesh, everywhere)
  ones = jax.make_array_from_callback((mesh.size,), sharding, lambda index: np.ones(1, np.float32))
  with jax.set_mesh(mesh):
    program = jax.jit(add).lower(ones).compile()
    barriers.together('devices that are connected')
    jax.block_until_ready(program(ones))


def share(count: int) -> range:
  """Which of `count` items this process works on: consecutive ones, as rows lie on the devices."""
  each = -(-count // jax.process_count())
  begin = min(jax.process_index() * each, count)
  return range(begin, min(begin + each, count))


def strided(items: Sequence) -> Sequence:
  """Those of some items that this process verifies: every P-th of P processes, see `interleaved`.

  Neighbours are samples of one prompt, and take about as long, so processes have similar work.
  """
  return items[jax.process_index() :: jax.process_count()]


def interleaved(parts: Sequence[np.ndarray]) -> np.ndarray:
  """Arrays [n, ...] of the `strided` rows of each process, as one array of all rows.

  >>> interleaved([np.array([0, 2, 4]), np.array([1, 3])])
  array([0, 1, 2, 3, 4])
  """
  rows = np.zeros((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
  for process, part in enumerate(parts):
    rows[process :: len(parts)] = part
  return rows


def rows(make: Callable[[Sequence], Any], records: Sequence, what: str) -> Any:
  """The arrays `make(records)`, of which each process makes those of its share of the records.

  Args:
    make: records, at least one, -> a tree of NumPy arrays with the same number of rows for each record.
      A row may depend on its record alone.
    records: equal in all processes.
    what: names them in errors.
  """
  processes = jax.process_count()
  if processes == 1:
    return make(records)
  each = -(-len(records) // processes)
  own = [records[i] for i in share(len(records))]
  own += [records[-1]] * (each - len(own))  # all processes exchange the same number of rows
  with _together(what) as made:
    made.append(make(own))
  leaves, tree = jax.tree.flatten(made[0])
  per_record = len(leaves[0]) // each
  sent = [np.ascontiguousarray(x).reshape(len(x), -1).view(np.uint8) for x in leaves]
  bounds = np.cumsum([0, *(x.shape[1] for x in sent)])
  found = _exchanged(np.concatenate(sent, axis=1), _identity)
  found = found.reshape(processes * len(leaves[0]), -1)
  found = found[: len(records) * per_record]
  parts = [found[:, a:b] for a, b in itertools.pairwise(bounds)]
  restored = [
    np.ascontiguousarray(part).view(x.dtype).reshape(len(part), *x.shape[1:])
    for part, x in zip(parts, leaves)
  ]
  return jax.tree.unflatten(tree, restored)


def every(make: Callable[[], Any], what: str) -> list[Any]:
  """The values of all processes, in their order: that of this process is `make()`.

  Args:
    make: gives what can be pickled.
    what: names it in errors.
  """
  if jax.process_count() == 1:
    return [make()]
  with _together(what) as made:
    made.append(make())
  return [pickle.loads(sent) for sent in _messages(pickle.dumps(made[0]), _identity)]


def first(make: Callable[[], Any], what: str) -> Any:
  """The value of the first process, in all of them; the others do not call `make`."""
  if jax.process_count() == 1:
    return make()
  own = jax.process_index() == 0
  with _together(what) as made:
    made.append(pickle.dumps(make()) if own else b'')
  return pickle.loads(_messages(made[0], _added)[0])


@contextlib.contextmanager
def _together(what: str) -> Iterator[list]:
  """Barrier at the end, with the error of the block, if any."""
  failure = None
  try:
    yield []
  except Exception as error:
    failure = error
  barriers.together(what, failure)


def _messages(own: bytes, combine: Callable) -> list[bytes]:
  """The messages of all processes; or, with `_added`, that of the first one, others having sent b''."""
  size = np.array([len(own)], np.uint32).view(np.uint8)
  sent = np.frombuffer(own, np.uint8)
  fill = lambda x, length: np.pad(x, (0, length - len(x)))
  # One exchange suffices for short messages; lengths of others are rounded up, so few programs compile.
  heads = _exchanged(fill(np.concatenate([size, sent[:SHORT]]), 4 + SHORT), combine)
  heads = heads.reshape(-1, 4 + SHORT)
  sizes = np.ascontiguousarray(heads[:, :4]).view(np.uint32).ravel()
  found, longest = heads[:, 4:], int(sizes.max())
  if longest > SHORT:
    length = 2 ** math.ceil(math.log2(longest))
    found = _exchanged(fill(sent, length), combine).reshape(-1, length)
  return [row[:size].tobytes() for row, size in zip(found, sizes)]


def _exchanged(own: np.ndarray, combine: Callable) -> np.ndarray:
  """`combine` of the arrays [P, ...] of all processes."""
  devices = {device.process_index: device for device in reversed(_DEVICES.get() or jax.devices())}
  mesh = _mesh(tuple(devices[i] for i in range(jax.process_count())))
  sharding = NamedSharding(mesh, PartitionSpec('process'))
  shape = (jax.process_count(), *own.shape)
  x = jax.make_array_from_process_local_data(sharding, own[None], shape)
  with jax.set_mesh(mesh):
    return np.asarray(_program(combine, mesh)(x).addressable_data(0))


@functools.cache
def _mesh(devices: tuple[jax.Device, ...]) -> Mesh:
  """One device of each process."""
  return Mesh(np.array(devices), 'process')


@functools.cache
def _program(combine: Callable, mesh: Mesh) -> Callable:
  """`combine`, compiled, with its result on every device."""
  return jax.jit(combine, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _identity(x: jax.Array) -> jax.Array:
  """The arrays of all processes."""
  return x


def _added(x: jax.Array) -> jax.Array:
  """Their sum."""
  return jnp.sum(x, axis=0, dtype=x.dtype)
