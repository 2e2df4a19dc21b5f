"""Weights of preference pairs: factors of the loss of a pair, without gradient.

A function of `TABLE` fills one of the `weights` of `objectives.Pairwise`. It returns one number a pair,
[B / 2], and reads arrays of all rows: rows 2i and 2i + 1 are a pair, `preferred` [B] says which of them
is the preferred one, and `gap` [B] is the difference of their scores, the same in both rows. A pair of
weight 0 still counts in the number of pairs. As one of the `scales` a function multiplies beta instead.
"""

from collections.abc import Callable
from typing import Annotated

import jax.numpy as jnp

from polgrad.losses import implicit_rewards, pairs
from polgrad.losses._common import bounded
from polgrad.registry import Range, table
from polgrad.types import Array


def given(weights: Array) -> Array:
  """The weights that the data give to pairs, `Batch.weights` (standard).

  Args:
    weights: [B], the same in both rows of a pair.

  Returns:
    [B / 2].
  """
  return pairs.first(weights)


def alignment(
  logp: Array, typical_logp: Array, mask: Array, *, cap: Annotated[float, Range(at_least=0)] = 1.0
) -> Array:
  """min(cap, exp(a_w + a_l)), a the mean over a row's tokens of logp - typical_logp: WPO
  (arXiv:2406.11827).

  A pair that the policy itself might have sampled has a weight near 1, one that is off-policy a small
  weight. typical_logp is log sum_v pi_v^2 (`logit_stats.log_collision`): then every pair has the weight
  1 under a uniform policy, and E_{token ~ pi} exp(logp - typical_logp) = 1.

  Args:
    logp: [B, T], nats.
    typical_logp: [B, T], nats, the log-probability that a token is compared with.
    mask: bool[B, T].
    cap: largest weight; TRL has none (infinity).

  Returns:
    [B / 2], in [0, cap].
  """
  rows = implicit_rewards.log_ratio_mean(logp, typical_logp, mask)
  return jnp.minimum(jnp.exp(bounded(rows[::2] + rows[1::2])), cap)


def semantic(similarity: Array, *, alpha: Annotated[float, Range(at_least=0)] = 1.0) -> Array:
  """exp(-alpha (1 - similarity)): Sem-DPO (arXiv:2507.20133).

  Args:
    similarity: [B], the cosine between embeddings of prompt and preferred completion, the same in both
      rows of a pair.
    alpha: larger values give less weight to pairs whose completion is semantically far from the prompt.

  Returns:
    [B / 2].
  """
  return jnp.exp(-alpha * (1 - pairs.first(similarity)))


def kept_pairs(pair_factors: Array) -> Array:
  """The selection `pair_factors`: 0 for pairs that are left out, and one positive number for all others
  (standard).

  The number is (pairs) / (pairs that are kept), so the mean over all pairs of weight * loss is the mean
  loss of the kept ones.

  Args:
    pair_factors: [B], the same in both rows of a pair.

  Returns:
    [B / 2].
  """
  return pairs.first(pair_factors)


def batch_beta(batch_beta: Array) -> Array:
  """The selection `batch_beta`, a factor of beta for the whole batch: beta-DPO (arXiv:2407.08639).

  Args:
    batch_beta: [].

  Returns:
    [].
  """
  return batch_beta


TABLE = table('pair_weights', given, alignment, semantic, kept_pairs, batch_beta)
Part = Annotated[Callable, TABLE]
