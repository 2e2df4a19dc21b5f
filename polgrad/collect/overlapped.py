"""Sampling beside training: a batch is sampled while the policy is updated on an earlier one."""

import concurrent.futures
import contextvars
from typing import Any

from polgrad import speed
from polgrad.collect.base import Collected, Draw
from polgrad.sharding import to_host
from polgrad.types import TrainState


class Overlapped:
  """Collects as `Steps` with a lag do, and gives the batch to train on before the new one is sampled.

  The first batch of a phase, or of a memory that is empty, is sampled before it is used, as without
  overlap. From then on a thread samples and scores new rows, by copies of the parameters that the
  policy has at the beginning of the step, while the batch of `lag` steps before is taken from the memory
  and trained on. What is sampled, remembered and used is therefore the same as with this lag alone,
  and so is every checkpoint.
  """

  def __init__(self, steps: Any):
    """Makes the collector of a `RolloutSteps`."""
    self.steps = steps
    self.threads = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='sampler')

  def collect(self, state: TrainState, draw: Draw, step: int) -> Collected:
    """The batch of a step, whose `pending` waits for the rows that are sampled in it."""
    memory = to_host(state.collect_state)
    if not int(memory.count):
      return self.steps.collect(state, draw, step)
    lent = self.steps.lent(state)
    within = contextvars.copy_context()  # the devices that programs are compiled for
    sampling = self.threads.submit(within.run, self.steps.fresh, lent, draw, step)
    own = speed.Meter()  # that of `steps` is used by the thread
    with own.timing('annotation'):
      random = self.steps.random(step)
      batch = self.steps.mixed(self.steps.recalled(memory, random, step, coming=1), random)
      batch = self.steps.annotated(batch, state, step, random)
      own.add('annotation', self.steps.annotate.flops(batch))
      batch, credit_state = self.steps.credit(batch, state)

    def finish(collected: Collected) -> Collected:
      with own.timing('waiting'):
        fresh, report = sampling.result()
      report.metrics['staleness'] = float(batch.staleness.mean())
      report.metrics.update(self.steps.meter.take() | own.take())
      return Collected(collected.batch, credit_state, self.steps.stored(fresh, memory), *report)

    return Collected(batch, credit_state, memory, {}, [], [], pending=finish)
