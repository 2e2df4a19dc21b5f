"""Costs of rows, to be subtracted from their rewards. They are data.

A penalty of the divergence from the reference can be paid in the reward when its gradient is an
expectation of cost times score. For chi^2(pi || reference) = E_pi[rho] - 1 the cost is made of
rho = pi / reference of the whole row. Unlike KL, chi^2 bounds how far a true reward may fall behind a
proxy that correlates with it under the reference (arXiv:2403.03185).
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from polgrad.losses.groups import divide
from polgrad.losses.ratios import bounded
from polgrad.registry import table
from polgrad.types import Array


def chi_square(log_ratio_sum: Array, *, limit: float = 10.0) -> Array:
  """rho - 1, whose mean is chi^2(pi || reference) (arXiv:2403.03185).

  On-policy, E[(rho - 1) grad log pi] = grad chi^2 / 2: for a penalty c chi^2 the coefficient is 2 c.

  Args:
    log_ratio_sum: [B], log pi - log reference of the row, nats.
    limit: rho is clipped to [1 / limit, limit]; rows are long and rho explodes.

  Returns:
    [B].
  """
  return jnp.expm1(_clipped(log_ratio_sum, limit))


def root_chi_square(log_ratio_sum: Array, valid: Array, *, limit: float = 10.0) -> Array:
  """(rho - 1) / sqrt(chi^2), chi^2 = mean of (rho - 1)^2 / rho over the batch (arXiv:2403.03185).

  On-policy, E[cost grad log pi] = grad sqrt(chi^2), the quantity in the paper's bound. This estimate
  of chi^2 is never negative, as that by E[rho] - 1 is.

  Args:
    log_ratio_sum: [B], log pi - log reference of the row, nats.
    valid: bool[B], rows that count.
    limit: rho is clipped to [1 / limit, limit].

  Returns:
    [B]; 0 where not valid, and everywhere when policy and reference agree.
  """
  chex.assert_rank(log_ratio_sum, 1)
  chex.assert_equal_shape([log_ratio_sum, valid])
  log_ratio = jnp.where(valid, _clipped(log_ratio_sum, limit), 0)
  squares = jnp.square(2 * jnp.sinh(log_ratio / 2))  # (rho - 1)^2 / rho
  mean = jnp.sum(squares) / jnp.maximum(jnp.sum(valid), 1)
  return divide(jnp.expm1(log_ratio), jnp.sqrt(mean))


def _clipped(log_ratio_sum: Array, limit: float) -> Array:
  bound = jnp.log(limit)
  return jnp.clip(bounded(jax.lax.stop_gradient(log_ratio_sum)), -bound, bound)


TABLE = table('reward_penalties', chi_square, root_chi_square)
Part = Annotated[Callable, TABLE]
