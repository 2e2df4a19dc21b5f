"""A memory of sampled batches, which are used later (`lag`) or again (`replay`).

It is a ring of the last batches, or a buffer of the best groups: arrays of fixed shapes, so it is
checkpointed like the rest of the state, and a resumed run trains on the same rows.

Which of the remembered groups are used again is decided by a priority, a function of `TABLE` of n groups
of `G` rows. Its positional arguments name what it reads: `rewards` f[n, G], `valid` bool[n, G], and
`ages` f[n], in collected batches. A group of priority 0 is not used again.
"""

import math
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import jax
import numpy as np

from polgrad.registry import Fraction, NotNegative, call, table, unbound
from polgrad.types import Batch

Array = np.ndarray


def centred(rewards: Array, valid: Array) -> Array:
  """The valid rewards less the mean of those of their group, and 0 for others, f64[N, G].

  In a group whose rewards are all equal it is exactly 0; their mean may differ from them by rounding.
  """
  rewards, valid = np.asarray(rewards, np.float64), np.asarray(valid, bool)
  count = np.maximum(valid.sum(axis=1, keepdims=True), 1)
  mean = np.where(valid, rewards, 0).sum(axis=1, keepdims=True) / count
  largest = np.where(valid, rewards, -np.inf).max(axis=1, keepdims=True)
  smallest = np.where(valid, rewards, np.inf).min(axis=1, keepdims=True)
  return np.where(valid & (largest > smallest), rewards - mean, 0.0)


def variances(rewards: Array, valid: Array) -> Array:
  """The variance (divisor n) of the valid rewards of each group, f64[N]; 0 for fewer than 2.

  With rewards 0 and 1 it is p (1 - p).

  Args:
    rewards: f[N, G].
    valid: bool[N, G].

  >>> print(variances(np.array([[1, 1, 1, 0, 0, 0, 0, 0], [1] * 8]), np.ones((2, 8), bool)))
  [0.234375 0.      ]
  """
  count = np.maximum(np.sum(valid, axis=1), 1)
  return np.square(centred(rewards, valid)).sum(axis=1) / count


def uniform(ages: Array) -> Array:
  """All groups are alike."""
  return np.ones(len(ages))


def recency(ages: Array, *, decay: Fraction = 0.5) -> Array:
  """decay^(age - 1): groups of the batch before count 1, older ones less."""
  return decay ** np.maximum(ages - 1, 0)


def contrast(rewards: Array, valid: Array) -> Array:
  """sum_i |R_i - mean|, 0 where all rewards of the group are equal.

  With group-normalised advantages that is sum_i |A_i| times the standard deviation of the group, the
  score of the replay buffer of TRL.
  """
  return np.abs(centred(rewards, valid)).sum(axis=1)


def deviation(rewards: Array, valid: Array, *, eps: NotNegative = 1e-3) -> Array:
  """The standard deviation of the rewards of the group (ddof 0), plus eps.

  With eps > 0 groups of equal rewards are used again too, so that importance weights can make up for
  the priorities exactly (arXiv:1511.05952). A group without a valid row has the priority 0.
  """
  return np.where(valid.any(axis=1), np.sqrt(variances(rewards, valid)) + eps, 0)


def recovery(rewards: Array, valid: Array, ages: Array, *, decay: Fraction = 0.5) -> Array:
  """decay^(age - 1) for groups whose rewards differ, 0 for others.

  With replay_exponent=inf and replay_into='dull', places of groups without signal get the newest groups
  with one.
  """
  return np.where(contrast(rewards, valid) > 0, recency(ages, decay=decay), 0)


def mean_reward(rewards: Array, valid: Array) -> Array:
  """The mean reward of the group, at least 0."""
  mean = np.where(valid, rewards, 0).sum(axis=1) / np.maximum(valid.sum(axis=1), 1)
  return np.maximum(mean, 0)


TABLE = table('replay', uniform, recency, contrast, deviation, recovery, mean_reward)
Part = Annotated[Callable, TABLE]


class Ring(NamedTuple):
  """The last `capacity` batches; batch number n (from 0) is at index n % capacity."""

  batches: Batch  # every array has a leading axis: [capacity, B, ...]
  count: Array  # i32[], batches stored so far


class Best(NamedTuple):
  """The groups with the largest priorities so far, largest first."""

  rows: Batch  # every array is [capacity * G, ...]
  priorities: Array  # f32[capacity]; 0: there is no group yet


class Choice(NamedTuple):
  """Which groups of a batch are replaced, and by which of the remembered ones.

  Attributes:
    fraction: of the groups, the most that are replaced, 0 to 1.
    priority: of remembered groups.
    exponent: they are drawn with probabilities proportional to priority^exponent; infinity takes those
      with the largest priorities, the first ones of equal ones.
    into: 'random' replaces random groups, 'dull' those whose rewards are all equal, from the first.
    correction: exponent of the importance weights of groups that are used again (`importance_weights`),
      which are then drawn independently; None: the rows have no weights.
    scaled: whether these weights are divided by the largest one.
  """

  fraction: float
  priority: Callable = uniform
  exponent: float = 1.0
  into: Literal['random', 'dull'] = 'random'
  correction: float | None = None
  scaled: bool = True


