"""Objectives: what the optimizer minimises, as a few families of compositions.

An objective never sees the model. It says what it reads (`requires`, `stats`), gets exactly that,
and returns named terms as undivided means, so that any split of a batch into micro-batches or over
devices gives the same value and gradient once totals are divided by the counts of the whole batch.

The families: `policy_gradient`, `pairwise`, `pointwise`, `distillation`, `supervised`, and
`weighted_sum` of these. Which arrays a slot's function gets is decided by the names of its
positional arguments; see `view` for all names.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from polgrad import optim
from polgrad.losses import (
  aggregation as aggregations,
)
from polgrad.losses import (
  divergences,
  implicit_rewards,
  links,
  penalties,
  ratios,
  surrogates,
)
from polgrad.losses import pointwise as pointwise_losses
from polgrad.losses import weights as token_weights
from polgrad.registry import Weighted, call, inputs, table
from polgrad.types import Array, Batch, Max, Mean, Outputs

Terms = dict[str, Mean]
Metrics = dict[str, Mean | Max]


class Objective(NamedTuple):
  """A loss with its state.

  Attributes:
    requires: optional `Batch` and `Outputs` fields that it reads; nothing else is computed.
    apply: (outputs, batch, state, *, step) -> (terms, metrics). The loss is the sum of
      `term.value()`. Counts never depend on the outputs, so they can be taken beforehand.
    init: () -> state, carried in `TrainState` and its checkpoints.
    advance: (state, metrics) -> state, once an update, with the metrics of the whole batch.
    stats: functions of (logits, tokens, teacher_logits), by name, to be evaluated for every token
      in the pass over the vocabulary; they arrive as `outputs.stats`.
    group: rows that must stay together, in this order, when a batch is split.
  """

  requires: frozenset[str]
  apply: Callable
  init: Callable[[], Any] = lambda: ()
  advance: Callable[[Any, Metrics], Any] = lambda state, metrics: state
  stats: Mapping[str, Callable] = {}
  group: int = 1


def view(outputs: Outputs, batch: Batch) -> dict[str, Array]:
  """Every array that a slot may name; this is the door at which masked entries become zero.

  Per token [B, T]: logp, entropy, values, behavior_logp, proximal_logp, reference_logp,
  teacher_logp, advantages, returns, old_values, log_ratio (= logp - proximal_logp), mask.
  Per row [B]: rewards, label, group_ids, weights.
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
  tokens = {k: v for k, v in tokens.items() if v is not None}
  chex.assert_equal_shape([batch.mask, *tokens.values()])  # a [B] array must not broadcast
  arrays = {k: jnp.where(batch.mask, v, 0.0) for k, v in tokens.items()}
  if 'proximal_logp' in arrays:
    arrays['log_ratio'] = arrays['logp'] - arrays['proximal_logp']
  rows = {k: getattr(batch, k) for k in ('rewards', 'label', 'group_ids', 'weights')}
  return arrays | {k: v for k, v in rows.items() if v is not None} | {'mask': batch.mask}


def reads(functions: Iterable[Callable]) -> frozenset[str]:
  """The optional fields that these functions name."""
  named = {name for f in functions for name in inputs(f)}
  if 'log_ratio' in named:
    named |= {'proximal_logp'}
  return frozenset(named - {'logp', 'log_ratio', 'mask', 'score', 'group_ids'})


