"""Log importance ratios at the level at which a method compares two policies.

`log_ratio` is log pi_theta - log pi_old of the sampled tokens, 0 where the mask is False. This is
the one place where it is clamped (to +-20 nats), so nothing downstream overflows when it
exponentiates; a clamped entry has gradient 0.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from polgrad.registry import table
from polgrad.types import Array

LIMIT = 20.0  # nats; exp(20) is 5e8, far outside every trust region


def bounded(log_ratio: Array) -> Array:
  """Clamps log-ratios to what can be exponentiated safely: [...] -> [...]."""
  return jnp.clip(log_ratio, -LIMIT, LIMIT)


def token(log_ratio: Array, mask: Array) -> Array:
  """Every token by itself, as in PPO (arXiv:1707.06347).

  Args:
    log_ratio: [..., T], nats.
    mask: bool[..., T].

  Returns:
    [..., T], clamped; 0 where `mask` is False.
  """
  chex.assert_equal_shape([log_ratio, mask])
  return jnp.where(mask, bounded(log_ratio), 0)


def sequence_geometric(log_ratio: Array, mask: Array) -> Array:
  """The mean log-ratio of the row at each of its tokens: GSPO-token (arXiv:2507.18071).

  log s_t = d_t - sg(d_t) + sg(mean_k d_k): the value is the length-normalised sequence ratio, and
  the gradient passes through the token itself only. With one advantage per row and the
  `sequence_mean` aggregation, value and gradient are those of the paper's sequence-level GSPO.
  Other aggregations weight long rows more than the paper does.

  Args:
    log_ratio: [..., T], nats.
    mask: bool[..., T].

  Returns:
    [..., T], clamped; 0 where `mask` is False, so also in a row without tokens.
  """
  chex.assert_equal_shape([log_ratio, mask])
  log_ratio = jnp.where(mask, log_ratio, 0)
  length = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
  mean = jnp.sum(log_ratio, axis=-1, keepdims=True) / length
  straight_through = log_ratio - jax.lax.stop_gradient(log_ratio) + jax.lax.stop_gradient(mean)
  return jnp.where(mask, bounded(straight_through), 0)


TABLE = table(token, sequence_geometric)
Part = Annotated[Callable, TABLE]
