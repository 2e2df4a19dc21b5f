"""State that an objective keeps between updates, for example a running mean of a metric.

A `History` advances once an update, on the metrics of the whole minibatch; its value is an argument
that the functions of an objective can name. Its state is part of the checkpoint.

A controller is a history whose value is the coefficient of a penalty. A function of `FACTORS` in the
slot `schedules` multiplies the penalty by it. An adaptive KL penalty, for example, is

    penalties={'kl': weighted(1.0, part(penalties.k2))},
    schedules={'kl': part(metric_history.kl_coefficient)},
    history={'kl_coefficient': part(metric_history.adaptive_kl, target=0.05)},
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp

from polgrad.reductions import Metric
from polgrad.registry import Positive, suggest, table
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
      'total': decay * state['total'] + _value(metrics, metric),
      'weight': decay * state['weight'] + 1.0,
    }

  return History(
    init=lambda: {'total': jnp.zeros(()), 'weight': jnp.zeros(())},
    value=lambda state: state['total'] / jnp.maximum(state['weight'], 1e-8),
    advance=advance,
  )


def average(*, metrics: tuple, decay: float = 0.9) -> History:
  """Moving averages of n metrics, f32[n]: x <- decay x + (1 - decay) metric, from 0.

  A metric that has no numbers in an update, such as the mean over no rows, leaves its average unchanged.

  Args:
    metrics: names of the metrics.
    decay: weight of the earlier updates.
  """

  def advance(x, found):
    found = [_metric(found, name) for name in metrics]
    seen = jnp.stack([getattr(one, 'count', 1) > 0 for one in found])
    new = jnp.stack([one.value() for one in found])
    return jnp.where(seen, decay * x + (1 - decay) * new, x)

  return _remembered((0.0,) * len(metrics), advance)


def total_of(*, metric: str = 'score') -> History:
  """The sum and the number of all numbers that a mean was taken of in earlier updates, f32[2].

  Their quotient is the mean over all rows so far, also where updates have different numbers of rows.

  Args:
    metric: name of a `reductions.Mean`.
  """

  def advance(state, metrics):
    found = _metric(metrics, metric)
    return state + jnp.stack([found.total, found.count])

  return _remembered((0.0, 0.0), advance)


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
  return _remembered(
    initial, lambda state, found: jnp.stack([_value(found, name) for name in metrics])
  )


def adaptive_kl(
  *,
  metric: str = 'kl',
  target: Positive = 0.05,
  initial: Positive = 0.1,
  rate: float = 0.0256,
  limit: float = 0.2,
) -> History:
  """A coefficient beta that keeps a divergence near its target, f32[] (arXiv:1909.08593).

  beta <- beta (1 + rate clip(KL / target - 1, -limit, limit)) after every update.

  Args:
    metric: name of the divergence, for example that of its penalty.
    target: the divergence that is wanted, nats per token.
    initial: beta before the first update.
    rate: relative change of beta per unit of the relative error. The paper has rows of the batch /
      horizon, with 256 rows and a horizon of 10,000.
    limit: largest relative error that counts.
  """

  def advance(beta, metrics):
    error = jnp.clip(_value(metrics, metric) / target - 1, -limit, limit)
    return beta * (1 + rate * error)

  return _remembered(initial, advance)


def entropy_control(
  *,
  metric: str = 'entropy',
  target: float = 0.3,
  initial: float = 0.0,
  rate: float = 0.001,
  largest: float = 0.1,
) -> History:
  """A coefficient c of the entropy bonus that keeps the entropy near its target, f32[] (standard).

  c <- clip(c + rate (target - H), 0, largest) after every update. The bonus is
  `penalties.negative_entropy` with the weight 1 and the schedule `entropy_coefficient`.

  Args:
    metric: name of the entropy.
    target: the entropy H that is wanted, nats per token.
    initial: c before the first update.
    rate: change of c per update and nat of the error.
    largest: upper bound of c; the lower bound is 0, so a high entropy is not pushed down.
  """

  def advance(c, metrics):
    return jnp.clip(c + rate * (target - _value(metrics, metric)), 0, largest)

  return _remembered(initial, advance)


def kl_coefficient(kl_coefficient: Array) -> Array:
  """The value of the history `kl_coefficient`, as the factor of a penalty, f32[]."""
  return kl_coefficient


def entropy_coefficient(entropy_coefficient: Array) -> Array:
  """The value of the history `entropy_coefficient`, as the factor of a penalty, f32[]."""
  return entropy_coefficient


def _value(metrics: Mapping[str, Metric], name: str) -> Array:
  """The value of a metric; see `_metric`."""
  return _metric(metrics, name).value()


def _metric(metrics: Mapping[str, Metric], name: str) -> Metric:
  """The metric of this name.

  Raises:
    ValueError: the objective has no metric of this name; the message lists those that it has.
  """
  if name not in metrics:
    raise ValueError(f'the history reads the metric {name!r}{suggest(name, metrics)}')
  return metrics[name]


def _remembered(initial: float | tuple, advance: Callable) -> History:
  """A history whose state is its value, an array of float32."""
  return History(
    init=lambda: jnp.asarray(initial, jnp.float32), value=lambda state: state, advance=advance
  )


TABLE = table(
  'metric_history', running_mean, average, total_of, latest, adaptive_kl, entropy_control
)
Part = Annotated[History, TABLE]

FACTORS = table('metric_history', kl_coefficient, entropy_coefficient)
