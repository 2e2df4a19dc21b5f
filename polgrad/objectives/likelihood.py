"""Objectives of given sequences: their likelihood, or the distance to a teacher on them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated

from polgrad.losses import aggregation as aggregations
from polgrad.losses import divergences, logit_stats, penalties
from polgrad.losses import weights as token_weights
from polgrad.objectives.base import (
  Metrics,
  Objective,
  State,
  StatFunction,
  Terms,
  call_slot,
  check_vocabulary,
  of_logits,
  off_policy_metrics,
  view,
  weigh,
)
from polgrad.registry import unbound
from polgrad.types import Array, Batch, Outputs

LossPart = Annotated[Callable, penalties.TABLE | logit_stats.TABLE]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(Objective):
  """AGG over tokens of D(teacher || student) over the whole vocabulary (arXiv:2306.13649).

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
    return frozenset({'teacher_logits'})

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
class Supervised(Objective):
  """AGG of prod_k w_k * loss: the likelihood of given completions.

  Attributes:
    aggregation: how token losses become one number.
    loss: of one given token, -logp by default. A loss of the whole next-token distribution reads
      `logits`. Its name is that of the term and of the metric.
    weights: token weights by name; no gradient passes through them. Without weights, the default,
      this is plain supervised fine-tuning.
    only: name of an array [B]; rows where it is not above one half are left out of both the sum and its
      normaliser. The empty name, the default, leaves out no row.
    preferred_only: True leaves out all rows but those with label 1, e.g. the rejected half of
      preference pairs. False, the default, needs no label.

  Raises:
    ValueError: a loss of the distribution that reads an unknown array.
  """

  aggregation: aggregations.Part
  loss: LossPart = penalties.nll
  weights: Mapping[str, token_weights.Part] = dataclasses.field(default_factory=dict)
  only: str = ''
  preferred_only: bool = False

  def __post_init__(self):
    for name, loss in self.stats.items():
      check_vocabulary(name, loss)

  @functools.cached_property
  def slots(self) -> Mapping[str, Callable]:
    return {'loss': self.loss, **{f'weights.{k}': f for k, f in self.weights.items()}}

  @functools.cached_property
  def requires(self) -> frozenset[str]:
    rows = {'label'} if self.preferred_only else set()
    return super().requires | rows | ({self.only} - {''})

  @functools.cached_property
  def stats(self) -> Mapping[str, StatFunction]:
    return {'loss': self.loss} if of_logits(self.loss) else {}

  def apply(
    self, outputs: Outputs, batch: Batch, state: State, *, step: Array | int
  ) -> tuple[Terms, Metrics]:
    del state, step
    x = view(outputs, batch)
    where = batch.mask
    if self.preferred_only:
      where = where & (x['label'] > 0.5)[:, None]
    if self.only:
      where = where & (x[self.only] > 0.5)[:, None]
    loss = x['loss'] if self.stats else call_slot('loss', self.loss, x)
    name = unbound(self.loss).__name__
    return {name: self.aggregation(weigh(loss, self.weights, x), where)}, off_policy_metrics(x)
