"""What losses of tokens share: penalties with coefficients, statistics, selections and histories."""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Annotated

import jax
import jax.numpy as jnp

from polgrad import metric_history, optim
from polgrad.losses import aggregation as aggregations
from polgrad.losses import divergences, logit_stats, penalties
from polgrad.objectives.base import (
  WHOLE,
  Comparing,
  Metrics,
  State,
  Terms,
  call_slot,
  check_distinct,
  check_names,
  check_vocabulary,
  of_logits,
  token_mean,
  view,
)
from polgrad.registry import Weighted, check_weighted, either
from polgrad.types import Array, Batch, Outputs

PenaltyPart = Annotated[
  Callable, either(penalties.TABLE, divergences.TABLE | divergences.LISTED, logit_stats.TABLE)
]
StatPart = Annotated[Callable, either(logit_stats.TABLE, divergences.TABLE | divergences.LISTED)]
FactorPart = Annotated[Callable, either(optim.SCHEDULES, metric_history.FACTORS)]


class Penalized(Comparing):
  """A loss of tokens plus sum_k coefficient_k * schedule_k(step) * AGG(penalty_k).

  Subclasses are dataclasses with these fields, whose `__post_init__` calls `prepare`.

  Attributes:
    aggregation: how token losses become one number.
    penalties: regularisers with their coefficients. Each is a term and, without its coefficient, a
      metric under its name. One that reads logits runs in the pass over the vocabulary.
    schedules: factors of a penalty's coefficient, for some of the penalties.
    stats: statistics of the next-token distribution; slots read them by these names. Penalties of the
      logits are added to them.
    selections: functions that compare tokens of the whole batch; slots read the results by these names.
    history: values that are kept between updates; slots read them by these names.
  """

  aggregation: aggregations.Part
  penalties: Mapping[str, Weighted]
  schedules: Mapping[str, Callable]
  stats: Mapping[str, Callable]
  selections: Mapping[str, Callable]
  history: Mapping[str, metric_history.History]

  def prepare(self, taken: Mapping[str, str], **stats: Callable) -> None:
    """Checks the slots, and adds the penalties of the logits to the statistics.

    Args:
      taken: names that no penalty may have, each with what it is.
      stats: further statistics, of a slot that may read logits.

    Raises:
      TypeError: a penalty without a coefficient.
      ValueError: a schedule without its penalty, a name that two arrays would have, a penalty with a
        name that is taken, or a statistic that reads an unknown array.
    """
    check_weighted('penalties', self.penalties)
    check_names('schedules', self.schedules, self.penalties)
    for name in self.penalties:
      if name in taken:
        raise ValueError(
          f'a penalty cannot be called {name!r}: that is {taken[name]}; call it otherwise'
        )
    added = {**self.of_vocabulary, **stats}
    # `dataclasses.replace` passes statistics to which this method added the same functions before.
    own = {name: fn for name, fn in self.stats.items() if added.get(name) is not fn}
    check_distinct(
      stats=own,
      selections=self.selections,
      history=self.history,
      penalties=self.of_vocabulary,
    )
    for name, fn in own.items():
      check_vocabulary(f'stats.{name}', fn)
    for name, fn in self.of_vocabulary.items():
      check_vocabulary(f'penalties.{name}', fn)
    for name, fn in stats.items():
      check_vocabulary(name, fn)
    object.__setattr__(self, 'stats', {**own, **added})

  @functools.cached_property
  def of_vocabulary(self) -> dict[str, Callable]:
    """The penalties that need the logits, so they run in the pass over the vocabulary."""
    return {k: p.fn for k, p in self.penalties.items() if of_logits(p.fn)}

  def readers(
    self, *, listed: Collection[str] = (), **groups: Mapping[str, Callable]
  ) -> dict[str, Callable]:
    """The functions of the slots that hold several, by `slot.name`.

    Args:
      listed: names of statistics that another slot lists, besides those of penalties.
      groups: further slots, in front of those of this class.
    """
    taken = {*self.of_vocabulary, *listed}
    groups |= {
      'selections': self.selections,
      'penalties': {k: p.fn for k, p in self.penalties.items()},
      'stats': {k: f for k, f in self.stats.items() if k not in taken},
      'schedules': self.schedules,
    }
    return {f'{slot}.{k}': f for slot, group in groups.items() for k, f in group.items()}

  @property
  def made(self) -> set[str]:
    """Names of the arrays that statistics, selections and histories are."""
    return {*self.stats, *self.selections, *self.history}

  def arrays(
    self, outputs: Outputs, batch: Batch, state: State, step: Array | int
  ) -> dict[str, Array]:
    """Every array that a slot may name, except those that `completed` adds."""
    x = view(outputs, batch)
    x['step'] = jnp.asarray(step, jnp.float32)
    return x | self.remembered(state)

  def completed(self, x: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays with those that slots compute from others."""
    return dict(x)

  def penalty_terms(
    self, x: Mapping[str, Array], where: Array, step: Array | int
  ) -> tuple[Terms, Metrics]:
    """The penalties over the tokens in `where`: as terms of the loss, and as metrics.

    Args:
      x: what `arrays` gave.
      where: bool[B, T].
      step: number of the update.
    """
    x = self.completed(x) | {'step': step}
    terms, metrics = {}, {}
    for name, (coefficient, penalty) in self.penalties.items():
      if name in self.of_vocabulary:
        value = x[name]
      else:
        value = call_slot(f'penalties.{name}', penalty, x)
      metrics[name] = self.aggregation(value, where)
      terms[name] = metrics[name].scale(coefficient * self.factor(name, x))
    return terms, metrics

  def factor(self, name: str, x: Mapping[str, Array]) -> Array | float:
    """The factor of a penalty's coefficient: of its schedule, or 1."""
    if name not in self.schedules:
      return 1.0
    return call_slot(f'schedules.{name}', self.schedules[name], x)

  def compare(
    self, outputs: Outputs, batch: Batch, state: State, *, step: Array | int
  ) -> dict[str, Array]:
    """The results of all selections as features [B, ...], without gradient; see `select`."""
    x = self.arrays(jax.lax.stop_gradient(outputs), batch, state, step)
    # The noise depends on the update alone, so a repeated update selects the same tokens.
    x['noise'] = jax.random.uniform(jax.random.fold_in(jax.random.key(0), step), batch.mask.shape)
    x = self.completed(x)
    found = {}
    for name, selection in self.selections.items():
      value = jax.lax.stop_gradient(call_slot(f'selections.{name}', selection, x))
      # One value of the whole batch is repeated for every row, so that it survives a split.
      if value.shape != batch.mask.shape:
        name, value = WHOLE + name, jnp.broadcast_to(value, (len(batch.mask), *value.shape))
      found[name] = value
    return found

  def selection_metrics(self, x: Mapping[str, Array], batch: Batch) -> Metrics:
    """The selections that are values of the whole batch, such as bounds."""
    metrics = {}
    for name in self.selections:
      if name not in batch.features:
        for i, value in enumerate(jnp.ravel(x[name])):
          value = jnp.broadcast_to(value, batch.mask.shape)
          metrics[f'{name}/{i}'] = token_mean(value, batch.mask)
    return metrics
