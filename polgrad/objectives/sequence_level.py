"""Objectives of whole rows: pairs of scores, single scores, and regressions on the reward."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from polgrad import optim
from polgrad.losses import implicit_rewards, log_partition, logit_stats, preference_losses
from polgrad.losses import pointwise as pointwise_losses
from polgrad.objectives.base import (
  Metrics,
  Objective,
  State,
  Terms,
  call_slot,
  check_vocabulary,
  off_policy_metrics,
  row_mean,
  view,
)
from polgrad.types import Array, Batch, Outputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairwise(Objective):
  """Mean over pairs of link(beta * (score_w - score_l) - offset, 1 - label_smoothing).

  Rows 2i and 2i + 1 are a pair. `label[2i]` is the probability that row 2i is preferred; if it is
  below one half, row 2i + 1 is the preferred one, so sampled pairs need no reordering. A pair with a
  fully masked row (a tie, a failed verifier) is left out of both the sum and the number of pairs.
  `Batch.weights`, where given, multiply a pair's loss and do not change the number of pairs.

  The metric `accuracy` is the fraction of pairs whose preferred row has the higher score. Equal
  scores count as one half, as they do before the first update of DPO, where rounding would decide
  otherwise. `margin` is the mean of score_w - score_l. `chosen_reward` and `rejected_reward` are the
  means of beta * score_w and beta * score_l, the implicit rewards.

  Attributes:
    score: of a row, [B], such as the summed log-ratio to the reference.
    link: loss of a pair, [B / 2], of its scaled score difference and the confidence of its label.
    beta: multiplies the score difference.
    offset: margin that is subtracted from it, in units of the loss's argument.
    label_smoothing: probability that a label is wrong, in [0, 1/2].
  """

  score: implicit_rewards.Part
  link: preference_losses.Part
  beta: float = 1.0
  offset: float = 0.0
  label_smoothing: float = 0.0

  rows_per_prompt = 2  # a pair is never split; this is no field, because it cannot be chosen

  @functools.cached_property
  def slots(self) -> Mapping[str, Callable]:
    return {'score': self.score}

  @functools.cached_property
  def requires(self) -> frozenset[str]:
    return super().requires | {'label'}

  def apply(
    self, outputs: Outputs, batch: Batch, state: State, *, step: Array | int
  ) -> tuple[Terms, Metrics]:
    del state, step
    x = view(outputs, batch)

    # The preferred row is the one whose label is at least one half.
    label = x['label'].reshape(-1, 2)[:, 0]
    sign = jnp.where(label >= 0.5, 1.0, -1.0)
    confidence = jnp.maximum(label, 1.0 - label)
    smoothing = self.label_smoothing
    confidence = confidence * (1.0 - smoothing) + (1.0 - confidence) * smoothing

    scores = call_slot('score', self.score, x).reshape(-1, 2)
    gap = sign * (scores[:, 0] - scores[:, 1])
    chosen = jnp.where(sign > 0, scores[:, 0], scores[:, 1])
    loss = self.link(self.beta * gap - self.offset, confidence)

    # Pairs count only if both of their rows have tokens.
    where = jnp.any(batch.mask, axis=1).reshape(-1, 2).all(axis=1)
    if batch.weights is not None:
      loss = loss * batch.weights.reshape(-1, 2)[:, 0]
    metrics = {
      'accuracy': row_mean((gap > 0) + 0.5 * (gap == 0), where),
      'margin': row_mean(jax.lax.stop_gradient(gap), where),
      'chosen_reward': row_mean(self.beta * jax.lax.stop_gradient(chosen), where),
      'rejected_reward': row_mean(self.beta * jax.lax.stop_gradient(chosen - gap), where),
    }
    return {'preference': row_mean(loss, where)}, metrics | off_policy_metrics(x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pointwise(Objective):
  """Mean over rows of loss(beta * score, ...); the loss reads a label, a reward or a group.

  Where rows have labels, `chosen_reward` and `rejected_reward` are the mean scaled scores of those with
  a label of at least one half and of the others.

  Attributes:
    score: of a row, [B], such as the summed log-ratio to the reference.
    loss: of a row, [B], of the score (times beta) and of any arrays that it names.
    beta: multiplies the score.
    rows_per_prompt: number of consecutive rows with the same prompt; more than 1 is needed only if
      `loss` compares the rows of a group.
  """

  score: implicit_rewards.Part
  loss: pointwise_losses.Part
  beta: float = 1.0
  rows_per_prompt: int = 1

  makes = frozenset({'score'})

  @functools.cached_property
  def slots(self) -> Mapping[str, Callable]:
    return {'score': self.score, 'loss': self.loss}

  def apply(
    self, outputs: Outputs, batch: Batch, state: State, *, step: Array | int
  ) -> tuple[Terms, Metrics]:
    del state, step
    x = view(outputs, batch)
    x['score'] = self.beta * call_slot('score', self.score, x)
    where = isolate_empty_rows(x)
    score = jax.lax.stop_gradient(x['score'])
    metrics = {'score': row_mean(score, where)}
    if 'label' in x:
      metrics['chosen_reward'] = row_mean(score, where & (x['label'] >= 0.5))
      metrics['rejected_reward'] = row_mean(score, where & (x['label'] < 0.5))
    loss = call_slot('loss', self.loss, x)
    return {'pointwise': row_mean(loss, where)}, metrics | off_policy_metrics(x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regression(Objective):
  """Mean over rows of scale * e^2 / 2, e = zeta - center, zeta = R / beta - score (arXiv:2503.18929).

  With the score sum_t log(pi / anchor) and the center log Z, e is zero for every sample, whichever
  policy drew it, exactly at pi = anchor exp(R / beta) / Z. The descent weight of a row's log-probs
  is scale * e. A method is the choice of anchor and center.

  Attributes:
    score: of a row, [B], nats; a log-ratio to the anchor.
    center: of a row, [B], nats; the estimate of log Z.
    beta: the temperature, in units of the reward.
    schedule: multiplies beta, by update.
    scale: multiplies the loss (1: e^2 / 2): 2 gives e^2, and beta gives the gradient in units of the
      reward.
    rows_per_prompt: number of consecutive rows with the same prompt; more than 1 is needed only if
      `center` compares the rows of a group.
    stats: statistics of the next-token distribution; score and center read them by these names.

  Raises:
    ValueError: a statistic that reads an unknown array.
  """

  score: implicit_rewards.Part
  center: log_partition.Part
  beta: float = 0.5
  schedule: optim.SchedulePart = optim.constant
  scale: float = 1.0
  rows_per_prompt: int = 1
  stats: Mapping[str, logit_stats.Part] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    for name, stat in self.stats.items():
      check_vocabulary(f'stats.{name}', stat)

  @functools.cached_property
  def slots(self) -> Mapping[str, Callable]:
    stats = {f'stats.{k}': f for k, f in self.stats.items()}
    return {'score': self.score, 'center': self.center, **stats}

  @functools.cached_property
  def makes(self) -> frozenset[str]:
    return frozenset({'beta', 'score', 'scaled_rewards', 'residual', *self.stats})

  @functools.cached_property
  def requires(self) -> frozenset[str]:
    return super().requires | {'rewards'}

  def apply(
    self, outputs: Outputs, batch: Batch, state: State, *, step: Array | int
  ) -> tuple[Terms, Metrics]:
    del state
    x = view(outputs, batch)
    where = isolate_empty_rows(x)

    # The center may read everything that the residual is made of.
    x['beta'] = self.beta * self.schedule(jnp.asarray(step))
    x['score'] = call_slot('score', self.score, x)
    x['scaled_rewards'] = x['rewards'] / x['beta']
    x['residual'] = x['scaled_rewards'] - x['score']
    error = x['residual'] - call_slot('center', self.center, x)

    metrics = {
      'score': row_mean(jax.lax.stop_gradient(x['score']), where),
      'residual': row_mean(jax.lax.stop_gradient(jnp.abs(error)), where),
    }
    loss = row_mean(0.5 * self.scale * jnp.square(error), where)
    return {'regression': loss}, metrics | off_policy_metrics(x)


def isolate_empty_rows(x: dict[str, Array]) -> Array:
  """Gives each row without tokens a group id that no other row has, in place.

  A failed row therefore does not change the statistics of its group.

  Returns:
    bool[B], True for rows that have tokens.
  """
  where = jnp.any(x['mask'], axis=1)
  if 'group_ids' in x:
    x['group_ids'] = jnp.where(where, x['group_ids'], -1 - jnp.arange(len(where)))
  return where
