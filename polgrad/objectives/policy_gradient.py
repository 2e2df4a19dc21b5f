"""The policy gradient. To first order every method is -AGG(mask * sg(w) * logp) with

    w = K I psi A - sum_k coefficient_k kappa_k

where K is a keep-mask, I an importance weight, psi a gate, A an advantage and kappa_k are penalties.
`PolicyGradient` has a slot for each factor; a method is one choice for each slot.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from polgrad import metric_history
from polgrad.losses import aggregation as aggregations
from polgrad.losses import ratios, surrogates
from polgrad.losses import selections as batch_selections
from polgrad.losses import weights as token_weights
from polgrad.objectives.base import (
  OFF_POLICY,
  Metrics,
  State,
  Terms,
  call_slot,
  check_names,
  off_policy_metrics,
  token_mean,
  weigh,
)
from polgrad.objectives.penalized import FactorPart, Penalized, PenaltyPart, StatPart
from polgrad.registry import inputs
from polgrad.types import Array, Batch, Outputs

FROM_RATIO = frozenset({'log_ratio', 'proximal_logp'})  # made by the slots `ratio` and `proximal`
PROBE = 'probe/'  # prefix of the terms of probes
# Fractions of tokens with a gradient, by the sign of the advantage.
KEPT = ('kept_positive', 'kept_negative')


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyGradient(Penalized):
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
    taken = {'policy': 'the term of the surrogate'}
    taken |= dict.fromkeys((*KEPT, *OFF_POLICY), 'a metric of every update')
    check_names('only', {self.only} - {''}, self.selections)
    self.prepare(taken)
    # `dataclasses.replace` passes probes that have the prefix.
    probes = {PROBE + k.removeprefix(PROBE): f for k, f in self.probes.items()}
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
  def _readers(self) -> dict[str, Callable]:
    probes = {k.removeprefix(PROBE): f for k, f in self.probes.items()}
    return self.readers(weights=self.weights, probes=probes)

  @functools.cached_property
  def makes(self) -> frozenset[str]:
    made = {'log_ratio', *self.made}
    return frozenset(made if 'proximal_logp' in inputs(self.proximal) else made | FROM_RATIO)

  def apply(
    self, outputs: Outputs, batch: Batch, state: State, *, step: Array | int
  ) -> tuple[Terms, Metrics]:
    batch = self.compared(outputs, batch, state, step)
    x = self.arrays(outputs, batch, state, step)
    where = batch.mask & (x[self.only] > 0) if self.only else batch.mask

    metrics = self.policy_metrics(x, batch, where)
    terms = {'policy': self.aggregation(self.token_loss(x, x['logp']), where)}

    added, measured = self.penalty_terms(x, where, step)
    terms, metrics = terms | added, metrics | measured

    for name, probe in self.probes.items():
      slot = f'probes.{name.removeprefix(PROBE)}'
      terms[name] = self.aggregation(self.token_loss(x, x['logp'], slot, probe), where)
    return terms, metrics

  def completed(self, x: Mapping[str, Array]) -> dict[str, Array]:
    return self.with_ratio(x, x['logp'])

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

  def policy_metrics(self, x: Mapping[str, Array], batch: Batch, where: Array) -> Metrics:
    """Distance to the sampler, fraction of tokens with a gradient, and results of selections."""
    metrics = off_policy_metrics(x)
    if 'advantages' in x:
      metrics |= self.kept_metrics(x, where)
    metrics |= self.selection_metrics(x, batch)
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
