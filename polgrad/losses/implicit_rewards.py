"""Scores of whole rows, made of their log-probabilities: the implicit rewards of preference losses.

A function of `TABLE` fills the slot `score` of `objectives.Pairwise`, `Pointwise` or `Regression`. It
sums or averages over the tokens where `mask` is True. Masked entries are replaced by 0, so NaN there
changes neither the score nor its gradient. The caller multiplies the score by beta.

A policy's log-probabilities carry gradient; reference and proximal ones are constants that the caller
does not differentiate.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax.numpy as jnp

from polgrad.losses._common import single
from polgrad.registry import Fraction, table
from polgrad.types import Array


def log_ratio_sum(logp: Array, reference_logp: Array, mask: Array) -> Array:
  """sum_t (logp - reference_logp): the implicit reward of DPO, divided by beta (arXiv:2305.18290).

  Args:
    logp: [..., T], nats.
    reference_logp: [..., T], nats, constant.
    mask: bool[..., T].

  Returns:
    [...], nats; 0 in a row without tokens.
  """
  return jnp.sum(_differences(logp, reference_logp, mask), axis=-1)


def log_ratio_mean(logp: Array, reference_logp: Array, mask: Array) -> Array:
  """`log_ratio_sum` divided by the number of tokens: length-normalised DPO (arXiv:2411.15124).

  Args:
    logp: [..., T], nats.
    reference_logp: [..., T], nats, constant.
    mask: bool[..., T].

  Returns:
    [...], nats per token; 0 in a row without tokens.
  """
  return log_ratio_sum(logp, reference_logp, mask) / jnp.maximum(jnp.sum(mask, axis=-1), 1)


def logp_sum(logp: Array, mask: Array) -> Array:
  """sum_t logp: the reference-free score of SLiC-HF and CPO (arXiv:2305.10425, arXiv:2401.08417).

  Args:
    logp: [..., T], nats.
    mask: bool[..., T].

  Returns:
    [...], nats; 0 in a row without tokens.
  """
  chex.assert_equal_shape([logp, mask])
  return jnp.sum(jnp.where(mask, single(logp), 0), axis=-1)


def logp_mean(logp: Array, mask: Array) -> Array:
  """`logp_sum` divided by the number of tokens: the score of SimPO (arXiv:2405.14734).

  Args:
    logp: [..., T], nats.
    mask: bool[..., T].

  Returns:
    [...], nats per token; 0 in a row without tokens.
  """
  return logp_sum(logp, mask) / jnp.maximum(jnp.sum(mask, axis=-1), 1)


def last_value(values_after: Array, mask: Array) -> Array:
  """The scalar head after the last token of the row: the score of a reward model (arXiv:2203.02155).

  The last token of a completion is its stop token, so the head has read the whole row.

  Args:
    values_after: [..., T], carries gradient.
    mask: bool[..., T].

  Returns:
    [...]; 0 in a row without tokens.
  """
  chex.assert_equal_shape([values_after, mask])
  later = jnp.cumsum(mask[..., ::-1], axis=-1)[..., ::-1]  # tokens from this one on
  return jnp.sum(jnp.where(mask & (later == 1), single(values_after), 0), axis=-1)


def user_score(user_score: Array) -> Array:
  """The score that a row has for its user: variational preference learning (arXiv:2408.10075).

  Args:
    user_score: [...], of the head `heads.LatentUser`, carries gradient.

  Returns:
    [...], the same.
  """
  return single(user_score)


def old_log_ratio_sum(logp: Array, proximal_logp: Array, mask: Array) -> Array:
  """sum_t (logp - proximal_logp): the log-ratio to the policy at the start of the phase, as in mirror
  descent (arXiv:2501.12599).

  Args:
    logp: [..., T], nats.
    proximal_logp: [..., T], nats, constant.
    mask: bool[..., T].

  Returns:
    [...], nats; 0 in a row without tokens.
  """
  return log_ratio_sum(logp, proximal_logp, mask)


def bellman_sum(logp: Array, reference_logp: Array, log_normalizer: Array, mask: Array) -> Array:
  """V_1 + sum_t (logp - reference_logp), V_1 the log-normaliser of the logits that score the row's
  first token: TBRM (arXiv:2505.15311).

  The logits are interpreted as Q in units of beta, so V = logsumexp(Q) and logp = Q - V. The squared
  difference to R / beta is then a Bellman residual summed over the row. V_1 takes the place of log Z
  and carries gradient, so use it with `log_partition.zero` as the centre.

  Args:
    logp: [..., T], nats.
    reference_logp: [..., T], nats, constant.
    log_normalizer: [..., T], nats, logsumexp of the logits; carries gradient.
    mask: bool[..., T].

  Returns:
    [...], nats; 0 in a row without tokens.
  """
  chex.assert_equal_shape([log_normalizer, mask])
  first = mask & (jnp.cumsum(mask, axis=-1) == 1)
  return logp_sum(log_normalizer, first) + log_ratio_sum(logp, reference_logp, mask)


def weighted_log_ratio_sum(
  logp: Array, reference_logp: Array, token_weights: Array, mask: Array
) -> Array:
  """sum_t s_t (logp - reference_logp): token-weighted DPO, as in OPA-DPO (arXiv:2501.09695).

  Args:
    logp: [..., T], nats.
    reference_logp: [..., T], nats, constant.
    token_weights: [..., T], s, constant: more than 1 where an expert found an error.
    mask: bool[..., T].

  Returns:
    [...], nats; 0 in a row without tokens.
  """
  chex.assert_equal_shape([token_weights, mask])
  weights = jnp.where(mask, single(token_weights), 0)
  return jnp.sum(weights * _differences(logp, reference_logp, mask), axis=-1)


def clipped_log_ratio_sum(
  logp: Array, reference_logp: Array, mask: Array, *, low: float = -1.0, high: float = 1.5
) -> Array:
  """sum_t clip(logp - reference_logp, low, high): the humanline score (arXiv:2509.24207).

  A token outside the bounds has no gradient. With infinite bounds it is `log_ratio_sum`.

  Args:
    logp: [..., T], nats.
    reference_logp: [..., T], nats, constant.
    mask: bool[..., T].
    low: smallest log-ratio of a token, nats.
    high: largest log-ratio of a token, nats.

  Returns:
    [...], nats; 0 in a row without tokens.
  """
  return jnp.sum(jnp.clip(_differences(logp, reference_logp, mask), low, high), axis=-1)


def selected_log_ratio_sum(
  logp: Array, reference_logp: Array, selected: Array, mask: Array
) -> Array:
  """`log_ratio_sum` of the selected tokens alone: SamPO with one subset (arXiv:2406.10957).

  Args:
    logp: [..., T], nats.
    reference_logp: [..., T], nats, constant.
    selected: bool[..., T].
    mask: bool[..., T].

  Returns:
    [...], nats; 0 in a row without selected tokens.
  """
  return log_ratio_sum(logp, reference_logp, mask & (selected > 0))


def separately_selected_sum(
  logp: Array, reference_logp: Array, selected: Array, reference_selected: Array, mask: Array
) -> Array:
  """Sum of logp over some tokens less that of reference_logp over others: SamPO as in the authors' code
  (arXiv:2406.10957), which draws the tokens of the reference again.

  Args:
    logp: [..., T], nats.
    reference_logp: [..., T], nats, constant.
    selected: bool[..., T], of the policy.
    reference_selected: bool[..., T], of the reference.
    mask: bool[..., T].

  Returns:
    [...], nats; 0 in a row without selected tokens.
  """
  own = logp_sum(logp, mask & (selected > 0))
  return own - logp_sum(reference_logp, mask & (reference_selected > 0))


def two_references(
  logp: Array,
  reference_logp: Array,
  previous_logp: Array,
  mask: Array,
  *,
  reference_weight: Fraction = 1 / 3,
) -> Array:
  """sum_t (logp - w reference_logp - (1 - w) previous_logp): INPO (arXiv:2407.00617).

  The log-ratio to the geometric mean of two policies, so a step of mirror descent starts at one and is
  drawn to the other.

  Args:
    logp: [..., T], nats.
    reference_logp: [..., T], nats, constant.
    previous_logp: [..., T], nats, constant: the policy at the start of the iteration.
    mask: bool[..., T].
    reference_weight: w of the reference; the previous policy has the rest.

  Returns:
    [...], nats; 0 in a row without tokens.
  """
  return reference_weight * log_ratio_sum(logp, reference_logp, mask) + (
    1 - reference_weight
  ) * log_ratio_sum(logp, previous_logp, mask)


def _differences(logp: Array, other: Array, mask: Array) -> Array:
  """logp - other, 0 outside the mask. Differences are summed, because a difference of two long sums
  has lost the digits in which they differ."""
  chex.assert_equal_shape([logp, other, mask])
  own, other = (jnp.where(mask, single(x), 0) for x in (logp, other))
  return own - other


TABLE = table(
  'implicit_rewards',
  log_ratio_sum,
  log_ratio_mean,
  logp_sum,
  logp_mean,
  last_value,
  user_score,
  old_log_ratio_sum,
  bellman_sum,
  weighted_log_ratio_sum,
  clipped_log_ratio_sum,
  selected_log_ratio_sum,
  separately_selected_sum,
  two_references,
)
Part = Annotated[Callable, TABLE]
