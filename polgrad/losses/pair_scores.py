"""Scores of the rows of preference pairs that look at both rows of their pair.

A function of `TABLE` fills the slot `score` of `objectives.Pairwise`, as those of `implicit_rewards` do.
Rows 2i and 2i + 1 are a pair, and `preferred` [B] says which of them is the preferred one. Masked
entries change neither a score nor its gradient.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from polgrad.losses import implicit_rewards, pairs
from polgrad.registry import Fraction, either, table
from polgrad.types import Array


def damped_sum(
  logp: Array, reference_logp: Array, mask: Array, *, damping: Fraction = 0.5
) -> Array:
  """sum_{t <= m} D_t + damping sum_{t > m} D_t, D = logp - reference_logp: LD-DPO (arXiv:2409.06411).

  m is the number of tokens of the shorter row of the pair, so only what makes a row the longer one is
  damped. damping = 1 is `implicit_rewards.log_ratio_sum`, and 0 cuts both rows to one length.

  Args:
    logp: [B, T], nats.
    reference_logp: [B, T], nats, constant.
    mask: bool[B, T].
    damping: alpha of the paper, in [0, 1].

  Returns:
    [B], nats; 0 in a row without tokens.
  """
  beyond = jnp.cumsum(mask, axis=1) > pairs.shared_length(mask)[:, None]
  weights = jnp.where(beyond, damping, 1.0)
  return implicit_rewards.weighted_log_ratio_sum(logp, reference_logp, weights, mask)


def divergence_corrected_sum(
  logp: Array,
  teacher_logp: Array,
  reference_kl: Array,
  preferred: Array,
  mask: Array,
  *,
  coefficient: float = 1.0,
  detach_preferred: bool = False,
) -> Array:
  """sum_t (logp - teacher_logp) + coefficient K, K = sum_t KL(reference || policy): TDPO
  (arXiv:2404.11999).

  The difference of the scores of a pair is h - coefficient (K_l - K_w), with h that of DPO. TDPO1 has
  the coefficient 1. TDPO2 has no gradient through K_w: the rejected row may not drift from the reference
  any more than the preferred one, which itself is free.

  Args:
    logp: [B, T], nats.
    teacher_logp: [B, T], nats, constant: the reference, called `teacher` because its whole distribution
      is compared.
    reference_kl: [B, T], nats, sum_v ref(v) log(ref(v) / pi(v)) of the next-token distributions.
    preferred: bool[B], one True in each pair.
    mask: bool[B, T].
    coefficient: of K; alpha of TDPO2.
    detach_preferred: whether K of the preferred row carries no gradient.

  Returns:
    [B], nats; 0 in a row without tokens.
  """
  chex.assert_equal_shape([logp, reference_kl, mask])
  kl = implicit_rewards.logp_sum(reference_kl, mask)
  if detach_preferred:
    kl = jnp.where(preferred, jax.lax.stop_gradient(kl), kl)
  return implicit_rewards.log_ratio_sum(logp, teacher_logp, mask) + coefficient * kl


TABLE = table('pair_scores', damped_sum, divergence_corrected_sum)
Part = Annotated[Callable, either(implicit_rewards.TABLE, TABLE)]
