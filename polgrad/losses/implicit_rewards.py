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


TABLE = table(log_ratio_sum, log_ratio_mean, logp_sum, logp_mean)
Part = Annotated[Callable, TABLE]
