"""What an objective is, the arrays that it may read, and the metrics that every run reports."""

import abc
import functools
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from polgrad.arrays import ARRAYS, MODEL, OBJECTIVE, OWNED, VOCABULARY, WIDE, per_token
from polgrad.losses import aggregation, turns
from polgrad.losses._common import single
from polgrad.metric_history import History
from polgrad.objectives.heads import Head, Scalar
from polgrad.reductions import EffectiveSampleSize, Max, Mean, Metric, Quantile
from polgrad.registry import UnknownArray, call, inputs, suggest, unbound
from polgrad.types import Array, Batch, Outputs

Terms = dict[str, Mean]
Metrics = dict[str, Metric]
State = Any  # a pytree of arrays
StatFunction = Callable[..., Array]  # `tokens` and arrays of VOCABULARY, some of them -> [n]
Select = Callable[..., dict[str, Array]]  # (outputs, batch, state, *, step) -> features [B, ...]
EMPTY = types.MappingProxyType({})


class Objective(abc.ABC):
  """A loss and the state that it keeps between updates; base class of all families.

  Attributes:
    slots: functions that read arrays by name, keyed by their slot, e.g. `penalties.kl`. Errors name
      the slot.
    makes: names of arrays that the objective computes for these functions itself.
    requires: optional fields of `Batch` and `Outputs`, and features, that the objective reads; no
      other optional field is computed.
    stats: functions of logits, tokens and the other arrays of `arrays.VOCABULARY`, by name. They are
      evaluated for every token in the pass over the vocabulary and arrive as `outputs.stats`.
    rows_per_prompt: number of consecutive rows of a record that it compares (1: none).
    rows_together: number of consecutive rows that stay together, in this order, when a batch is split;
      a multiple of `rows_per_prompt`.
    head: layers on the states of the model at the last tokens of rows, see `objectives.heads`, with
      parameters that are trained with the model; by default there are none.
    probes: names of terms that are not part of the loss; an optimizer may ask for their gradient.
    select: (outputs, batch, state, *, step) -> features [B, ...] that compare tokens of the whole
      batch, such as ranks. A caller that splits the batch calls it before the split and adds the
      result to `batch.features`; otherwise `apply` calls it. None: nothing is compared.
  """

  slots: Mapping[str, Callable] = EMPTY
  makes: frozenset[str] = frozenset()
  stats: Mapping[str, StatFunction] = EMPTY
  rows_per_prompt: int = 1
  probes: Collection[str] = frozenset()
  head: Head = Scalar()
  select: Select | None = None

  @functools.cached_property
  def requires(self) -> frozenset[str]:
    return reads(self.slots.values(), made=self.makes)

  @property
  def rows_together(self) -> int:
    return self.rows_per_prompt

  @abc.abstractmethod
  def apply(
    self, outputs: Outputs, batch: Batch, state: State, *, step: Array | int
  ) -> tuple[Terms, Metrics]:
    """The terms of the loss, and metrics.

    The loss is the sum of `term.value()` over all terms except `probes`. Counts of the terms do not
    depend on the outputs once `select` has run, so they can be taken beforehand.

    Args:
      outputs: of the model, for the rows of the batch.
      batch: a minibatch or a part of it.
      state: what `init` or `advance` returned.
      step: number of the update in its phase; schedules read it.

    Raises:
      UnknownArray: a function of a slot reads an array that is absent; the message names the slot.
    """

  def init(self) -> State:
    """The state before the first update; it is part of `TrainState` and its checkpoints."""
    return ()

  def advance(self, state: State, metrics: Metrics) -> State:
    """The state after an update, given the metrics of its whole batch."""
    del metrics
    return state


class Comparing(Objective):
  """An objective that compares the entries of a whole batch, and that keeps values between updates.

  Attributes:
    selections: functions of the whole batch by name; `compare` calls them.
    history: values that are kept between updates, by name.
  """

  selections: Mapping[str, Callable] = EMPTY
  history: Mapping[str, History] = EMPTY

  @abc.abstractmethod
  def compare(
    self, outputs: Outputs, batch: Batch, state: State, *, step: Array | int
  ) -> dict[str, Array]:
    """The results of all selections as features [B, ...], without gradient; see `select`."""

  @property
  def select(self) -> Select | None:
    return self.compare if self.selections else None

  def init(self) -> State:
    return {name: one.init() for name, one in self.history.items()}

  def advance(self, state: State, metrics: Metrics) -> State:
    return {name: one.advance(state[name], metrics) for name, one in self.history.items()}

  def remembered(self, state: State) -> dict[str, Array]:
    """The values of the history, by name."""
    return {name: one.value(state[name]) for name, one in self.history.items()}

  def compared(self, outputs: Outputs, batch: Batch, state: State, step: Array | int) -> Batch:
    """The batch with the results of all selections as features.

    A caller that splits the batch has called `select` before the split; then nothing is done.
    """
    if all({name, WHOLE + name} & batch.features.keys() for name in self.selections):
      return batch
    return batch.replace(features=batch.features | self.compare(outputs, batch, state, step=step))


