"""State that an objective keeps between updates, for example a running mean of a metric.

A `History` advances once an update, on the metrics of the whole minibatch; its value is an argument
that the functions of an objective can name. Its state is part of the checkpoint.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp

from polgrad.reductions import Metric
from polgrad.registry import table
from polgrad.types import Array


class History(NamedTuple):
  """Three pure functions of a state, which is a pytree of arrays."""

  init: Callable[[], Any]  # () -> the state before the first update
  value: Callable[[Any], Array]  # state -> the value that the objective's functions read
  advance: Callable[[Any, Mapping[str, Metric]], Any]  # (state, metrics of one update) -> state


def running_mean(*, metric: str = 'entropy', decay: float = 1.0) -> History:
  """The mean of a metric over all earlier updates, f32[]; 0 before the first update.

  sum_i decay^(n - i) metric_i / sum_i decay^(n - i),     i = 1 ... n updates
  """

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
  """The values of n metrics in the last update, f32[n].

  Args:
    metrics: names of the metrics.
    initial: n values, used before the first update.

  Raises:
    ValueError: the two have different lengths.
  """
  if len(metrics) != len(initial):
    raise ValueError(f'{len(metrics)} metrics, but {len(initial)} initial values')
  return History(
    init=lambda: jnp.asarray(initial, jnp.float32),
    value=lambda state: state,
    advance=lambda state, found: jnp.stack([found[name].value() for name in metrics]),
  )


TABLE = table('metric_history', running_mean, latest)
Part = Annotated[History, TABLE]
