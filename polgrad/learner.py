"""From a batch to new parameters: forward pass, gradient, optimizer, anchors."""

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from polgrad.losses.logit_stats import entropy, logp
from polgrad.models.policy import Policy, labelled, learned, overlay
from polgrad.models.token_stats import token_stats
from polgrad.objectives import Objective
from polgrad.optim import Oracle
from polgrad.packing import join, packed, split
from polgrad.types import Array, Batch, Mean, Metric, Outputs, Params, TrainState


def forward(
  policy: Policy,
  params: Params,
  batch: Batch,
  *,
  fields: frozenset[str] = frozenset(),
  stats: Mapping[str, Callable] = {},
  temperature: float = 1.0,
  teacher: tuple[Policy, Params] | None = None,
) -> Outputs:
  """Log-probs of the tokens, and only what else is asked for.

  What the batch's layout leaves out (prompts, and in packed rows all but the mask) is 0.

  Args:
    batch: of its fields, tokens, segment_ids, mask and what the layout needs are read.
    fields: out of {'entropy', 'values'}.
    stats: further functions of (logits, tokens, teacher_logits), by name.
    temperature: divides all logits, as it did when the tokens were sampled.
    teacher: a second model whose logits a stat reads; no gradient reaches it.
  """
  layout, back = batch.layout, lambda x: x
  if layout.rows:
    batch, back = packed(batch)
  start = max(layout.prompt_length - 1, 0)

  def states(policy: Policy, params: Params) -> Array:
    if layout.shared == 1:
      return policy.hidden(params, batch.tokens, batch.segment_ids)[:, start:]
    sizes = dict(prompt_length=layout.prompt_length, rows_per_prompt=layout.shared)
    return policy.completions(params, batch.tokens, batch.segment_ids, **sizes)

  whole = lambda x: back(jnp.pad(x, ((0, 0), (start, 0))))
  hidden = states(policy, params)
  wanted = {'logp': logp, **stats}
  if 'entropy' in fields:
    wanted['entropy'] = entropy
  of_teacher = {}
  if teacher is not None:
    other, other_params = teacher[0], jax.lax.stop_gradient(teacher[1])
    of_teacher = {
      'teacher_hidden': states(other, other_params),
      'teacher_unembed': lambda h: other.unembed(other_params, h),
    }
  out = token_stats(
    hidden,
    batch.tokens[:, start:],
    lambda h: policy.unembed(params, h),
    stats=wanted,
    temperature=temperature,
    where=batch.mask if layout.rows else None,
    most=layout.scored,
    **of_teacher,
  )
  if 'values' in fields:
    out['values'] = previous(policy.value(params, hidden))
  out = {name: whole(x) for name, x in out.items()}
  return Outputs(
    logp=out['logp'],
    entropy=out.get('entropy'),
    values=out.get('values'),
    stats={name: out[name] for name in stats},
  )


def previous(x: Array) -> Array:
  """Moves [B, T] one to the right: the value before token t speaks about token t."""
  return jnp.pad(x[:, :-1], ((0, 0), (1, 0)))


def parameter_sets(state: TrainState, frozen: Mapping[str, Any]) -> dict[str, Params]:
  """The policy's parameters and those of all anchors by name, each whole.

  An anchor of the policy holds only what updates change; one in `frozen` is a model of its own.
  """
  whole = {n: a if n in frozen else overlay(state.params, a) for n, a in state.anchors.items()}
  return {'policy': state.params, **whole}


