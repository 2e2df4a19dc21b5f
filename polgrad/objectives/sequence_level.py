"""Objectives of whole rows: pairs of scores, single scores, and regressions on the reward."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from polgrad.losses import implicit_rewards, log_partition, logit_stats, preference_losses
from polgrad.losses import pointwise as pointwise_losses
from polgrad.objectives.base import Objective, off_policy_metrics, reads, row_mean, view
from polgrad.registry import call
from polgrad.types import Array


def pairwise(
  *,
  score: implicit_rewards.Part,
  link: preference_losses.Part,
  beta: float = 1.0,
  offset: float = 0.0,
  label_smoothing: float = 0.0,
) -> Objective:
  """Mean over pairs of link(beta * (score_w - score_l) - offset, 1 - label_smoothing).

  Rows 2i and 2i + 1 are a pair. `label[2i]` is the probability that row 2i is preferred; a label
  below one half turns the pair round, so sampled pairs need no reordering. A pair with a fully
  masked row (a tie, a failed verifier) counts neither above nor below the fraction line. `weights`,
  where given, multiply a pair's loss and stay out of the count.
  """

  def apply(outputs, batch, state, *, step):
    del state, step
    x = view(outputs, batch)
    label = x['label'].reshape(-1, 2)[:, 0]
    turn = jnp.where(label >= 0.5, 1.0, -1.0)
    confidence = jnp.maximum(label, 1.0 - label)
    confidence = confidence * (1.0 - label_smoothing) + (1.0 - confidence) * label_smoothing
    scores = call(score, x).reshape(-1, 2)
    gap = turn * (scores[:, 0] - scores[:, 1])
    loss = link(beta * gap - offset, confidence)
    where = jnp.any(batch.mask, axis=1).reshape(-1, 2).all(axis=1)
    if batch.weights is not None:
      loss = loss * batch.weights.reshape(-1, 2)[:, 0]
    metrics = {
      'accuracy': row_mean(gap > 0, where),
      'margin': row_mean(jax.lax.stop_gradient(gap), where),
    }
    return {'preference': row_mean(loss, where)}, metrics | off_policy_metrics(x)

  return Objective(requires=reads([score]) | {'label'}, apply=apply, rows_per_prompt=2)


def pointwise(
  *,
  score: implicit_rewards.Part,
  loss: pointwise_losses.Part,
  beta: float = 1.0,
  rows_per_prompt: int = 1,
) -> Objective:
  """Mean over rows of loss(beta * score, ...): a label, a reward or a group says where it goes.

  Args:
    score: [B] sequence score, such as the summed log-ratio to the reference.
    loss: one number a row, of the score or of any arrays that it names.
    beta: multiplies the score.
    rows_per_prompt: rows of one prompt; needed when `loss` compares the rows of a group.
  """

  def apply(outputs, batch, state, *, step):
    del state, step
    x = view(outputs, batch)
    x['score'] = beta * call(score, x)
    where = _own_groups(x)
    metrics = {'score': row_mean(jax.lax.stop_gradient(x['score']), where)}
    return {'pointwise': row_mean(call(loss, x), where)}, metrics | off_policy_metrics(x)

  return Objective(
    requires=reads([score, loss], made={'score'}), apply=apply, rows_per_prompt=rows_per_prompt
  )


def regression(
  *,
  score: implicit_rewards.Part,
  center: log_partition.Part,
  beta: float = 0.5,
  scale: float = 1.0,
  rows_per_prompt: int = 1,
  stats: Mapping[str, logit_stats.Part] = {},
) -> Objective:
  """Mean over rows of scale * e^2 / 2, e = zeta - center, zeta = R / beta - score (arXiv:2503.18929).

  With the score sum_t log(pi / anchor), e is zero for every sample, whoever drew it, exactly at
  pi = anchor exp(R / beta) / Z if the centre is log Z. The descent weight of a row's log-probs is
  scale * e. What papers call their method is the choice of anchor and centre.

  Args:
    score: [B], nats; a log-ratio to the anchor.
    center: [B], the estimate of log Z.
    beta: the temperature, in units of the reward.
    scale: multiplies the loss: 2 for e^2, beta for the gradient in units of the reward.
    rows_per_prompt: rows of one prompt; needed when `center` compares the rows of a group.
    stats: statistics of the next-token distribution that score or centre read by these names.
  """

  def apply(outputs, batch, state, *, step):
    del state, step
    x = view(outputs, batch)
    where = _own_groups(x)
    x['beta'] = jnp.asarray(beta)
    x['score'] = call(score, x)
    x['scaled_rewards'] = x['rewards'] / beta
    x['residual'] = x['scaled_rewards'] - x['score']
    error = x['residual'] - call(center, x)
    metrics = {
      'score': row_mean(jax.lax.stop_gradient(x['score']), where),
      'residual': row_mean(jax.lax.stop_gradient(jnp.abs(error)), where),
    }
    loss = row_mean(0.5 * scale * jnp.square(error), where)
    return {'regression': loss}, metrics | off_policy_metrics(x)

  made = {'beta', 'score', 'scaled_rewards', 'residual', *stats}
  requires = reads([score, center, *stats.values()], made=made) | {'rewards'}
  return Objective(requires=requires, apply=apply, stats=stats, rows_per_prompt=rows_per_prompt)


def _own_groups(x: dict[str, Array]) -> Array:
  """Which rows have tokens, bool[B]; a row without any has no say in its group."""
  where = jnp.any(x['mask'], axis=1)
  if 'group_ids' in x:
    x['group_ids'] = jnp.where(where, x['group_ids'], -1 - jnp.arange(len(where)))
  return where
