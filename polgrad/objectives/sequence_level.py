"""Objectives of whole rows: pairs of scores, and regressions on the reward."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated

import jax
import jax.numpy as jnp

from polgrad import metric_history, optim
from polgrad.losses import (
  divergences,
  implicit_rewards,
  log_partition,
  logit_stats,
  pair_offsets,
  pair_scores,
  pair_selections,
  pair_weights,
  pairs,
  preference_losses,
  score_shapes,
)
from polgrad.objectives.base import (
  WHOLE,
  Comparing,
  Metrics,
  Objective,
  State,
  Terms,
  call_slot,
  check_distinct,
  check_vocabulary,
  off_policy_metrics,
  row_mean,
  view,
  weigh,
)
from polgrad.objectives.row_level import isolate_empty_rows
from polgrad.reductions import Deviation
from polgrad.registry import Positive, check_weighted, either, inputs
from polgrad.types import Array, Batch, Outputs

StatPart = Annotated[Callable, either(logit_stats.TABLE, divergences.TABLE | divergences.LISTED)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairwise(Comparing):
  """Mean over pairs of (product of weights) * link(z, p'),
  z = beta (product of scales) (r_w - r_l) - offset - sum_k c_k offset_k.

  r = shape(score) of a row, w the preferred row of a pair and l the other. Rows 2i and 2i + 1 are a
  pair. `label[2i]` is the probability that row 2i is preferred; if it is below one half, row 2i + 1 is
  the preferred one, so sampled pairs need no reordering. With p, the probability that the preferred row
  is the better one, the link gets p' = (1 - s) p + s (1 - p), s being `label_smoothing`. A pair with a
  fully masked row (a tie, a failed verifier) is left out of both the sum and the number of pairs.

  The metric `accuracy` is the fraction of pairs whose preferred row has the higher score. Equal
  scores count as one half, as they do before the first update of DPO, where rounding would decide
  otherwise. `margin` is the mean of r_w - r_l, and `margin_std` its standard deviation. `chosen_reward`
  and `rejected_reward` are the means of beta r_w and beta r_l, the implicit rewards.

  Attributes:
    score: of a row, [B], such as the summed log-ratio to the reference.
    link: loss of a pair, [B / 2], of its margin z and the confidence of its label.
    shape: of a row, [B], a function of `score` and of any arrays; it may compare the rows of a pair.
    beta: multiplies the difference of the shaped scores.
    scales: factors of beta by name, [B / 2] or one number, without gradient.
    offset: number that is subtracted from the margin, in units of the link's argument.
    offsets: functions of any arrays, [B / 2], which are subtracted too, each with its coefficient,
      e.g. `{'length': weighted(-0.1, part(pair_offsets.length_difference))}`. They may carry gradient.
    weights: factors of the loss of a pair by name, [B / 2]. No gradient passes through them, and a pair
      of weight 0 still counts in the number of pairs.
    label_smoothing: probability s that a label is wrong, in [0, 1/2]. The negative number
      -e / (1 - 2 e) undoes flips of probability e instead, so p may be larger than 1.
    stats: statistics of the next-token distribution; slots read them by these names.
    selections: functions that compare pairs of the whole batch, such as ranks; slots read the results
      by these names.
    history: values that are kept between updates; slots read them by these names.

  Raises:
    TypeError: an offset without a coefficient.
    ValueError: a name that two arrays would have, or a statistic that reads an unknown array.
  """

  score: pair_scores.Part
  link: preference_losses.Part
  shape: score_shapes.Part = score_shapes.identity
  beta: Positive = 1.0
  scales: Mapping[str, pair_weights.Part] = dataclasses.field(default_factory=dict)
  offset: float = 0.0
  offsets: Mapping[str, pair_offsets.Part] = dataclasses.field(default_factory=dict)
  weights: Mapping[str, pair_weights.Part] = dataclasses.field(default_factory=dict)
  label_smoothing: float = 0.0
  stats: Mapping[str, StatPart] = dataclasses.field(default_factory=dict)
  selections: Mapping[str, pair_selections.Part] = dataclasses.field(default_factory=dict)
  history: Mapping[str, metric_history.Part] = dataclasses.field(default_factory=dict)

  rows_per_prompt = 2  # a pair is never split; this is no field, because it cannot be chosen

  def __post_init__(self):
    check_weighted('offsets', self.offsets)
    check_distinct(stats=self.stats, selections=self.selections, history=self.history)
    for name, stat in self.stats.items():
      check_vocabulary(f'stats.{name}', stat)

  @functools.cached_property
  def slots(self) -> Mapping[str, Callable]:
    groups = {
      'offsets': {k: p.fn for k, p in self.offsets.items()},
      'scales': self.scales,
      'weights': self.weights,
      'stats': self.stats,
      'selections': self.selections,
    }
    several = {f'{slot}.{k}': f for slot, group in groups.items() for k, f in group.items()}
    return {'score': self.score, 'shape': self.shape, **several}

  @functools.cached_property
  def makes(self) -> frozenset[str]:
    made = {'score', 'preferred', 'gap', *self.stats, *self.selections, *self.history}
    return frozenset(made)

  @functools.cached_property
  def requires(self) -> frozenset[str]:
    return super().requires | {'label'}

  def apply(
    self, outputs: Outputs, batch: Batch, state: State, *, step: Array | int
  ) -> tuple[Terms, Metrics]:
    x = self.arrays(outputs, self.compared(outputs, batch, state, step), state, step)
    self.add_scores(x)

    # The margin of each pair, less what it must exceed, and the weighted loss.
    chosen, rejected = pairs.split(x['score'], x['preferred'])
    gap = chosen - rejected
    margin = weigh(self.beta * gap, self.scales, x, 'scales') - self.offset
    for name, (coefficient, offset) in self.offsets.items():
      margin = margin - coefficient * call_slot(f'offsets.{name}', offset, x)
    loss = weigh(self.link(margin, self.confidence(x)), self.weights, x)

    where = pairs.complete(batch.mask)
    metrics = {
      'accuracy': row_mean((gap > 0) + 0.5 * (gap == 0), where),
      'margin': row_mean(jax.lax.stop_gradient(gap), where),
      'margin_std': Deviation.of(jax.lax.stop_gradient(gap), where),
      'chosen_reward': row_mean(self.beta * jax.lax.stop_gradient(chosen), where),
      'rejected_reward': row_mean(self.beta * jax.lax.stop_gradient(rejected), where),
    }
    return {'preference': row_mean(loss, where)}, metrics | off_policy_metrics(x)

  def arrays(
    self, outputs: Outputs, batch: Batch, state: State, step: Array | int
  ) -> dict[str, Array]:
    """Every array that the score may name."""
    x = view(outputs, batch)
    x['step'] = jnp.asarray(step, jnp.float32)
    x['preferred'] = pairs.preferred(x['label'])
    return x | self.remembered(state)

  def add_scores(self, x: dict[str, Array]) -> None:
    """Adds the shaped `score` of the rows and the `gap` of their pairs, in place."""
    x['score'] = call_slot('score', self.score, x)
    x['score'] = call_slot('shape', self.shape, x)  # a shape reads the score by that name
    chosen, rejected = pairs.split(x['score'], x['preferred'])
    x['gap'] = jnp.repeat(chosen - rejected, 2)

  def confidence(self, x: Mapping[str, Array]) -> Array:
    """The probability that the preferred row is the better one, after smoothing, [B / 2]."""
    p = pairs.certainty(x['label'])
    return p * (1 - self.label_smoothing) + (1 - p) * self.label_smoothing

  def compare(
    self, outputs: Outputs, batch: Batch, state: State, *, step: Array | int
  ) -> dict[str, Array]:
    """The results of all selections as features [B, ...], without gradient; see `select`."""
    x = self.arrays(jax.lax.stop_gradient(outputs), batch, state, step)
    if any({'score', 'gap'} & set(inputs(fn)) for fn in self.selections.values()):
      self.add_scores(x)  # otherwise the score may be one of selected tokens
    # The noise depends on the update alone, so a repeated update selects the same pairs.
    x['noise'] = jax.random.uniform(jax.random.fold_in(jax.random.key(0), step), batch.mask.shape)
    rows, found = len(batch.mask), {}
    for name, selection in self.selections.items():
      value = jax.lax.stop_gradient(call_slot(f'selections.{name}', selection, x))
      # Features have one entry a row: a value of a pair is repeated for its two rows, and a value of
      # the whole batch for all rows.
      if value.shape == batch.mask.shape:
        found[name] = value
      elif value.shape == (rows // 2,):
        found[name] = jnp.repeat(value, 2)
      else:
        found[WHOLE + name] = jnp.broadcast_to(value, (rows, *value.shape))
    return found


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
  beta: Positive = 0.5
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
