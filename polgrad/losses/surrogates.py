"""Policy-gradient losses of one token, to be minimised; r = exp(log_ratio).

Each keeps the value that its paper writes, so curves can be compared. On-policy (r = 1) all of them
have the gradient of `reinforce`. Advantages are data. Log-ratios come clamped from `ratios`.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from polgrad.registry import table
from polgrad.types import Array


def reinforce(logp: Array, advantages: Array) -> Array:
  """-A log pi: the score-function estimator (Williams 1992; standard).

  Args:
    logp: [..., T], nats.
    advantages: [..., T], in units of the reward.

  Returns:
    [..., T].
  """
  chex.assert_equal_shape([logp, advantages])
  return -advantages * logp


def importance_weighted(log_ratio: Array, advantages: Array) -> Array:
  """-A r: the unclipped importance-weighted objective, e.g. CPI in arXiv:1707.06347, section 3.

  Args:
    log_ratio: [..., T], nats.
    advantages: [..., T].

  Returns:
    [..., T].
  """
  chex.assert_equal_shape([log_ratio, advantages])
  return -advantages * jnp.exp(log_ratio)


def clipped(
  log_ratio: Array, advantages: Array, *, eps_low: float = 0.2, eps_high: float = 0.2
) -> Array:
  """-min(r A, clip(r, 1 - eps_low, 1 + eps_high) A): PPO (arXiv:1707.06347).

  DAPO's clip-higher is `eps_high=0.28` (arXiv:2503.14476). Written with the bound that can bind,
  the objective is A min(r, 1 + eps_high) for A >= 0 and A max(r, 1 - eps_low) for A < 0. A token on
  the bound counts as kept and has its full gradient. Infinite bounds give `importance_weighted`.

  Args:
    log_ratio: [..., T], nats.
    advantages: [..., T].
    eps_low: distance of the lower bound from 1.
    eps_high: distance of the upper bound from 1.

  Returns:
    [..., T].
  """
  chex.assert_equal_shape([log_ratio, advantages])
  ratio = jnp.exp(log_ratio)
  up = advantages >= 0
  kept = jnp.where(up, ratio <= 1 + eps_high, ratio >= 1 - eps_low)
  bound = jnp.where(up, 1 + eps_high, 1 - eps_low).astype(ratio.dtype)
  return -advantages * jnp.where(kept, ratio, bound)


def dual_clipped(
  log_ratio: Array,
  advantages: Array,
  *,
  eps_low: float = 0.2,
  eps_high: float = 0.2,
  cap: float = 3.0,
) -> Array:
  """`clipped`, and where A < 0 the loss is at most -cap A: dual-clip PPO (arXiv:1912.09729).

  Without the cap, a bad token that became much more likely has an unbounded loss.

  Args:
    log_ratio: [..., T], nats.
    advantages: [..., T].
    eps_low: distance of the lower bound from 1.
    eps_high: distance of the upper bound from 1.
    cap: the largest ratio itself (not a distance from 1), for A < 0.

  Returns:
    [..., T].

  Raises:
    ValueError: cap <= 1, which would silence on-policy tokens.
  """
  chex.assert_equal_shape([log_ratio, advantages])
  if cap <= 1:
    raise ValueError(f'cap is an absolute ratio and must exceed 1, got {cap}')
  loss = clipped(log_ratio, advantages, eps_low=eps_low, eps_high=eps_high)
  capped = (advantages < 0) & (jnp.exp(log_ratio) > cap)
  return jnp.where(capped, -cap * advantages, loss)


def truncated(logp: Array, log_ratio: Array, advantages: Array, *, cap: float = 5.0) -> Array:
  """-sg(min(r, cap)) A log pi: CISPO (arXiv:2506.13585).

  No token is dropped: beyond the cap its weight is cut, not its gradient. `cap` is the largest
  ratio itself, by default that of ScaleRL (arXiv:2510.13786); some code bases take eps with
  cap = 1 + eps. An infinite cap has the gradient of `importance_weighted`.

  Args:
    logp: [..., T], nats; carries the gradient.
    log_ratio: [..., T], nats; detached here.
    advantages: [..., T].
    cap: the largest ratio.

  Returns:
    [..., T].

  Raises:
    ValueError: cap <= 0, which would silence every token.
  """
  chex.assert_equal_shape([logp, log_ratio, advantages])
  if cap <= 0:
    raise ValueError(f'cap is an absolute ratio and must be positive, got {cap}')
  weight = jax.lax.stop_gradient(jnp.minimum(jnp.exp(log_ratio), cap))
  return -weight * advantages * logp


TABLE = table(reinforce, importance_weighted, clipped, dual_clipped, truncated)
Part = Annotated[Callable, TABLE]