WHOLE = 'whole/'  # marks a feature that is one value of the whole batch, repeated for every row


def view(outputs: Outputs, batch: Batch) -> dict[str, Array]:
  """Every array that a slot may name; masked entries of per-token arrays become zero here.

  These are the arrays of the batch, those of the model, the statistics of the logits, and two that
  are computed here: `turn_ids` and, where there are values, `first_value`. `polgrad/arrays.py` says
  what each array is. A feature with the prefix `whole/` holds one value for the whole batch.

  Raises:
    AssertionError: a per-token array does not have the shape [B, T] of the mask.
  """
  mask = batch.mask
  named = {n: getattr(outputs, n) for n in MODEL} | outputs.stats
  found = {n: x for n, x in named.items() if x is not None} | {n: batch[n] for n in batch}
  # Each row repeats a value of the whole batch, so that it is cut like every other feature.
  whole = {n: x for n, x in found.items() if n.startswith(WHOLE)}
  found = {n: x for n, x in found.items() if n not in whole}
  tokens = {n: x for n, x in found.items() if n in outputs.stats or per_token(n, x, mask)}
  chex.assert_equal_shape([mask, *tokens.values()])  # a [B] array must not broadcast
  zeroed = {n: jnp.where(mask, x, jnp.zeros_like(x)) for n, x in tokens.items()}
  arrays = found | zeroed | {n.removeprefix(WHOLE): x[0] for n, x in whole.items()}
  arrays['mask'] = mask
  given = arrays.get('turn_ids')
  arrays['turn_ids'] = turns.numbers(mask) if given is None else jnp.where(mask, given, -1)
  if 'values' in arrays:
    first = jnp.argmax(mask, axis=1)[:, None]
    arrays['first_value'] = jnp.take_along_axis(arrays['values'], first, axis=1)[:, 0]
  return arrays


RESERVED = frozenset(OWNED)  # names that statistics, selections and histories cannot have
# What is there for every function: required fields, group ids, and what the objective computes.
ALWAYS = {
  *('tokens', 'segment_ids', 'mask', 'group_ids', 'logp'),
  *(name for name, array in OBJECTIVE.items() if not array.made_of),
}
MADE_OF = {name: array.made_of for name, array in ARRAYS.items() if array.made_of}
VOCABULARY_ARRAYS = {*VOCABULARY, *WIDE, 'tokens'}


def reads(functions: Iterable[Callable], *, made: Iterable[str] = ()) -> frozenset[str]:
  """The arrays that these functions name and that some batches do not have.

  Args:
    functions: of `losses`.
    made: names of arrays that the objective computes itself.

  Returns:
    Names of optional fields of `Batch` and `Outputs` and of features. Of the arrays of the pass over the
    vocabulary only `teacher_logits` is among them, because the pass always has the others.
  """
  named = {name for f in functions for name in inputs(f)} - set(made)
  named = {MADE_OF.get(name, name) for name in named}
  return frozenset(named - ALWAYS - (VOCABULARY.keys() - {'teacher_logits'}))


def of_logits(fn: Callable) -> bool:
  """Whether a function must run inside the pass over the vocabulary."""
  return bool({'logits', 'hidden'} & set(inputs(fn)))


def check_names(slot: str, given: Iterable[str], known: Iterable[str]) -> None:
  """Refuses names that are not among the known ones.

  Raises:
    ValueError: lists the unknown names and the valid ones, and suggests one.
  """
  unknown = sorted(set(given) - set(known))
  if unknown:
    raise ValueError(f'{slot} names {unknown}{suggest(unknown[0], known)}')


def check_vocabulary(slot: str, fn: Callable) -> None:
  """Refuses a statistic that reads what the pass over the vocabulary does not have.

  Raises:
    ValueError: names the slot, the function and the array, and suggests one.
  """
  for name in inputs(fn):
    if name not in VOCABULARY_ARRAYS:
      raise ValueError(
        f'{slot}: {function_name(fn)} reads {name!r}, which is no array of the pass over the '
        f'vocabulary{suggest(name, VOCABULARY_ARRAYS)}'
      )


