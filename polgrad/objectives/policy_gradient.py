"""The policy gradient. To first order every method is -AGG(mask * sg(w) * logp) with

    w = K I psi A - sum_k coefficient_k kappa_k

where K is a keep-mask, I an importance weight, psi a gate, A an advantage and kappa_k are penalties.
`PolicyGradient` has a slot for each factor; a method is one choice for each slot.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated

import jax
import jax.numpy as jnp

from polgrad import metric_history, optim
from polgrad.losses import aggregation as aggregations
from polgrad.losses import divergences, logit_stats, penalties, ratios, surrogates
from polgrad.losses import selections as batch_selections
from polgrad.losses import weights as token_weights
from polgrad.objectives.base import (
  OFF_POLICY,
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
  off_policy_metrics,
  token_mean,
  view,
  weigh,
)
from polgrad.registry import check_weighted, either, inputs
from polgrad.types import Array, Batch, Outputs

PenaltyPart = Annotated[Callable, either(penalties.TABLE, divergences.TABLE)]
StatPart = Annotated[Callable, either(logit_stats.TABLE, divergences.TABLE)]
FactorPart = Annotated[Callable, either(optim.SCHEDULES, metric_history.FACTORS)]
FROM_RATIO = frozenset({'log_ratio', 'proximal_logp'})  # made by the slots `ratio` and `proximal`
PROBE = 'probe/'  # prefix of the terms of probes
# Fractions of tokens with a gradient, by the sign of the advantage.
KEPT = ('kept_positive', 'kept_negative')


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyGradient(Comparing):
  """AGG(prod_k w_k * surrogate) + sum_k coefficient_k * schedule_k(step) * AGG(penalty_k).

  Attributes:
    surrogate: loss of every token, [B, T], of log-ratios (or log-probs) and advantages.
    aggregation: how token losses become one number.
    ratio: the level of the log-ratio: token, turn or sequence.
    proximal: log-probs of the policy that the log-ratio is taken against, [B, T].
    weights: token weights and keep-masks by name; the surrogate is multiplied by all of them, and no
      gradient passes through them. A token of weight 0 still counts in the normaliser.
    penalties: regularisers with their coefficients, e.g.
      `{'kl': weighted(0.04, part(penalties.k3))}`. Each is a term and a metric under its name. One
      from `divergences` compares whole next-token distributions with those of the anchor `teacher`.
    schedules: factors of a penalty's coefficient, for some of the penalties: functions of the update's
      number, or of a controller in `history`.
    stats: statistics of the next-token distribution; slots read them by these names. Penalties from
      `divergences` are added to them, because they need the logits too.
    selections: functions that compare tokens of the whole batch, such as the top tokens by a rank;
      slots read the results by these names.
    only: name of a selection; other tokens are left out of both the sum and its normaliser. The
      empty name, the default, leaves out no token.
    history: values that are kept between updates; slots read them by these names.
    probes: losses by name that are not minimised; an optimizer may ask for the gradient of the term
      `probe/NAME`. Their keys are these names of terms once the objective is made.

  Raises:
    TypeError: a penalty without a coefficient.
    ValueError: a schedule without its penalty, an unknown name in `only`, a name that two arrays
      would have, a penalty called `policy`, or a statistic that reads an unknown array.
  """

  surrogate: surrogates.Part
  aggregation: aggregations.Part
  ratio: ratios.Part = ratios.token
  proximal: ratios.ProximalPart = ratios.recorded
  weights: Mapping[str, token_weights.Part] = dataclasses.field(default_factory=dict)
  penalties: Mapping[str, PenaltyPart] = dataclasses.field(default_factory=dict)
  schedules: Mapping[str, FactorPart] = dataclasses.field(default_factory=dict)
  stats: Mapping[str, StatPart] = dataclasses.field(default_factory=dict)
  selections: Mapping[str, batch_selections.Part] = dataclasses.field(default_factory=dict)
  only: str = ''
  history: Mapping[str, metric_history.Part] = dataclasses.field(default_factory=dict)
  probes: Mapping[str, surrogates.Part] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    check_weighted('penalties', self.penalties)
    check_names('schedules', self.schedules, self.penalties)
    check_names('only', {self.only} - {''}, self.selections)
    for name in ('policy', *KEPT, *OFF_POLICY):
      if name in self.penalties:
        what = 'the term of the surrogate' if name == 'policy' else 'a metric of every update'
        raise ValueError(f'a penalty cannot be called {name!r}: that is {what}; call it otherwise')
    of_vocabulary = self.of_vocabulary
    # `dataclasses.replace` passes statistics and probes to which the lines below were applied before.
    own_stats = {k: f for k, f in self.stats.items() if of_vocabulary.get(k) is not f}
    check_distinct(
      stats=own_stats,
      selections=self.selections,
      history=self.history,
      penalties=of_vocabulary,
    )
    for name, stat in own_stats.items():
      check_vocabulary(f'stats.{name}', stat)
    for name, penalty in of_vocabulary.items():
      check_vocabulary(f'penalties.{name}', penalty)
    probes = {PROBE + k.removeprefix(PROBE): f for k, f in self.probes.items()}
    object.__setattr__(self, 'stats', {**own_stats, **of_vocabulary})
    object.__setattr__(self, 'probes', probes)

  @functools.cached_property
  def slots(self) -> Mapping[str, Callable]:
    slots = self._readers
    if self.uses_ratio:
      slots = {'ratio': self.ratio, 'proximal': self.proximal, **slots}
    return {'surrogate': self.surrogate, **slots}

  @functools.cached_property
  def uses_ratio(self) -> bool:
    """Whether a slot reads the log-ratio or the log-probs that it is taken against."""
    readers = [self.surrogate, *self._readers.values()]
    return any(FROM_RATIO & set(inputs(fn)) for fn in readers)

  @functools.cached_property
  def of_vocabulary(self) -> dict[str, Callable]:
    """The penalties that need the logits, so they run in the pass over the vocabulary."""
    return {k: p.fn for k, p in self.penalties.items() if of_logits(p.fn)}

  @functools.cached_property
  def _readers(self) -> dict[str, Callable]:
    """The functions of the slots that hold several, by `slot.name`."""
    groups = {
      'weights': self.weights,
      'probes': {k.removeprefix(PROBE): f for k, f in self.probes.items()},
      'selections': self.selections,
      'penalties': {k: p.fn for k, p in self.penalties.items()},
      'stats': {k: f for k, f in self.stats.items() if k not in self.of_vocabulary},
      'schedules': self.schedules,
    }
    return {f'{slot}.{k}': f for slot, group in groups.items() for k, f in group.items()}

  @functools.cached_property
  def makes(self) -> frozenset[str]:
    made = {'log_ratio', *self.stats, *self.selections, *self.history}
    return frozenset(made if 'proximal_logp' in inputs(self.proximal) else made | FROM_RATIO)

  def apply(
    self, outputs: Outputs, batch: Batch, state: State, *, step: Array | int
  ) -> tuple[Terms, Metrics]:
    batch = self.compared(outputs, batch, state, step)
    x = self.arrays(outputs, batch, state, step)
    where = batch.mask & (x[self.only] > 0) if self.only else batch.mask

    metrics = self.policy_metrics(x, batch, where)
    terms = {'policy': self.aggregation(self.token_loss(x, x['logp']), where)}

    # Each penalty is also a metric, without its coefficient.
    x_with_ratio = self.with_ratio(x, x['logp'])
    for name, (coefficient, penalty) in self.penalties.items():
      if name in self.of_vocabulary:
        value = x[name]
      else:
        value = call_slot(f'penalties.{name}', penalty, x_with_ratio)
      metrics[name] = self.aggregation(value, where)
      factor = self.factor(name, x | {'step': step})
      terms[name] = metrics[name].scale(coefficient * factor)

    for name, probe in self.probes.items():
      slot = f'probes.{name.removeprefix(PROBE)}'
      terms[name] = self.aggregation(self.token_loss(x, x['logp'], slot, probe), where)
    return terms, metrics

  def factor(self, name: str, x: Mapping[str, Array]) -> Array | float:
    """The factor of a penalty's coefficient: of its schedule, or 1."""
    if name not in self.schedules:
      return 1.0
    return call_slot(f'schedules.{name}', self.schedules[name], x)

  def arrays(
    self, outputs: Outputs, batch: Batch, state: State, step: Array | int
  ) -> dict[str, Array]:
    """Every array that a slot may name, except those that depend on the log-ratio."""
    x = view(outputs, batch)
    x['step'] = jnp.asarray(step, jnp.float32)
    return x | self.remembered(state)

  def with_ratio(self, x: Mapping[str, Array], logp: Array) -> dict[str, Array]:
    """The arrays with `logp` replaced, and with the log-ratio where a slot reads it."""
    x = {**x, 'logp': logp}
    if self.uses_ratio:
      x['proximal_logp'] = jax.lax.stop_gradient(call_slot('proximal', self.proximal, x))
      x['log_ratio'] = logp - x['proximal_logp']
      x['log_ratio'] = call_slot('ratio', self.ratio, x)
    return x

  def token_loss(
    self,
    x: Mapping[str, Array],
    logp: Array,
    slot: str = 'surrogate',
    loss: Callable | None = None,
  ) -> Array:
    """The surrogate (or another loss of its kind) times all weights, [B, T], at these log-probs."""
    x = self.with_ratio(x, logp)
    return weigh(call_slot(slot, loss or self.surrogate, x), self.weights, x)

  def compare(
    self, outputs: Outputs, batch: Batch, state: State, *, step: Array | int
  ) -> dict[str, Array]:
    """The results of all selections as features [B, ...], without gradient; see `select`."""
    outputs = jax.lax.stop_gradient(outputs)
    x = self.arrays(outputs, batch, state, step)
    # The noise depends on the update alone, so a repeated update selects the same tokens.
    x['noise'] = jax.random.uniform(jax.random.fold_in(jax.random.key(0), step), batch.mask.shape)
    x = self.with_ratio(x, x['logp'])
    found = {}
    for name, selection in self.selections.items():
      value = jax.lax.stop_gradient(call_slot(f'selections.{name}', selection, x))
      # One value of the whole batch is repeated for every row, so that it survives a split.
      if value.shape != batch.mask.shape:
        name, value = WHOLE + name, jnp.broadcast_to(value, (len(batch.mask), *value.shape))
      found[name] = value
    return found

  def policy_metrics(self, x: Mapping[str, Array], batch: Batch, where: Array) -> Metrics:
    """Distance to the sampler, fraction of tokens with a gradient, and results of selections."""
    metrics = off_policy_metrics(x)
    if 'advantages' in x:
      metrics |= self.kept_metrics(x, where)
    # Of the selections, only values of the whole batch are reported, such as bounds.
    for name in self.selections:
      if name not in batch.features:
        for i, value in enumerate(jnp.ravel(x[name])):
          value = jnp.broadcast_to(value, batch.mask.shape)
          metrics[f'{name}/{i}'] = token_mean(value, batch.mask)
    return metrics

  def kept_metrics(self, x: Mapping[str, Array], where: Array) -> Metrics:
    """The fraction of tokens whose surrogate has a gradient, by the sign of the advantage."""
    kept = self.kept(x).astype(jnp.float32)
    signs = (x['advantages'] > 0, x['advantages'] < 0)
    return {name: token_mean(kept, where & sign) for name, sign in zip(KEPT, signs)}

  def kept(self, x: Mapping[str, Array]) -> Array:
    """bool[B, T]: tokens whose surrogate, times all weights, has a gradient; `x` is from `arrays`."""
    total = lambda logp: jnp.sum(self.token_loss(x, logp))
    return jax.grad(total)(jax.lax.stop_gradient(x['logp'])) != 0
