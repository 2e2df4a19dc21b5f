"""Digests of arrays that do not depend on how an array is sharded, and arrays that are not finite.

A digest is the sum over all elements of bits * (2 i + 1) modulo 2^64, where i is the place of the
element in the whole array. Factors are odd, so a flipped bit always changes the sum.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

CHUNK = 2**16  # elements that are added at a time, so that they stay in the processor's cache
ODD = 2 * np.arange(CHUNK, dtype=np.uint64) + np.uint64(1)


def digests(tree: Any) -> dict[str, str]:
  """The digest of every array of a pytree by its path, the same in all processes."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  sums = _over_processes([_local(x) for _, x in leaves])
  return {path_name(path): f'{x:016x}' for (path, _), x in zip(leaves, sums)}


def not_finite(tree: Any) -> list[str]:
  """The paths of the arrays that hold NaN or infinity, the same in all processes."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  bad = _over_processes([any(not _finite(data) for data, _ in _shards(x)) for _, x in leaves])
  return [path_name(path) for (path, _), count in zip(leaves, bad) if count]


def _over_processes(values: list[int]) -> np.ndarray:
  """u64[n], the sums of these values over all processes, modulo 2^64."""
  own = np.array(values, np.uint64)
  if jax.process_count() == 1:
    return own
  # In halves, because devices have no numbers of 64 bits.
  halves = multihost_utils.process_allgather(own.view(np.uint32))
  return np.ascontiguousarray(halves).view(np.uint64).sum(axis=0, dtype=np.uint64)


def path_name(path: Any) -> str:
  """The text of a path in a tree, for example `layers/gate`."""
  return '/'.join(_key(entry) for entry in path)


def _key(entry: Any) -> str:
  """The text of one entry of a path, which is an attribute, a dict key or an index."""
  for field in ('name', 'key', 'idx'):
    if hasattr(entry, field):
      return str(getattr(entry, field))
  return str(entry)


def _shards(x: Any) -> Iterator[tuple[np.ndarray, tuple[int, ...]]]:
  """The pieces of an array that this process answers for, each with the place where it starts."""
  if not isinstance(x, jax.Array):
    yield np.asarray(x), (0,) * np.ndim(x)
    return
  for shard in x.addressable_shards:
    if shard.replica_id == 0:
      yield np.asarray(shard.data), tuple(s.start or 0 for s in shard.index)


def _local(x: Any) -> int:
  """The sum over the elements that this process answers for."""
  total = 0
  for data, start in _shards(x):
    bits = np.ascontiguousarray(data).reshape(-1).view(f'u{data.dtype.itemsize}')
    for begin in range(0, bits.size, CHUNK):
      piece = bits[begin : begin + CHUNK].astype(np.uint64)
      if data.shape == np.shape(x):
        total += int(piece @ ODD[: piece.size]) + 2 * begin * int(piece.sum())
      else:
        place = np.arange(begin, begin + piece.size)
        total += int(piece @ (2 * _in_whole(place, data.shape, start, np.shape(x)) + np.uint64(1)))
  return total % 2**64


def _in_whole(
  place: np.ndarray, shape: tuple[int, ...], start: tuple[int, ...], whole: tuple[int, ...]
) -> np.ndarray:
  """Places in a shard -> places in the whole array, both flattened."""
  found = np.zeros(place.shape, np.uint64)
  for axis, index in enumerate(np.unravel_index(place, shape)):
    stride = math.prod(whole[axis + 1 :])
    found += (index.astype(np.uint64) + np.uint64(start[axis])) * np.uint64(stride)
  return found


def _finite(data: np.ndarray) -> bool:
  if not jax.numpy.issubdtype(data.dtype, jax.numpy.inexact):
    return True
  return bool(np.isfinite(data.astype(np.float32) if data.dtype.itemsize < 4 else data).all())