def make_update(
  policy: Policy,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  *,
  temperature: float = 1.0,
  micro_batches: int = 1,
  anchors: Mapping[str, Callable] = {},
  frozen: Mapping[str, Policy] = {},
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
  """One optimizer step on one minibatch: (state, batch) -> (state, metrics); jit it.

  The batch is cut into `micro_batches` that are forwarded one after another. Counts are taken from the
  whole batch first, so the gradient is that of the whole batch, whatever the cut; it is summed in
  float32. Only parameters that updates change (see `Policy.labels`) have gradients, optimizer state
  and anchors.

  An update whose loss or gradient is not finite (or whose steps, if the optimizer asked the oracle)
  leaves everything but `step` and `skipped` as it was.
  """
  # Entropy is a metric of every run; where no objective reads it, the compiler drops it.
  fields = (objective.requires & {'values'}) | {'entropy'}
  teacher = frozen.get('teacher', policy) if 'teacher_logits' in objective.requires else None
  optimizer = optax.with_extra_args_support(optimizer)

  def stay(batch: Batch) -> int:
    """Rows that stay together when a batch is cut."""
    return max(objective.rows_per_prompt, batch.layout.shared)

  def outputs_of(state: TrainState, moving: Params, batch: Batch) -> Outputs:
    return forward(
      policy,
      overlay(state.params, moving),
      batch,
      fields=fields,
      stats=objective.stats,
      temperature=temperature,
      teacher=teacher and (teacher, parameter_sets(state, frozen)['teacher']),
    )

  def terms_of(state: TrainState, outputs: Outputs, batch: Batch):
    return objective.apply(outputs, batch, state.objective_state, step=state.update)

  def counts_of(state: TrainState, batch: Batch) -> dict[str, Array]:
    zeros = jnp.zeros(batch.tokens.shape, jnp.float32)
    blank = Outputs(
      logp=zeros, entropy=zeros, values=zeros, stats={k: zeros for k in objective.stats}
    )
    return {name: term.count for name, term in terms_of(state, blank, batch)[0].items()}

  def loss_fn(moving: Params, batch: Batch, counts: Mapping, state: TrainState, probe: str):
    """The share of this piece in the loss (or in a probe), if `counts` are those of the whole."""
    terms, metrics = terms_of(state, outputs_of(state, moving, batch), batch)
    if probe and probe not in terms:
      raise ValueError(f'the optimizer asks for {probe!r}; there is {sorted(objective.probes)}')
    named = {probe} if probe else terms.keys() - objective.probes
    shares = [
      Mean(total=t.total, count=counts.get(name, t.count)).value()
      for name, t in terms.items()
      if name in named
    ]
    return sum(shares), (terms, metrics)

  def selected(state: TrainState, moving: Params, batch: Batch) -> Batch:
    """The batch with what compares its tokens, before it is cut."""
    if micro_batches == 1 or objective.select is None:
      return batch
    parts = split(batch, micro_batches, stay(batch))
    outputs = jax.lax.map(lambda part: outputs_of(state, moving, part), parts)
    outputs = join(outputs, stay(batch))
    found = objective.select(outputs, batch, state.objective_state, step=state.update)
    return batch.replace(features=batch.features | found)

  def gradient(state: TrainState, moving: Params, batch: Batch, probe: str = ''):
    grad_fn = jax.value_and_grad(functools.partial(loss_fn, state=state, probe=probe), has_aux=True)
    batch = selected(state, moving, batch)
    if micro_batches == 1:
      return grad_fn(moving, batch, {})
    counts = counts_of(state, batch)
    parts = split(batch, micro_batches, stay(batch))

    def accumulate(carry, part):
      (loss, aux), grads = grad_fn(moving, part, counts)
      return jax.tree.map(jnp.add, carry, (loss, grads)), aux

    zero = (jnp.zeros(()), jax.tree.map(lambda p: jnp.zeros(p.shape), moving))
    (loss, grads), aux = jax.lax.scan(accumulate, zero, parts)
    mergeable = lambda x: isinstance(x, Metric)
    pieces = [jax.tree.map(lambda x, i=i: x[i], aux) for i in range(micro_batches)]
    aux = functools.reduce(lambda a, b: jax.tree.map(operator.add, a, b, is_leaf=mergeable), pieces)
    return (loss, aux), grads

  def oracle_of(state: TrainState, moving: Params, batch: Batch, asked: list) -> Oracle:
    """What an optimizer may ask about this update's loss; nothing is computed that it does not ask.

    Names of questions go to `asked`.
    """

    def at(params: Params, probe: str = '') -> Params:
      asked.append('gradient')
      return gradient(state, params, batch, probe)[1]

    def halves() -> tuple[Params, Params]:
      asked.append('halves')
      # Samples of a prompt lie together, so halves share no prompt and are independent.
      middle = len(batch.tokens) // 2
      pieces = [
        jax.tree.map(lambda x, s=s: x[s], batch) for s in (slice(middle), slice(middle, None))
      ]
      return tuple(gradient(state, moving, piece)[1] for piece in pieces)

    def product(vector: Params) -> Params:
      return jax.jvp(at, (moving,), (vector,))[1]

    return Oracle(gradient=at, halves=halves, product=product)

  def update(state: TrainState, batch: Batch):
    moving = learned(policy, state.params)
    (loss, (terms, metrics)), grads = gradient(state, moving, batch)
    # A sum of squares in bfloat16 would be off by percents.
    single = jax.tree.map(lambda g: g.astype(jnp.float32), labelled(policy, grads, 'train'))
    norm = optax.tree.norm(single)
    asked = []
    oracle = oracle_of(state, moving, batch, asked)
    steps, opt_state = optimizer.update(grads, state.opt_state, moving, oracle=oracle)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    if asked:  # else steps need not be there, whole, before the first parameter moves
      finite &= jnp.isfinite(optax.tree.norm(steps))
    moving = optax.apply_updates(moving, steps)
    count = state.update + 1
    moved = state.replace(
      params=overlay(state.params, moving),
      opt_state=opt_state,
      anchors={k: anchors[k](v, moving, count) for k, v in state.anchors.items()},
      objective_state=objective.advance(state.objective_state, metrics),
      skipped=jnp.zeros_like(state.skipped),
    )
    stayed = state.replace(skipped=state.skipped + 1)
    state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), moved, stayed)
    state = state.replace(step=state.step + 1, update=count)
    report = {f'loss/{k}': v.value() for k, v in terms.items()}
    report |= {k: v.value() for k, v in metrics.items()}
    excess = jax.tree.leaves(labelled(policy, grads, 'balance'))
    if excess:  # of the most crowded expert, as a share of the tokens
      worst = jnp.max(jnp.stack([jnp.max(x) for x in excess]))
      report['router_excess'] = worst / jnp.sum(batch.segment_ids > 0)
    return state, {
      'loss': loss,
      'grad_norm': norm,
      'skipped': state.skipped,
      **report,
    }

  return update


def make_annotate(
  policy: Policy,
  *,
  fields: frozenset[str],
  temperature: float,
  micro_batches: int,
  stats: Mapping[str, Callable] = {},
) -> Callable[[Params, Batch], Outputs]:
  """(params, batch) -> Outputs without a gradient; jit it."""

  def annotate(params: Params, batch: Batch) -> Outputs:
    one = lambda part: forward(
      policy, params, part, fields=fields, stats=stats, temperature=temperature
    )
    if micro_batches == 1:
      return one(batch)
    parts = split(batch, micro_batches, batch.layout.shared)
    return join(jax.lax.map(one, parts), batch.layout.shared)

  return annotate
