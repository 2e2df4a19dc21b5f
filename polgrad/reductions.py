"""Numbers over the tokens of a batch that can be computed part by part.

A batch is cut into micro-batches and spread over devices. A loss term or a metric therefore stays a
reduction until the end: each part gives one, `a + b` merges two parts exactly, and `value()` is the
number of the whole batch.
"""

import functools
import operator
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array


@struct.dataclass(kw_only=True)
class Mean:
  """A mean that has not been divided yet: a sum and what it is to be divided by."""

  total: Array  # f32[]
  count: Array  # f32[]

  def value(self) -> Array:
    """total / count, and exactly 0 (with gradient 0) when nothing was counted."""
    safe = jnp.where(self.count > 0, self.count, 1)
    return jnp.where(self.count > 0, self.total / safe, 0)

  def __add__(self, other: 'Mean') -> 'Mean':
    return Mean(total=self.total + other.total, count=self.count + other.count)

  def scale(self, factor: Array | float) -> 'Mean':
    return Mean(total=factor * self.total, count=self.count)


@struct.dataclass(kw_only=True)
class Max:
  """A maximum over the parts of a batch."""

  maximum: Array  # f32[]

  def value(self) -> Array:
    return self.maximum

  def __add__(self, other: 'Max') -> 'Max':
    return Max(maximum=jnp.maximum(self.maximum, other.maximum))


@struct.dataclass(kw_only=True)
class EffectiveSampleSize:
  """The effective sample size of n weights as a fraction of n: (sum w)^2 / (n sum w^2).

  It is 1 if all weights are equal, and 0 where there are none.
  """

  total: Array  # f32[]
  squares: Array  # f32[]
  count: Array  # f32[]

  @classmethod
  def of(cls, weights: Array, where: Array) -> 'EffectiveSampleSize':
    w = jnp.where(where, weights, 0)
    return cls(total=jnp.sum(w), squares=jnp.sum(w * w), count=jnp.sum(where, dtype=w.dtype))

  def value(self) -> Array:
    size = self.count * self.squares
    return jnp.where(size > 0, self.total**2 / jnp.where(size > 0, size, 1), 0)

  def __add__(self, other: 'EffectiveSampleSize') -> 'EffectiveSampleSize':
    return EffectiveSampleSize(
      total=self.total + other.total,
      squares=self.squares + other.squares,
      count=self.count + other.count,
    )


@struct.dataclass(kw_only=True)
class Deviation:
  """The standard deviation of n numbers, with the divisor n - 1; 0 for fewer than two."""

  total: Array  # f32[]
  squares: Array  # f32[]
  count: Array  # f32[]

  @classmethod
  def of(cls, x: Array, where: Array) -> 'Deviation':
    x = jnp.where(where, x, 0)
    return cls(total=jnp.sum(x), squares=jnp.sum(x * x), count=jnp.sum(where, dtype=x.dtype))

  def mean(self) -> Array:
    return self.total / jnp.maximum(self.count, 1)

  def value(self) -> Array:
    excess = self.squares - self.total * self.mean()
    return jnp.sqrt(jnp.maximum(excess, 0) / jnp.maximum(self.count - 1, 1))

  def __add__(self, other: 'Deviation') -> 'Deviation':
    return Deviation(
      total=self.total + other.total,
      squares=self.squares + other.squares,
      count=self.count + other.count,
    )


LEVELS = 10  # bins of confidence from 1/2 to 1, in which calibration is measured


@struct.dataclass(kw_only=True)
class CalibrationError:
  """The expected calibration error of predictions between two alternatives (arXiv:1706.04599).

  A prediction has a confidence c >= 1/2, the probability of the alternative that it names, and an
  outcome o, the fraction to which it was right. With n predictions, n_b of them in bin b,

      error = sum_b n_b / n |mean of c in b - mean of o in b|

  over `LEVELS` bins of equal width. It is 0 if of all that is said with confidence c a fraction c is
  right, and where nothing was predicted.
  """

  confidence: Array  # f32[LEVELS], sums
  outcome: Array  # f32[LEVELS], sums
  counts: Array  # f32[LEVELS]

  @classmethod
  def of(cls, confidence: Array, outcome: Array, where: Array) -> 'CalibrationError':
    bins = jnp.clip(jnp.floor((confidence - 0.5) * 2 * LEVELS), 0, LEVELS - 1).astype(jnp.int32)
    add = lambda x: (
      jnp.zeros(LEVELS, jnp.float32).at[bins].add(jnp.where(where, x, 0).astype(jnp.float32))
    )
    return cls(confidence=add(confidence), outcome=add(outcome), counts=add(jnp.ones_like(outcome)))

  def value(self) -> Array:
    count = jnp.sum(self.counts)
    gaps = jnp.sum(jnp.abs(self.confidence - self.outcome))
    return jnp.where(count > 0, gaps / jnp.where(count > 0, count, 1), 0)

  def __add__(self, other: 'CalibrationError') -> 'CalibrationError':
    return CalibrationError(
      confidence=self.confidence + other.confidence,
      outcome=self.outcome + other.outcome,
      counts=self.counts + other.counts,
    )


BINS = 255  # of the histogram of log-ratios; the middle one holds 0
FINEST = (
  1e-3  # nats; bins near 0 are a tenth of it wide, other bins a tenth of their distance from 0
)
STEP = 0.083  # width of a bin after asinh: 127 bins reach from 0 to 20 nats


@struct.dataclass(kw_only=True)
class Quantile:
  """A quantile of exp(x), from a histogram of asinh(x / FINEST), which adds up over parts.

  The value is exp of the middle of a bin: exact for x = 0, with x within a tenth elsewhere.
  """

  counts: Array  # f32[BINS], numbers per bin
  fraction: float = struct.field(pytree_node=False)  # of the numbers, at or below the quantile

  @classmethod
  def of(cls, x: Array, where: Array, *, fraction: float) -> 'Quantile':
    bins = jnp.round(jnp.arcsinh(x / FINEST) / STEP).astype(jnp.int32) + BINS // 2
    bins = jnp.clip(bins, 0, BINS - 1)
    counts = jnp.zeros(BINS, jnp.float32).at[bins].add(where.astype(jnp.float32))
    return cls(counts=counts, fraction=fraction)

  def value(self) -> Array:
    below = jnp.cumsum(self.counts)
    bin_ = jnp.argmax(below >= jnp.maximum(self.fraction * below[-1], 1e-6))
    return jnp.exp(FINEST * jnp.sinh((bin_ - BINS // 2) * STEP))

  def __add__(self, other: 'Quantile') -> 'Quantile':
    return Quantile(counts=self.counts + other.counts, fraction=self.fraction)


Metric = Mean | Max | EffectiveSampleSize | Deviation | CalibrationError | Quantile  # one of these


def empty(reduction: Any) -> Array:
  """bool[]: whether nothing was counted, so that `value()` says nothing; False for a maximum."""
  counts = getattr(reduction, 'count', getattr(reduction, 'counts', None))
  return jnp.asarray(False) if counts is None else jnp.sum(counts) == 0


def merged(parts: Iterable[Any]) -> Any:
  """Trees of terms and metrics of the whole, from the same trees of its parts."""
  one = lambda x: isinstance(x, Metric)
  return functools.reduce(lambda a, b: jax.tree.map(operator.add, a, b, is_leaf=one), parts)
