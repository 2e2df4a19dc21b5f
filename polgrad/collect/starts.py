"""A priority buffer of states to start from again: data rows with the attempts that were made at them.

The buffer is arrays of fixed shapes, so it is checkpointed like the rest of the state, and a resumed run
starts from the same states. All functions are pure and run on the host.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

Array = np.ndarray
By = Literal['priority', 'rank']
Extend = Literal['random', 'best', 'worst']


class Start(NamedTuple):
  """A data row, and the attempts at it that a prompt shows, oldest first."""

  row: int
  attempts: Sequence[Sequence[int]]  # token ids, without the stop token
  depth: int  # attempts that were made in all, also those that are not shown any more
  priority: float


class Starts(NamedTuple):
  """The starts with the largest priorities, `C` places of `K` attempts of `T` tokens.

  A place of priority 0 is free. A start whose priority falls to 0 gives its place free.
  """

  rows: Array  # i32[C], row of the data
  priorities: Array  # f32[C], at least 0
  tokens: Array  # i32[C, K, T], oldest attempt first, 0 behind the end
  lengths: Array  # i32[C, K], tokens of each attempt; -1: there is none
  depths: Array  # i32[C]
  too_long: Array  # i32[], starts that had no room in a prompt so far


def empty(capacity: int, attempts: int, length: int) -> Starts:
  """A buffer of `capacity` places for at most `attempts` attempts of `length` tokens each."""
  return Starts(
    rows=np.zeros(capacity, np.int32),
    priorities=np.zeros(capacity, np.float32),
    tokens=np.zeros((capacity, attempts, length), np.int32),
    lengths=np.full((capacity, attempts), -1, np.int32),
    depths=np.zeros(capacity, np.int32),
    too_long=np.zeros((), np.int32),
  )


def start(memory: Starts, place: int) -> Start:
  """What is in a place."""
  shown = [
    ids[:n].tolist() for ids, n in zip(memory.tokens[place], memory.lengths[place]) if n >= 0
  ]
  row, depth = int(memory.rows[place]), int(memory.depths[place])
  return Start(row, shown, depth, float(memory.priorities[place]))


def extended(row: int, before: Start | None, attempt: Sequence[int], priority: float) -> Start:
  """A start with one more attempt; `before` is None for a row without attempts."""
  attempts, depth = ([], 0) if before is None else (before.attempts, before.depth)
  return Start(row, [*attempts, [*map(int, attempt)]], depth + 1, priority)


def probabilities(priorities: Array, *, by: By = 'priority', exponent: float = 1.0) -> Array:
  """Probabilities of the places, f64[C]: proportional to priority^exponent, or to rank^-exponent.

  The largest priority has rank 1. A place of priority 0 has probability 0; without any other all are 0.

  >>> print(probabilities(np.array([0.25, 0.0, 0.1875])).round(4))
  [0.5714 0.     0.4286]
  >>> print(probabilities(np.array([0.25, 0.0, 0.1875]), by='rank').round(4))
  [0.6667 0.     0.3333]
  """
  priorities = np.asarray(priorities, np.float64)
  usable = priorities > 0
  if by == 'rank':
    order = np.argsort(-priorities, kind='stable')
    worth = 1.0 / (1 + np.argsort(order, kind='stable'))
  else:
    worth = np.maximum(priorities, 1e-30)
  weights = np.where(usable, worth**exponent, 0.0)
  return weights / max(weights.sum(), 1e-300)


def chosen(
  memory: Starts,
  count: int,
  random: np.random.Generator,
  *,
  new: float,
  by: By = 'priority',
  exponent: float = 1.0,
) -> Array:
  """The places that the `count` groups of a step start from, i[count]; -1 is a new data row.

  Each is -1 with probability `new`, and otherwise a place of the buffer, by `probabilities`. A place
  comes at most once in a step, so with fewer usable places more are -1.
  """
  again = random.random(count) >= new
  chances = probabilities(memory.priorities, by=by, exponent=exponent)
  number = min(int(again.sum()), int((chances > 0).sum()))
  places = np.full(count, -1)
  if number:
    taken = random.choice(len(chances), size=number, replace=False, p=chances)
    places[np.flatnonzero(again)[:number]] = taken
  return places


def measured(memory: Starts, places: Array, variances: Array) -> Starts:
  """The buffer whose places i[n] have the variances f[n] as priorities; a place -1 is left out."""
  priorities = memory.priorities.copy()
  known = np.asarray(places) >= 0
  priorities[np.asarray(places)[known]] = np.asarray(variances)[known]
  return memory._replace(priorities=priorities)


def pushed(memory: Starts, found: Sequence[Start]) -> Starts:
  """The buffer with further starts; those of the lowest priority leave it.

  A start of priority 0 never enters. Of equal priorities the one that came first stays. A start that is
  there already only changes its priority. Attempts that a place has no room for are left out, the oldest
  first.
  """
  entries = [start(memory, place) for place in np.flatnonzero(memory.priorities > 0)]
  shown = memory.tokens.shape[1]
  known = {}
  for one in [*entries, *(_shortened(s, shown) for s in found if s.priority > 0)]:
    known[one.row, tuple(map(tuple, one.attempts))] = one
  kept = sorted(known.values(), key=lambda s: -s.priority)[: len(memory.rows)]
  out = empty(*memory.tokens.shape)._replace(too_long=memory.too_long)
  for place, one in enumerate(kept):
    out.rows[place], out.priorities[place], out.depths[place] = one.row, one.priority, one.depth
    for number, ids in enumerate(one.attempts):
      out.tokens[place, number, : len(ids)], out.lengths[place, number] = ids, len(ids)
  return out


def _shortened(one: Start, shown: int) -> Start:
  """With the last attempts alone, and with the precision of the buffer."""
  return one._replace(attempts=one.attempts[-shown:], priority=float(np.float32(one.priority)))


def picked(rewards: Array, valid: Array, random: np.random.Generator, *, extend: Extend) -> Array:
  """The row of each group that extends the history, i[N]: a valid one, where there is one.

  Args:
    rewards: f[N, G].
    valid: bool[N, G].
    extend: 'random', or one of the rows with the largest ('best') or smallest ('worst') reward.
  """
  signed = {'random': 0.0, 'best': 1.0, 'worst': -1.0}[extend] * np.asarray(rewards, np.float64)
  noise = random.random(signed.shape)
  # The largest noise among the rows with the largest score.
  best = np.where(valid, signed, -np.inf)
  best = valid & (best == best.max(axis=1, keepdims=True))
  return np.argmax(np.where(best, noise, np.where(valid, -1.0, -2.0)), axis=1)
