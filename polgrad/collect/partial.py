"""Partial rollouts: rows that continue over updates, and sampling that does not wait for the trainer.

More prompts are *in flight* than a batch has. A batch is made as soon as all rows of enough prompts are
over; the other rows continue later, with the newest weights. So a few long rows hold nothing up. What is
in flight is part of the state of a run: a resumed run continues it, and no row is lost or trained twice.
"""

import concurrent.futures
import contextvars
import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from polgrad import exchanges, speed
from polgrad.collect.base import Collect, Collected, Context, Draw, laid_out
from polgrad.collect.drawn import Drawn
from polgrad.collect.rollout_steps import RolloutSteps
from polgrad.collect.scored import distinct
from polgrad.collect.steps import Report
from polgrad.curricula import Sampled
from polgrad.learner import parameter_sets
from polgrad.sampling import resumable, stopping
from polgrad.sampling.resumable import EMPTY, Rows, complete
from polgrad.sharding import to_host
from polgrad.types import Batch, TrainState

# Settings of `Rollouts` that cannot be set beside `in_flight`: they give rows without versions of their
# tokens, need all rows of a prompt at once, or belong to another loop of decoding.
REFUSED = ('old_runs', 'beginning', 'hints', 'demonstrations', 'preferences', 'opponents', 'others')
REFUSED += ('environment', 'max_resamples', 'replay_correction')
REFUSED += ('slots', 'speculate', 'token_temperature')


class InFlight(NamedTuple):
  """What a collector with rows in flight remembers."""

  rows: Rows  # of F prompts
  memory: Any  # batches: those that wait to be used, and those of `replay`; () without any


