"""A weighted sum of objectives over one batch, each with its own reduction and choice of rows."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Annotated

from polgrad import optim
from polgrad.losses import row_choices
from polgrad.objectives.base import (
  Metrics,
  Objective,
  Select,
  State,
  StatFunction,
  Terms,
  call_slot,
  check_names,
  reads,
)
from polgrad.objectives.likelihood import Distillation, Supervised
from polgrad.objectives.policy_gradient import PolicyGradient
from polgrad.objectives.prefix_scorer import PrefixValues
from polgrad.objectives.reward_model import RewardModel
from polgrad.objectives.row_level import Listwise, Pointwise
from polgrad.objectives.sequence_level import Pairwise, Regression
from polgrad.registry import check_weighted, table
from polgrad.types import STREAMS, Array, Batch, Outputs

FAMILIES = table(
  'objectives',
  PolicyGradient,
  Pairwise,
  RewardModel,
  Pointwise,
  Listwise,
  Regression,
  PrefixValues,
  Distillation,
  Supervised,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightedSum(Objective):
  """sum_k weight_k * schedule_k(step) * objective_k.

  The model reads the batch once, whatever the number of objectives. Several of them may see the same
  rows, and each divides by its own counts. Terms, metrics and features of an objective get its name
  and a slash as a prefix.

  Attributes:
    streams: objectives by name, each `weighted(w, part(...))`.
    schedules: factors of an objective's weight by update, for some of the objectives.
    rows: which rows an objective sees, for some of the objectives. Without a choice, an objective
      that is called like one of `types.STREAMS` sees the rows of that stream, if the batch has streams.
      In such a batch every objective needs one of the two. In other batches an objective without a
      choice sees all rows, under any name. Rows that credit has masked are seen by none.

  Raises:
    TypeError: an objective without a weight.
    ValueError: a schedule or a choice of rows without its objective.
  """

  streams: Mapping[str, Annotated[Objective, FAMILIES]]
  schedules: Mapping[str, optim.SchedulePart] = dataclasses.field(default_factory=dict)
  rows: Mapping[str, row_choices.Part] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    check_weighted('streams', self.streams)
    check_names('schedules', self.schedules, self.streams)
    check_names('rows', self.rows, self.streams)

  @functools.cached_property
  def parts(self) -> dict[str, Objective]:
    """The objectives by name, without their weights."""
    return {name: self.streams[name].fn for name in sorted(self.streams)}

  @functools.cached_property
  def slots(self) -> Mapping[str, Callable]:
    of_parts = {f'streams.{k}.{s}': f for k, p in self.parts.items() for s, f in p.slots.items()}
    return of_parts | {f'rows.{k}': f for k, f in self.rows.items()}

  @functools.cached_property
  def makes(self) -> frozenset[str]:
    return frozenset().union(*(part.makes for part in self.parts.values()))

  @functools.cached_property
  def requires(self) -> frozenset[str]:
    by_name = self.parts.keys() - self.rows.keys()
    of_rows = reads(self.rows.values())
    of_rows |= {'stream'} if by_name and by_name <= {*STREAMS} else set()
    return of_rows.union(*(part.requires for part in self.parts.values()))

  @functools.cached_property
  def stats(self) -> Mapping[str, StatFunction]:
    return {k: f for name, part in self.parts.items() for k, f in _add(name, part.stats).items()}

  @functools.cached_property
  def rows_per_prompt(self) -> int:
    return max(part.rows_per_prompt for part in self.parts.values())

  @functools.cached_property
  def probes(self) -> Collection[str]:
    return frozenset(
      f'{name}/{probe}' for name, part in self.parts.items() for probe in part.probes
    )

  @property
  def select(self) -> Select | None:
    return self.compare if any(part.select for part in self.parts.values()) else None

  def init(self) -> State:
    return {name: part.init() for name, part in self.parts.items()}

  def advance(self, state: State, metrics: Metrics) -> State:
    return {
      name: part.advance(state[name], _remove(name, metrics)) for name, part in self.parts.items()
    }

  def apply(
    self, outputs: Outputs, batch: Batch, state: State, *, step: Array | int
  ) -> tuple[Terms, Metrics]:
    terms, metrics = {}, {}
    for name, part in self.parts.items():
      weight = self.streams[name].weight
      if name in self.schedules:
        weight = weight * self.schedules[name](step)
      seen = self.seen_by(name, outputs, batch)
      part_terms, part_metrics = part.apply(*seen, state[name], step=step)
      terms |= _add(name, {k: v.scale(weight) for k, v in part_terms.items()})
      metrics |= _add(name, part_metrics)
    return terms, metrics

  def compare(
    self, outputs: Outputs, batch: Batch, state: State, *, step: Array | int
  ) -> dict[str, Array]:
    """What the selections of all streams find, as features [B, ...]; see `select`."""
    found = {}
    for name, part in self.parts.items():
      if part.select is not None:
        seen = self.seen_by(name, outputs, batch)
        found |= _add(name, part.select(*seen, state[name], step=step))
    return found

  def seen_by(self, name: str, outputs: Outputs, batch: Batch) -> tuple[Outputs, Batch]:
    """What one of the objectives sees.

    These are the rows that are chosen for it, its own statistics and features, and the features that
    belong to no objective.

    Raises:
      ValueError: the batch has streams, and an objective has neither the name of one nor a choice of
        rows.
      UnknownArray: a choice reads an array that the batch does not have.
    """
    if batch.stream is not None:
      self.check_streams()
    choose = self.rows.get(name)
    if choose is None and batch.stream is not None:
      choose = functools.partial(row_choices.of_stream, kind=name)
    if choose is not None:
      kept = call_slot(f'rows.{name}', choose, batch)
      batch = batch.replace(mask=batch.mask & kept[:, None])
    shared = {k: v for k, v in batch.features.items() if '/' not in k}
    features = shared | _remove(name, batch.features)
    return outputs.replace(stats=_remove(name, outputs.stats)), batch.replace(features=features)

  def check_streams(self, path: str = 'streams') -> None:
    """Refuses objectives without rows in a mixed batch: without a choice, and called like no stream.

    Args:
      path: place of `streams` in the configuration, for the error.

    Raises:
      ValueError: lists the streams, and suggests one.
    """
    check_names(path, self.streams.keys() - self.rows.keys(), STREAMS)


def _add(name: str, items: Mapping) -> dict:
  """The items with the prefix of a stream."""
  return {f'{name}/{k}': v for k, v in items.items()}


def _remove(name: str, items: Mapping) -> dict:
  """The items that have the prefix of a stream, without it."""
  prefix = f'{name}/'
  return {k.removeprefix(prefix): v for k, v in items.items() if k.startswith(prefix)}
