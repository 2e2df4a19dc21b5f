"""A memory of rollouts: batches that wait until they are used, and groups that are used again.

It is a ring of the last batches, arrays of fixed shape, so it is checkpointed like the rest
of the state and a resumed run goes on with the same rows.
"""

from typing import NamedTuple

import jax
import numpy as np

Rows = dict[str, np.ndarray]  # [B, ...] each


class Ring(NamedTuple):
  """The last `capacity` batches; batch number n (from 0) stands in slot n % capacity."""

  rows: Rows  # [capacity, B, ...] each
  count: np.ndarray  # i32[], batches stored so far


def empty(like: Rows, *, capacity: int) -> Ring:
  """Room for `capacity` batches with the shapes and dtypes of `like`."""
  rows = {name: np.zeros((capacity, *x.shape), x.dtype) for name, x in like.items()}
  return Ring(rows, np.zeros((), np.int32))


def stored(memory: Ring, rows: Rows) -> Ring:
  """The memory with one more batch, in the place of the oldest when it is full."""
  slot = int(memory.count) % _capacity(memory)

  def put(ring, x):
    ring = ring.copy()
    ring[slot] = x
    return ring

  return Ring(jax.tree.map(put, memory.rows, rows), memory.count + np.int32(1))


def recalled(
  memory: Ring, *, lag: int, fraction: float, rows_per_prompt: int, random: np.random.Generator
) -> Rows:
  """The batch to train on: that of `lag` batches ago, partly replaced by older groups.

  While there is none that old, it is the oldest there is. Of its groups, round(fraction * groups) are
  drawn at random and replaced by groups drawn, without repetition, from all older batches; while
  there is no older batch none is. `group_ids` stay those of the places.

  Args:
    lag: 0 is the batch stored last.
    fraction: of the groups, 0 to 1.
    group: rows of a group, which lie together.
    random: decides which groups, and by which.
  """
  filled = min(int(memory.count), _capacity(memory))
  age = min(lag, filled - 1)
  slots = (int(memory.count) - 1 - np.arange(age, filled)) % _capacity(memory)
  candidates = {name: np.concatenate(ring[slots]) for name, ring in memory.rows.items()}
  groups = len(candidates['group_ids']) // len(slots) // rows_per_prompt
  source = np.arange(groups)
  if len(slots) > 1:
    places = random.choice(groups, size=round(fraction * groups), replace=False)
    older = np.arange(groups, groups * len(slots))
    source[places] = random.choice(older, size=len(places), replace=False)
  rows = (source[:, None] * rows_per_prompt + np.arange(rows_per_prompt)[None]).reshape(-1)
  taken = {name: x[rows] for name, x in candidates.items()}
  return taken | {'group_ids': candidates['group_ids'][: len(rows)]}


def _capacity(memory: Ring) -> int:
  return len(memory.rows['group_ids'])
