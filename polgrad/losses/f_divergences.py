"""Derivatives f'(t) of the generators f of f-divergences, t = pi / p, for a target distribution p.

A function of `TABLE` fills the slot `derivative` of an estimator in `credit`. D_f = E_p[f(pi / p)] has
the gradient E_pi[f'(t) grad log pi], so -f'(t) acts as a reward of the sampled row: f-DPG
(arXiv:2302.08215). The input is log t, which each function clamps to +-20 nats. The output is a
constant: no gradient flows through it. Forward means KL(p || pi), which covers the target; reverse
means KL(pi || p), which seeks its modes.
"""

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from polgrad.losses._common import bounded
from polgrad.registry import table
from polgrad.types import Array


def forward_kl(log_t: Array) -> Array:
  """-1 / t, of f = -log t: KL(p || pi), the original DPG (arXiv:2302.08215).

  Args:
    log_t: [...], log pi - log p, nats.

  Returns:
    [...].
  """
  return -jnp.exp(-_data(log_t))


def reverse_kl(log_t: Array) -> Array:
  """log t + 1, of f = t log t: KL(pi || p), which is KL-regularised reinforcement learning
  (arXiv:2302.08215).

  Args:
    log_t: [...], log pi - log p, nats.

  Returns:
    [...].
  """
  return _data(log_t) + 1


def jensen_shannon(log_t: Array) -> Array:
  """log t - log((t + 1) / 2): KL(pi || m) + KL(p || m), m = (pi + p) / 2 (arXiv:2302.08215).

  This is twice the divergence that is usually called that of Jensen and Shannon.

  Args:
    log_t: [...], log pi - log p, nats.

  Returns:
    [...], below log(2).
  """
  return jnp.log(2.0) - jax.nn.softplus(-_data(log_t))


def total_variation(log_t: Array) -> Array:
  """sign(t - 1) / 2, of f = |t - 1| / 2 (arXiv:2302.08215). The authors' code has no factor 1 / 2.

  Args:
    log_t: [...], log pi - log p, nats.

  Returns:
    [...].
  """
  return 0.5 * jnp.sign(_data(log_t))


def forward_chi_square(log_t: Array) -> Array:
  """1 - 1 / t^2, of f = 1/t + t - 2: chi^2(p || pi) (arXiv:2302.08215).

  Args:
    log_t: [...], log pi - log p, nats.

  Returns:
    [...].
  """
  return -jnp.expm1(-2 * _data(log_t))


def reverse_chi_square(log_t: Array) -> Array:
  """2 (t - 1), of f = (t - 1)^2: chi^2(pi || p) (arXiv:2302.08215).

  Args:
    log_t: [...], log pi - log p, nats.

  Returns:
    [...].
  """
  return 2 * jnp.expm1(_data(log_t))


def _data(log_t: Array) -> Array:
  """log t, clamped and without gradient."""
  return bounded(jax.lax.stop_gradient(log_t))


TABLE = table(
  'f_divergences',
  forward_kl,
  reverse_kl,
  jensen_shannon,
  total_variation,
  forward_chi_square,
  reverse_chi_square,
)
Part = Annotated[Callable, TABLE]