def policy_gradient(
  *,
  surrogate: surrogates.Part,
  aggregation: aggregations.Part,
  ratio: ratios.Part = ratios.token,
  weights: Mapping[str, token_weights.Part] = {},
  penalties: Mapping[str, penalties.Part] = {},
) -> Objective:
  """AGG(prod_k w_k * surrogate) + sum_k coefficient_k * AGG(penalty_k).

  Args:
    surrogate: [B, T] loss of log-ratios (or log-probs) and advantages.
    aggregation: how token losses become one number.
    ratio: the level of the log-ratio: token or sequence.
    weights: detached token weights that multiply the surrogate.
    penalties: regularisers with their coefficients, e.g.
      `{'kl': weighted(0.04, part(penalties.k3))}`; each is a term and a metric of its own.
  """

  _check_weighted('penalties', penalties)
  if 'policy' in penalties:
    raise ValueError("a penalty cannot be called 'policy': that is the term of the surrogate")

  def apply(outputs, batch, state, *, step):
    del state, step
    x = view(outputs, batch)
    metrics = _policy_metrics(x)
    if 'log_ratio' in x:
      x['log_ratio'] = ratio(x['log_ratio'], batch.mask)
    loss = call(surrogate, x)
    for weight in weights.values():
      loss = loss * jax.lax.stop_gradient(call(weight, x))
    terms = {'policy': aggregation(loss, batch.mask)}
    for name, (coefficient, penalty) in penalties.items():
      value = aggregation(call(penalty, x), batch.mask)
      metrics[name] = value
      terms[name] = value.scale(coefficient)
    return terms, metrics

  functions = [surrogate, *weights.values(), *(p.fn for p in penalties.values())]
  return Objective(requires=reads(functions), apply=apply)


def _check_weighted(slot: str, parts: Mapping[str, Any]) -> None:
  for name, one in parts.items():
    if not isinstance(one, Weighted):
      raise TypeError(f'{slot}.{name}: give it a coefficient, as in weighted(0.1, part(...))')


def _policy_metrics(x: dict[str, Array]) -> Metrics:
  """How far the policy is from the one that sampled, in nats, whatever the loss does about it."""
  metrics = {}
  where = x['mask']
  if 'entropy' in x:
    metrics['entropy'] = _token_mean(x['entropy'], where)
  if 'behavior_logp' in x:
    gap = jax.lax.stop_gradient(x['behavior_logp'] - x['logp'])
    # k3 of KL(sampler, policy): never negative, zero when both agree.
    metrics['sampler_kl'] = _token_mean(jnp.expm1(-gap) + gap, where)
    metrics['sampler_max_gap'] = Max(maximum=jnp.max(jnp.abs(gap)))
  return metrics


def _token_mean(x: Array, where: Array) -> Mean:
  return aggregations.token_mean(jax.lax.stop_gradient(x), where)


def pairwise(
  *,
  score: implicit_rewards.Part,
  link: links.Part,
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
      'accuracy': _row_mean(gap > 0, where),
      'margin': _row_mean(jax.lax.stop_gradient(gap), where),
    }
    return {'preference': _row_mean(loss, where)}, metrics

  return Objective(requires=reads([score]) | {'label'}, apply=apply, group=2)


def _row_mean(x: Array, where: Array) -> Mean:
  total = jnp.sum(jnp.where(where, x, 0).astype(jnp.float32))
  return Mean(total=total, count=jnp.sum(where).astype(jnp.float32))


def pointwise(
  *,
  score: implicit_rewards.Part,
  loss: pointwise_losses.Part,
  beta: float = 1.0,
  group: int = 1,
) -> Objective:
  """Mean over rows of loss(beta * score, ...): a label, a reward or a group says where it goes.

  Args:
    score: [B] sequence score, such as the summed log-ratio to the reference.
    loss: one number a row; `pointwise.consistency` gives the regression family.
    beta: multiplies the score.
    group: rows of one prompt; needed when `loss` compares the rows of a group.
  """

  def apply(outputs, batch, state, *, step):
    del state, step
    x = view(outputs, batch)
    x['score'] = beta * call(score, x)
    where = jnp.any(batch.mask, axis=1)
    if 'group_ids' in x:  # a row that is masked out has no say in its group
      x['group_ids'] = jnp.where(where, x['group_ids'], -1 - jnp.arange(len(where)))
    metrics = {'score': _row_mean(jax.lax.stop_gradient(x['score']), where)}
    return {'pointwise': _row_mean(call(loss, x), where)}, metrics

  return Objective(requires=reads([score, loss]), apply=apply, group=group)


