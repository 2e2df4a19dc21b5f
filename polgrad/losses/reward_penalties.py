"""Costs of rows that are subtracted from their rewards, to penalise a divergence from the reference.

A function of `TABLE` fills one of the `costs` of an estimator in `credit`. No gradient flows through a
cost. Subtracting a cost from the reward penalises a divergence if the gradient of the divergence is an
expectation of cost times score. For chi^2(pi || reference) = E_pi[rho] - 1 the cost is computed from
rho = pi / reference of the whole row. Unlike KL, chi^2 bounds how much lower the true reward can be
than a proxy reward that correlates with it under the reference (arXiv:2403.03185).
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from polgrad.losses._common import bounded
from polgrad.losses.groups import divide
from polgrad.registry import table
from polgrad.types import Array


def chi_square(log_ratio_sum: Array, *, limit: float = 10.0) -> Array:
  """rho - 1, whose mean is chi^2(pi || reference) (arXiv:2403.03185).

  On-policy, E[(rho - 1) grad log pi] = grad chi^2 / 2, so a penalty c chi^2 needs the coefficient 2 c.

  Args:
    log_ratio_sum: [B], log pi - log reference of the row, nats.
    limit: rho is clipped to [1 / limit, limit], because it grows exponentially with the row's length.

  Returns:
    [B].
  """
  return jnp.expm1(_clipped(log_ratio_sum, limit))


def root_chi_square(log_ratio_sum: Array, valid: Array, *, limit: float = 10.0) -> Array:
  """(rho - 1) / sqrt(chi^2), chi^2 = mean of (rho - 1)^2 / rho over the batch (arXiv:2403.03185).

  On-policy, E[cost grad log pi] = grad sqrt(chi^2), the quantity in the paper's bound. This estimate
  of chi^2 is never negative; the estimate mean(rho) - 1 can be.

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
  """log rho, clipped to +-log(limit) and without gradient."""
  bound = jnp.log(limit)
  return jnp.clip(bounded(jax.lax.stop_gradient(log_ratio_sum)), -bound, bound)


TABLE = table('reward_penalties', chi_square, root_chi_square)
Part = Annotated[Callable, TABLE]
