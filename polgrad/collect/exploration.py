"""A behavior policy that moves to where the policy should have been sampled more.

PROPS (proximal robust on-policy sampling, arXiv:2311.08290): a finite on-policy sample differs from
the policy by chance. Before more is drawn, the behavior policy moves away from the rows that were
drawn already, so that all samples together are closer to the policy than independent ones would be.
They are then used as if they were on-policy, without an importance correction.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated

import jax
import numpy as np
import optax

from polgrad import optim, sharding
from polgrad.collect import base
from polgrad.collect.base import Collect, Context, Draw, Sampling, draws_of, laid_out
from polgrad.collect.drawn import Drawn, Draws
from polgrad.collect.scored import distinct, joined_rows
from polgrad.collect.steps import PROVIDED, Steps, common
from polgrad.compiling import jit
from polgrad.learner import Learner, forward_in_pieces
from polgrad.losses import aggregation, surrogates
from polgrad.models.policy import Policy, learned
from polgrad.objectives import Objective, PolicyGradient
from polgrad.registry import AtLeastOne, Range
from polgrad.sharding import to_host
from polgrad.types import Array, Batch, Params, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explored(Sampling):
  """Rollouts that cover the policy's distribution better than independent ones (arXiv:2311.08290).

  Each group is drawn in `rounds` parts. Before each part but the first, a behavior policy starts at
  the present policy and is trained to `avoid` the rows that were drawn already; it then draws the
  part. The objective treats all rows as samples of the policy: `proximal_logp` is the policy's own,
  `behavior_logp` that of the behavior policy that drew the row.
  """

  # Parts that a group is drawn in; `samples_per_prompt` is a multiple of it.
  rounds: AtLeastOne = 4
  # Of the behavior policy.
  optimizer: optim.Part = optim.adamw
  # Passes of the behavior policy over the rows that were drawn already.
  epochs: AtLeastOne = 16
  # Updates of the behavior policy in a pass.
  minibatches: AtLeastOne = 4
  # How far the ratio behavior / policy is pushed below 1; inf with one pass of one minibatch is ROS
  # (arXiv:2111.14552).
  eps: Annotated[float, Range(above=0)] = 0.3
  # The passes end with the update at which the behavior policy is this far from the policy, in nats per
  # token.
  kl_limit: Annotated[float, Range(above=0)] = 0.01

  def __post_init__(self):
    super().__post_init__()
    if self.samples_per_prompt % self.rounds:
      raise ValueError(
        f'Explored: a group of {self.samples_per_prompt} is not drawn in {self.rounds} equal rounds'
      )
    if self.prompts % self.minibatches:
      raise ValueError(
        f'Explored: {self.prompts} prompts do not divide into {self.minibatches} minibatches'
      )

  @property
  def provides(self) -> frozenset[str]:
    return PROVIDED | self.turn_arrays.keys()

  def make(self, context: Context) -> Collect:
    context = self.within(context)
    return ExploredSteps(
      settings=self,
      draw=draws_of(self, context, samples_per_prompt=self.samples_per_prompt // self.rounds),
      behavior=make_behavior(self, context),
      **common(self, context, recompute_proximal=True),
    ).collect


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExploredSteps(Steps):
  """The steps of `Explored`: sampling is done in rounds, the others are those of all collectors."""

  settings: Explored
  draw: Draws  # of the rows of one round
  behavior: 'Behavior'

  def sample(self, state: TrainState, draw: Draw, step: int) -> tuple[Drawn, Sequence[dict]]:
    settings, context = self.settings, self.context
    records = draw(settings.prompts)
    lay = functools.partial(settings.lay_out, tokenizer=context.tokenizer, cut=settings.cut)
    prompts = laid_out(lay, records)
    # Each round gets other ids, because noise is folded from them.
    ids = distinct(np.tile(prompts.ids, settings.rounds)).reshape(settings.rounds, -1)
    drawn, episodes = [], []
    for number in range(settings.rounds):
      params = self._params(state, drawn, step)
      seed = self.context.seed
      rows = self.draw({'policy': params}, prompts, records, ids[number], seed=seed, step=step)
      self.count(rows, settings.samples_per_prompt // settings.rounds)
      drawn.append(rows.batch)
      episodes = joined_rows(episodes, rows.episodes, settings.prompts)
    batch = joined(drawn, settings.rounds, settings.prompts)
    prompt_ids = np.repeat(prompts.ids, settings.samples_per_prompt)
    return Drawn(batch.replace(prompt_ids=prompt_ids), episodes), records

  def _params(self, state: TrainState, drawn: Sequence[Batch], step: int) -> Params:
    """Of the policy in the first round, then of a policy that avoids what was drawn."""
    if not drawn:
      return state.params
    seen = joined(drawn, self.settings.rounds, self.settings.prompts)
    seed = (self.context.seed, step, 2, len(drawn))
    return self.behavior.avoiding(state, seen, seed=seed).params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Behavior:
  """Trains a behavior policy to avoid given rows, with functions that are compiled once a phase."""

  settings: Explored
  context: Context
  objective: Objective
  optimizer: optax.GradientTransformation
  logp: Callable[[Params, Batch], Array]  # of the policy, compiled
  update: Callable  # of the behavior policy, compiled

  def avoiding(self, state: TrainState, seen: Batch, *, seed: Sequence[int]) -> TrainState:
    """A policy that starts at the present one and is trained on the rows `seen`.

    Args:
      seen: rows of all rounds; those still to come are masked out.
      seed: of the order of the rows.
    """
    settings = self.settings
    place = functools.partial(sharding.place_batch, self.context.mesh)
    rows = Batch(
      tokens=seen.tokens,
      segment_ids=seen.segment_ids,
      mask=seen.mask,
      advantages=np.where(seen.mask, np.float32(-1), np.float32(0)),
    )
    own = to_host(self.logp(state.params, place(rows)))
    cuts = base.minibatches(
      rows.replace(behavior_logp=own, proximal_logp=own),
      epochs=settings.epochs,
      parts=settings.minibatches,
      rows_per_prompt=settings.samples_per_prompt,
      seed=seed,
    )
    begun = start(self.context.policy, self.optimizer, self.objective, state)
    return avoid(self.update, begun, map(place, cuts), kl_limit=settings.kl_limit)


def make_behavior(settings: Explored, context: Context) -> Behavior:
  """Compiles what trains the behavior policy.

  Raises:
    ValueError: a minibatch does not divide into micro-batches and devices.
  """
  policy, micro_batches = context.policy, context.micro_batches
  devices = sharding.data_parallel_size(context.mesh)
  rows = settings.rows // settings.minibatches
  if rows % (micro_batches * devices):
    raise ValueError(
      f'Explored: minibatches of {rows} rows do not divide into '
      f'{micro_batches} micro_batches x {devices} devices'
    )
  sizes = dict(temperature=settings.temperature, micro_batches=micro_batches)
  objective = avoidance(eps=settings.eps)
  optimizer = optim.balanced(settings.optimizer, policy.labels, rate=policy.config.balance_rate)
  learner = Learner(policy, objective, optimizer, **sizes)
  return Behavior(
    settings=settings,
    context=context,
    objective=objective,
    optimizer=optimizer,
    logp=jit(lambda params, batch: forward_in_pieces(policy, params, batch, **sizes).logp),
    update=jit(learner.update),
  )


def avoidance(*, eps: float) -> Objective:
  """Mean over tokens of max(r, clip(r, 1 - eps, 1 + eps)), r = behavior / policy.

  This is PPO with all advantages -1; the limit eps = inf is mean(r), as in ROS (arXiv:2111.14552).
  """
  surrogate = functools.partial(surrogates.clipped, eps_low=eps, eps_high=eps)
  return PolicyGradient(surrogate=surrogate, aggregation=aggregation.token_mean)


def start(
  policy: Policy, optimizer: optax.GradientTransformation, objective: Objective, state: TrainState
) -> TrainState:
  """The state of a behavior policy: the present policy's parameters, and a new optimizer."""
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
  """Updates the behavior policy on one minibatch after the other.

  It ends with the first minibatch on which the mean k3 estimate of KL(policy, behavior), taken before
  its update, is above `kl_limit`, in nats per token. That update is kept, as in the authors' code.

  Args:
    update: (state, batch) -> (state, report), the update of `avoidance`.
    cuts: minibatches whose `behavior_logp` and `proximal_logp` are those of the present policy.
  """
  for cut in cuts:
    state, report = update(state, cut)
    if report['sampler_kl'] > kl_limit:
      break
  return state


def joined(rounds: Sequence[Batch], total: int, prompts: int) -> Batch:
  """The rows of `total` rounds as one prompt-major batch; those still to come are masked out.

  Rows to come are there so that shapes are the same before every round. Rows of one prompt are
  ordered by round.
  """
  to_come = rounds[0].replace(mask=np.zeros_like(rounds[0].mask))
  rounds = [*rounds, *[to_come] * (total - len(rounds))]

  def join(*parts):
    grouped = np.stack([x.reshape(prompts, -1, *x.shape[1:]) for x in parts], axis=1)
    return grouped.reshape(-1, *grouped.shape[3:])

  return jax.tree.map(join, *rounds)
