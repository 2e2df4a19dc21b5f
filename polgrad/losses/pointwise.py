"""Losses of one row: of its label (unpaired feedback), or of its reward compared within a pair.

A function of `TABLE` fills the slot `loss` of `objectives.Pointwise` or `Listwise`. `score`, z in
formulas, is an implicit reward that is multiplied by beta already (see `implicit_rewards`). The label is
p in formulas. Labels and rewards are constants.

A function of `SELECTIONS` fills one of their `selections`: it makes one number of the whole minibatch,
or one of each row, which a loss reads by its name in the configuration.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from polgrad.losses import preference_losses
from polgrad.losses._common import bounded
from polgrad.losses.groups import everyone, partner, rank, same
from polgrad.registry import NotNegative, table
from polgrad.types import Array


def logistic(
  score: Array, label: Array, *, desirable: float = 1.0, undesirable: float = 1.0
) -> Array:
  """desirable p softplus(-z) + undesirable (1 - p) softplus(z): the binary classifier of BCO
  (arXiv:2404.04656) with its threshold at z = 0.

  softplus(z) is log(1 + exp(z)). `bco` has another threshold.

  Args:
    score: [...].
    label: [...], 1 for a desirable row, 0 for an undesirable one.
    desirable: weight of desirable rows.
    undesirable: weight of undesirable rows.

  Returns:
    [...].
  """
  chex.assert_equal_shape([score, label])
  good, bad = jax.nn.softplus(-score), jax.nn.softplus(score)
  return desirable * label * good + undesirable * (1 - label) * bad


def sigmoid(
  score: Array, label: Array, *, desirable: float = 1.0, undesirable: float = 1.0
) -> Array:
  """desirable p sigmoid(-z) + undesirable (1 - p) sigmoid(z): KTO with reference point z0 = 0
  (arXiv:2402.01306), which is APO-zero on unpaired data (arXiv:2408.06266).

  The loss is bounded, so its gradient vanishes where |z| is large, whatever the label. `kto` has
  another reference point.

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
  reference_point: Array,
  *,
  desirable: float = 1.0,
  undesirable: float = 1.0,
) -> Array:
  """`sigmoid` of z - z0: KTO (arXiv:2402.01306), z0 the reference point.

  Rows count as gains or losses relative to z0. In the paper it is an estimate of beta KL(pi, reference),
  `mismatched_mean`. Where one kind of rows is rarer, desirable * (number of desirable rows) should be
  between 1 and 4/3 times undesirable * (number of undesirable rows); another version has 3/2.

  Args:
    score: [...].
    label: [...], 1 for a desirable row, 0 for an undesirable one.
    reference_point: [], z0; no gradient flows through it.
    desirable: weight of desirable rows, lambda_D in the paper.
    undesirable: weight of undesirable rows, lambda_U in the paper.

  Returns:
    [...].
  """
  shifted = score - jax.lax.stop_gradient(reference_point)
  return sigmoid(shifted, label, desirable=desirable, undesirable=undesirable)


def bco(
  score: Array,
  label: Array,
  reference_point: Array,
  *,
  desirable: float = 1.0,
  undesirable: float = 1.0,
) -> Array:
  """`logistic` of z - d: BCO (arXiv:2404.04656), d the reference point.

  In the paper d is the mean score of all rows so far, `running_mean`.

  Args:
    score: [...].
    label: [...], 1 for a desirable row, 0 for an undesirable one.
    reference_point: [], d; no gradient flows through it.
    desirable: weight of desirable rows.
    undesirable: weight of undesirable rows; `matched_bco` has another one for each row.

  Returns:
    [...].
  """
  shifted = score - jax.lax.stop_gradient(reference_point)
  return logistic(shifted, label, desirable=desirable, undesirable=undesirable)


def matched_bco(
  score: Array,
  label: Array,
  reference_point: Array,
  density_ratio: Array,
  *,
  least: NotNegative = 0.5,
  most: NotNegative = 10.0,
) -> Array:
  """p softplus(-(z - d)) + w (1 - p) softplus(z - d), w = clip(density_ratio, least, most): `bco` whose
  bad rows count as if their prompts were those of good rows (arXiv:2404.04656).

  Args:
    score: [...].
    label: [...], 1 for a desirable row, 0 for an undesirable one.
    reference_point: [], d; no gradient flows through it.
    density_ratio: [...], p(prompt | good row) / p(prompt | bad row), constant.
    least: smallest w.
    most: largest w.

  Returns:
    [...].
  """
  chex.assert_equal_shape([score, label, density_ratio])
  weight = jnp.clip(jax.lax.stop_gradient(density_ratio), least, most)
  return bco(score, label, reference_point, undesirable=weight)


