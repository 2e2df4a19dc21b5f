"""Objectives: what the optimizer minimises, as a few families of compositions.

An objective never sees the model. It says what it reads (`requires`, `stats`), gets exactly that,
and returns named terms as undivided means, so that any split of a batch into micro-batches or over
devices gives the same value and gradient once totals are divided by the counts of the whole batch.

The families: `policy_gradient`, `pairwise`, `pointwise`, `regression`, `distillation`, `supervised`,
and `weighted_sum` of these. Which arrays a slot's function gets is decided by the names of its
positional arguments; see `view` for all names.
"""

from collections.abc import Mapping
from typing import Annotated

from polgrad import optim
from polgrad.objectives.base import Objective, check_names, view
from polgrad.objectives.likelihood import distillation, supervised
from polgrad.objectives.policy_gradient import policy_gradient
from polgrad.objectives.sequence_level import pairwise, pointwise, regression
from polgrad.registry import check_weighted, table
from polgrad.types import Batch, Outputs

FAMILIES = table(
  'objectives', policy_gradient, pairwise, pointwise, regression, distillation, supervised
)


def weighted_sum(
  *,
  streams: Mapping[str, Annotated[Objective, FAMILIES]],
  schedules: Mapping[str, optim.SchedulePart] = {},
) -> Objective:
  """sum_k weight_k * schedule_k(step) * objective_k.

  Args:
    streams: objectives by name, each `weighted(w, part(...))`. Where `batch.stream` is given, the
      k-th name (sorted) sees only the rows with `stream == k`; otherwise all see all rows.
    schedules: multipliers of a stream's weight over the updates, for some of the names.
  """
  check_weighted('streams', streams)
  check_names('schedules', schedules, streams)
  names = sorted(streams)
  parts = {name: streams[name].fn for name in names}

  def own(name: str, outputs: Outputs, batch: Batch) -> tuple[Outputs, Batch]:
    """What a stream sees: its rows, its statistics, its features and everybody's."""
    if batch.stream is not None:
      batch = batch.replace(mask=batch.mask & (batch.stream == names.index(name))[:, None])
    shared = {k: v for k, v in batch.features.items() if '/' not in k}
    features = shared | _below(name, batch.features)
    return outputs.replace(stats=_below(name, outputs.stats)), batch.replace(features=features)

  def select(outputs, batch, state, *, step):
    found = {}
    for name in names:
      if parts[name].select is not None:
        own_found = parts[name].select(*own(name, outputs, batch), state[name], step=step)
        found |= _above(name, own_found)
    return found

  def apply(outputs, batch, state, *, step):
    terms, metrics = {}, {}
    for name in names:
      weight = streams[name].weight
      if name in schedules:
        weight = weight * schedules[name](step)
      own_terms, own_metrics = parts[name].apply(*own(name, outputs, batch), state[name], step=step)
      terms |= _above(name, {k: v.scale(weight) for k, v in own_terms.items()})
      metrics |= _above(name, own_metrics)
    return terms, metrics

  return Objective(
    requires=frozenset().union(*(p.requires for p in parts.values())),
    apply=apply,
    init=lambda: {name: parts[name].init() for name in names},
    advance=lambda state, metrics: {
      name: parts[name].advance(state[name], _below(name, metrics)) for name in names
    },
    stats={k: f for name in names for k, f in _above(name, parts[name].stats).items()},
    rows_per_prompt=max(p.rows_per_prompt for p in parts.values()),
    select=select if any(p.select for p in parts.values()) else None,
    probes=frozenset(f'{name}/{probe}' for name in names for probe in parts[name].probes),
  )


def _above(name: str, items: Mapping) -> dict:
  return {f'{name}/{k}': v for k, v in items.items()}


def _below(name: str, items: Mapping) -> dict:
  prefix = f'{name}/'
  return {k.removeprefix(prefix): v for k, v in items.items() if k.startswith(prefix)}


TABLE = FAMILIES | table('objectives', weighted_sum)
Part = Annotated[Objective, TABLE]

__all__ = [
  'FAMILIES',
  'TABLE',
  'Objective',
  'Part',
  'distillation',
  'pairwise',
  'pointwise',
  'policy_gradient',
  'regression',
  'supervised',
  'view',
  'weighted_sum',
]
