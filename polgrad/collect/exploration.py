"""A behaviour policy that goes where the present policy should have been sampled more.

PROPS (proximal robust on-policy sampling, arXiv:2311.08290): a finite on-policy sample differs from
the policy by chance. Before more is drawn, the sampler moves away from what was drawn already, so
that all samples together come closer to the policy than independent ones would. They are then used
as if they were on-policy, without an importance correction.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np
import optax

from polgrad import optim, sharding
from polgrad.collect.base import Collector, Context, Draw, minibatches
from polgrad.collect.rollouts import FEATURES, Gathered, as_rows, make_drawer, make_rollouts
from polgrad.collect.scored import distinct, metrics, score_rollout
from polgrad.compiling import jit
from polgrad.data import batching
from polgrad.learner import Learner, forward_in_pieces
from polgrad.losses import aggregation, surrogates
from polgrad.models.policy import Policy, learned
from polgrad.objectives import Objective, PolicyGradient
from polgrad.sharding import to_host
from polgrad.types import Batch, Rollout, TrainState


def explored(
  *,
  prompts: int = 8,
  samples_per_prompt: int = 8,
  rounds: int = 4,
  prompt_length: int = 64,
  max_new_tokens: int = 64,
  temperature: float = 1.0,
  optimizer: optim.Part = optim.adamw,
  epochs: int = 16,
  minibatches: int = 4,
  eps: float = 0.3,
  kl_limit: float = 0.01,
  mask_truncated: bool = False,
) -> Collector:
  """Rollouts that cover the policy's distribution better than independent ones (arXiv:2311.08290).

  Each group is drawn in `rounds` parts. Before each part but the first a behaviour policy starts at
  the present policy and is trained to `avoid` what was drawn already; it then draws the part. The
  objective treats all rows as samples of the policy: `proximal_logp` is the policy's own,
  `behavior_logp` that of whoever drew.

  Args:
    optimizer: of the behaviour policy.
    epochs: passes over the rows drawn already.
    minibatches: updates of a pass.
    eps: how far the ratio is pushed; inf with one pass of one minibatch is ROS (arXiv:2111.14552).
    kl_limit: end the passes when the behaviour policy is so far from the policy, in nats a token.
    temperature, mask_truncated: as in `rollouts`.
  """
  if rounds < 1 or samples_per_prompt % rounds:
    raise ValueError(
      f'explored: a group of {samples_per_prompt} is not drawn in {rounds} equal rounds'
    )
  if minibatches < 1 or prompts % minibatches:
    raise ValueError(f'explored: {prompts} prompts do not divide into {minibatches} minibatches')
  if epochs < 1 or eps <= 0 or kl_limit <= 0:
    raise ValueError(
      f'explored: epochs, eps and kl_limit must be positive, got {epochs}, {eps} and {kl_limit}'
    )
  return Collector(
    make=functools.partial(
      make_rollouts,
      make_gather=functools.partial(
        _make_exploring,
        records=prompts,
        samples_per_prompt=samples_per_prompt,
        rounds=rounds,
        prompt_length=prompt_length,
        sampler=dict(
          samples_per_prompt=samples_per_prompt // rounds,
          max_new_tokens=max_new_tokens,
          temperature=temperature,
        ),
        optimizer=optimizer,
        epochs=epochs,
        parts=minibatches,
        eps=eps,
        kl_limit=kl_limit,
      ),
      temperature=temperature,
      recompute_proximal=True,
      mask_truncated=mask_truncated,
    ),
    records=prompts,
    rows=prompts * samples_per_prompt,
    rows_per_prompt=samples_per_prompt,
    length=prompt_length + max_new_tokens,
    temperature=temperature,
    provides=frozenset({'behavior_logp', 'proximal_logp', 'rewards'}) | FEATURES,
  )


def avoidance(*, eps: float) -> Objective:
  """mean over tokens of max(r, clip(r, 1 - eps, 1 + eps)), r = behaviour / policy.

  This is PPO with all advantages -1; the limit eps = inf is mean(r), as in ROS (arXiv:2111.14552).
  """
  surrogate = functools.partial(surrogates.clipped, eps_low=eps, eps_high=eps)
  return PolicyGradient(surrogate=surrogate, aggregation=aggregation.token_mean)


def start(
  policy: Policy, optimizer: optax.GradientTransformation, objective: Objective, state: TrainState
) -> TrainState:
  """The behaviour policy at the present policy, with an optimizer of its own."""
  opt_state = jit(lambda params: optimizer.init(learned(policy, params)))(state.params)
  return state.replace(
    opt_state=opt_state,
    anchors={},
    collect_state=(),
    credit_state=(),
    objective_state=objective.init(),
  )


def avoid(
  update: Callable, state: TrainState, cuts: Iterable[Batch], *, kl_limit: float
) -> TrainState:
  """Updates the behaviour policy on one minibatch after the other.

  It ends before the first whose mean k3 estimate of KL(policy, behaviour) is above `kl_limit`.

  Args:
    update: (state, batch) -> (state, report), the update of `avoidance`.
    cuts: minibatches whose `behavior_logp` and `proximal_logp` are those of the present policy.
  """
  for cut in cuts:
    moved, report = update(state, cut)
    if report['sampler_kl'] > kl_limit:
      return state
    state = moved
  return state


def joined(rounds: Sequence[Rollout], total: int, prompts: int) -> Rollout:
  """All rounds as one prompt-major rollout; those still to come are there, masked out.

  So the shapes are the same before every round. Rows of one prompt lie round after round.
  """
  to_come = rounds[0].replace(mask=np.zeros_like(rounds[0].mask))
  rounds = [*rounds, *[to_come] * (total - len(rounds))]

  def join(*parts):
    grouped = np.stack([x.reshape(prompts, -1, *x.shape[1:]) for x in parts], axis=1)
    return grouped.reshape(-1, *grouped.shape[3:])

  return jax.tree.map(join, *rounds)


def _make_exploring(
  context: Context,
  *,
  records: int,
  samples_per_prompt: int,
  rounds: int,
  prompt_length: int,
  sampler: Mapping,
  optimizer: optax.GradientTransformation,
  epochs: int,
  parts: int,
  eps: float,
  kl_limit: float,
) -> Callable:
  """(state, draw, step) -> Gathered: `rounds` draws, each by a policy that avoids the earlier."""
  policy, temperature = context.policy, sampler['temperature']
  piece = context.micro_batches * sharding.data_parallel_size(context.mesh)
  if records * samples_per_prompt // parts % piece:
    raise ValueError(
      f'explored: minibatches of {records * samples_per_prompt // parts} rows do not divide into '
      f'{context.micro_batches} micro_batches x {piece // context.micro_batches} devices'
    )
  optimizer = optim.balanced(optimizer, policy.labels, rate=policy.config.balance_rate)
  objective = avoidance(eps=eps)
  sample = make_drawer(context, sampler)
  annotate = jit(
    functools.partial(
      forward_in_pieces,
      policy,
      temperature=temperature,
      micro_batches=context.micro_batches,
    )
  )
  learner = Learner(
    policy, objective, optimizer, temperature=temperature, micro_batches=context.micro_batches
  )
  update = jit(learner.update)

  def behavior(state: TrainState, drawn: list[Rollout], step: int) -> TrainState:
    seen = joined(drawn, rounds, records)
    place = functools.partial(sharding.place_batch, context.mesh)
    batch = Batch(
      tokens=seen.tokens,
      segment_ids=seen.segment_ids,
      mask=seen.mask,
      advantages=np.where(seen.mask, np.float32(-1), np.float32(0)),
    )
    own = to_host(annotate(state.params, place(batch)).logp)
    batch = batch.replace(behavior_logp=own, proximal_logp=own)
    random = (context.seed, step, 2, len(drawn))
    cuts = minibatches(
      batch, epochs=epochs, parts=parts, rows_per_prompt=samples_per_prompt, seed=random
    )
    begun = start(policy, optimizer, objective, state)
    return avoid(update, begun, map(place, cuts), kl_limit=kl_limit)

  def gather(state: TrainState, draw: Draw, step: int) -> Gathered:
    prompts = batching.prompts(draw(records), context.tokenizer, length=prompt_length)
    ids = distinct(np.tile(prompts.ids, rounds)).reshape(rounds, -1)
    drawn = []
    for number in range(rounds):
      drawer = behavior(state, drawn, step) if drawn else state
      rollout = sample(
        {'policy': drawer.params},
        prompts.tokens,
        prompts.mask,
        ids[number],
        seed=context.seed,
        step=step,
        policy_step=int(state.step),
      )
      drawn.append(to_host(rollout))
    every = joined(drawn, rounds, records)
    every = every.replace(prompt_ids=np.repeat(prompts.ids, samples_per_prompt))
    judged = score_rollout(every, prompts.records, context)
    return Gathered(judged, as_rows(judged.scored), metrics(judged), judged.scores.messages)

  return gather
