"""Optimizers, schedules and anchors: thin, named compositions of optax.

A schedule multiplies a learning rate or the weight of a loss; its `step` counts updates.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from polgrad.registry import table
from polgrad.types import Array, Params


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


def _warmed_up(step: Array, warmup: int, fall: optax.Schedule) -> Array:
  rise = optax.linear_schedule(0.0, 1.0, max(warmup, 1))
  return optax.join_schedules([rise, fall], [warmup])(step)


SCHEDULES = table(constant, linear, cosine)
SchedulePart = Annotated[Callable[[Array], Array], SCHEDULES]


def adamw(
  *,
  learning_rate: float = 1e-6,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  max_grad_norm: float = 1.0,
  schedule: SchedulePart = constant,
  master_weights: bool = True,
) -> optax.GradientTransformation:
  """AdamW (arXiv:1711.05101) after clipping the gradient by its global norm.

  The learning rate is `learning_rate * schedule(update)`; see `in_float32` for `master_weights`.
  """
  transform = optax.chain(
    optax.clip_by_global_norm(max_grad_norm),
    optax.scale_by_adam(b1, b2, eps, mu_dtype=jnp.float32),
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_schedule(schedule),
    optax.scale(-learning_rate),
  )
  return in_float32(transform) if master_weights else transform


def sgd(
  *,
  learning_rate: float = 1e-3,
  momentum: float = 0.0,
  max_grad_norm: float = float('inf'),
  schedule: SchedulePart = constant,
  master_weights: bool = True,
) -> optax.GradientTransformation:
  """Gradient descent, with heavy-ball momentum if asked for; `master_weights` as in `adamw`."""
  transform = optax.chain(
    optax.clip_by_global_norm(max_grad_norm),
    optax.trace(momentum),
    optax.scale_by_schedule(schedule),
    optax.scale(-learning_rate),
  )
  return in_float32(transform) if master_weights else transform


class MasterState(NamedTuple):
  """Float32 copies of the parameters of lower precision (nothing for the others), and the rest."""

  master: Params
  inner: Any


def in_float32(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """Runs an optimizer on float32 master copies of parameters that are stored in bfloat16.

  A bfloat16 number has 8 bits, so a step below 1/256 of it would be lost, and most steps are. The
  step is made on the master copy in float32, moments included, and the parameter is the copy,
  rounded. Float32 parameters are their own master copies: nothing is kept for them.
  """
  single = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
  low = lambda p: p.dtype != jnp.float32

  def init(params):
    keep = lambda p: p.astype(jnp.float32) if low(p) else optax.MaskedNode()
    return MasterState(jax.tree.map(keep, params), optimizer.init(single(params)))

  def update(grads, state, params):
    masters = jax.tree.map(lambda p, m: m if low(p) else p, params, state.master)
    steps, inner = optimizer.update(single(grads), state.inner, masters)
    moved = optax.apply_updates(masters, steps)
    # The difference of two bfloat16 numbers in float32, so that adding it gives the rounded copy.
    rounded = lambda p, m: m.astype(p.dtype).astype(jnp.float32) - p.astype(jnp.float32)
    steps = jax.tree.map(lambda p, m, s: rounded(p, m) if low(p) else s, params, moved, steps)
    keep = lambda p, m: m if low(p) else optax.MaskedNode()
    return steps, MasterState(jax.tree.map(keep, params, moved), inner)

  return optax.GradientTransformation(init, update)


def balanced(
  optimizer: optax.GradientTransformation, labels: Callable[[Params], Params], *, rate: float
) -> optax.GradientTransformation:
  """Sign steps of size `rate` on what is labelled 'balance', the optimizer on what is 'train'.

  The gradient of a router's bias is the excess load of its experts; see `models/experts.py`.
  """
  if not rate:
    return optimizer
  return optax.partition({'train': optimizer, 'balance': optax.sign_sgd(rate)}, labels)


TABLE = table(adamw, sgd)
Part = Annotated[optax.GradientTransformation, TABLE]


# Anchors: named parameter sets (reference, proximal, ema, teacher) and how they follow the policy.
# A rule is (anchor, params, step) -> anchor, applied after update number `step` (from 1).


def fixed(anchor: Params, params: Params, step: Array) -> Params:
  """The parameters at the start of the phase, for ever."""
  del params, step
  return anchor


def ema(anchor: Params, params: Params, step: Array, *, decay: float = 0.99) -> Params:
  """decay * anchor + (1 - decay) * params, after every update."""
  del step
  return jax.tree.map(lambda a, p: (decay * a + (1 - decay) * p).astype(a.dtype), anchor, params)


def sync(anchor: Params, params: Params, step: Array, *, every: int = 100) -> Params:
  """A copy of the policy, taken after every `every` updates (arXiv:2404.09656)."""
  due = step % every == 0
  return jax.tree.map(lambda a, p: jnp.where(due, p, a), anchor, params)


ANCHORS = table(fixed, ema, sync)
AnchorPart = Annotated[Callable, ANCHORS]
