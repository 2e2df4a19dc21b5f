"""Objectives of the scores of single rows, and of the rows of one prompt together."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated

import jax
import jax.numpy as jnp

from polgrad import metric_history
from polgrad.losses import groups, implicit_rewards, listwise
from polgrad.losses import pointwise as pointwise_losses
from polgrad.objectives.base import (
  WHOLE,
  Comparing,
  Metrics,
  State,
  Terms,
  call_slot,
  check_distinct,
  off_policy_metrics,
  row_mean,
  view,
)
from polgrad.reductions import Mean
from polgrad.registry import Positive, either
from polgrad.types import Array, Batch, Outputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pointwise(Comparing):
  """Mean over rows of loss(beta * score, ...); the loss reads a label, a reward or a group.

  Where rows have labels, `chosen_reward` and `rejected_reward` are the mean scaled scores of those with
  a label of at least one half and of the others.

  Attributes:
    score: of a row, [B], such as the summed log-ratio to the reference.
    loss: of a row, [B], of the score (times beta) and of any arrays that it names.
    beta: multiplies the score.
    rows_per_prompt: number of consecutive rows with the same prompt; more than 1 is needed only if
      `loss` compares the rows of a group.
    selections: numbers of the whole minibatch or of each row, such as a mean or partners by rank; the
      loss reads them by these names. They are computed before micro-batches are cut, and no gradient
      passes through them.
    history: values that are kept between updates; selections and loss read them by these names.

  Raises:
    ValueError: a name that two arrays would have.
  """

  score: implicit_rewards.Part
  loss: pointwise_losses.Part
  beta: Positive = 1.0
  rows_per_prompt: int = 1
  selections: Mapping[str, pointwise_losses.SelectionPart] = dataclasses.field(default_factory=dict)
  history: Mapping[str, metric_history.Part] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    check_distinct(selections=self.selections, history=self.history)

  @functools.cached_property
  def slots(self) -> Mapping[str, Callable]:
    selections = {f'selections.{name}': fn for name, fn in self.selections.items()}
    return {'score': self.score, 'loss': self.loss, **selections}

  @functools.cached_property
  def makes(self) -> frozenset[str]:
    return frozenset({'score', 'beta', *self.selections, *self.history})

  def apply(
    self, outputs: Outputs, batch: Batch, state: State, *, step: Array | int
  ) -> tuple[Terms, Metrics]:
    x = self.arrays(outputs, self.compared(outputs, batch, state, step), state)
    where = isolate_empty_rows(x)

    # Selections are metrics too; one number of the whole batch is its own mean.
    score = jax.lax.stop_gradient(x['score'])
    metrics = {'score': row_mean(score, where)}
    metrics |= {name: row_mean(jnp.full_like(score, x[name]), where) for name in self.selections}
    if 'label' in x:
      metrics['chosen_reward'] = row_mean(score, where & (x['label'] >= 0.5))
      metrics['rejected_reward'] = row_mean(score, where & (x['label'] < 0.5))
    metrics |= self.group_metrics(x, where)

    loss = call_slot('loss', self.loss, x)
    return {'pointwise': self.reduce(loss, x, where)}, metrics | off_policy_metrics(x)

  def arrays(self, outputs: Outputs, batch: Batch, state: State) -> dict[str, Array]:
    """Every array that the loss may name."""
    x = view(outputs, batch)
    x |= self.remembered(state)
    return x | {'score': self.beta * call_slot('score', self.score, x), 'beta': self.beta}

  def compare(
    self, outputs: Outputs, batch: Batch, state: State, *, step: Array | int
  ) -> dict[str, Array]:
    """The results of all selections as features [B], without gradient; see `select`."""
    del step
    x = self.arrays(jax.lax.stop_gradient(outputs), batch, state)
    rows, found = len(batch.mask), {}
    for name, selection in self.selections.items():
      value = jax.lax.stop_gradient(call_slot(f'selections.{name}', selection, x))
      if value.shape == (rows,):
        found[name] = value
      else:  # one value of the whole batch
        found[WHOLE + name] = jnp.broadcast_to(value, (rows, *value.shape))
    return found

  def reduce(self, loss: Array, x: Mapping[str, Array], where: Array) -> Mean:
    """The mean of [B] over the rows in `where`."""
    del x
    return row_mean(loss, where)

  def group_metrics(self, x: Mapping[str, Array], where: Array) -> Metrics:
    """Metrics that compare the rows of a group."""
    del x, where
    return {}


ListPart = Annotated[Callable, either(listwise.TABLE, pointwise_losses.TABLE)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listwise(Pointwise):
  """Mean over prompts of the sum over their rows of loss(beta * score, ...).

  A prompt of which fewer than two rows have tokens (failed verifiers, missing completions) is left out
  of both the sum and the number of prompts, as a pair without one of its rows is. Where rows have
  rewards, `accuracy` is the fraction of prompts whose row with the highest score has the highest reward.

  Attributes:
    loss: a row's part of the loss of its prompt, [B].
    rows_per_prompt: number of consecutive rows with the same prompt, which are never split.
  """

  loss: ListPart
  rows_per_prompt: int = 2

  @functools.cached_property
  def requires(self) -> frozenset[str]:
    return super().requires | {'group_ids'}

  def reduce(self, loss: Array, x: Mapping[str, Array], where: Array) -> Mean:
    """The sum of [B] over the rows of each prompt, averaged over prompts with two rows or more."""
    group = groups.members(x['group_ids'], where)
    compared = where & (groups.size(group) > 1)
    count = jnp.sum(compared & groups.first(group), dtype=loss.dtype)
    return Mean(total=jnp.sum(jnp.where(compared, loss, 0)), count=count)

  def group_metrics(self, x: Mapping[str, Array], where: Array) -> Metrics:
    if 'rewards' not in x:
      return {}
    group = groups.members(x['group_ids'], where)
    compared = where & (groups.size(group) > 1)
    score = jax.lax.stop_gradient(x['score'])
    top = compared & (score == groups.maximum(score, group))
    best = x['rewards'] == groups.maximum(x['rewards'], group)
    return {'accuracy': row_mean(best.astype(score.dtype), top)}


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
