"""Objectives of given sequences: their likelihood, or the distance to a teacher on them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated

from polgrad import metric_history
from polgrad.losses import aggregation as aggregations
from polgrad.losses import divergences, logit_stats, penalties
from polgrad.losses import selections as batch_selections
from polgrad.losses import weights as token_weights
from polgrad.objectives.base import (
  OFF_POLICY,
  Metrics,
  Objective,
  State,
  StatFunction,
  Terms,
  call_slot,
  check_vocabulary,
  function_name,
  of_logits,
  off_policy_metrics,
  reads,
  view,
  weigh,
)
from polgrad.objectives.penalized import FactorPart, Penalized, PenaltyPart, StatPart
from polgrad.types import Array, Batch, Outputs

LossPart = Annotated[Callable, penalties.TABLE | logit_stats.TABLE]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(Objective):
  """AGG over tokens of D(teacher || student) over the vocabulary (arXiv:2306.13649).

  The sequences may come from the student, the teacher or a data set; their distribution carries no
  gradient. The [B, T, V] logits are never held in memory: the divergence is evaluated in chunks.

  Attributes:
    divergence: of the teacher's and the student's next-token distribution.
    aggregation: how token losses become one number.

  Raises:
    ValueError: a divergence that reads an unknown array.
  """

  divergence: divergences.Part
  aggregation: aggregations.Part

  def __post_init__(self):
    check_vocabulary('divergence', self.divergence)

  @functools.cached_property
  def slots(self) -> Mapping[str, Callable]:
    return {'divergence': self.divergence}

  @functools.cached_property
  def requires(self) -> frozenset[str]:
    return reads([self.divergence])

  @functools.cached_property
  def stats(self) -> Mapping[str, StatFunction]:
    return {'divergence': self.divergence}

  def apply(
    self, outputs: Outputs, batch: Batch, state: State, *, step: Array | int
  ) -> tuple[Terms, Metrics]:
    del state, step
    x = view(outputs, batch)
    terms = {'distillation': self.aggregation(x['divergence'], batch.mask)}
    return terms, off_policy_metrics(x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Supervised(Penalized):
  """AGG(prod_k w_k * loss) + sum_k coefficient_k * schedule_k(step) * AGG(penalty_k).

  The loss is the likelihood of given completions.

  Attributes:
    aggregation: how token losses become one number.
    loss: of one given token, -logp by default. A loss of the whole next-token distribution reads
      `logits`. Its name is that of the term and of the metric.
    weights: token weights by name; the loss is multiplied by all of them, and no gradient passes through
      them. Without weights, the default, this is plain supervised fine-tuning. A token of weight 0 still
      counts in the normaliser.
    penalties: regularisers with their coefficients, such as
      `{'entropy': weighted(0.01, part(penalties.negative_entropy))}`. Each is a term and a metric under
      its name. One from `divergences` compares whole next-token distributions with those of the anchor
      `teacher`.
    schedules: factors of a penalty's coefficient, for some of the penalties: functions of the update's
      number, or of a controller in `history`.
    stats: statistics of the next-token distribution; slots read them by these names. Penalties of the
      logits are added to them.
    selections: functions that compare tokens of the whole batch; slots read the results by these
      names.
    only: name of a selection [B, T] or of an array [B]; tokens or rows where it is not above one half
      are left out of both the sum and its normaliser. The empty name, the default, leaves out none.
    preferred_only: True leaves out all rows but those with label 1, e.g. the rejected half of
      preference pairs. False, the default, needs no label.
    history: values that are kept between updates; slots read them by these names.

  Raises:
    TypeError: a penalty without a coefficient.
    ValueError: a schedule without its penalty, a name that two arrays would have, a penalty that is
      called as the loss, or a statistic that reads an unknown array.
  """

  aggregation: aggregations.Part
  loss: LossPart = penalties.nll
  weights: Mapping[str, token_weights.Part] = dataclasses.field(default_factory=dict)
  penalties: Mapping[str, PenaltyPart] = dataclasses.field(default_factory=dict)
  schedules: Mapping[str, FactorPart] = dataclasses.field(default_factory=dict)
  stats: Mapping[str, StatPart] = dataclasses.field(default_factory=dict)
  selections: Mapping[str, batch_selections.Part] = dataclasses.field(default_factory=dict)
  only: str = ''
  preferred_only: bool = False
  history: Mapping[str, metric_history.Part] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    taken = {function_name(self.loss): 'the term of the loss'}
    taken |= dict.fromkeys(OFF_POLICY, 'a metric of every update')
    self.prepare(taken, **({'loss': self.loss} if of_logits(self.loss) else {}))

  @functools.cached_property
  def slots(self) -> Mapping[str, Callable]:
    return {'loss': self.loss, **self.readers(listed=['loss'], weights=self.weights)}

  @functools.cached_property
  def makes(self) -> frozenset[str]:
    return frozenset(self.made)

  @functools.cached_property
  def requires(self) -> frozenset[str]:
    rows = {'label'} if self.preferred_only else set()
    return super().requires | rows | ({self.only} - {'', *self.selections})

  def apply(
    self, outputs: Outputs, batch: Batch, state: State, *, step: Array | int
  ) -> tuple[Terms, Metrics]:
    batch = self.compared(outputs, batch, state, step)
    x = self.arrays(outputs, batch, state, step)
    where = self.chosen(x)
    loss = x['loss'] if of_logits(self.loss) else call_slot('loss', self.loss, x)
    loss = self.aggregation(weigh(loss, self.weights, x), where)
    terms, metrics = self.penalty_terms(x, where, step)
    metrics |= off_policy_metrics(x) | self.selection_metrics(x, batch)
    return {function_name(self.loss): loss, **terms}, metrics

  def chosen(self, x: Mapping[str, Array]) -> Array:
    """bool[B, T]: the tokens that the loss is averaged over."""
    where = x['mask']
    if self.preferred_only:
      where = where & (x['label'] > 0.5)[:, None]
    if self.only:
      found = x[self.only] > 0.5
      where = where & (found if self.only in self.selections else found[:, None])
    return where
