"""What a curriculum is, and what several of them share: draws of rows, and counts by row."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from polgrad.data import stream
from polgrad.types import STREAMS, Array, Batch

Records = Sequence[Mapping]
State = Any  # pytree of arrays
TINY = 1e-30  # weight of a row that is only drawn when no other is left, as a fraction of the total


class Request(NamedTuple):
  """What a step asks of a curriculum: `count` rows out of `size`."""

  count: int
  size: int  # rows of the data
  cursor: int  # rows that the phase has drawn before
  seed: int  # of the phase
  shuffle: bool = True  # setting of the phase
  taken: tuple[int, ...] = ()  # rows that this step has drawn already
  samples_per_prompt: int = 1  # completions of each row that is drawn
  records: Records = ()  # of the data

  @property
  def random(self) -> np.random.Generator:
    """Random numbers of this request, the same ones in a resumed run."""
    return np.random.default_rng((self.seed, self.cursor, 6))

  def next_rows(self) -> np.ndarray:
    """The next rows of the shuffled epochs of the phase, i[count]."""
    place = dict(seed=self.seed, cursor=self.cursor, count=self.count, shuffle=self.shuffle)
    return np.asarray(stream.rows(self.size, **place))


class Sampled(NamedTuple):
  """The rows that a step has sampled and scored, also those that dynamic sampling has replaced."""

  rows: np.ndarray  # i32[n], row of the prompt in the data
  rewards: np.ndarray  # f32[n], 0 where not valid
  valid: np.ndarray  # bool[n]
  # f32[n] by name, terms of the reward; NaN where a verifier failed
  terms: Mapping[str, np.ndarray]
  replaced: np.ndarray  # bool[n], dynamic sampling took another prompt instead


class Observed(NamedTuple):
  """What a curriculum learns of a step. Rows that are not valid must be ignored.

  The rows that were trained on are others than the rows that were sampled where a collector remembers
  or chooses rows.
  """

  rows: Array  # i32[n], as in `Sampled`
  rewards: Array  # f32[n]
  valid: Array  # bool[n]
  terms: Mapping[str, Array]  # f32[n]
  trained_rows: Array  # i32[m], row of the prompt of each row that was trained on or replaced
  magnitudes: Array  # f32[m], mean |advantage| of its tokens; 0 if it was replaced
  trained_valid: Array  # bool[m], the policy sampled it, and something of it is trained on
  # f32[m], mean |log pi now - log pi then| of the last response to the prompt before this one, nats; 0
  # at the first. None: not measured, because the curriculum does not read it (`collect.responses`).
  drift: Array | None = None
  # f32[n, E], of the prompts of `rows`, if the curriculum embeds prompts
  embeddings: Array = np.zeros((0, 0), np.float32)


class Curriculum(NamedTuple):
  """Chooses the data rows of every step: pure functions of a state.

  The state is a pytree of arrays, usually with an entry for each row of the data. It is part of
  `TrainState` and its checkpoints.

  Attributes:
    init: records -> the first state; () if nothing is remembered.
    propose: (state, request) -> i[count] rows, NumPy. It runs on the host, and takes random numbers
      from the request alone.
    update: (state, observed) -> the next state, JAX. A step without valid rows changes nothing, except
      what counts steps. Several rows of one prompt count as one observation of all of them.
    features: (state, rows i[B]) -> {name: f32[B]}, what credit may read of the rows, from before the
      update.
    provides: names of the features.
    report: state -> metrics by name; an array has a number for each of `names`.
    names: records -> the names of the entries of such arrays.
    terms: names of the terms of the reward that `update` reads.
    embed: records -> f32[n, E], what `update` learns of prompts as `Observed.embeddings`; NumPy, on the
      host. None: nothing.
    pools: whether a row that a step draws several times makes one large group.
    reads: 'rewards' if `update` reads rewards, 'magnitudes' if it reads advantages, 'drift' if it reads
      how far the policy has moved on the last response to a prompt.
  """

  init: Callable[[Records], State]
  propose: Callable[[State, Request], np.ndarray]
  update: Callable[[State, Observed], State] = lambda state, observed: state
  features: Callable[[State, np.ndarray], dict[str, np.ndarray]] = lambda state, rows: {}
  provides: frozenset[str] = frozenset()
  report: Callable[[State], dict[str, Any]] = lambda state: {}
  names: Callable[[Records], tuple[str, ...]] = lambda records: ()
  terms: frozenset[str] = frozenset()
  reads: frozenset[str] = frozenset()
  pools: bool = False
  embed: Callable[[Records], np.ndarray] | None = None


def observed(
  batch: Batch,
  sampled: Sampled | None,
  drift: np.ndarray | None = None,
  records: Records = (),
  embed: Callable[[Records], np.ndarray] | None = None,
) -> Observed:
  """What a curriculum learns of a collected batch (NumPy).

  Args:
    sampled: of the step; None if nothing was sampled.
    drift: f32[B] of the rows of the batch, if it was measured.
    records: of the data.
    embed: of the curriculum.
  """
  if sampled is None:
    none = np.zeros(0, np.float32)
    sampled = Sampled(none.astype(np.int32), none, none > 0, {}, none > 0)
  away = sampled.rows[sampled.replaced]
  trained = np.zeros(0, np.int32) if batch.prompt_ids is None else batch.prompt_ids
  magnitudes, valid = np.zeros(len(trained), np.float32), np.zeros(len(trained), bool)
  if batch.advantages is not None and len(trained):
    tokens = batch.mask.sum(axis=1)
    total = np.where(batch.mask, np.abs(batch.advantages), 0.0).sum(axis=1)
    magnitudes = (total / np.maximum(tokens, 1)).astype(np.float32)
    valid = (tokens > 0) & from_policy(batch)
  return Observed(
    rows=sampled.rows,
    rewards=sampled.rewards,
    valid=sampled.valid,
    terms=sampled.terms,
    trained_rows=np.concatenate([trained, away]).astype(np.int32),
    magnitudes=np.concatenate([magnitudes, np.zeros(len(away), np.float32)]),
    trained_valid=np.concatenate([valid, sampled.valid[sampled.replaced]]),
    drift=None if drift is None else np.concatenate([drift, np.zeros(len(away), np.float32)]),
    **({} if embed is None else {'embeddings': _embedded(embed, records, sampled.rows)}),
  )


def from_policy(batch: Batch) -> np.ndarray:
  """bool[B]: the rows (NumPy) that the policy sampled: neither demonstrations nor opponents."""
  rows = np.ones(len(batch.mask), bool)
  if batch.stream is not None:
    rows &= batch.stream == STREAMS.index('sampled')
  return rows & (batch['opponent'] == 0) if 'opponent' in batch else rows


def _embedded(embed: Callable, records: Records, rows: np.ndarray) -> np.ndarray:
  """The embeddings of rows [n, E], each of which is computed once."""
  some, where = np.unique(rows, return_inverse=True)
  return embed([records[int(row)] for row in some])[where]


def best(keys: np.ndarray, request: Request) -> np.ndarray:
  """The rows with the largest keys f[size], largest first; of equal keys the first rows.

  Rows that the step has drawn already come after all others, and again if there are too few.
  """
  order = np.argsort(-np.asarray(keys), kind='stable')
  if request.taken:
    seen = np.isin(order, request.taken)
    order = np.concatenate([order[~seen], order])
  return np.resize(order, request.count)


def drawn(weights: np.ndarray, request: Request, *, repeated: bool = False) -> np.ndarray:
  """Rows with probabilities proportional to weights f[size]; weights that are all 0 count as equal.

  Args:
    repeated: draw independently, so that a row may come more than once. Otherwise a row comes again,
      and a row of weight 0 comes at all, only if no others are left.

  Raises:
    ValueError: a weight is negative or not finite.
  """
  weights = np.asarray(weights, np.float64)
  if not (np.isfinite(weights) & (weights >= 0)).all():
    row = int(np.argmin(np.isfinite(weights) & (weights >= 0)))
    raise ValueError(
      f'weights of rows must be at least 0 and finite, but row {row} has {weights[row]}'
    )
  total = weights.sum()
  chances = weights / total if total > 0 else np.full(len(weights), 1 / len(weights))
  random = request.random
  if repeated:
    return random.choice(len(chances), request.count, p=chances / chances.sum())
  # The largest log w + Gumbel noise: draws without replacement (Efraimidis and Spirakis 2006).
  return best(np.log(np.maximum(chances, TINY)) + random.gumbel(size=len(chances)), request)


class Counts(NamedTuple):
  """Successes of the valid completions of each row of the data in one step."""

  hits: Array  # f32[D], sum of the rewards, each cut to [0, 1]
  total: Array  # f32[D], number of completions


def counts(found: Observed, size: int, term: str = '') -> Counts:
  """The successes of every row.

  Args:
    size: rows of the data.
    term: name of the term of the reward that says how right a completion is; '' is the whole reward.
  """
  rewards = found.terms[term] if term else found.rewards
  valid = jnp.asarray(found.valid) & jnp.isfinite(jnp.asarray(rewards))
  right = jnp.where(valid, jnp.clip(jnp.asarray(rewards, jnp.float32), 0.0, 1.0), 0.0)
  spread = lambda x: jax.ops.segment_sum(x, jnp.asarray(found.rows), num_segments=size)
  return Counts(spread(right), spread(valid.astype(jnp.float32)))