def distillation(*, divergence: divergences.Part, aggregation: aggregations.Part) -> Objective:
  """AGG over tokens of D(teacher || student) over the whole vocabulary (arXiv:2306.13649).

  The sequences may come from the student, the teacher or a data set; their distribution carries no
  gradient. The [B, T, V] logits are never held: the divergence is evaluated in the chunked pass.
  """

  def apply(outputs, batch, state, *, step):
    del state, step
    x = view(outputs, batch)
    return {'distillation': aggregation(x['divergence'], batch.mask)}, _policy_metrics(x)

  return Objective(
    requires=frozenset({'teacher_logits'}), apply=apply, stats={'divergence': divergence}
  )


def supervised(
  *,
  aggregation: aggregations.Part,
  weights: Mapping[str, token_weights.Part] = {},
  preferred_only: bool = False,
) -> Objective:
  """AGG of -prod_k w_k * logp: the likelihood of given completions.

  Args:
    aggregation: how token losses become one number.
    weights: detached token weights (none: plain supervised fine-tuning).
    preferred_only: look only at rows with label 1, e.g. the chosen half of preference pairs.
  """

  def apply(outputs, batch, state, *, step):
    del state, step
    x = view(outputs, batch)
    where = batch.mask
    if preferred_only:
      where = where & (x['label'] > 0.5)[:, None]
    loss = -x['logp']
    for weight in weights.values():
      loss = loss * jax.lax.stop_gradient(call(weight, x))
    return {'nll': aggregation(loss, where)}, _policy_metrics(x)

  label = {'label'} if preferred_only else set()
  return Objective(requires=reads(weights.values()) | label, apply=apply)


FAMILIES = table(policy_gradient, pairwise, pointwise, distillation, supervised)


def weighted_sum(
  *,
  streams: Mapping[str, Annotated[Objective, FAMILIES]],
  schedules: Mapping[str, optim.SchedulePart] = {},
) -> Objective:
  """sum_k weight_k * schedule_k(step) * objective_k.

  Args:
    streams: objectives by name, each `weighted(w, part(...))`. Where `batch.stream` is given, the
      k-th name (sorted) sees only the rows with `stream == k`; otherwise all see all rows.
    schedules: multipliers of a stream's weight over the updates, for some of the names.
  """
  _check_weighted('streams', streams)
  unknown = sorted(set(schedules) - set(streams))
  if unknown:
    raise ValueError(f'schedules for {unknown}, but the streams are {sorted(streams)}')
  names = sorted(streams)
  parts = {name: streams[name].fn for name in names}

  def apply(outputs, batch, state, *, step):
    terms, metrics = {}, {}
    for index, name in enumerate(names):
      own = batch
      if batch.stream is not None:
        own = batch.replace(mask=batch.mask & (batch.stream == index)[:, None])
      weight = streams[name].weight
      if name in schedules:
        weight = weight * schedules[name](step)
      stats = {k.split('/', 1)[1]: v for k, v in outputs.stats.items() if k.startswith(f'{name}/')}
      own_terms, own_metrics = parts[name].apply(
        outputs.replace(stats=stats), own, state[name], step=step
      )
      terms |= {f'{name}/{k}': v.scale(weight) for k, v in own_terms.items()}
      metrics |= {f'{name}/{k}': v for k, v in own_metrics.items()}
    return terms, metrics

  def advance(state, metrics):
    own = lambda name: {
      k.split('/', 1)[1]: v for k, v in metrics.items() if k.startswith(f'{name}/')
    }
    return {name: parts[name].advance(state[name], own(name)) for name in names}

  return Objective(
    requires=frozenset().union(*(p.requires for p in parts.values())),
    apply=apply,
    init=lambda: {name: parts[name].init() for name in names},
    advance=advance,
    stats={f'{name}/{k}': f for name in names for k, f in parts[name].stats.items()},
    group=max(p.group for p in parts.values()),
  )


TABLE = FAMILIES | table(weighted_sum)
Part = Annotated[Objective, TABLE]
