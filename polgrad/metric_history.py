"""Scalars that an objective carries over updates: of the metrics of every update to a value.

A memory advances once an update, on the metrics of the whole batch, and its state is checkpointed
with the rest, so a resumed run goes on with what it had.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp

from polgrad.registry import table
from polgrad.types import Array, Metric


class History(NamedTuple):
  """A carried value.

  Attributes:
    init: () -> state, a pytree of arrays.
    value: state -> what slots read.
    advance: (state, metrics of one update) -> state.
  """

  init: Callable[[], Any]
  value: Callable[[Any], Array]
  advance: Callable[[Any, Mapping[str, Metric]], Any]


def running_mean(*, metric: str = 'entropy', decay: float = 1.0) -> History:
  """The mean of a metric over all earlier updates, weighted decay^age; 0 before the first."""

  def advance(state, metrics):
    return {
      'total': decay * state['total'] + metrics[metric].value(),
      'weight': decay * state['weight'] + 1.0,
    }

  return History(
    init=lambda: {'total': jnp.zeros(()), 'weight': jnp.zeros(())},
    value=lambda state: state['total'] / jnp.maximum(state['weight'], 1e-8),
    advance=advance,
  )


def latest(*, metrics: tuple, initial: tuple) -> History:
  """The metrics of the last update, f32[n], and `initial` before the first."""
  if len(metrics) != len(initial):
    raise ValueError(f'{len(metrics)} metrics, but {len(initial)} initial values')
  return History(
    init=lambda: jnp.asarray(initial, jnp.float32),
    value=lambda state: state,
    advance=lambda state, found: jnp.stack([found[name].value() for name in metrics]),
  )


TABLE = table('metric_history', running_mean, latest)
Part = Annotated[History, TABLE]
