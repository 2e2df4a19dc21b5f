"""Rollouts of which some start from states of given answers, and say so (HNPG)."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from polgrad.collect.base import Collect, Context
from polgrad.collect.drawn import Drawn
from polgrad.collect.rollout_steps import RolloutSteps
from polgrad.collect.rollouts import Rollouts
from polgrad.collect.scored import Texts
from polgrad.types import STREAMS, Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restarts(Rollouts):
  """Rollouts with a `beginning`, whose `Batch.stream` tells the two kinds of rows from each other.

  A row that begins with a part of the record's answer is in the stream of demonstrations: it is what the
  policy does in a state of the data. Other rows are in that of samples. So an objective can give both
  kinds their own mean, and credit their own targets.
  """

  def __post_init__(self):
    super().__post_init__()
    if not self.begins or self.hints:
      raise ValueError(
        'Restarts: some rows begin in a state of the data, so it needs a beginning, such as '
        'beginnings.uniform with a probability below 1, and no hints; Rollouts has the others'
      )

  def _shapes(self) -> dict[str, tuple]:
    return super()._shapes() | {'stream': (np.int32,)}

  def make(self, context: Context) -> Collect:
    return RestartSteps(**self._parts(self.within(context))).collect


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestartSteps(RolloutSteps):
  """The steps of `Restarts`."""

  def _scored(self, rows: Drawn, records: Sequence[dict]) -> tuple[Batch, Texts]:
    batch, texts = super()._scored(rows, records)
    kinds = ['demonstration' if 'begun' in record else 'sampled' for record in records]
    each = np.array([STREAMS.index(kind) for kind in kinds], np.int32)
    return batch.with_arrays(stream=np.repeat(each, len(batch.tokens) // len(records))), texts

  def _with_kinds(self, batch: Batch) -> Batch:
    """The batch with what says which row is which, except `stream`, which rows have already."""
    return super()._with_kinds(batch).replace(stream=batch.stream)
