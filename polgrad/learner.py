"""From a batch to new parameters: the forward pass, and one optimizer step (`Learner.update`)."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax

from polgrad import optim
from polgrad.arrays import WIDE
from polgrad.losses.logit_stats import entropy, logp
from polgrad.models.policy import Policy, labelled, learned, overlay
from polgrad.models.token_stats import Rows, token_stats, unembedding
from polgrad.objectives import Objective, networks
from polgrad.objectives import Part as ObjectivePart
from polgrad.objectives.base import Metrics, Terms
from polgrad.optim import Oracle, learning_rate
from polgrad.optim.standard import STANDARD
from polgrad.packing import join, packed, split
from polgrad.reductions import Mean, empty, merged
from polgrad.registry import AtLeastOne, call, inputs, table
from polgrad.sharding import pieces_of_a_row
from polgrad.types import Array, Batch, Layout, MixedTokens, Outputs, Params, TrainState

# Prefix of what an update says of a metric: True if it counted nothing, so that its number says nothing.
EMPTY = 'empty/'


def forward(
  policy: Policy,
  params: Params,
  batch: Batch,
  *,
  fields: frozenset[str] = frozenset(),
  stats: Mapping[str, Callable] = {},
  temperature: float = 1.0,
  teacher: tuple[Policy, Params] | None = None,
  head: Callable[[Params, Array, Batch], dict[str, Array]] | None = None,
) -> Outputs:
  """Log-probabilities of the tokens, and the other outputs that are asked for.

  Outputs are meaningful only where the batch's mask is True. The layout may leave others out: they are
  0 in prompt columns, and in packed rows all but values are 0 outside the mask.

  Args:
    batch: only its tokens, segment_ids, mask, layout and offset are read, what `head` and `stats` read,
      and `teacher_states` where the teacher is an unembedding alone.
    fields: further outputs, out of {'entropy', 'values', 'values_after'}.
    stats: further functions of the next-token distribution by name, see `token_stats`.
    temperature: divides all logits, as it did when the tokens were sampled.
    teacher: a second model, whose logits a stat reads as `teacher_logits`; it gets no gradient.
    head: (params['head'], states [B, D] at the last token of each row, batch) -> further fields of the
      outputs, see `objectives.heads`.
  """
  given, layout = batch, batch.layout
  # Packing: short rows of the batch become one row of the model. `unpack` returns the model's
  # numbers [rows, T] to the places [B, T] of their tokens.
  unpack = lambda x: x
  if layout.rows:
    batch, unpack = packed(batch)

  # The policy's and the teacher's pass over the same rows, without the prompt columns.
  start = _first_column(layout, batch.tokens.shape[1])
  hidden, dropped = _hidden(policy, params, batch, layout)
  teacher_hidden = teacher_unembed = None
  if teacher is not None:
    teacher_policy, teacher_params = teacher[0], jax.lax.stop_gradient(teacher[1])
    teacher_hidden = _teacher_hidden(teacher_policy, teacher_params, batch, layout)
    teacher_unembed = unembedding(teacher_policy, teacher_params)

  # All that needs logits over the vocabulary, in one pass. Packed rows evaluate only the mask.
  wanted = {'logp': logp, **stats}
  if 'entropy' in fields:
    wanted['entropy'] = entropy
  read_wide = WIDE & {name for stat in stats.values() for name in inputs(stat)}
  wide = {name: batch.features[name].reshape(*batch.tokens.shape, -1) for name in read_wide}
  out = token_stats(
    hidden,
    batch.tokens[:, start:],
    unembedding(policy, params),
    stats=wanted,
    temperature=temperature,
    where=batch.mask if layout.rows else None,
    most=layout.scored,
    teacher_hidden=teacher_hidden,
    teacher_unembed=teacher_unembed,
    whole=Rows(batch.tokens, batch.segment_ids, batch.mask),
    wide={name: x[:, start:] for name, x in wide.items()},
  )
  if fields & {'values', 'values_after'}:
    out['values_after'] = policy.value(params, hidden)
    out['values'] = previous(out['values_after'])
  if dropped is not None:
    out['dropped'] = dropped
  read = (
    {} if head is None else head(params.get('head', {}), _last_states(hidden, given, start), given)
  )

  # Back to [B, T]: the prompt columns return as zeros, and packed rows to their own places.
  before = lambda x: jnp.pad(x, ((0, 0), (start, 0), *[(0, 0)] * (x.ndim - 2)))
  out = {name: unpack(before(x)) for name, x in out.items()}
  return Outputs(
    logp=out['logp'],
    entropy=out.get('entropy'),
    values=out['values'] if 'values' in fields else None,
    values_after=out['values_after'] if 'values_after' in fields else None,
    stats={name: out[name] for name in stats},
    dropped=out.get('dropped'),
    **read,
  )


def tokens_read(batch: Batch) -> Array | MixedTokens:
  """What the model reads: the tokens, or mixtures with those of other rows where the batch has them."""
  if 'partner_tokens' not in batch:
    return batch.tokens
  return MixedTokens(batch.tokens, batch['partner_tokens'], batch['own_share'])


def seen_by(batch: Batch, name: str) -> Batch:
  """The batch as an anchor that learns sees it: its features `NAME/x` are the arrays `x`."""
  before = f'{name}/'
  own = {n.removeprefix(before): x for n, x in batch.features.items() if n.startswith(before)}
  rest = {n: x for n, x in batch.features.items() if not n.startswith(before)}
  return batch.replace(features=rest).with_arrays(**own)


def read_by_anchors(batch: Batch) -> Batch:
  """The batch without the tokens that only the policy reads, such as labels: they are padding."""
  if 'policy_only' not in batch:
    return batch
  hidden = batch['policy_only'] > 0
  return batch.replace(segment_ids=jnp.where(hidden, 0, batch.segment_ids))


def _last_states(hidden: Array, batch: Batch, start: int) -> Array:
  """The states [B, D] at the last token of each row of the batch; of a row without tokens any state.

  Args:
    hidden: of the rows, without their first `start` columns, or of the packed rows.
  """
  seen = batch.segment_ids > 0
  if batch.layout.rows:
    place = batch.offset + jnp.sum(seen, axis=1) - 1
    return hidden.reshape(-1, hidden.shape[-1])[place]
  last = jnp.max(jnp.where(seen, jnp.arange(seen.shape[1]), start), axis=1) - start
  return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def _hidden(
  policy: Policy, params: Params, batch: Batch, layout: Layout
) -> tuple[Array, Array | None]:
  """Final hidden states from `_first_column` on; consecutive rows may share one pass of their prompt.

  Where experts have a capacity, with the fraction of each token's experts that have dropped it.
  """
  both = policy.dropped or (lambda *args, **sizes: (policy.completions(*args, **sizes), None))
  if layout.shared > 1:
    sizes = dict(prompt_length=layout.prompt_length, rows_per_prompt=layout.shared)
    return both(params, batch.tokens, batch.segment_ids, **sizes)
  both = policy.dropped or (lambda *args: (policy.hidden(*args), None))
  start = _first_column(layout, batch.tokens.shape[1])
  found = both(params, tokens_read(batch), batch.segment_ids)
  return jax.tree.map(lambda x: x[:, start:], found)


def _teacher_hidden(policy: Policy, params: Params, batch: Batch, layout: Layout) -> Array:
  """Final hidden states of the teacher from `_first_column` on.

  A teacher on other devices has computed them: `teacher_states` has the state that predicts a token at
  the place of that token, one column behind the token that it was computed at.
  """
  if policy.hidden is not None:
    return _hidden(policy, params, read_by_anchors(batch), layout)[0]
  states = batch['teacher_states'].reshape(*batch.tokens.shape, -1)
  return jnp.roll(states, -1, axis=1)[:, _first_column(layout, batch.tokens.shape[1]) :]


def _first_column(layout: Layout, length: int) -> int:
  """The last prompt column, whose hidden state predicts the first token that may be scored.

  Where the positions of a row are sharded, it is an earlier one, from which on they divide as well.
  """
  last = max(layout.prompt_length - 1, 0)
  return last if layout.shared > 1 else last - last % pieces_of_a_row(length)


def previous(x: Array) -> Array:
  """Moves [B, T] one column to the right: the value of token t is taken before the model reads it."""
  return jnp.pad(x[:, :-1], ((0, 0), (1, 0)))


def in_pieces(
  function: Callable[[Batch], Any], batch: Batch, pieces: int, rows_per_prompt: int
) -> Any:
  """`function(batch)`, on one piece of the batch after another, so that only one is in memory.

  Args:
    function: Batch [B / pieces, ...] -> arrays [B / pieces, ...]; each row depends on its own row of the
      batch only.
    rows_per_prompt: number of consecutive rows that stay in one piece.
  """
  if pieces == 1:
    return function(batch)
  outputs = jax.lax.map(function, split(batch, pieces, rows_per_prompt))
  return join(outputs, rows_per_prompt)


def forward_in_pieces(
  policy: Policy, params: Params, batch: Batch, *, micro_batches: int = 1, **settings: Any
) -> Outputs:
  """`forward` with its `settings`, on `micro_batches` pieces of the batch; takes no gradient."""
  function = functools.partial(forward, policy, params, **settings)
  return in_pieces(function, batch, micro_batches, batch.layout.shared)


def parameter_sets(state: TrainState, frozen: Mapping[str, Any]) -> dict[str, Params]:
  """All parameters of the policy (under 'policy') and of every anchor, by name.

  An anchor of the policy stores only what updates change, so the rest is filled in from the policy.
  An anchor named in `frozen` is another model, and stores all of its parameters.
  """
  anchors = {n: a if n in frozen else overlay(state.params, a) for n, a in state.anchors.items()}
  return {'policy': state.params, **anchors}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned:
  """How an anchor learns: by the gradient of an objective, on the batches of the policy.

  Attributes:
    objective: its loss, in which `logp` is the log-prob under the anchor. It reads what the batch has.
    optimizer: what makes a step of its gradient.
    minibatches: updates on a batch, after those of the policy.
  """

  objective: ObjectivePart
  optimizer: optim.Part = optim.adamw
  minibatches: AtLeastOne = 1


LearnedPart = Annotated[Learned, table('learner', Learned)]


@dataclasses.dataclass(frozen=True, eq=False)
class AnchorLearner:
  """One optimizer step of an anchor that learns by its own loss; jit `update`.

  Attributes:
    name: of the anchor.
    learner: of the anchor's model, with its objective and optimizer. It has no anchors itself.
  """

  name: str
  learner: 'Learner'

  def init(self, anchor: Params, init_opt_state: Callable) -> dict[str, Any]:
    """The entry of the anchor in `TrainState.learned`.

    Args:
      init_opt_state: (optimizer, params) -> the optimizer's first state.
    """
    return {
      'opt_state': init_opt_state(self.learner.optimizer, anchor),
      'objective_state': self.learner.objective.init(),
      'skipped': jnp.zeros((), jnp.int32),
    }

  def update(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
    """One step of the anchor: (state, batch) -> (state, metrics); nothing else changes.

    The objective finds the log-probs of the anchor in `logp`. The metric `skipped` is the number
    of consecutive steps of the anchor that were skipped.
    """
    policy, own = self.learner.policy, state.learned[self.name]
    # The state as if the anchor were the policy; it shares what no update changes.
    seen = state.replace(
      params=overlay(state.params, state.anchors[self.name]),
      anchors={},
      learned={},
      **own,
    )
    moved, report = self.learner.update(seen, seen_by(batch, self.name))
    after = {name: getattr(moved, name) for name in own}
    state = state.replace(
      anchors=state.anchors | {self.name: learned(policy, moved.params)},
      learned=state.learned | {self.name: after},
    )
    return state, report


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineNetwork:
  """A network that scores hidden states, and how it learns: on the batches of the policy.

  Attributes:
    network: what it is, and its loss.
    optimizer: what makes a step of its gradient.
    states_of: whose states it reads: 'policy', or the name of an anchor.
    minibatches: updates on a batch, before those of the policy.
  """

  network: networks.Part
  optimizer: Annotated[optax.GradientTransformation, STANDARD] = optim.adamw
  states_of: str = 'policy'
  minibatches: AtLeastOne = 1


NetworkPart = Annotated[OnlineNetwork, table('learner', OnlineNetwork)]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class NetworkLearner:
  """Scores of a network, and one optimizer step of it; jit both.

  Parameters and optimizer state of a network are on every device, and rows are sharded.
  """

  name: str
  policy: Policy  # the model whose states it reads
  states_of: str  # 'policy', or the name of the anchor that has its parameters
  network: networks.Network
  optimizer: optax.GradientTransformation
  frozen: Mapping[str, Policy] = dataclasses.field(default_factory=dict)
  micro_batches: int = 1  # must divide the rows of the minibatch; changes memory and speed only

  def init(self, params: Params, init_opt_state: Callable) -> dict[str, Any]:
    """The entry of the network in `TrainState.networks`.

    Args:
      params: of `network.init`.
      init_opt_state: (optimizer, params) -> the optimizer's first state.
    """
    return {
      'params': params,
      'opt_state': init_opt_state(self.optimizer, self.trained(params)),
      'skipped': jnp.zeros((), jnp.int32),
    }

  def shapes(self) -> Params:
    """The parameters of the network, as shapes."""
    width = self.policy.config.width
    return jax.eval_shape(lambda: self.network.init(jax.random.key(0), width))

  def trained(self, params: Params) -> Params:
    """The entries of the parameters that updates change."""
    return {name: x for name, x in params.items() if name not in self.network.fixed}

  def states(self, params: Params, batch: Batch) -> Array:
    """The states [n, B, T, D] that the network reads; the layout of the batch makes no difference.

    Args:
      params: of the model.
    """
    config = self.policy.config
    numbers = networks.numbers_of_layers(self.network.layers, config.num_layers)
    layers = sorted({*numbers})
    found = self.policy.states(params, batch.tokens, batch.segment_ids, layers=tuple(layers))
    return jax.lax.stop_gradient(found)[jnp.array([layers.index(n) for n in numbers])]

  def scores(self, params: Params, own: Params, batch: Batch) -> Array:
    """The score of each token, f32[B, T].

    Args:
      params: of the model.
      own: of the network.
      batch: with what the network reads.
    """
    score = lambda rows: self.network.scores(own, self.states(params, rows), rows)
    return in_pieces(score, batch, self.micro_batches, 1)

  def renewed(self, params: Params, own: Params, pieces: Batch) -> Params:
    """The network's parameters with those that change without a gradient, see `Network.renewed`.

    Args:
      params: of the model.
      own: of the network.
      pieces: the micro-batches, stacked.
    """
    if self.network.moments is None:
      return own
    look = lambda rows: self.network.moments(own, self.states(params, rows), rows)
    found = _merged(jax.lax.map(look, pieces), self.micro_batches)
    return self.network.renewed(own, {name: mean.value() for name, mean in found.items()})

  def update(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
    """One step of the network: (state, batch) -> (state, metrics); nothing else changes.

    A batch without tokens to learn from changes nothing. A step is skipped if loss or gradient is not
    finite; the metric `skipped` is the number of consecutive steps that were skipped.
    """
    own, network = state.networks[self.name], self.network
    params = parameter_sets(state, self.frozen)[self.states_of]
    pieces = split(batch, self.micro_batches, 1)
    before = self.renewed(params, own['params'], pieces)
    trained = self.trained(before)
    count = jnp.sum(network.learns(batch), dtype=jnp.float32)

    def loss(trained: Params, rows: Batch) -> Array:
      errors = network.errors(before | trained, self.states(params, rows), rows)
      return Mean(total=jnp.sum(jnp.where(network.learns(rows), errors, 0)), count=count).value()

    # Losses and gradients of the pieces add up, because each is divided by the count of the whole.
    def accumulate(sums, rows):
      return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss)(trained, rows)), ()

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trained))
    (value, grads), _ = jax.lax.scan(accumulate, zero, pieces)
    norm = optax.tree.norm(grads)
    optimizer = optax.with_extra_args_support(self.optimizer)
    rate = learning_rate(optimizer, own['opt_state'])
    steps, opt_state = optimizer.update(grads, own['opt_state'], trained)

    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    moved = {'params': before | optax.apply_updates(trained, steps), 'opt_state': opt_state}
    moved = {k: _where(finite & (count > 0), moved[k], own[k]) for k in moved}
    moved['skipped'] = jnp.where(finite, 0, own['skipped'] + 1)
    report = {'loss': value, 'grad_norm': norm, 'skipped': moved['skipped'], 'tokens': count}
    report |= rate | {f'{EMPTY}{name}': count == 0 for name in ('loss', 'grad_norm')}
    return state.replace(networks=state.networks | {self.name: moved}), report


def _where(condition: Array, first: Any, second: Any) -> Any:
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), first, second)


@dataclasses.dataclass(frozen=True, eq=False)
class FurtherLearner:
  """One more optimizer step of the policy, by another objective and optimizer; jit `update`.

  Attributes:
    name: of the batches that it learns from, `Collected.further`.
    learner: of the policy, with this objective and optimizer. It has no anchors.
  """

  name: str
  learner: 'Learner'

  def init(self, params: Params, init_opt_state: Callable) -> dict[str, Any]:
    """The entry in `TrainState.learned`: the state of the other optimizer and objective.

    Args:
      params: the part of the policy's parameters that updates change.
      init_opt_state: (optimizer, params) -> the optimizer's first state.
    """
    return AnchorLearner(self.name, self.learner).init(params, init_opt_state)

  def update(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
    """One step: (state, batch) -> (state, metrics).

    Only the policy and the entry of this learner change: counters, anchors and the state of the other
    optimizer do not. Schedules of the objective count the updates of the phase.
    """
    seen = state.replace(anchors={}, learned={}, **state.learned[self.name])
    moved, report = self.learner.update(seen, batch)
    after = {name: getattr(moved, name) for name in state.learned[self.name]}
    return state.replace(params=moved.params, learned=state.learned | {self.name: after}), report


# Compared by identity, because its mappings have no hash and `jax.jit` hashes a method's object.
@dataclasses.dataclass(frozen=True, eq=False)
class Learner:
  """What one optimizer step on one minibatch needs; jit `update`, the others are its steps.

  `trainable` is, in all methods, the part of the parameters that updates change (`Policy.labels`);
  only these have gradients, optimizer state and anchors.

  The minibatch is cut into `micro_batches` that are forwarded one after another. Counts and
  selections are taken from the whole minibatch first, so the cut changes neither loss nor gradient.
  """

  policy: Policy
  objective: Objective
  optimizer: optax.GradientTransformation  # may take `oracle=`, see `Oracle`
  _: dataclasses.KW_ONLY
  temperature: float = 1.0  # of sampling; divides all logits
  micro_batches: int = 1  # must divide the rows of the minibatch; changes memory and speed only
  # Rules by anchor name, (anchor, params, step) -> anchor; one for each anchor of the state, see
  # `optim.anchors`.
  anchors: Mapping[str, Callable[[Params, Params, Array], Params]] = dataclasses.field(
    default_factory=dict
  )
  # Models of the anchors that are not copies of the policy, by anchor name.
  frozen: Mapping[str, Policy] = dataclasses.field(default_factory=dict)

  def update(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step: (state, batch) -> (state, metrics).

    A step is skipped if the loss or the norm of the gradient is not finite, or the norm of the step
    of an optimizer that asked the oracle. A skipped step adds 1 to `step`, `update` and `skipped`, and
    leaves every other field of the state unchanged. A step that is made adds 1 to `step` and `update`
    and sets `skipped` to 0.
    """
    # The gradient of the whole minibatch.
    trainable = learned(self.policy, state.params)
    (loss, (terms, metrics)), grads = self.gradient(state, trainable, batch)
    norm = self.gradient_norm(grads)

    # The optimizer's step.
    oracle, asked = self.oracle(state, trainable, batch, loss)
    optimizer = optax.with_extra_args_support(self.optimizer)
    rate = learning_rate(optimizer, state.opt_state)
    steps, opt_state = optimizer.update(grads, state.opt_state, trainable, oracle=oracle)

    # Is it finite? Steps are checked only if other gradients went into them: checking them keeps all
    # steps in memory at once and prevents updating the parameters in place.
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    if asked:
      finite &= jnp.isfinite(optax.tree.norm(steps))

    # Parameters, anchors and the objective's state, or the old ones if the step is skipped.
    before, trainable = trainable, optax.apply_updates(trainable, steps)
    count = state.update + 1
    follow = {'params': trainable, 'previous': before, 'step': count}
    moved = state.replace(
      params=overlay(state.params, trainable),
      opt_state=opt_state,
      anchors={
        k: call(self.anchors[k], {**state.anchors, **follow, 'anchor': a})
        for k, a in state.anchors.items()
      },
      objective_state=self.objective.advance(state.objective_state, metrics),
      skipped=jnp.zeros_like(state.skipped),
    )
    skipped = state.replace(skipped=state.skipped + 1)
    state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), moved, skipped)
    state = state.replace(step=state.step + 1, update=count)

    # Metrics of the minibatch, taken at the old parameters.
    report = {f'loss/{k}': v.value() for k, v in terms.items()}
    report |= {k: v.value() for k, v in metrics.items()}
    report |= {f'{EMPTY}{k}': empty(v) for k, v in metrics.items()}
    report |= self.router_excess(grads, batch) | rate
    return state, {'loss': loss, 'grad_norm': norm, 'skipped': state.skipped, **report}

  def measure(self, state: TrainState, batch: Batch) -> tuple[Terms, Metrics]:
    """The undivided terms and metrics of a batch at the state's parameters; nothing is updated."""
    trainable = learned(self.policy, state.params)
    batch = self.select(state, trainable, batch)
    outputs = functools.partial(self.outputs, state, trainable, sampled=False)
    look = lambda piece: self.terms(state, outputs(piece), piece)
    if self.micro_batches == 1:
      return look(batch)
    pieces = split(batch, self.micro_batches, self.rows_per_prompt(batch))
    return _merged(jax.lax.map(look, pieces), self.micro_batches)

  def gradient(
    self, state: TrainState, trainable: Params, batch: Batch, probe: str = ''
  ) -> tuple[tuple[Array, tuple[Terms, Metrics]], Params]:
    """((loss, (terms, metrics)), gradient) of the whole minibatch at `trainable`.

    Sums over micro-batches are float32; without micro-batches the gradient has the parameters' dtypes.

    Args:
      probe: name of a term whose gradient is taken instead of that of the loss, see `Objective.probes`.
    """
    value_and_grad = jax.value_and_grad(self.loss, argnums=1, has_aux=True)
    batch = self.select(state, trainable, batch)
    if self.micro_batches == 1:
      return value_and_grad(state, trainable, batch, {}, probe)
    counts = self.counts(state, batch)

    def accumulate(sums, piece):
      (loss, aux), grads = value_and_grad(state, trainable, piece, counts, probe)
      return jax.tree.map(jnp.add, sums, (loss, grads)), aux

    # Losses and gradients add up in the loop; terms and metrics of all pieces are merged after it.
    zero = (jnp.zeros(()), jax.tree.map(lambda p: jnp.zeros(p.shape), trainable))
    pieces = split(batch, self.micro_batches, self.rows_per_prompt(batch))
    (loss, grads), aux = jax.lax.scan(accumulate, zero, pieces)
    return (loss, _merged(aux, self.micro_batches)), grads

  def loss(
    self,
    state: TrainState,
    trainable: Params,
    batch: Batch,
    counts: Mapping[str, Array],
    probe: str = '',
  ) -> tuple[Array, tuple[Terms, Metrics]]:
    """(loss, (terms, metrics)), where a micro-batch gives its summand of the minibatch's loss.

    Args:
      batch: a minibatch, or one of its micro-batches.
      counts: by which each term's total is divided, those of the minibatch; {}: those of `batch`.
      probe: name of the only term to take; '' takes all terms of the loss.

    Raises:
      ValueError: the objective has no such probe.
    """
    terms, metrics = self.terms(state, self.outputs(state, trainable, batch), batch)
    if probe and probe not in terms:
      known = sorted(self.objective.probes)
      raise ValueError(f'the optimizer asks for {probe!r}; there is {known}')
    taken = {probe} if probe else terms.keys() - self.objective.probes
    summands = [
      Mean(total=term.total, count=counts.get(name, term.count)).value()
      for name, term in terms.items()
      if name in taken
    ]
    return sum(summands), (terms, metrics)

  def outputs(
    self, state: TrainState, trainable: Params, batch: Batch, *, sampled: bool = True
  ) -> Outputs:
    """What the objective reads of the model, with `trainable` in the place of the state's parameters.

    Args:
      sampled: whether random variables of a head are drawn, as in training; else they are their means.
    """
    values = self.objective.requires & {'values', 'values_after'}
    head = self.objective.head
    # Entropy is a metric of every run of a policy, which a reward model is not; where no metric or loss
    # reads it, the compiler drops it.
    scored = 'values_after' in values or head.makes
    entropy = frozenset() if scored else frozenset({'entropy'})
    return forward(
      self.policy,
      overlay(state.params, trainable),
      batch,
      fields=values | entropy,
      stats=self.objective.stats,
      temperature=self.temperature,
      teacher=self.teacher(state),
      head=functools.partial(head.read, sampled=sampled),
    )

  def teacher(self, state: TrainState) -> tuple[Policy, Params] | None:
    """The anchor `teacher` as a model, if the objective compares with its logits."""
    if 'teacher_logits' not in self.objective.requires:
      return None
    model = self.frozen.get('teacher', self.policy)
    return model, parameter_sets(state, self.frozen)['teacher']

  def terms(self, state: TrainState, outputs: Outputs, batch: Batch) -> tuple[Terms, Metrics]:
    """The objective's undivided terms and metrics, and what experts have dropped of the mask."""
    terms, metrics = self.objective.apply(outputs, batch, state.objective_state, step=state.update)
    if outputs.dropped is not None:
      total = jnp.sum(jnp.where(batch.mask, outputs.dropped, 0))
      count = jnp.sum(batch.mask, dtype=jnp.float32)
      metrics = metrics | {'experts_dropped': Mean(total=total, count=count)}
    return terms, metrics

  def counts(self, state: TrainState, batch: Batch) -> dict[str, Array]:
    """The number f32[] that each term's total is divided by; it needs no pass of the model.

    Counts do not depend on outputs (see `Objective.apply`), so outputs of zeros give them.
    """
    zeros = jnp.zeros(batch.tokens.shape, jnp.float32)
    stats = {name: zeros for name in self.objective.stats}
    read = dict.fromkeys(self.objective.head.makes, zeros[:, 0])
    blank = Outputs(
      logp=zeros, entropy=zeros, values=zeros, values_after=zeros, stats=stats, **read
    )
    terms, _ = self.terms(state, blank, batch)
    return {name: term.count for name, term in terms.items()}

  def select(self, state: TrainState, trainable: Params, batch: Batch) -> Batch:
    """The batch with the features that compare its tokens with each other (`Objective.select`).

    They need the whole minibatch, so they cost a forward pass before it is cut into micro-batches.
    Without micro-batches the objective computes them itself, and the batch is returned unchanged.
    """
    if self.micro_batches == 1 or self.objective.select is None:
      return batch
    outputs = in_pieces(
      functools.partial(self.outputs, state, trainable),
      batch,
      self.micro_batches,
      self.rows_per_prompt(batch),
    )
    found = self.objective.select(outputs, batch, state.objective_state, step=state.update)
    return batch.replace(features=batch.features | found)

  def rows_per_prompt(self, batch: Batch) -> int:
    """Number of consecutive rows that stay together when a batch is cut into micro-batches."""
    return max(self.objective.rows_together, batch.layout.shared)

  def oracle(
    self, state: TrainState, trainable: Params, batch: Batch, loss: Array
  ) -> tuple[Oracle, list[str]]:
    """What the optimizer may ask about the loss of this minibatch, and the questions it has asked.

    `loss` is its value at `trainable`.

    The list is empty until the optimizer's update is traced, and then holds the name of each question.
    """
    asked = []

    def at(params: Params, probe: str = '') -> Params:
      asked.append('gradient')
      return self.gradient(state, params, batch, probe)[1]

    def halves() -> tuple[Params, Params]:
      asked.append('halves')
      middle = len(batch.tokens) // 2
      first = jax.tree.map(lambda x: x[:middle], batch)
      second = jax.tree.map(lambda x: x[middle:], batch)
      return tuple(self.gradient(state, trainable, half)[1] for half in (first, second))

    def product(vector: Params) -> Params:
      return jax.jvp(at, (trainable,), (vector,))[1]

    def both(params: Params) -> tuple[Array, Params]:
      asked.append('value_and_gradient')
      (value, _), gradient = self.gradient(state, params, batch)
      return value, gradient

    answers = dict(gradient=at, halves=halves, product=product, value_and_gradient=both)
    return Oracle(value=lambda: loss, **answers), asked

  def gradient_norm(self, grads: Params) -> Array:
    """The norm f32[] of the gradient, without the balance of routers."""
    # A sum of squares in bfloat16 would be off by percents.
    trained = labelled(self.policy, grads, 'train')
    return optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), trained))

  def router_excess(self, grads: Params, batch: Batch) -> dict[str, Array]:
    """Tokens of the most crowded expert above the mean load, as a fraction of all tokens.

    The "gradient" of a router's bias is this excess, see `models/experts.py`. {} without experts.
    """
    excess = jax.tree.leaves(labelled(self.policy, grads, 'balance'))
    if not excess:
      return {}
    worst = jnp.max(jnp.stack([jnp.max(x) for x in excess]))
    return {'router_excess': worst / jnp.sum(batch.segment_ids > 0)}


def _merged(stacked: Any, pieces: int) -> Any:
  """Terms and metrics of the whole, from those of its pieces, stacked along a first axis."""
  return merged(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(pieces))
