"""A memory of sampled batches, which are used later (`lag`) or again (`replay`).

It is a ring of the last batches, arrays of fixed shapes, so it is checkpointed like the rest of the
state, and a resumed run trains on the same rows.
"""

from typing import NamedTuple

import jax
import numpy as np

from polgrad.types import Batch


class Ring(NamedTuple):
  """The last `capacity` batches; batch number n (from 0) is at index n % capacity."""

  batches: Batch  # every array has a leading axis: [capacity, B, ...]
  count: np.ndarray  # i32[], batches stored so far


def empty(like: Batch, *, capacity: int) -> Ring:
  """A ring for `capacity` batches with the arrays, shapes and dtypes of `like`."""
  batches = jax.tree.map(lambda x: np.zeros((capacity, *x.shape), x.dtype), like)
  return Ring(batches, np.zeros((), np.int32))


def stored(memory: Ring, batch: Batch) -> Ring:
  """The memory with one more batch; when it is full, the oldest is overwritten."""
  index = int(memory.count) % _capacity(memory)

  def put(ring, x):
    ring = ring.copy()
    ring[index] = x
    return ring

  return Ring(jax.tree.map(put, memory.batches, batch), memory.count + np.int32(1))


def recalled(
  memory: Ring, *, lag: int, fraction: float, rows_per_prompt: int, random: np.random.Generator
) -> Batch:
  """The batch to train on: the one stored `lag` batches ago, partly replaced by older groups.

  While no batch is that old, the oldest is taken. Of its groups, round(fraction * groups) are chosen
  at random and replaced by groups drawn, without repetition, from all older batches; none is replaced
  while there is no older batch. `group_ids` remain those of the batch that was taken.

  Args:
    lag: 0 is the batch stored last.
    fraction: of the groups, 0 to 1.
    rows_per_prompt: consecutive rows of a group.
    random: decides which groups are replaced, and by which.
  """
  # Candidates are the batch of that age and all older ones, newest first.
  filled = min(int(memory.count), _capacity(memory))
  age = min(lag, filled - 1)
  indices = (int(memory.count) - 1 - np.arange(age, filled)) % _capacity(memory)
  candidates = jax.tree.map(lambda ring: np.concatenate(ring[indices]), memory.batches)
  # Which of the candidate groups each place gets.
  groups = len(candidates.group_ids) // len(indices) // rows_per_prompt
  source = np.arange(groups)
  if len(indices) > 1:
    places = random.choice(groups, size=round(fraction * groups), replace=False)
    older = np.arange(groups, groups * len(indices))
    source[places] = random.choice(older, size=len(places), replace=False)
  rows = (source[:, None] * rows_per_prompt + np.arange(rows_per_prompt)[None]).reshape(-1)
  taken = jax.tree.map(lambda x: x[rows], candidates)
  return taken.replace(group_ids=candidates.group_ids[: len(rows)])


def _capacity(memory: Ring) -> int:
  return len(memory.batches.group_ids)
