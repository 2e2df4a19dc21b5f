"""Anchors: named parameter sets (reference, proximal, ema, teacher) and how they follow the policy.

A rule is (anchor, params, step) -> anchor, applied after update number `step` (from 1).
"""

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from polgrad.registry import table
from polgrad.types import Array, Params


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


ANCHORS = table('optim', fixed, ema, sync)
AnchorPart = Annotated[Callable, ANCHORS]
