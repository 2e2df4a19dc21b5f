"""Estimates that are carried over steps: success rates of rows, and values of categories."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from polgrad.curricula.base import Counts, Observed, Records
from polgrad.types import Array


class DiscountedBeta(NamedTuple):
  """Counts of successes and failures of each row of the data; older ones count less."""

  alpha: Array  # f32[D]
  beta: Array  # f32[D]


def begin(size: int, prior: float = 1.0) -> DiscountedBeta:
  """Every row has the counts `prior` and `prior`."""
  return DiscountedBeta(np.full(size, prior, np.float32), np.full(size, prior, np.float32))


def begin_from_rates(rates: np.ndarray, rollouts: int, strength: float) -> DiscountedBeta:
  """Counts that add up to `strength`, from the success rates of earlier rollouts.

  alpha = N (s + 1/2) / (n + 1) and beta = N (n - s + 1/2) / (n + 1), with N = `strength`, n = `rollouts`
  and s = n * rate successes (SPO, arXiv:2509.13232). n = 0 gives (1/2, 1/2).

  >>> [float(x[0].round(4)) for x in begin_from_rates(np.array([0.5]), 8, 8.0)]
  [4.0, 4.0]
  """
  if not rollouts:
    return begin(len(rates), 0.5)
  hits = rollouts * np.asarray(rates, np.float32)
  scale = np.float32(strength / (rollouts + 1))
  return DiscountedBeta(scale * (hits + 0.5), scale * (rollouts - hits + 0.5))


def updated(
  state: DiscountedBeta,
  seen: Counts,
  *,
  decay: float | Array = 1.0,
  decay_all: float = 1.0,
  prior: float = 0.0,
) -> DiscountedBeta:
  """The counts after a step.

      alpha <- prior + d (alpha - prior) + hits,    beta <- prior + d (beta - prior) + misses

  d is `decay_all` for rows without completions in the step, and `decay_all * decay` for the others; a
  `decay` may be one number or f[D].

  >>> step = Counts(np.array([1.0]), np.array([1.0]))
  >>> after = updated(DiscountedBeta(np.array([4.0]), np.array([4.0])), step, decay=0.875)
  >>> print(after.alpha, after.beta, value(after))
  [4.5] [3.5] [0.5625]
  """
  kept = jnp.where(seen.total > 0, decay_all * decay, decay_all)
  fall = lambda x, new: prior + kept * (x - prior) + new
  return DiscountedBeta(fall(state.alpha, seen.hits), fall(state.beta, seen.total - seen.hits))


def forgetting(
  drift: Array, *, half: float = 0.06, low: float = 0.875, high: float = 0.96
) -> Array:
  """clip(2^(-drift / half), low, high): the weight of earlier counts of a prompt, which is smaller if
  the policy has moved far on its last response (SPO, arXiv:2509.13232).

  Args:
    drift: mean |log pi now - log pi then|, nats.
    half: drift at which the weight would be 1/2 without bounds, nats.
    low: the smallest weight, of a drift of half log2(1 / low) or more: 0.0116.
    high: the largest weight, of a drift of half log2(1 / high) or less: 0.0035.

  >>> print(forgetting(jnp.array([0.0, 0.0035, 0.0058, 0.0116, 0.03])).round(4))
  [0.96   0.96   0.9352 0.875  0.875 ]
  """
  return jnp.clip(jnp.exp2(-jnp.asarray(drift) / half), low, high)


def drift_of_rows(found: Observed, size: int) -> Array:
  """The drift of each row of the data, f32[D]: the mean over its rows in the step, 0 without any."""
  rows = jnp.asarray(found.trained_rows)
  spread = lambda x: jax.ops.segment_sum(x, rows, num_segments=size)
  drift = jnp.asarray(found.drift, jnp.float32)
  return spread(drift) / jnp.maximum(spread(jnp.ones_like(drift)), 1)


def value(state: DiscountedBeta) -> np.ndarray:
  """The estimated success rate of every row, alpha / (alpha + beta), f32[D]; 1/2 without any count."""
  alpha, beta = np.asarray(state.alpha), np.asarray(state.beta)
  total = alpha + beta
  return np.where(total > 0, alpha / np.where(total > 0, total, 1), 0.5).astype(np.float32)


class Bandit(NamedTuple):
  """A value of each of C categories of rows."""

  value: Array  # f32[C]
  category: Array  # i32[D], of each row of the data


def category_names(records: Records, field: str) -> tuple[str, ...]:
  """The values of a field of the records as texts, sorted."""
  return tuple(sorted({_text(record, row, field) for row, record in enumerate(_all(records))}))


def begin_bandit(records: Records, field: str) -> Bandit:
  """All values are 0.

  Raises:
    ValueError: a record without the field.
  """
  texts = [_text(record, row, field) for row, record in enumerate(_all(records))]
  number = {name: i for i, name in enumerate(sorted(set(texts)))}
  return Bandit(
    np.zeros(len(number), np.float32), np.array([number[text] for text in texts], np.int32)
  )


def rewarded(state: Bandit, found: Observed, rate: float) -> Bandit:
  """Q <- (1 - rate) Q + rate x, with x the mean |advantage| of the category's rows in the step.

  A category without valid rows keeps its value.
  """
  arms = len(state.value)
  valid = jnp.asarray(found.trained_valid)
  category = jnp.asarray(state.category)[jnp.asarray(found.trained_rows)]
  sums = lambda x: jax.ops.segment_sum(jnp.where(valid, x, 0.0), category, num_segments=arms)
  count = sums(jnp.ones(len(valid), jnp.float32))
  mean = sums(jnp.asarray(found.magnitudes)) / jnp.maximum(count, 1)
  value = jnp.where(count > 0, (1 - rate) * state.value + rate * mean, state.value)
  return state._replace(value=value)


def softmax(x: np.ndarray, temperature: float) -> np.ndarray:
  """exp(x / temperature) / sum, f64."""
  powers = np.exp((np.asarray(x, np.float64) - np.max(x)) / temperature)
  return powers / powers.sum()


def numbers(records: Records, field: str) -> np.ndarray:
  """A field of all records as f32[D].

  Raises:
    ValueError: a record in which it is missing or no finite number.
  """
  return np.array([_number(r, row, field) for row, r in enumerate(_all(records))], np.float32)


def _all(records: Records):
  return (records[row] for row in range(len(records)))


def _text(record: Mapping, row: int, field: str) -> str:
  return str(_field(record, row, field))


def _number(record: Mapping, row: int, field: str) -> float:
  found = _field(record, row, field)
  if isinstance(found, bool) or not isinstance(found, int | float) or not np.isfinite(found):
    raise ValueError(f'record {row}: {field!r} is no finite number: {found!r:.60}')
  return float(found)


def _field(record: Mapping, row: int, field: str):
  if field not in record:
    raise ValueError(f'record {row}: no field {field!r}, only {sorted(record)}')
  return record[field]