def importance_weights(chances: Array, exponent: float, *, scaled: bool = True) -> Array:
  """w_i = (n P_i)^-b of the n groups that may be drawn, divided by the largest w_i if `scaled`, f[N]
  (prioritised replay, arXiv:1511.05952).

  With b = 1 and without scaling E[w f] is the mean of f over these groups, for any f; scaled it is that
  mean times the smallest n P_i, which is the same for all f.

  Args:
    chances: f[N], P, which add up to 1; a group of 0 is never drawn and gets the weight 0.
    exponent: b.
    scaled: whether the largest weight is 1.

  >>> print(importance_weights(np.array([0.5, 0.25, 0.25, 0.0]), 1.0).round(3))
  [0.5 1.  1.  0. ]
  """
  usable = chances > 0
  expected = np.where(usable, chances * usable.sum(), 1.0)
  weights = np.where(usable, expected**-exponent, 0.0)
  return weights / weights.max() if scaled and usable.any() else weights


def empty(like: Batch, *, capacity: int) -> Ring:
  """A ring for `capacity` batches with the arrays, shapes and dtypes of `like`."""
  batches = jax.tree.map(lambda x: np.zeros((capacity, *x.shape), x.dtype), like)
  return Ring(batches, np.zeros((), np.int32))


def empty_best(like: Batch, *, batches: int, rows_per_prompt: int) -> Best:
  """A buffer for as many groups as `batches` batches like this one have."""
  rows = jax.tree.map(lambda x: np.zeros((batches * len(x), *x.shape[1:]), x.dtype), like)
  return Best(rows, np.zeros(len(rows.group_ids) // rows_per_prompt, np.float32))


def stored(memory: Ring, batch: Batch) -> Ring:
  """The memory with one more batch; when it is full, the oldest is overwritten."""
  index = int(memory.count) % _capacity(memory)

  def put(ring, x):
    ring = ring.copy()
    ring[index] = x
    return ring

  return Ring(jax.tree.map(put, memory.batches, batch), memory.count + np.int32(1))


def drawn_rows(memory: Ring, count: int, random: np.random.Generator) -> Batch:
  """Random rows of all batches of a ring that holds at least one, without repetition where it can be."""
  rows = all_rows(memory)
  there = len(rows.group_ids)
  return rows_at(rows, random.choice(there, size=count, replace=count > there))


def all_rows(memory: Ring) -> Batch:
  """The rows of all batches of a ring that holds at least one."""
  filled = min(int(memory.count), _capacity(memory))
  return jax.tree.map(lambda ring: np.concatenate(ring[:filled]), memory.batches)


def rows_at(rows: Batch, places: np.ndarray) -> Batch:
  """Some rows of a batch (NumPy), in this order."""
  return jax.tree.map(lambda x: x[places], rows)


def stored_best(memory: Best, batch: Batch, choice: Choice) -> Best:
  """The buffer with the groups of a batch that are better than its worst ones.

  A group of priority 0 never enters; of equal groups the older one stays.
  """
  size = len(memory.rows.group_ids) // len(memory.priorities)
  found = _priorities(choice, batch, size, np.zeros(len(batch.group_ids) // size))
  both = np.concatenate([memory.priorities, found.astype(np.float32)])
  kept = np.argsort(-both, kind='stable')[: len(memory.priorities)]
  rows = _rows(kept, size)
  joined = jax.tree.map(lambda x, y: np.concatenate([x, y])[rows], memory.rows, batch)
  return Best(joined, both[kept])


def recalled(
  memory: Ring,
  *,
  lag: int,
  choice: Choice,
  rows_per_prompt: int,
  random: np.random.Generator,
  coming: int = 0,
) -> Batch:
  """The batch to train on: the one stored `lag` batches ago, partly replaced by older groups.

  While no batch is that old, the oldest is taken. Of its groups, round(fraction * groups) are replaced
  by groups of all older batches, without repetition; none is replaced while there is no older batch.
  `group_ids` remain those of the batch that was taken.

  Args:
    lag: 0 is the batch stored last.
    choice: which groups are replaced, and by which.
    rows_per_prompt: consecutive rows of a group.
    random: decides where the choice leaves it open.
    coming: 1 counts a batch that is not stored yet as the newest; then `lag` is at least 1, and there is
      a stored one.
  """
  # Candidates are the batch of that age and all older ones, newest first.
  count = int(memory.count) + coming
  filled = min(count, _capacity(memory))
  age = min(lag, filled - 1)
  indices = (count - 1 - np.arange(age, filled)) % _capacity(memory)
  candidates = jax.tree.map(lambda ring: np.concatenate(ring[indices]), memory.batches)
  # Which of the candidate groups each place gets.
  groups = len(candidates.group_ids) // len(indices) // rows_per_prompt
  ages = np.repeat(np.arange(len(indices)), groups).astype(float)
  return replaced(candidates, groups, ages, choice, rows_per_prompt, random)


def recalled_best(
  memory: Best, batch: Batch, *, choice: Choice, random: np.random.Generator
) -> Batch:
  """The batch, of which some groups are replaced by groups of the buffer, see `recalled`."""
  size = len(memory.rows.group_ids) // len(memory.priorities)
  there = np.flatnonzero(memory.priorities > 0)
  rows = _rows(there, size)
  candidates = jax.tree.map(lambda x, y: np.concatenate([x, y[rows]]), batch, memory.rows)
  groups = len(batch.group_ids) // size
  now = batch.sampled_at[0]
  ages = np.append(np.zeros(groups), (now - memory.rows.sampled_at[rows[::size]]).astype(float))
  return replaced(candidates, groups, ages, choice, size, random)


def replaced(
  candidates: Batch,
  groups: int,
  ages: Array,
  choice: Choice,
  size: int,
  random: np.random.Generator,
) -> Batch:
  """The first `groups` groups of the candidates, some of them replaced by the others.

  `group_ids` remain those of the first groups.

  Args:
    candidates: NumPy, groups of `size` consecutive rows.
    groups: number of groups of the result.
    ages: f[n] of all candidate groups, in collected batches.
    choice: which groups are replaced, and by which.
    size: rows of a group.
    random: decides where the choice leaves it open.

  Returns:
    The batch; with a `correction` it has the feature `replay_weight`, 1 for groups that are not older.
  """
  source, weights = np.arange(groups), np.ones(groups, np.float32)
  if len(ages) > groups:
    places = _places(choice, jax.tree.map(lambda x: x[: groups * size], candidates), size, random)
    weighed = _weighed(choice, candidates, size, ages)[groups:]
    taken = groups + _drawn(choice, weighed, len(places), random)
    source[places[: len(taken)]] = taken
    if choice.correction is not None:
      chances = weighed / max(weighed.sum(), 1e-300)
      corrected = importance_weights(chances, choice.correction, scaled=choice.scaled)
      weights[places[: len(taken)]] = corrected[taken - groups]
  rows = _rows(source, size)
  batch = jax.tree.map(lambda x: x[rows], candidates).replace(
    group_ids=candidates.group_ids[: len(rows)]
  )
  if choice.correction is None:
    return batch
  return batch.with_arrays(replay_weight=np.repeat(weights, size))


def _places(choice: Choice, batch: Batch, size: int, random: np.random.Generator) -> Array:
  """The groups of a batch that are replaced."""
  groups = len(batch.group_ids) // size
  most = round(choice.fraction * groups)
  if choice.into == 'random':
    return random.choice(groups, size=most, replace=False)
  spread = contrast(batch.rewards.reshape(-1, size), batch.valid.reshape(-1, size))
  return np.flatnonzero(spread == 0)[:most]


def _weighed(choice: Choice, candidates: Batch, size: int, ages: Array) -> Array:
  """priority^exponent of every group, f[n]; of older groups alone they count."""
  weights = _priorities(choice, candidates, size, ages)
  if math.isinf(choice.exponent):
    return weights
  return np.where(weights > 0, np.maximum(weights, 1e-30) ** choice.exponent, 0.0)


def _drawn(choice: Choice, weights: Array, count: int, random: np.random.Generator) -> Array:
  """Numbers of groups by their weights f[n]; none if all weights are 0."""
  usable = int(np.sum(weights > 0))
  if not usable or not count:
    return np.zeros(0, np.int64)
  if math.isinf(choice.exponent):
    return np.argsort(-weights, kind='stable')[: min(count, usable)]
  if choice.correction is None and unbound(choice.priority) is uniform:
    return random.choice(len(weights), size=count, replace=count > usable)
  # Only if more are needed than there are, or draws are corrected, a group comes more than once.
  repeated = count > usable or choice.correction is not None
  return random.choice(len(weights), size=count, replace=repeated, p=weights / weights.sum())


def _priorities(choice: Choice, batch: Batch, size: int, ages: Array) -> Array:
  """The priority of every group, f[n]."""
  read = {name: batch[name].reshape(-1, size) for name in ('rewards', 'valid') if name in batch}
  grouped = {'ages': ages, **read}
  return np.asarray(call(choice.priority, grouped), float)


def _rows(groups: Array, size: int) -> Array:
  """The rows of groups by their numbers."""
  return (groups[:, None] * size + np.arange(size)[None]).reshape(-1)


def _capacity(memory: Ring) -> int:
  return len(memory.batches.group_ids)
