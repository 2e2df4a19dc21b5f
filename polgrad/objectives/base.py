"""What an objective is, the arrays that it may read, and what every run reports for free."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from polgrad.losses import aggregation
from polgrad.registry import call, inputs
from polgrad.types import Array, Batch, Effective, Max, Mean, Metric, Outputs, Quantile

Terms = dict[str, Mean]
Metrics = dict[str, Metric]


class Objective(NamedTuple):
  """A loss with its state.

  Attributes:
    requires: optional `Batch` and `Outputs` fields, and features, that it reads; nothing else is
      computed.
    apply: (outputs, batch, state, *, step) -> (terms, metrics). The loss is the sum of
      `term.value()` over all terms but `probes`. Counts never depend on the outputs once `select`
      has run, so they can be taken beforehand.
    init: () -> state, carried in `TrainState` and its checkpoints.
    advance: (state, metrics) -> state, once an update, with the metrics of the whole batch.
    stats: functions of (logits, tokens, teacher_logits, hidden), by name, to be evaluated for every
      token in the pass over the vocabulary; they arrive as `outputs.stats`.
    rows_per_prompt: rows that must stay together, in this order, when a batch is split.
    select: (outputs, batch, state, *, step) -> features [B, ...] that compare tokens of the whole
      batch (ranks, moments). Whoever splits a batch calls it before and adds the result to
      `batch.features`; otherwise `apply` does. None: there is nothing to compare.
    probes: names of terms that are not part of the loss; an optimizer may ask for their gradient.
  """

  requires: frozenset[str]
  apply: Callable
  init: Callable[[], Any] = lambda: ()
  advance: Callable[[Any, Metrics], Any] = lambda state, metrics: state
  stats: Mapping[str, Callable] = {}
  rows_per_prompt: int = 1
  select: Callable | None = None
  probes: frozenset[str] = frozenset()


WHOLE = 'whole/'  # marks a feature that is one value of the whole batch, repeated for every row


def view(outputs: Outputs, batch: Batch) -> dict[str, Array]:
  """Every array that a slot may name; this is the door at which masked entries become zero.

  Per token [B, T]: logp, entropy, values, behavior_logp, proximal_logp, reference_logp,
  teacher_logp, advantages, returns, old_values, turn_ids (runs of the mask, -1 outside), mask.
  Per row [B]: rewards, label, group_ids, weights, first_value (the value before the first token).
  Further: statistics of the logits and features of the rollout under their own names.
  """
  tokens = {
    'logp': outputs.logp,
    'entropy': outputs.entropy,
    'values': outputs.values,
    'behavior_logp': batch.behavior_logp,
    'proximal_logp': batch.proximal_logp,
    'reference_logp': batch.reference_logp,
    'teacher_logp': batch.teacher_logp,
    'advantages': batch.advantages,
    'returns': batch.returns,
    'old_values': batch.old_values,
    **outputs.stats,
  }
  mask = batch.mask
  rows = {k: getattr(batch, k) for k in ('rewards', 'label', 'group_ids', 'weights')}
  for name, x in batch.features.items():
    if name.startswith(WHOLE):
      rows[name.removeprefix(WHOLE)] = x[0]
    elif x.ndim == 2 and x.shape == mask.shape:
      tokens[name] = x
    else:
      rows[name] = x
  tokens = {k: v for k, v in tokens.items() if v is not None}
  chex.assert_equal_shape([mask, *tokens.values()])  # a [B] array must not broadcast
  arrays = {k: jnp.where(mask, v, jnp.zeros_like(v)) for k, v in tokens.items()}
  starts = mask & ~jnp.pad(mask[:, :-1], ((0, 0), (1, 0)))
  arrays['turn_ids'] = jnp.where(mask, jnp.cumsum(starts, axis=1) - 1, -1)
  if 'values' in arrays:
    first = jnp.argmax(mask, axis=1)[:, None]
    arrays['first_value'] = jnp.take_along_axis(arrays['values'], first, axis=1)[:, 0]
  return arrays | {k: v for k, v in rows.items() if v is not None} | {'mask': mask}


RESERVED = {
  *(Batch.__dataclass_fields__.keys() | Outputs.__dataclass_fields__.keys()),
  *('log_ratio', 'turn_ids', 'first_value', 'step', 'noise'),
}
ALWAYS = {'logp', 'mask', 'turn_ids', 'group_ids', 'tokens', 'step', 'noise'}
MADE_OF = {'first_value': 'values'}


def reads(functions: Iterable[Callable], *, made: Iterable[str] = ()) -> frozenset[str]:
  """The optional fields that these functions name; `made` is what the objective makes itself.

  What is read inside the pass over the vocabulary needs no field, except for a teacher's logits.
  """
  named = {name for f in functions for name in inputs(f)} - set(made)
  named = {MADE_OF.get(name, name) for name in named}
  return frozenset(named - ALWAYS - {'logits', 'hidden'})


def of_logits(fn: Callable) -> bool:
  """Whether a function must run inside the pass over the vocabulary."""
  return bool({'logits', 'hidden'} & set(inputs(fn)))


def check_names(slot: str, given: Iterable[str], known: Iterable[str]) -> None:
  unknown = sorted(set(given) - set(known))
  if unknown:
    raise ValueError(f'{slot} names {unknown}; there are {sorted(known)}')


def check_distinct(**slots: Iterable[str]) -> None:
  """Refuses a name that two slots give to an array, or that another array has already."""
  owners = {name: 'the batch' for name in RESERVED}
  for slot, names in slots.items():
    for name in names:
      if name in owners:
        raise ValueError(f'{slot}.{name}: the name is taken by {owners[name]}')
      owners[name] = slot


def off_policy_metrics(x: Mapping[str, Array]) -> Metrics:
  """How far the policy is from the one that sampled, whatever the loss does about it.

  The log-ratio is log pi - log pi_behavior of the sampled tokens, in nats: `sampler_kl` is the k3
  estimate of KL(sampler || policy), never negative and 0 when both agree; `sampler_max_gap` the
  largest difference; `ratio_q..` quantiles of the ratio; `effective_sample_size` the share
  (sum r)^2 / (n sum r^2) of the tokens that importance-weighted sums rest on.
  """
  metrics = {}
  where = x['mask']
  if 'entropy' in x:
    metrics['entropy'] = token_mean(x['entropy'], where)
  if 'behavior_logp' in x:
    gap = jax.lax.stop_gradient(x['behavior_logp'] - x['logp'])
    metrics['sampler_kl'] = token_mean(jnp.expm1(-gap) + gap, where)
    metrics['sampler_max_gap'] = Max(maximum=jnp.max(jnp.abs(gap)))
    metrics['effective_sample_size'] = Effective.of(jnp.exp(jnp.clip(-gap, -20, 20)), where)
    for percent in (1, 50, 99):
      metrics[f'ratio_q{percent:02d}'] = Quantile.of(-gap, where, share=percent / 100)
  return metrics


def token_mean(x: Array, where: Array) -> Mean:
  return aggregation.token_mean(jax.lax.stop_gradient(x), where)


def row_mean(x: Array, where: Array) -> Mean:
  total = jnp.sum(jnp.where(where, x, 0).astype(jnp.float32))
  return Mean(total=total, count=jnp.sum(where).astype(jnp.float32))


def weigh(loss: Array, weights: Mapping[str, Callable], x: Mapping[str, Array]) -> Array:
  """The loss times every weight; weights are data."""
  for weight in weights.values():
    loss = loss * jax.lax.stop_gradient(call(weight, x))
  return loss
