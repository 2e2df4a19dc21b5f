"""Anchor rules: how a named parameter set (reference, teacher, ...) follows the policy.

A rule is a function (anchor, params, step) -> anchor. It is applied after every update: `params` are
the policy's new parameters that updates change, `step` the number of updates in the phase, from 1. A
rule with an argument `previous` gets the parameters before the update, and one with the name of another
anchor gets that anchor, as it was before the update of the policy.
"""

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from polgrad.registry import AtLeastOne, Fraction, table
from polgrad.types import Array, Params


def fixed(anchor: Params, params: Params, step: Array) -> Params:
  """The anchor never changes: it is the policy at the start of the phase, or a frozen model."""
  del params, step
  return anchor


def ema(
  anchor: Params, params: Params, step: Array, *, decay: Fraction = 0.99, corrected: bool = False
) -> Params:
  """decay * anchor + (1 - decay) * params, after every update (standard).

  With `corrected` the anchor forgets its start: it is the mean of the policies after updates 1, ..., k
  with weights decay^(k - i), which is a mean from 0 divided by 1 - decay^k.

  Args:
    anchor: moves.
    params: the policy after the update.
    step: updates so far, from 1.
    decay: of the anchor.
    corrected: whether the bias towards the start is removed; with decay 1 this is the mean of all.
  """
  rate = 1 - decay
  if corrected:
    rate = rate / (1 - decay**step) if decay < 1 else 1 / step
  return jax.tree.map(lambda a, p: ((1 - rate) * a + rate * p).astype(a.dtype), anchor, params)


def rising_ema(
  anchor: Params, params: Params, step: Array, *, start: Fraction = 0.996, steps: AtLeastOne = 1000
) -> Params:
  """`ema` whose decay rises by half a cosine from `start` to 1, a fixed anchor (arXiv:2006.07733).

      decay = 1 - (1 - start) (1 + cos(pi min(step / steps, 1))) / 2

  Args:
    anchor: moves.
    params: the policy after the update.
    step: updates so far, from 1.
    start: decay of update 0.
    steps: updates until the decay is 1.
  """
  done = jnp.minimum(step / steps, 1.0)
  rest = (1 - start) * (1 + jnp.cos(jnp.pi * done)) / 2
  return jax.tree.map(lambda a, p: (a + rest * (p - a)).astype(a.dtype), anchor, params)


def slow_ema(
  anchor: Params,
  params: Params,
  step: Array,
  *,
  decay: Fraction = 0.997,
  ramp: AtLeastOne = 40_000,
) -> Params:
  """`ema` whose decay rises: decay exp(-5 (1 - min(step / ramp, 1))^2), as in ELR+ (arXiv:2007.00151).

  In the first updates the anchor is nearly a copy of the policy, so that it forgets its start.

  Args:
    anchor: moves.
    params: the policy after the update.
    step: updates so far, from 1.
    decay: of the updates from `ramp` on.
    ramp: updates until the decay is reached; the authors' 40,000 are half of their run.
  """
  now = decay * jnp.exp(-5 * (1 - jnp.minimum(step / ramp, 1.0)) ** 2)
  return jax.tree.map(lambda a, p: (now * a + (1 - now) * p).astype(a.dtype), anchor, params)


def slow_ema_of_peer(
  anchor: Params,
  peer: Params,
  step: Array,
  *,
  decay: Fraction = 0.997,
  ramp: AtLeastOne = 40_000,
) -> Params:
  """`slow_ema` of the anchor `peer`, a second network that learns too (arXiv:2007.00151)."""
  return slow_ema(anchor, peer, step, decay=decay, ramp=ramp)


def sync(anchor: Params, params: Params, step: Array, *, every: AtLeastOne = 100) -> Params:
  """A copy of the policy, taken again after every `every` updates (arXiv:2404.09656)."""
  due = step % every == 0
  return jax.tree.map(lambda a, p: jnp.where(due, p, a), anchor, params)


def blend(
  anchor: Params, params: Params, step: Array, *, alpha: Fraction = 0.6, every: AtLeastOne = 512
) -> Params:
  """alpha * params + (1 - alpha) * anchor, after every `every` updates (arXiv:2404.09656).

  With alpha = 1 this is `sync`, with every = 1 `ema` of the decay 1 - alpha, and with alpha = 0 `fixed`.
  """
  due = step % every == 0
  mix = lambda a, p: jnp.where(due, (alpha * p + (1 - alpha) * a).astype(a.dtype), a)
  return jax.tree.map(mix, anchor, params)


def sync_before(anchor: Params, previous: Params, step: Array, *, every: AtLeastOne = 1) -> Params:
  """A copy of the policy as it was right before every `every`-th update (arXiv:2509.24207).

  With every=1 the anchor is one update behind: an update sees as the anchor the policy before the update
  that preceded it. `sync(every=1)` would be the policy itself, so all log-ratios to it would be 0.
  """
  due = step % every == 0
  return jax.tree.map(lambda a, p: jnp.where(due, p, a), anchor, previous)


ANCHORS = table(
  'optim', fixed, ema, rising_ema, slow_ema, slow_ema_of_peer, sync, sync_before, blend
)
# What a rule may read besides other anchors.
OF_POLICY = ('anchor', 'params', 'previous', 'step')
AnchorPart = Annotated[Callable, ANCHORS]
