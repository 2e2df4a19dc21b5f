"""The policy gradient: to first order every method is -AGG(mask * sg(w) * logp) with

    w = K I psi A - sum_k coefficient_k kappa_k

a keep-mask K, an importance weight I, a gate psi, an advantage A and penalties. Each factor is a slot
here; what a paper calls its method is a choice for each.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from polgrad import metric_history, optim
from polgrad.losses import aggregation as aggregations
from polgrad.losses import divergences, logit_stats, penalties, ratios, surrogates
from polgrad.losses import selections as batch_selections
from polgrad.losses import weights as token_weights
from polgrad.objectives.base import (
  WHOLE,
  Objective,
  check_distinct,
  check_names,
  of_logits,
  off_policy_metrics,
  reads,
  token_mean,
  view,
  weigh,
)
from polgrad.registry import call, check_weighted, either, inputs
from polgrad.types import Array, Batch

PenaltyPart = Annotated[Callable, either(penalties.TABLE, divergences.TABLE)]
StatPart = Annotated[Callable, either(logit_stats.TABLE, divergences.TABLE)]


def policy_gradient(
  *,
  surrogate: surrogates.Part,
  aggregation: aggregations.Part,
  ratio: ratios.Part = ratios.token,
  proximal: ratios.ProximalPart = ratios.recorded,
  weights: Mapping[str, token_weights.Part] = {},
  penalties: Mapping[str, PenaltyPart] = {},
  schedules: Mapping[str, optim.SchedulePart] = {},
  stats: Mapping[str, StatPart] = {},
  selections: Mapping[str, batch_selections.Part] = {},
  only: str = '',
  history: Mapping[str, metric_history.Part] = {},
  probes: Mapping[str, surrogates.Part] = {},
) -> Objective:
  """AGG(prod_k w_k * surrogate) + sum_k coefficient_k * schedule_k(step) * AGG(penalty_k).

  Args:
    surrogate: [B, T] loss of log-ratios (or log-probs) and advantages.
    aggregation: how token losses become one number.
    ratio: the level of the log-ratio: token, turn or sequence.
    proximal: what the log-ratio is taken against.
    weights: detached token weights and keep-masks that multiply the surrogate. A token of weight 0
      still counts in the denominator.
    penalties: regularisers with their coefficients, e.g.
      `{'kl': weighted(0.04, part(penalties.k3))}`; each is a term and a metric of its own. One of
      `divergences` compares whole distributions, with the anchor `teacher`.
    schedules: multipliers of a penalty's coefficient over the updates, for some of the names.
    stats: statistics of the next-token distribution; slots read them by these names.
    selections: what compares tokens of the whole batch, such as the top tokens by a rank; slots
      read the results by these names.
    only: a selection outside which nothing counts, neither above nor below the fraction line.
    history: what is carried over updates; slots read them by these names.
    probes: losses that are no part of the objective, for an optimizer that asks for their gradient.
  """
  check_weighted('penalties', penalties)
  check_names('schedules', schedules, penalties)
  check_names('only', {only} - {''}, selections)
  if 'policy' in penalties:
    raise ValueError("a penalty cannot be called 'policy': that is the term of the surrogate")
  of_vocabulary = {k: p.fn for k, p in penalties.items() if of_logits(p.fn)}
  check_distinct(stats=stats, selections=selections, history=history, penalties=of_vocabulary)

  def arrays(outputs, batch: Batch, state: Any, step) -> dict[str, Array]:
    x = view(outputs, batch)
    x['step'] = jnp.asarray(step, jnp.float32)
    return x | {name: one.value(state[name]) for name, one in history.items()}

  def with_ratio(x: dict[str, Array], logp: Array) -> dict[str, Array]:
    """The arrays with these live log-probs, the proximal ones, and the log-ratio between them."""
    x = x | {'logp': logp}
    if set(inputs(proximal)) <= x.keys():
      x['proximal_logp'] = jax.lax.stop_gradient(call(proximal, x))
      x['log_ratio'] = logp - x['proximal_logp']
      x['log_ratio'] = call(ratio, x)
    return x

  def select(outputs, batch, state, *, step):
    outputs = jax.lax.stop_gradient(outputs)
    x = arrays(outputs, batch, state, step)
    x['noise'] = jax.random.uniform(jax.random.fold_in(jax.random.key(0), step), batch.mask.shape)
    x = with_ratio(x, x['logp'])
    found = {}
    for name, selection in selections.items():
      value = jax.lax.stop_gradient(call(selection, x))
      if value.shape != batch.mask.shape:  # one value of the whole batch
        name, value = WHOLE + name, jnp.broadcast_to(value, (len(batch.mask), *value.shape))
      found[name] = value
    return found

  def apply(outputs, batch, state, *, step):
    if not all({name, WHOLE + name} & batch.features.keys() for name in selections):
      batch = batch.replace(features=batch.features | select(outputs, batch, state, step=step))
    x = arrays(outputs, batch, state, step)
    where = batch.mask & (x[only] > 0) if only else batch.mask

    def token_loss(logp: Array, loss: Callable = surrogate) -> Array:
      y = with_ratio(x, logp)
      return weigh(call(loss, y), weights, y)

    metrics = off_policy_metrics(x)
    if 'advantages' in x:
      metrics |= _kept(token_loss, x, where)
    metrics |= {
      f'{name}/{i}': token_mean(jnp.broadcast_to(v, batch.mask.shape), batch.mask)
      for name in selections
      if name not in batch.features
      for i, v in enumerate(jnp.ravel(x[name]))
    }
    terms = {'policy': aggregation(token_loss(x['logp']), where)}
    x = with_ratio(x, x['logp'])
    for name, (coefficient, penalty) in penalties.items():
      value = x[name] if name in of_vocabulary else call(penalty, x)
      metrics[name] = aggregation(value, where)
      factor = schedules[name](step) if name in schedules else 1.0
      terms[name] = metrics[name].scale(coefficient * factor)
    for name, probe in probes.items():
      terms[f'probe/{name}'] = aggregation(token_loss(x['logp'], probe), where)
    return terms, metrics

  functions = [
    *(surrogate, ratio, proximal, *weights.values(), *probes.values(), *selections.values()),
    *(p.fn for p in penalties.values()),
    *stats.values(),
  ]
  from_ratio = {'log_ratio', 'proximal_logp'}
  if not any(from_ratio & set(inputs(f)) for f in functions if f not in (ratio, proximal)):
    functions = [f for f in functions if f not in (ratio, proximal)]
  made = {'log_ratio', *stats, *selections, *history}
  if 'proximal_logp' not in inputs(proximal):
    made.add('proximal_logp')
  return Objective(
    requires=reads(functions, made=made),
    apply=apply,
    init=lambda: {name: one.init() for name, one in history.items()},
    advance=lambda state, metrics: {
      name: one.advance(state[name], metrics) for name, one in history.items()
    },
    stats={**stats, **of_vocabulary},
    select=select if selections else None,
    probes=frozenset(f'probe/{name}' for name in probes),
  )


def _kept(token_loss: Callable, x: Mapping[str, Array], where: Array) -> dict:
  """The share of tokens whose surrogate has a gradient, by the sign of their advantage."""
  weight = jax.grad(lambda logp: jnp.sum(token_loss(logp)))(jax.lax.stop_gradient(x['logp']))
  kept = (weight != 0).astype(jnp.float32)
  return {
    'kept_positive': token_mean(kept, where & (x['advantages'] > 0)),
    'kept_negative': token_mean(kept, where & (x['advantages'] < 0)),
  }