def number_due(begun: np.ndarray, number: int, *, prompts: int, longest: int) -> int:
  """How many of the oldest prompts batch `number` has to contain, so that no prompt is ever late.

  A prompt that was drawn for batch n must be in one of the batches n to n + longest, and each batch
  has room for `prompts` of them. Of the prompts that must be in one of the next j + 1 batches, the
  later j batches hold j * prompts, so the rest is due now:

      max_j (#{n + longest <= number + j} - j * prompts)

  Args:
    begun: i32[F], n of each prompt.
    number: of the batch that is made now.
    prompts: of a batch.
    longest: batches that a prompt may be left out of.

  >>> number_due(np.array([0, 0, 0, 0]), 0, prompts=2, longest=1)
  2
  >>> number_due(np.array([0, 0, 1, 1]), 1, prompts=2, longest=2)
  0
  """
  later = np.arange(longest + 1)
  deadlines = begun[:, None] + longest <= number + later[None]
  return max(0, int((deadlines.sum(axis=0) - prompts * later).max()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class InFlightSteps(RolloutSteps):
  """The steps of `Rollouts` with rows in flight."""

  continue_rows: Callable[..., Rows]  # see `make_resumable_sampler`
  first_seen: int  # state of the stop strings before the first token

  def collect(self, state: TrainState, draw: Draw, step: int) -> Collected:
    rows, memory = to_host(state.collect_state)
    rows = self.filled(rows, draw, step)
    rows = self.drawn(rows, self.lent(state), number=step, version=step)
    batch, report, rows = self.taken(rows, state, draw, step)
    found = self.completed(batch, report, memory, state, step)
    return found._replace(collect_state=InFlight(rows, found.collect_state))

  def filled(self, rows: Rows, draw: Draw, number: int) -> Rows:
    """The rows with new prompts in the places of those that are gone.

    Args:
      number: of the batch that is made next.
    """
    samples = self.settings.samples_per_prompt
    empty = np.flatnonzero(rows.begun[::samples] == EMPTY)
    if not len(empty):
      return rows
    prompts = laid_out(self.draw_rows.lay_out, draw(len(empty)))
    places = _rows(empty, samples)
    width = prompts.tokens.shape[1]
    spread = lambda x: np.repeat(x, samples, axis=0)
    rows = jax.tree.map(np.copy, rows)
    for x in rows:
      x[places] = 0
    rows.tokens[places, :width] = spread(prompts.tokens)
    rows.real[places, :width] = spread(prompts.mask)
    rows.begun[places], rows.seen[places] = number, self.first_seen
    rows.prompt_ids[places] = spread(prompts.ids)
    rows.noise_ids[places] = spread(distinct(prompts.ids))
    return rows

  def due(self, rows: Rows, number: int) -> np.ndarray:
    """The prompts that batch `number` has to contain, oldest first."""
    settings = self.settings
    begun = rows.begun[:: settings.samples_per_prompt]
    count = number_due(begun, number, prompts=settings.prompts, longest=settings.batches_in_flight)
    return np.argsort(begun, kind='stable')[:count]

  def drawn(
    self,
    rows: Rows,
    state: TrainState,
    *,
    number: int,
    version: int,
    stop: Callable[[Rows], bool] = lambda rows: False,
  ) -> Rows:
    """The rows after draws, until batch `number` can be made of them or `stop` says True.

    Args:
      state: whose parameters draw.
      version: of these parameters: the batches that had been used for training when they were taken.
    """
    settings, params = self.settings, parameter_sets(state, self.context.frozen)
    due = np.zeros(settings.in_flight, bool)
    due[self.due(rows, number)] = True
    with self.meter.timing('rollout'):
      return self.continue_rows(
        {name: params[name] for name in self.draw_rows.reads},
        rows,
        seed=self.context.seed,
        version=version,
        due=due,
        needed=settings.prompts,
        chunk=settings.chunk,
        stop=stop,
      )

  def ready(self, rows: Rows, number: int) -> np.ndarray | None:
    """The prompts of batch `number`: those that are due, and the oldest others that are complete.

    None if they are not complete.
    """
    settings = self.settings
    done, due = complete(rows, settings.samples_per_prompt), self.due(rows, number)
    if done.sum() < settings.prompts or not done[due].all():
      return None
    oldest = np.argsort(rows.begun[:: settings.samples_per_prompt], kind='stable')
    others = [i for i in oldest if done[i] and i not in due]
    return np.sort(np.concatenate([due, others])[: settings.prompts].astype(int))

  def taken(
    self, rows: Rows, state: TrainState, draw: Draw, number: int
  ) -> tuple[Batch, Report, Rows]:
    """Batch `number`, scored, and the rows that are left in flight."""
    samples, prompts = self.settings.samples_per_prompt, self.ready(rows, number)
    places = _rows(prompts, samples)
    taken = jax.tree.map(lambda x: x[places], rows)
    source = self.context.source
    records = [{**source[i], 'id': i} for i in taken.prompt_ids[::samples].tolist()]
    with self.meter.timing('scoring'):
      batch = batch_of(taken, samples, self.context.tokenizer.pad_id)
      batch, report = self.score(self.count(Drawn(batch), samples), records, state, draw, number)
      batch = batch.replace(sampled_at=_oldest(batch))
    left = rows._replace(begun=rows.begun.copy())
    left.begun[places] = EMPTY
    report.metrics['in_flight'] = float(left.made[left.begun != EMPTY].sum())
    return batch, report, left

  def annotated(
    self, batch: Batch, state: TrainState, step: int, random: np.random.Generator
  ) -> Batch:
    ages = np.where(batch.mask, step - batch['versions'], 0).astype(np.float32)
    return super().annotated(batch.with_arrays(token_staleness=ages), state, step, random)


def _rows(prompts: np.ndarray, samples: int) -> np.ndarray:
  """The rows of prompts by their numbers."""
  return (prompts[:, None] * samples + np.arange(samples)[None]).reshape(-1)


def _oldest(batch: Batch) -> np.ndarray:
  """i32[B], the version that drew the first token of each row."""
  first = np.argmax(batch.mask, axis=1)
  return batch['versions'][np.arange(len(first)), first].astype(np.int32)


def batch_of(rows: Rows, samples: int, pad_id: int) -> Batch:
  """Complete rows as the sampler of one step would give them, with the `versions` of their tokens."""
  width = rows.tokens.shape[1] - rows.logp.shape[1]
  wide = lambda x: np.pad(x, ((0, 0), (width, 0)))
  return Batch(
    tokens=np.where(rows.real, rows.tokens, pad_id).astype(np.int32),
    segment_ids=rows.real.astype(np.int32),
    mask=wide(rows.real[:, width:]),
    behavior_logp=wide(rows.logp),
    finished=rows.finished,
    prompt_ids=rows.prompt_ids,
    group_ids=np.arange(len(rows.made), dtype=np.int32) // samples,
  ).with_arrays(versions=wide(rows.versions))


def make_in_flight_steps(settings: Any, context: Context, fields: dict[str, Any]) -> InFlightSteps:
  """The steps of `Rollouts` with `in_flight`.

  Args:
    fields: of `RolloutSteps`.
  """
  tokenizer, policy, drawn_from = context.tokenizer, context.policy, context.engine.drawn_from
  table = stopping.for_policy(tokenizer, policy)
  sample = resumable.make_resumable_sampler(
    {name: drawn_from(one) for name, one in context.frozen.items()},
    default=drawn_from(policy),
    behavior_policy=settings.behavior_policy,
    samples_per_prompt=settings.samples_per_prompt,
    stop_ids=tokenizer.stop_ids,
    stop_table=table,
    pad_id=tokenizer.pad_id,
    mesh=context.sampler_mesh or context.mesh,
    refill=settings.refill,
    **{n: getattr(settings, n) for n in ('max_new_tokens', 'temperature', 'top_k', 'top_p')},
  )
  return InFlightSteps(**fields, continue_rows=sample, first_seen=table.start if table else 0)


class Lender:
  """Gives the sampler copies of the parameters, anew every `weights_every` steps."""

  def __init__(self, steps: InFlightSteps):
    self._steps, self._lent, self._version = steps, None, 0

  def __call__(self, state: TrainState, step: int) -> tuple[TrainState, int]:
    """The state whose parameters sample, and their version: the step in which they were copied."""
    if self._lent is not None and step - self._version < self._steps.settings.weights_every:
      self._steps.meter.move('transfer', ())
    else:
      self._lent, self._version = self._steps.lent(state), step
    # What the sampler reads besides parameters, such as counters, is that of this step.
    copies = dict(params=self._lent.params, anchors=self._lent.anchors)
    return state.replace(opt_state=(), learned={}, **copies), self._version


def asynchronous(steps: InFlightSteps) -> Collect:
  """Collects while the policy is updated: a thread makes batches, up to `lag` that wait to be used.

  Without a `chunk` the thread makes in each step all batches for which there is room, by the
  parameters at its beginning; all numbers are then determined by the configuration. With a `chunk`, it
  is interrupted when the updates of the step are over, after the chunk in hand: the trainer waits only
  if no batch is left. Which parameters draw a token then depends on the speed of both; `versions`
  says it.

  Args:
    steps: whose memory is a ring.

  Returns:
    What makes the batch of a step. `Collected.pending` waits for the thread.
  """
  settings = steps.settings
  threads = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='sampler')
  lend = Lender(steps)

  def produced(
    flight: InFlight, lent: TrainState, version: int, draw: Draw, until: int, stop: Callable
  ) -> tuple[InFlight, list[Report]]:
    """What is in flight after batches were made, up to number `until`, and what to report of them."""
    rows, memory = flight
    reports = []
    with exchanges.on(steps.context.sampler_mesh or steps.context.mesh):
      while int(memory.count) < until and not stop(rows):
        number = int(memory.count)
        rows = steps.filled(rows, draw, number)
        rows = steps.drawn(rows, lent, number=number, version=version, stop=stop)
        if steps.ready(rows, number) is None:  # interrupted
          break
        batch, report, rows = steps.taken(rows, lent, draw, number)
        memory = steps.stored(batch, memory)
        reports.append(report)
    return InFlight(rows, memory), reports

  def collect(state: TrainState, draw: Draw, step: int) -> Collected:
    flight = InFlight(*to_host(state.collect_state))
    lent, version = lend(state, step)
    early = []
    if int(flight.memory.count) <= step:  # nothing waits: make the batch now
      flight, early = produced(flight, lent, version, draw, step + 1, lambda rows: False)

    # Sample in the thread.
    over = threading.Event()
    is_over = lambda rows: exchanges.first(over.is_set, 'whether the updates are over')
    stop = is_over if settings.chunk else (lambda rows: False)
    within = contextvars.copy_context()  # the devices that programs are compiled for
    until = step + 1 + settings.lag
    sampling = threads.submit(within.run, produced, flight, lent, version, draw, until, stop)

    # Meanwhile, take the batch to train on.
    own = speed.Meter()  # that of `steps` is used by the thread
    with own.timing('annotation'):
      random, waiting = steps.random(step), int(flight.memory.count) - 1 - step
      batch = steps.recalled(flight.memory, random, step, lag=waiting)
      batch = steps.annotated(batch, state, step, random)
      own.add('annotation', steps.annotate.flops(batch))
      batch, credit_state = steps.credit(batch, state)

    def finish(collected: Collected) -> Collected:
      with own.timing('waiting'):
        over.set()
        after, late = sampling.result()
      report = joined(early + late)
      report.metrics.update(steps.meter.take() | own.take())
      report.metrics['staleness'] = float(batch.staleness.mean())
      report.metrics['staleness/largest'] = float(batch['token_staleness'].max())
      report.metrics['batches_waiting'] = float(int(after.memory.count) - 1 - step)
      return Collected(collected.batch, credit_state, after, *report)

    return Collected(batch, credit_state, flight, {}, [], [], pending=finish)

  return collect


def joined(reports: Sequence[Report]) -> Report:
  """One report of the batches that were made in a step, of which there may be none."""
  if not reports:
    nothing = Sampled(
      *(np.zeros(0, dtype) for dtype in (np.int32, np.float32, bool)), {}, np.zeros(0, bool)
    )
    return Report({}, [], [], {}, (), nothing)
  names = set.intersection(*(set(one.metrics) for one in reports))
  means = {name: float(np.mean([one.metrics[name] for one in reports])) for name in sorted(names)}
  sampled = jax.tree.map(lambda *parts: np.concatenate(parts), *(one.sampled for one in reports))
  messages = [message for one in reports for message in one.messages]
  return reports[-1]._replace(metrics=means, messages=messages, sampled=sampled)
