"""Schedules: functions step -> multiplier f32[] of a learning rate or of a loss weight.

`step` is i32[], the number of updates that the phase has made, from 0.
"""

from collections.abc import Callable
from typing import Annotated

import jax.numpy as jnp
import optax

from polgrad.registry import table
from polgrad.types import Array


def constant(step: Array) -> Array:
  """1 at every step."""
  return jnp.ones_like(step, float)


def linear(step: Array, *, warmup: int = 0, steps: int, end: float = 0.0) -> Array:
  """Rises from 0 to 1 over `warmup` steps, then falls linearly to `end` at `steps`."""
  fall = optax.linear_schedule(1.0, end, max(steps - warmup, 1))
  return _warmed_up(step, warmup, fall)


def cosine(step: Array, *, warmup: int = 0, steps: int, end: float = 0.0) -> Array:
  """Rises from 0 to 1 over `warmup` steps, then follows a half cosine to `end` at `steps`."""
  fall = optax.cosine_decay_schedule(1.0, max(steps - warmup, 1), alpha=end)
  return _warmed_up(step, warmup, fall)


def inverse_linear(step: Array, *, steps: int, every: int = 1) -> Array:
  """1 / (1 - k / steps) with k = min(floor(step / every), steps - 1): from 1 at the start to `steps`.

  It is the weight 1 / t_k of the divergence in mirror descent whose step sizes t_k shrink to zero
  (arXiv:2005.09814).

  Args:
    steps: number of values, each held for `every` updates.
  """
  k = jnp.minimum(step // every, steps - 1)
  return steps / (steps - k).astype(jnp.float32)


def stairs(
  step: Array, *, begin: int, every: int, height: float, first: float = 1.0, last: float = 0.5
) -> Array:
  """A staircase from `first` to `last`, whose stairs have size `height`.

  The value is `first` up to update `begin`. The first stair follows right after it, and another one
  after every `every` further updates, until the value is `last`. ReMix weighs its base policy by
  stairs of 0.1 from 1 to 0.5 (arXiv:2507.06892).
  """
  climbed = height * jnp.ceil(jnp.maximum(step - begin, 0) / every)
  return first + jnp.sign(last - first) * jnp.minimum(climbed, abs(last - first))


def two_phase(step: Array, *, steps: int) -> Array:
  """1 - 0.2 (1 - exp(-2 p)) in the first half of `steps`, and 0.8 exp(-3 p) in the second.

  p is the part of the half that is done, from 0 to 1, so the value falls from 1 to 0.83 and from 0.8 to
  0.04. EPO weighs its entropy band by it (arXiv:2509.22576), with p as in the released code; the paper's
  p is the part of the whole run.
  """
  p = 2 * step / steps
  return jnp.where(p < 1, 0.8 + 0.2 * jnp.exp(-2 * p), 0.8 * jnp.exp(-3 * (p - 1)))


def progressive(step: Array, *, every: int, stages: int, last: float = 0.8) -> Array:
  """0 in the first stage, then last * k / stages in stage k (from 1): PS-KD (arXiv:2006.12000).

  It is the weight of a model's own earlier predictions in its targets.

  Args:
    every: updates of a stage.
    stages: number of stages; the value stays at `last` after them.
    last: value of the last stage.
  """
  stage = jnp.minimum(step // every + 1, stages)
  return jnp.where(step < every, 0.0, last * stage / stages)


def progressive_rest(step: Array, *, every: int, stages: int, last: float = 0.8) -> Array:
  """1 - `progressive`: the weight of the data beside it."""
  return 1 - progressive(step, every=every, stages=stages, last=last)


def rise_and_fall(
  step: Array, *, warmup: int = 0, decay: int, peak: float = 0.9, valley: float = 0.05
) -> Array:
  """From 0 to `peak` in `warmup` steps, then by a half cosine to `valley` in `decay` steps.

  It is the weight mu of the demonstrations in CHORD (arXiv:2508.11408).

  Args:
    warmup: updates of the rise.
    decay: updates of the fall.
    peak: largest value.
    valley: value after the fall.
  """
  fall = optax.cosine_decay_schedule(1.0, max(decay, 1))
  after = valley + (peak - valley) * fall(step - warmup)
  return jnp.where(step < warmup, peak * step / max(warmup, 1), after)


def rise_and_fall_rest(
  step: Array, *, warmup: int = 0, decay: int, peak: float = 0.9, valley: float = 0.05
) -> Array:
  """1 - `rise_and_fall`: the weight of the samples beside it."""
  return 1 - rise_and_fall(step, warmup=warmup, decay=decay, peak=peak, valley=valley)


def _warmed_up(step: Array, warmup: int, fall: optax.Schedule) -> Array:
  """From 0 to 1 in `warmup` steps, then `fall` of the steps after these."""
  rise = optax.linear_schedule(0.0, 1.0, max(warmup, 1))
  return optax.join_schedules([rise, fall], [warmup])(step)


SCHEDULES = table(
  'optim',
  *(constant, linear, cosine, inverse_linear, stairs, two_phase, progressive, progressive_rest),
  *(rise_and_fall, rise_and_fall_rest),
)
SchedulePart = Annotated[Callable[[Array], Array], SCHEDULES]
