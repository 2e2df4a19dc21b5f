"""Sampling beside training: a batch is sampled while the policy is updated on an earlier one."""

import concurrent.futures
import contextvars
from typing import Any

from polgrad import speed
from polgrad.collect.base import Collect, Collected, Draw
from polgrad.sharding import to_host
from polgrad.types import TrainState


def overlapped(steps: Any) -> Collect:
  """Collects as the steps of a collector with a lag do, and gives the batch to train on before the new
  one is sampled.

  The first batch of a phase is sampled before it is used, as without overlap. From then on a thread
  samples and scores new rows, by copies of the parameters that the policy has at the beginning of the
  step, while the batch of `lag` steps before is taken from the memory and trained on. What is sampled,
  remembered and used is therefore the same as with this lag alone, and so is every checkpoint.

  Args:
    steps: a `RolloutSteps`.

  Returns:
    What makes the batch of a step. `Collected.pending` waits for the rows that are sampled in it.
  """
  threads = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='sampler')

  def collect(state: TrainState, draw: Draw, step: int) -> Collected:
    memory = to_host(state.collect_state)
    if not int(memory.count):
      return steps.collect(state, draw, step)
    # Sample in the thread.
    within = contextvars.copy_context()  # the devices that programs are compiled for
    sampling = threads.submit(within.run, steps.fresh, steps.lent(state), draw, step)

    # Meanwhile, take the batch to train on from the memory.
    own = speed.Meter()  # that of `steps` is used by the thread
    with own.timing('annotation'):
      random = steps.random(step)
      batch = steps.mixed(steps.recalled(memory, random, step, coming=1), random)
      batch = steps.annotated(batch, state, step, random)
      own.add('annotation', steps.annotate.flops(batch))
      batch, credit_state = steps.credit(batch, state)

    def finish(collected: Collected) -> Collected:
      with own.timing('waiting'):
        fresh, report = sampling.result()
      report.metrics['staleness'] = float(batch.staleness.mean())
      report.metrics.update(steps.meter.take() | own.take() | steps.context.engine.take())
      return Collected(collected.batch, credit_state, steps.stored(fresh, memory), *report)

    return Collected(batch, credit_state, memory, {}, [], [], pending=finish)

  return collect
