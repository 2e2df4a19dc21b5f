"""Rollouts, and the answers of prompts that no sample solved, kept until there are enough of them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from polgrad.collect.base import Collect, Collected, Context, Draw
from polgrad.collect.rollout_steps import RolloutSteps
from polgrad.collect.rollouts import OTHER_ROWS, Rollouts
from polgrad.registry import AtLeastOne
from polgrad.sharding import to_host
from polgrad.types import Batch, Layout, TrainState

IMITATION = 'imitation'  # name of the batches for further updates


class Waiting(NamedTuple):
  """Answers that wait to be imitated, newest first."""

  tokens: np.ndarray  # i32[C, T]
  segment_ids: np.ndarray  # i32[C, T]
  mask: np.ndarray  # bool[C, T]
  count: np.ndarray  # i32[], how many of the rows are there


def empty(rows: int, length: int) -> Waiting:
  """Room for `rows` answers, none of which is there."""
  shape = (rows, length)
  numbers = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
  return Waiting(*numbers, np.zeros((), np.int32))


def pushed(waiting: Waiting, rows: Batch) -> Waiting:
  """The rows before those that wait; where there is no room, the oldest are dropped."""
  room = len(waiting.mask)
  join = lambda new, old: np.concatenate([new, old])[:room]
  count = min(int(waiting.count) + len(rows.mask), room)
  return Waiting(
    join(rows.tokens, waiting.tokens),
    join(rows.segment_ids, waiting.segment_ids),
    join(rows.mask, waiting.mask),
    np.asarray(count, np.int32),
  )


def popped(waiting: Waiting, number: int) -> tuple[Waiting, Waiting]:
  """The `number` newest answers, and what is left."""
  taken = Waiting(*(x[:number] for x in waiting[:3]), np.asarray(number, np.int32))
  left = (np.concatenate([x[number:], np.zeros_like(x[:number])]) for x in waiting[:3])
  return taken, Waiting(*left, np.asarray(waiting.count - number, np.int32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unsolved(Rollouts):
  """Samples completions, and hands the answers of unsolved prompts to a further update: ReLIFT
  (arXiv:2506.07527).

  A prompt is unsolved if all of its samples have exactly the reward `failed`. Its answer waits, and as
  soon as `imitated` answers wait, the newest ones are the batch `imitation` of that step, at most one a
  step. What waits is part of the state.
  """

  # Answers of a further update.
  imitated: AtLeastOne = 128
  # Reward of every sample of an unsolved prompt. Samples with a lower one, such as those without the
  # form that is asked for, leave their prompt out.
  failed: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    self.refuse('the groups of a step are fresh samples of its prompts alone', *OTHER_ROWS)

  @property
  def fields(self) -> tuple[str, ...]:
    return ('answer',)

  @property
  def further_rows(self) -> Mapping[str, int]:
    return {IMITATION: self.imitated}

  def init(self) -> tuple[Any, Waiting]:
    # Of the answers of a step, and fewer than a batch from before, none is dropped.
    return super().init(), empty(self.prompts + self.imitated - 1, self.length)

  def make(self, context: Context) -> Collect:
    return UnsolvedSteps(**self._parts(self.within(context))).collect


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnsolvedSteps(RolloutSteps):
  """The steps of `Unsolved`."""

  settings: Unsolved

  def collect(self, state: TrainState, draw: Draw, step: int) -> Collected:
    memory, waiting = to_host(state.collect_state)
    drawn = {}

    def remembering(count: int) -> Sequence[dict]:
      records = draw(count)
      drawn.update({record['id']: record for record in records})
      return records

    found = super().collect(state.replace(collect_state=memory), remembering, step)
    settings = self.settings
    unsolved = [drawn[i] for i in unsolved_prompts(found.batch, settings.failed)]
    if unsolved:
      answers = settings.demonstrated(unsolved, self.context.tokenizer, 'answer', cut=settings.cut)
      waiting = pushed(waiting, answers)
    further = {}
    if waiting.count >= settings.imitated:
      taken, waiting = popped(waiting, settings.imitated)
      further = {IMITATION: self._imitated(taken)}
    metrics = found.metrics | {
      'unsolved': float(len(unsolved)),
      'waiting': float(waiting.count),
    }
    return found._replace(
      collect_state=(found.collect_state, waiting), metrics=metrics, further=further
    )

  def _imitated(self, rows: Waiting) -> Batch:
    """A batch of answers; its prompts are forwarded one by one."""
    layout = self.context.layout
    return Batch(
      tokens=rows.tokens,
      segment_ids=rows.segment_ids,
      mask=rows.mask,
      layout=Layout(layout.prompt_length, 1, layout.pack),
    )


def unsolved_prompts(batch: Batch, failed: float) -> list[int]:
  """The ids of prompts whose rows are all valid and have the reward `failed`, in the order of rows."""
  ids, wrong = np.asarray(batch.prompt_ids), np.asarray(batch.valid & (batch.rewards == failed))
  others = {*ids[~wrong].tolist()}
  return [i for i in dict.fromkeys(ids.tolist()) if i not in others]