def check_reads(
  path: str, objective: Objective, missing: Iterable[str], known: Iterable[str]
) -> None:
  """Refuses the first function of an objective that reads an array which no part provides.

  Args:
    path: place of the objective in the configuration.
    objective: the objective whose slots are searched.
    missing: arrays that no part provides.
    known: arrays that other parts provide.

  Raises:
    ValueError: names the slot, the function and the array, lists all arrays and suggests one.
  """
  known = {*known, *ALWAYS, *objective.makes}
  for slot, fn in objective.slots.items():
    for name in inputs(fn):
      if name in missing and name not in objective.makes:
        raise ValueError(
          f'{path}.{slot}: {function_name(fn)} reads {name!r}, which neither collect nor credit '
          f'provides{suggest(name, known)}'
        )


def function_name(fn: Callable) -> str:
  """The name of a function whose knobs may be bound."""
  return getattr(unbound(fn), '__name__', repr(fn))


def call_slot(slot: str, fn: Callable, arrays: Mapping[str, Array]) -> Array:
  """Calls the function of a slot with the arrays that it names.

  Raises:
    UnknownArray: names the slot, the function and the array, lists all arrays and suggests one.
  """
  try:
    return call(fn, arrays)
  except UnknownArray as error:
    raise UnknownArray(f'{slot}: {error}') from None


def check_distinct(**slots: Iterable[str]) -> None:
  """Refuses a name that two slots give to an array, or that an array of the batch has.

  Raises:
    ValueError: names the slot, the name and its other owner.
  """
  owners = {name: 'the batch' for name in RESERVED}
  for slot, names in slots.items():
    for name in names:
      if name in owners:
        raise ValueError(f'{slot}.{name}: the name is taken by {owners[name]}')
      owners[name] = slot


# Names of `off_policy_metrics`, which no term of a loss may have.
OFF_POLICY = ('entropy', 'sampler_kl', 'sampler_max_gap', 'effective_sample_size')
OFF_POLICY += ('ratio_q01', 'ratio_q50', 'ratio_q99')


def off_policy_metrics(x: Mapping[str, Array]) -> Metrics:
  """The distance of the policy from the one that sampled, independent of the loss.

  All are of the log-ratio log pi - log pi_behavior of the sampled tokens, in nats, or of the ratio r.

  * `entropy`: mean entropy of the next-token distribution, nats.
  * `sampler_kl`: the k3 estimate of KL(sampler || policy), nats; never negative, and 0 if both agree.
    Gaps count up to 20 nats.
  * `sampler_max_gap`: the largest absolute log-ratio, nats.
  * `effective_sample_size`: (sum r)^2 / (n sum r^2), a fraction; 1 if all n ratios are equal.
  * `ratio_q01`, `ratio_q50`, `ratio_q99`: quantiles of r.
  """
  metrics = {}
  where = x['mask']
  if 'entropy' in x:
    metrics['entropy'] = token_mean(x['entropy'], where)
  if 'behavior_logp' in x:
    gap = jax.lax.stop_gradient(x['behavior_logp'] - x['logp'])
    near = jnp.clip(gap, -20, 20)  # exp of a larger one would overflow
    metrics['sampler_kl'] = token_mean(jnp.expm1(-near) + near, where)
    metrics['sampler_max_gap'] = Max(maximum=jnp.max(jnp.abs(gap)))
    metrics['effective_sample_size'] = EffectiveSampleSize.of(
      jnp.exp(jnp.clip(-gap, -20, 20)), where
    )
    for percent in (1, 50, 99):
      metrics[f'ratio_q{percent:02d}'] = Quantile.of(-gap, where, fraction=percent / 100)
  return metrics


def token_mean(x: Array, where: Array) -> Mean:
  """The mean of [B, T] over the tokens in `where`, without gradient."""
  return aggregation.token_mean(jax.lax.stop_gradient(x), where)


def row_mean(x: Array, where: Array) -> Mean:
  """The mean of [n] over the rows (or pairs) in `where`."""
  total = jnp.sum(jnp.where(where, single(x), 0))
  return Mean(total=total, count=jnp.sum(where, dtype=total.dtype))


def weigh(
  loss: Array, weights: Mapping[str, Callable], x: Mapping[str, Array], slot: str = 'weights'
) -> Array:
  """The loss multiplied by all weights of a slot; no gradient passes through a weight."""
  for name, weight in weights.items():
    loss = loss * jax.lax.stop_gradient(call_slot(f'{slot}.{name}', weight, x))
  return loss
