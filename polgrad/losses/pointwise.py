"""Losses of one row: of its label (unpaired feedback), or of its reward compared within a pair.

A function of `TABLE` fills the slot `loss` of `objectives.Pointwise`. `score`, z in formulas, is an
implicit reward that is multiplied by beta already (see `implicit_rewards`). The label is p in formulas.
Labels and rewards are constants.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from polgrad.losses import preference_losses
from polgrad.losses._common import bounded
from polgrad.losses.groups import partner, same
from polgrad.registry import table
from polgrad.types import Array


def logistic(score: Array, label: Array) -> Array:
  """p log(1 + exp(-z)) + (1 - p) log(1 + exp(z)): the binary classifier of BCO (arXiv:2404.04656).

  Args:
    score: [...].
    label: [...], 1 for a desirable row, 0 for an undesirable one.

  Returns:
    [...].
  """
  return preference_losses.logistic(score, label)


def sigmoid(
  score: Array, label: Array, *, desirable: float = 1.0, undesirable: float = 1.0
) -> Array:
  """desirable p sigmoid(-z) + undesirable (1 - p) sigmoid(z): KTO with reference point z0 = 0
  (arXiv:2402.01306), which is APO-zero on unpaired data (arXiv:2408.06266).

  The loss is bounded, so its gradient vanishes where |z| is large, whatever the label. `kto` has a
  reference point that is estimated.

  Args:
    score: [...].
    label: [...], 1 for a desirable row, 0 for an undesirable one.
    desirable: weight of desirable rows, lambda_D in the paper.
    undesirable: weight of undesirable rows, lambda_U in the paper.

  Returns:
    [...], in [0, 1] for labels in [0, 1] and weights of 1.
  """
  chex.assert_equal_shape([score, label])
  good, bad = jax.nn.sigmoid(-score), jax.nn.sigmoid(score)
  return desirable * label * good + undesirable * (1 - label) * bad


def kto(
  score: Array,
  label: Array,
  mismatched_score: Array,
  *,
  desirable: float = 1.0,
  undesirable: float = 1.0,
) -> Array:
  """`sigmoid` of z - z0, z0 = sg(max(mean of the mismatched scores, 0)): KTO (arXiv:2402.01306).

  z0 estimates beta KL(pi || reference) from completions of other prompts; rows count as gains or losses
  relative to it. The mean is over the rows that are given, so each micro-batch has a different z0, as in
  published code. The paper recommends weights with
  desirable * (number of desirable rows) / (undesirable * number of undesirable rows) between 1 and 4/3.

  Args:
    score: [B].
    label: [B], 1 for a desirable row, 0 for an undesirable one.
    mismatched_score: [B], the same score of the row's prompt with a completion of another prompt.
    desirable: weight of desirable rows, lambda_D in the paper.
    undesirable: weight of undesirable rows, lambda_U in the paper.

  Returns:
    [B].
  """
  chex.assert_rank(score, 1)
  chex.assert_equal_shape([score, label, mismatched_score])
  z0 = jax.lax.stop_gradient(jnp.maximum(jnp.mean(mismatched_score), 0))
  return sigmoid(score - z0, label, desirable=desirable, undesirable=undesirable)


def squared(score: Array, label: Array, *, target: float = 1.0) -> Array:
  """(z - (2 p - 1) target)^2: SPPO (arXiv:2405.00675).

  The mean over a pair is the paper's loss if p is the win rate of the row against the current policy,
  the reference is the policy of the previous iteration, and target = 1/(2 beta).

  Args:
    score: [...].
    label: [...], probability that the row wins against another sample.
    target: the score at which a row with p = 1 has loss 0.

  Returns:
    [...].
  """
  chex.assert_equal_shape([score, label])
  return jnp.square(score - (2 * label - 1) * target)


def paired_product_clip(
  logp: Array,
  proximal_logp: Array,
  rewards: Array,
  group_ids: Array,
  mask: Array,
  *,
  eps: float = 0.2,
) -> Array:
  """-min(dR x, dR clip(x, 1 - eps, 1 + eps)), dR = R - R_other of the pair, x = s sg(s_other), s the
  sequence ratio: P3O-V1 (arXiv:2310.00212).

  The published loss is half the sum over the pair, which is the mean over rows of this. On-policy the
  gradient is that of -dR log pi(row).

  Args:
    logp: [B, T], nats.
    proximal_logp: [B, T], nats, constant.
    rewards: [B].
    group_ids: i32[B]; a pair is a group of two rows. Rows of other groups have loss 0.
    mask: bool[B, T].
    eps: largest distance of the product x of both ratios from 1.

  Returns:
    [B].
  """
  moved = _moved(logp, proximal_logp, mask)
  other, gap = _pairs(rewards, group_ids)
  product = jnp.exp(bounded(moved + jax.lax.stop_gradient(moved[other])))
  return -jnp.minimum(gap * product, gap * jnp.clip(product, 1 - eps, 1 + eps))


def paired_joint_clip(
  logp: Array,
  proximal_logp: Array,
  rewards: Array,
  group_ids: Array,
  mask: Array,
  *,
  delta: float = 0.2,
) -> Array:
  """-min(c l, c clip(l, l_old - delta, l_old + delta)), l = log pi(row) - log pi(other row of the
  pair), c = sg(s s_other) dR / 2: P3O-V2 (arXiv:2310.00212).

  Both rows of a pair have the same loss, that of the pair, so the mean over rows is the published one.

  Args:
    logp: [B, T], nats.
    proximal_logp: [B, T], nats, constant.
    rewards: [B].
    group_ids: i32[B]; a pair is a group of two rows. Rows of other groups have loss 0.
    mask: bool[B, T].
    delta: largest change of the log-odds l of the pair, nats.

  Returns:
    [B].
  """
  moved = _moved(logp, proximal_logp, mask)
  other, gap = _pairs(rewards, group_ids)
  score = jnp.sum(jnp.where(mask, logp, 0), axis=-1)
  odds = score - score[other]
  old = jax.lax.stop_gradient(odds - (moved - moved[other]))
  coefficient = jnp.exp(bounded(jax.lax.stop_gradient(moved + moved[other])))
  coefficient = coefficient * gap / 2
  near = jnp.clip(odds, old - delta, old + delta)
  return -jnp.minimum(coefficient * odds, coefficient * near)


def _moved(logp: Array, proximal_logp: Array, mask: Array) -> Array:
  """Log-ratio of the row to the policy at the start of the phase: [B, T] -> [B], nats."""
  chex.assert_rank(mask, 2)
  chex.assert_equal_shape([logp, proximal_logp, mask])
  return jnp.sum(jnp.where(mask, logp - proximal_logp, 0), axis=-1)


def _pairs(rewards: Array, group_ids: Array) -> tuple[Array, Array]:
  """The place of the other row of the pair, i32[B], and dR, the gap to its reward, [B].

  A row that is not in a pair is compared with itself, so its gap is 0.
  """
  chex.assert_equal_shape([rewards, group_ids])
  other = partner(same(group_ids))
  paired = other != jnp.arange(len(rewards))
  return other, jnp.where(paired, rewards - rewards[other], 0)


TABLE = table('pointwise', logistic, sigmoid, kto, squared, paired_product_clip, paired_joint_clip)
Part = Annotated[Callable, TABLE]
