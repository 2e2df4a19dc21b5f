"""Scores of whole rows that a policy implies: what preference losses compare.

Sums over the mask; masked entries are replaced, so NaN there changes nothing. A coefficient beta is
applied by the caller.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax.numpy as jnp

from polgrad.registry import table
from polgrad.types import Array


def log_ratio_sum(logp: Array, reference_logp: Array, mask: Array) -> Array:
  """sum_t (logp - reference_logp): the implicit reward of DPO over beta (arXiv:2305.18290).

  Args:
    logp: [..., T], nats.
    reference_logp: [..., T], nats, data.
    mask: bool[..., T].

  Returns:
    [...], nats; 0 in a row without tokens.
  """
  return logp_sum(logp, mask) - logp_sum(reference_logp, mask)


def log_ratio_mean(logp: Array, reference_logp: Array, mask: Array) -> Array:
  """`log_ratio_sum` over the number of tokens: length-normalised DPO (arXiv:2411.15124).

  Args:
    logp: [..., T], nats.
    reference_logp: [..., T], nats, data.
    mask: bool[..., T].

  Returns:
    [...], nats a token; 0 in a row without tokens.
  """
  return logp_mean(logp, mask) - logp_mean(reference_logp, mask)


def logp_sum(logp: Array, mask: Array) -> Array:
  """sum_t logp: the reference-free score of SLiC-HF and CPO (arXiv:2305.10425, arXiv:2401.08417).

  Args:
    logp: [..., T], nats.
    mask: bool[..., T].

  Returns:
    [...], nats; 0 in a row without tokens.
  """
  chex.assert_equal_shape([logp, mask])
  return jnp.sum(jnp.where(mask, logp, 0), axis=-1)


def logp_mean(logp: Array, mask: Array) -> Array:
  """`logp_sum` over the number of tokens: the score of SimPO (arXiv:2405.14734).

  Args:
    logp: [..., T], nats.
    mask: bool[..., T].

  Returns:
    [...], nats a token; 0 in a row without tokens.
  """
  return logp_sum(logp, mask) / jnp.maximum(jnp.sum(mask, axis=-1), 1)


def old_log_ratio_sum(logp: Array, proximal_logp: Array, mask: Array) -> Array:
  """sum_t (logp - proximal_logp): a regression around the policy at the start of the phase, as in
  mirror descent (arXiv:2501.12599).

  Args:
    logp: [..., T], nats.
    proximal_logp: [..., T], nats, data.
    mask: bool[..., T].

  Returns:
    [...], nats; 0 in a row without tokens.
  """
  return log_ratio_sum(logp, proximal_logp, mask)


def bellman_sum(logp: Array, reference_logp: Array, log_normalizer: Array, mask: Array) -> Array:
  """V_1 + sum_t (logp - reference_logp), V_1 the log-normaliser of the logits that score the row's
  first token: TBRM (arXiv:2505.15311).

  Logits are read as Q in units of beta, so V = logsumexp(Q) and logp = Q - V; the squared difference
  to R / beta is a Bellman residual summed over the row. Gradient flows through V_1 too, which takes
  the place of log Z: regress with centre zero.

  Args:
    logp: [..., T], nats.
    reference_logp: [..., T], nats, data.
    log_normalizer: [..., T], nats, logsumexp of the logits.
    mask: bool[..., T].

  Returns:
    [...], nats; 0 in a row without tokens.
  """
  chex.assert_equal_shape([log_normalizer, mask])
  first = mask & (jnp.cumsum(mask, axis=-1) == 1)
  return logp_sum(log_normalizer, first) + log_ratio_sum(logp, reference_logp, mask)


TABLE = table(
  'implicit_rewards',
  log_ratio_sum,
  log_ratio_mean,
  logp_sum,
  logp_mean,
  old_log_ratio_sum,
  bellman_sum,
)
Part = Annotated[Callable, TABLE]
