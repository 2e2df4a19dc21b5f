"""Sampling before training: the first step of a phase samples, and all steps train on what was kept.

So an iteration of RFT or STaR samples its prompts with one policy, filters the samples, and then makes
several epochs over them.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from polgrad.collect.base import Collect, Collected, Draw
from polgrad.collect.steps import Report
from polgrad.sharding import to_host
from polgrad.types import Batch, TrainState

if TYPE_CHECKING:
  from polgrad.collect.rollout_steps import RolloutSteps

# Settings of `Rollouts` that bring rows of other steps into a batch, or read the batch before.
REFUSED = ('lag', 'replay', 'old_runs', 'overlap', 'in_flight', 'beginning', 'token_temperature')
REFUSED += ('compare', 'max_resamples')


class Kept(NamedTuple):
  """The rows of the first step that every step trains on, in the order in which they were sampled."""

  rows: Batch  # [capacity, ...]
  count: np.ndarray  # i32[], rows that are there


def empty(blank: Batch, batches: int) -> Kept:
  """No rows, with room for those of a number of batches.

  Args:
    blank: a batch of zeros.
  """
  room = lambda x: np.zeros((batches * len(x), *x.shape[1:]), x.dtype)
  return Kept(jax.tree.map(room, blank), np.zeros((), np.int32))


def added(memory: Kept, batch: Batch) -> Kept:
  """The memory with the rows of a batch (NumPy) that are valid and have a mask, until it is full.

  Its arrays are changed in place.
  """
  first, capacity = int(memory.count), len(memory.rows.mask)
  good = np.flatnonzero(batch.valid & batch.mask.any(axis=1))[: capacity - first]
  for name in memory.rows.names():
    memory.rows[name][first : first + len(good)] = batch[name][good]
  return memory._replace(count=np.asarray(first + len(good), np.int32))


def order(count: int, size: int, step: int, seed: int) -> np.ndarray:
  """The rows of a step, i[size]: consecutive ones of shuffled epochs over `count` rows."""
  places = np.arange(step * size, (step + 1) * size)
  shuffled = lambda epoch: np.random.default_rng((seed, 9, epoch)).permutation(count)
  epochs = {epoch: shuffled(epoch) for epoch in np.unique(places // count).tolist()}
  return np.array([epochs[place // count][place % count] for place in places.tolist()])


def taken(memory: Kept, size: int, step: int, seed: int) -> Batch:
  """The batch of a step: `size` rows of the memory; without any, rows that are not valid."""
  count = int(memory.count)
  rows = order(count, size, step, seed) if count else np.zeros(size, int)
  batch = jax.tree.map(lambda x: x[rows], memory.rows)
  return batch.replace(group_ids=np.arange(size, dtype=np.int32))


def sampled_first(steps: 'RolloutSteps') -> Collect:
  """Collects as the steps of a collector do in the first step of a phase, until enough rows are kept.

  Sampling ends when the memory is full, when every record of the data was drawn once, or after
  `sample_first_most` batches. Every step trains on rows of the memory.
  """
  settings, size = steps.settings, steps.settings.rows

  def sample(state: TrainState, draw: Draw) -> tuple[Kept, Report]:
    memory, reports, lent = settings.init(), [], steps.lent(state)
    once = math.ceil(len(steps.context.source) / settings.prompts)
    # The number of the batch is in the place of that of the step, so each draws other noise.
    for number in range(min(settings.sample_first_most, once)):
      batch, report = steps.fresh(lent, draw, number)
      memory = added(memory, batch.replace(sampled_at=np.zeros(len(batch.mask), np.int32)))
      reports.append(report)
      if int(memory.count) == len(memory.rows.mask):
        break
    report = joined(reports)
    report.metrics['sampled_first/kept'] = float(memory.count)
    report.metrics['sampled_first/batches'] = float(len(reports))
    if not int(memory.count):
      sampled = len(reports) * settings.prompts
      report.messages.append(
        f'sample_first: no completion of {sampled} prompts is kept, so the steps of this phase have '
        'nothing to learn'
      )
    return memory, report

  def collect(state: TrainState, draw: Draw, step: int) -> Collected:
    memory, report = to_host(state.collect_state), Report({}, [], [], {})
    if step == 0:
      memory, report = sample(state, draw)
    with steps.meter.timing('annotation'):
      random = steps.random(step)
      batch = taken(memory, size, step, steps.context.seed)
      batch = steps.annotated(batch, state, step, random)
      steps.meter.add('annotation', steps.annotate.flops(batch))
      batch, credit_state = steps.credit(batch, state)
    report.metrics['staleness'] = float(batch.staleness.mean())
    report.metrics.update(steps.meter.take())
    return Collected(batch, credit_state, memory, *report)

  return collect


def joined(reports: Sequence[Report]) -> Report:
  """One report of several batches: means of metrics, the samples of the first, and what all drew.

  The rows of the batch are others, so it has neither terms nor episodes of rows.
  """
  names = {name: None for one in reports for name in one.metrics}
  values = {name: [one.metrics[name] for one in reports if name in one.metrics] for name in names}
  return Report(
    {name: float(np.mean(x)) for name, x in values.items()},
    reports[0].samples,
    [message for one in reports for message in one.messages],
    {},
    (),
    jax.tree.map(lambda *parts: np.concatenate(parts), *(one.sampled for one in reports)),
  )
