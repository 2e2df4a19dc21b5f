"""Detached token weights for data that another policy sampled. They multiply the token loss.

rho = pi_proximal / pi_behavior: how far the trainer's policy at the start of the phase stands from
what the sampler really drew from (other kernels, lower precision, older parameters). Never multiply
the reward instead: normalising advantages afterwards would undo it. The denominator of the
aggregation stays the number of valid tokens, also where a weight is 0.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from polgrad.losses.ratios import bounded
from polgrad.registry import table
from polgrad.types import Array


def truncated_importance(proximal_logp: Array, behavior_logp: Array, *, cap: float = 2.0) -> Array:
  """sg(min(rho, cap)): truncated importance sampling, per token (arXiv:2505.24034).

  Truncation makes weights smaller only: E_behavior[min(rho, cap)] <= 1. An infinite cap is the
  weight of decoupled PPO (arXiv:2505.24298).

  Args:
    proximal_logp: [..., T], nats.
    behavior_logp: [..., T], nats.
    cap: the largest weight.

  Returns:
    [..., T], in [0, cap].
  """
  return jnp.minimum(_ratio(proximal_logp, behavior_logp), cap)


def masked_importance(
  proximal_logp: Array, behavior_logp: Array, *, low: float = 0.5, high: float = 5.0
) -> Array:
  """sg(rho 1[low <= rho <= high]): IcePop (arXiv:2510.18855).

  Outside the band a token is dropped, not truncated; the bounds themselves are kept.
  `low=0, high=inf` is the full importance weight.

  Args:
    proximal_logp: [..., T], nats.
    behavior_logp: [..., T], nats.
    low: smallest ratio that is kept.
    high: largest ratio that is kept.

  Returns:
    [..., T].
  """
  ratio = _ratio(proximal_logp, behavior_logp)
  return jnp.where((ratio >= low) & (ratio <= high), ratio, 0)


def truncated_sequence_importance(
  proximal_logp: Array, behavior_logp: Array, mask: Array, *, cap: float = 2.0
) -> Array:
  """sg(min(prod_t rho_t, cap)) at every token: truncated importance sampling of rows (standard).

  With an infinite cap and r = 1 the sequence-level gradient is unbiased; its variance grows
  exponentially with the length, hence the cap.

  Args:
    proximal_logp: [..., T], nats.
    behavior_logp: [..., T], nats.
    mask: bool[..., T].
    cap: the largest weight.

  Returns:
    [..., T], one value per row; 1 in a row without tokens (if cap >= 1).
  """
  chex.assert_equal_shape([proximal_logp, behavior_logp, mask])
  log_ratio = jnp.where(mask, proximal_logp - behavior_logp, 0)
  total = jnp.sum(log_ratio, axis=-1, keepdims=True)
  weight = jnp.minimum(jnp.exp(bounded(jax.lax.stop_gradient(total))), cap)
  return jnp.broadcast_to(weight, mask.shape)


def _ratio(proximal_logp: Array, behavior_logp: Array) -> Array:
  chex.assert_equal_shape([proximal_logp, behavior_logp])
  return jnp.exp(bounded(jax.lax.stop_gradient(proximal_logp - behavior_logp)))


TABLE = table(truncated_importance, masked_importance, truncated_sequence_importance)
Part = Annotated[Callable, TABLE]
