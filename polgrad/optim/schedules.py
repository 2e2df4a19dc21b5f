"""Schedules multiply a learning rate or the weight of a loss; their `step` counts updates."""

from collections.abc import Callable
from typing import Annotated

import jax.numpy as jnp
import optax

from polgrad.registry import table
from polgrad.types import Array


def constant(step: Array) -> Array:
  """1 at every step."""
  return jnp.ones_like(step, jnp.float32)


def linear(step: Array, *, warmup: int = 0, steps: int, end: float = 0.0) -> Array:
  """Rises from 0 to 1 over `warmup` steps, then falls linearly to `end` at `steps`."""
  fall = optax.linear_schedule(1.0, end, max(steps - warmup, 1))
  return _warmed_up(step, warmup, fall)


def cosine(step: Array, *, warmup: int = 0, steps: int, end: float = 0.0) -> Array:
  """Rises from 0 to 1 over `warmup` steps, then follows a half cosine to `end` at `steps`."""
  fall = optax.cosine_decay_schedule(1.0, max(steps - warmup, 1), alpha=end)
  return _warmed_up(step, warmup, fall)


def inverse_linear(step: Array, *, steps: int, every: int = 1) -> Array:
  """1 / (1 - k / steps), k = floor(step / every): from 1 at the start to `steps` at the end.

  The weight 1 / t_k of the divergence in mirror descent with steps t_k that shrink to zero
  (arXiv:2005.09814).
  """
  k = jnp.minimum(step // every, steps - 1)
  return steps / (steps - k).astype(jnp.float32)


def stairs(
  step: Array, *, begin: int, every: int, height: float, first: float = 1.0, last: float = 0.5
) -> Array:
  """`first` until `begin`, then one stair of `height` towards `last` at once and after every `every`.

  From 1 down to 0.5 in stairs of 0.1 it weighs ReMix's base policy (arXiv:2507.06892).
  """
  climbed = height * jnp.ceil(jnp.maximum(step - begin, 0) / every)
  return first + jnp.sign(last - first) * jnp.minimum(climbed, abs(last - first))


def two_phase(step: Array, *, steps: int) -> Array:
  """1 - 0.2 (1 - exp(-2 p)) in the first half of p = step / steps, 0.8 exp(-3 p) after it.

  It weighs the entropy band of EPO (arXiv:2509.22576); at p = 1/2 it jumps from 0.87 to 0.18.
  """
  p = step / steps
  return jnp.where(p < 0.5, 0.8 + 0.2 * jnp.exp(-2 * p), 0.8 * jnp.exp(-3 * p))


def _warmed_up(step: Array, warmup: int, fall: optax.Schedule) -> Array:
  rise = optax.linear_schedule(0.0, 1.0, max(warmup, 1))
  return optax.join_schedules([rise, fall], [warmup])(step)


SCHEDULES = table('optim', constant, linear, cosine, inverse_linear, stairs, two_phase)
SchedulePart = Annotated[Callable[[Array], Array], SCHEDULES]