def mismatched_mean(mismatched_log_ratio: Array, beta: Array, mask: Array) -> Array:
  """max(beta mean(log-ratio of prompts with completions of others), 0): z0 of KTO (arXiv:2402.01306).

  The mean is that of the whole minibatch: of all devices and micro-batches. A completion of another
  prompt is a sample of neither policy, so this is the paper's rough estimate of beta KL(pi, reference).

  Args:
    mismatched_log_ratio: [B], nats; NaN in rows that have none.
    beta: [], what multiplies scores.
    mask: bool[B, T]; rows without tokens do not count.

  Returns:
    []; 0 if no row counts.
  """
  where = jnp.any(mask, axis=1) & jnp.isfinite(mismatched_log_ratio)
  mean = jnp.sum(jnp.where(where, mismatched_log_ratio, 0)) / jnp.maximum(jnp.sum(where), 1)
  return jnp.maximum(beta * mean, 0)


def running_mean(score: Array, earlier_scores: Array, mask: Array) -> Array:
  """The mean score of all rows of this update and of the earlier ones: delta of BCO (arXiv:2404.04656).

  Args:
    score: [B].
    earlier_scores: [2], sum and number of the scores before, see `metric_history.total_of`.
    mask: bool[B, T]; rows without tokens do not count.

  Returns:
    [].
  """
  where = jnp.any(mask, axis=1)
  sums = jnp.sum(jnp.where(where, score, 0)) + earlier_scores[0]
  return sums / jnp.maximum(jnp.sum(where) + earlier_scores[1], 1)


def matched(
  score: Array, matched_score: Array, label: Array, *, label_smoothing: float = 0.0
) -> Array:
  """softplus(-(z - m)) of a good row and softplus(z - m) of a bad one, m the score of the row of the
  other kind that it is matched with: AOT without pairs (arXiv:2406.05882).

  Rows are matched by rank (`sorted_partners`). Both rows of a match have the loss of the match, so with
  as many good as bad rows the mean over rows is the mean over matches. m is a constant, so a row has the
  gradient by its own score only. That gradient is doubled, without a change of the value, because the
  mean is over twice as many numbers as there are matches.

  Args:
    score: [B].
    matched_score: [B], m; infinite for a row that has no match, whose loss is 0.
    label: [B], at least one half for good rows; between 0 and 1 it is a probability.
    label_smoothing: probability that a label is wrong, in [0, 1/2].

  Returns:
    [B].
  """
  chex.assert_equal_shape([score, matched_score, label])
  found = jnp.isfinite(matched_score)
  twice = 2 * score - jax.lax.stop_gradient(score)
  gap = jnp.where(found, twice - jnp.where(found, matched_score, 0), 0)
  p = label * (1 - label_smoothing) + (1 - label) * label_smoothing
  return jnp.where(found, preference_losses.logistic(gap, p), 0)


def sorted_partners(score: Array, label: Array, mask: Array) -> Array:
  """For every row the score of the same rank among the rows of the other kind, for `matched`.

  Rows with a label of at least one half are good, the others bad. If there are not as many good as bad
  rows, a rank is scaled to the number of rows of the other kind and rounded down.

  Args:
    score: [B].
    label: [B].
    mask: bool[B, T]; rows without tokens do not count.

  Returns:
    [B]; infinite where the other kind has no rows.
  """
  rows = jnp.any(mask, axis=1)
  good = label >= 0.5
  kinds = [rows & good, rows & ~good]
  ranks = [rank(score, everyone(kind)) for kind in kinds]
  ordered = [jnp.sort(jnp.where(kind, score, jnp.inf)) for kind in kinds]
  counts = [jnp.sum(kind) for kind in kinds]
  place = lambda own, other: ranks[own] * counts[other] // jnp.maximum(counts[own], 1)
  take = lambda own, other: ordered[other][jnp.minimum(place(own, other), len(score) - 1)]
  return jnp.where(good, take(0, 1), take(1, 0))


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


def squared_error(score: Array, target: Array) -> Array:
  """(z - target)^2 / 2: a reward model that predicts a number (standard).

  Args:
    score: [...].
    target: [...], such as the rating of a completion.

  Returns:
    [...].
  """
  chex.assert_equal_shape([score, target])
  return 0.5 * jnp.square(score - target)


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


TABLE = table(
  'pointwise',
  logistic,
  sigmoid,
  kto,
  bco,
  matched_bco,
  matched,
  squared,
  squared_error,
  paired_product_clip,
  paired_joint_clip,
)
Part = Annotated[Callable, TABLE]

SELECTIONS = table('pointwise', mismatched_mean, running_mean, sorted_partners)
SelectionPart = Annotated[Callable, SELECTIONS]
