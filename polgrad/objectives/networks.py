"""Small networks that read hidden states of a model, score tokens, and learn online by their own loss.

A network is no part of the model, and no gradient of it reaches the model. Its parameters and the
state of its optimizer are in `TrainState.networks`; `learner.NetworkLearner` scores with it and trains
it. The scores of the network `NAME` are the array `NAME_scores`, [B, T], which credit and objective may
read. They are made before the network learns from the batch.

A state is aligned as all arrays are: `states[..., b, t, :]` is that of the model after it has read
`tokens[b, t]`.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from polgrad.losses import auxiliary_rewards
from polgrad.losses import discounted_values as valued
from polgrad.losses._layers import layer, layers, linear, mlp
from polgrad.objectives.heads import row_keys
from polgrad.reductions import Mean
from polgrad.registry import AtLeastOne, Count, Fraction, NotNegative, table
from polgrad.types import Array, Batch, Params

# What the noise of a row is for: it differs between learning and scoring.
LEARNING, SCORING = 0, 1


class Network(abc.ABC):
  """A network on hidden states; the base class.

  Attributes:
    layers: which layers of the model it reads, as fractions of its depth in (0, 1], see
      `numbers_of_layers`.
    requires: arrays of the batch that it reads, besides tokens, segment_ids and mask.
    fixed: entries of its parameters that are not trained.
  """

  layers: tuple[float, ...]
  requires: frozenset[str] = frozenset({'uniform'})
  fixed: frozenset[str] = frozenset()

  def __post_init__(self):
    fractions = self.layers
    numbers = all(isinstance(x, int | float) and 0 < x <= 1 for x in fractions)
    if not fractions or not numbers:
      raise ValueError(
        f'{type(self).__name__}: layers={fractions}: expected fractions of the depth, each above 0 and '
        'at most 1'
      )

  @abc.abstractmethod
  def init(self, key: Array, width: int) -> Params:
    """Random parameters, a nested dict of float32 arrays.

    Args:
      key: of the random numbers.
      width: D, size of a state of the model.
    """

  @abc.abstractmethod
  def learns(self, batch: Batch) -> Array:
    """The tokens whose errors are averaged in the loss, bool[B, T]."""

  @abc.abstractmethod
  def errors(self, params: Params, states: Array, batch: Batch) -> Array:
    """The loss of each token, f32[B, T]; it has the gradient. Outside of `learns` it is not read.

    Args:
      params: of `init`.
      states: [n, B, T, D], of the n layers.
      batch: with the arrays in `requires`.
    """

  # (params, states, batch) -> `Mean`s of the tokens that are learned, which `renewed` reads; None: there
  # are none, and nothing changes without a gradient.
  moments: Callable[[Params, Array, Batch], dict[str, Mean]] | None = None

  def renewed(self, params: Params, moments: dict[str, Array]) -> Params:
    """Parameters before a step, with those in `fixed` that change without a gradient.

    Args:
      params: of the last step.
      moments: the values of `moments` over the whole minibatch.
    """
    del moments
    return params

  @abc.abstractmethod
  def scores(self, params: Params, states: Array, batch: Batch) -> Array:
    """The score of each token, f32[B, T], 0 where there is none. Arguments are those of `errors`."""


def numbers_of_layers(fractions: tuple[float, ...], count: int) -> tuple[int, ...]:
  """The number of each layer, counted from 1, of a model with `count` layers.

  It is the layer behind round(fraction x count) others, and at most the last one, as in the release of
  RLFR. Small models have one layer for several fractions.

  >>> numbers_of_layers((0.25, 0.5, 0.75, 1.0), 28)
  (8, 15, 22, 28)
  >>> numbers_of_layers((0.25, 0.5, 0.75), 2)
  (1, 2, 2)
  """
  return tuple(min(round(x * count), count - 1) + 1 for x in fractions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flow(Network):
  """A flow that models states of right answers, given the state beside each (RLFR, arXiv:2510.10201).

      x_s   = s h + (1 - s) noise
      loss  = mean over layers and entries of (v(x_s, s, h', layer) - (h - noise))^2
      score = mean over layers of s / (1 - s) x the same error

  In the loss s is the sigmoid of a standard normal number, and in the score it is fixed.
  h is the state of a token in the mask and h' that of its neighbour, which for the first token is the
  last one of the prompt. The loss is averaged over the tokens of right rows. A token without a neighbour
  in its row has the score 0.

  v is a residual network in the width of the states. Each block is an MLP whose input is normalised,
  shifted and scaled, and whose output is gated, by linear functions of the time, the layer and h'
  (arXiv:2212.09748). Gates and output begin at 0, so v = 0 before the first step.

  Attributes:
    layers: which layers of the model are read, as fractions of its depth.
    side: the neighbour: the token 'before', or the one 'after'.
    time: s of the score.
    right: least reward of a row that is learned.
    blocks: number of residual blocks.
    hidden: width of the blocks; 0 is that of the states.
    normalize: divide each state by the root of its mean square first.
  """

  layers: tuple = (0.25, 0.5, 0.75)
  side: Literal['before', 'after'] = 'before'
  time: auxiliary_rewards.Inside = 0.8
  right: float = 1.0
  blocks: AtLeastOne = 3
  hidden: Count = 0
  normalize: bool = False

  requires = frozenset({'uniform', 'rewards', 'valid'})

  def init(self, key: Array, width: int) -> Params:
    size, keys = self.hidden or width, jax.random.split(key, 5)
    zeros = lambda inputs, outputs: jax.tree.map(jnp.zeros_like, layer(key, inputs, outputs))
    return {
      'state': layer(keys[0], width, size),
      'condition': layer(keys[1], width, size),
      'time': layers(keys[2], 2 * WAVES, size, size),
      'layer': layers(keys[3], 2 * WAVES, size, size),
      'blocks': {
        str(i): {'mlp': layers(one, size, size, size), 'modulation': zeros(size, 3 * size)}
        for i, one in enumerate(jax.random.split(keys[4], self.blocks))
      },
      'output': zeros(size, width),
    }

  def velocity(self, params: Params, x: Array, s: Array, condition: Array) -> Array:
    """v, [n, B, T, D] -> the same; s is [n, B, T] or a number."""
    s = jnp.broadcast_to(jnp.asarray(s), x.shape[:-1])
    depth = jnp.asarray(self.layers)[:, None, None]
    given = linear(params['condition'], condition)
    given += mlp(params['time'], waves(s)) + mlp(params['layer'], waves(depth))
    given, y = jax.nn.silu(given), linear(params['state'], x)
    for i in range(self.blocks):
      block = params['blocks'][str(i)]
      shift, scale, gate = jnp.split(linear(block['modulation'], given), 3, axis=-1)
      y += gate * mlp(block['mlp'], normalized(y) * (1 + scale) + shift)
    return linear(params['output'], normalized(y))

  def pairs(self, states: Array, batch: Batch) -> tuple[Array, Array, Array]:
    """States and those of the neighbours, [n, B, T, D], and the tokens in the mask that have one."""
    states = jax.lax.stop_gradient(states.astype(jnp.float32))
    states = normalized(states) if self.normalize else states
    there = batch.segment_ids > 0
    beside = lambda x: auxiliary_rewards.neighbours(x, there, side=self.side)
    condition, where = jax.vmap(beside)(states)
    return states, condition, where[0] & batch.mask

  def noise(self, states: Array, batch: Batch, purpose: int) -> tuple[Array, Array]:
    """Standard normal numbers [n, B, T, D] and [n, B, T], which depend on the row and the purpose."""
    count, _, length, width = states.shape
    draw = lambda key: jax.random.normal(
      jax.random.fold_in(key, purpose), (count, length, width + 1)
    )
    both = jnp.moveaxis(jax.vmap(draw)(row_keys(batch['uniform'])), 0, 1)
    return both[..., 1:], both[..., 0]

  def learns(self, batch: Batch) -> Array:
    there = batch.segment_ids > 0
    _, where = auxiliary_rewards.neighbours(there[..., None], there, side=self.side)
    right = batch['valid'] & (batch['rewards'] >= self.right)
    return where & batch.mask & right[:, None]

  def errors(self, params: Params, states: Array, batch: Batch) -> Array:
    target, condition, _ = self.pairs(states, batch)
    noise, time = self.noise(target, batch, LEARNING)
    s = jax.nn.sigmoid(time)
    velocity = self.velocity(params, auxiliary_rewards.noised(target, noise, s), s, condition)
    return jnp.mean(auxiliary_rewards.flow_error(velocity, target, noise), axis=0)

  def scores(self, params: Params, states: Array, batch: Batch) -> Array:
    target, condition, where = self.pairs(states, batch)
    noise, _ = self.noise(target, batch, SCORING)
    s = jnp.full(target.shape[:-1], self.time)
    velocity = self.velocity(params, auxiliary_rewards.noised(target, noise, s), s, condition)
    score = auxiliary_rewards.flow_score(velocity, target, noise, s=self.time)
    return jnp.where(where, jnp.mean(score, axis=0), 0)


WAVES = 8  # frequencies by which a number in [0, 1] is shown to a network


def waves(x: Array) -> Array:
  """cos and sin of pi k x, k = 1 ... WAVES: [...] -> [..., 2 WAVES]."""
  turns = jnp.multiply.outer(x, jnp.pi * jnp.arange(1, WAVES + 1))
  return jnp.concatenate([jnp.cos(turns), jnp.sin(turns)], axis=-1)


def normalized(x: Array) -> Array:
  """x divided by the root of its mean square over the last axis."""
  return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomTargets(Network):
  """A predictor of random targets, whose error is an exploration bonus (RDD, arXiv:2505.11044).

      loss  = mean over entries of (f(h) - y)^2,  y = m(h) + sigma noise, drawn anew at every visit
      score = mean over entries of (f(h) - m(h))^2

  h is a visited state, m a fixed random network and f the predictor. If f is the average of the targets
  of n visits, the mean score is sigma^2 / n. All visited rows that are not masked out are learned.

  Attributes:
    layers: which layer of the model is read, one fraction of its depth; 1 is the normalised last state.
    states: what is a visited state: the one at the 'last' token of a row in the mask, or that at
      'each' of them.
    outputs: entries of a target.
    hidden: width of the two hidden layers of each network; 0: each network is one matrix, so that with
      one-hot states the predictor is a table.
    sigma: standard deviation of the targets; at 0 this is random network distillation
      (arXiv:1810.12894).
  """

  layers: tuple = (1.0,)
  states: Literal['last', 'each'] = 'last'
  outputs: AtLeastOne = 64
  hidden: Count = 64
  sigma: NotNegative = 1.0

  fixed = frozenset({'target'})

  def __post_init__(self):
    super().__post_init__()
    if len(self.layers) != 1:
      raise ValueError(f'RandomTargets: layers={self.layers}: expected one fraction')

  def init(self, key: Array, width: int) -> Params:
    sizes = (
      (width, self.hidden, self.hidden, self.outputs) if self.hidden else (width, self.outputs)
    )
    named = zip(('target', 'predictor'), jax.random.split(key))
    return {name: layers(one, *sizes) for name, one in named}

  def both(self, params: Params, states: Array) -> tuple[Array, Array]:
    """f and m of the states, [B, T, outputs] each."""
    state = jax.lax.stop_gradient(states[0].astype(jnp.float32))
    run = mlp if self.hidden else lambda params, x: x @ params['0']['weight']
    return run(params['predictor'], state), run(params['target'], state)

  def learns(self, batch: Batch) -> Array:
    if self.states == 'each':
      return batch.mask
    later = jnp.cumsum(batch.mask[:, ::-1], axis=1)[:, ::-1]
    return batch.mask & (later == 1)

  def errors(self, params: Params, states: Array, batch: Batch) -> Array:
    prediction, mean = self.both(params, states)
    draw = lambda key: jax.random.normal(jax.random.fold_in(key, LEARNING), mean.shape[1:])
    noise = jax.vmap(draw)(row_keys(batch['uniform']))
    return auxiliary_rewards.distilled_error(prediction, mean, noise, sigma=self.sigma)

  def scores(self, params: Params, states: Array, batch: Batch) -> Array:
    bonus = auxiliary_rewards.distilled_bonus(*self.both(params, states))
    return jnp.where(self.learns(batch), bonus, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Critics(Network):
  """Critics at several discounts, whose scores are weights of the policy's log-probs (AMAGO,
  arXiv:2310.09971).

      V     = a critic's value of the state before the token
      Q     = r + discount V of the state before the next token;  at the last token Q = r
      y     = the smaller Q of two random target critics
      loss  = mean over critics and discounts of (V - y)^2, in normalised units
      score = mean over discounts of improve (min over critics of Q - mean of V) + imitate f(A),
              A = mean over critics of Q - V

  All numbers of the score are in normalised units too: divided by the deviation of the targets at that
  discount, as `losses.discounted_values.PopArt` keeps it. A state is followed by exactly one other for
  every token, so a critic of states gives Q, and its V is the mean over the tokens of the policy that
  drew the rows. Target critics are moving averages, from which no gradient is taken.

  The reward of the row is given at its last token. Rows that are not valid are not learned, and a token
  without a state before it has the score 0.

  Attributes:
    layers: which layer of the model is read, one fraction of its depth; 1 is the normalised last state.
    discounts: per token, in [0, 1].
    critics: number of critics.
    hidden: width of the two hidden layers; 0: a critic is one matrix, so that with one-hot states it is
      a table.
    follow: rate at which target critics follow, per update.
    normalize: rate of the statistics of targets, per update; 0: values are not normalised.
    improve: coefficient of the policy's own improvement by Q. With 0, targets are the mean of two
      critics in place of the minimum.
    imitate: coefficient of the likelihood of tokens that f selects.
    choose: f, advantages in normalised units -> weights.
  """

  layers: tuple = (1.0,)
  discounts: tuple = (0.1, 0.9, 0.95, 0.97, 0.99, 0.995, 0.999)
  critics: AtLeastOne = 4
  hidden: Count = 256
  follow: Fraction = 0.003
  normalize: Fraction = 5e-4
  improve: NotNegative = 1.0
  imitate: NotNegative = 0.1
  choose: valued.Part = valued.positive

  requires = frozenset({'uniform', 'rewards', 'valid'})
  fixed = frozenset({'target', 'popart'})

  def __post_init__(self):
    super().__post_init__()
    if len(self.layers) != 1:
      raise ValueError(f'Critics: layers={self.layers}: expected one fraction')
    inside = all(isinstance(x, int | float) and 0 <= x <= 1 for x in self.discounts)
    if not self.discounts or not inside:
      raise ValueError(f'Critics: discounts={self.discounts}: expected numbers in [0, 1]')

  def init(self, key: Array, width: int) -> Params:
    inside = (self.hidden, self.hidden) if self.hidden else ()
    make = lambda key: layers(key, width, *inside, len(self.discounts))
    critics = jax.vmap(make)(jax.random.split(key, self.critics))
    popart = valued.first_popart(len(self.discounts))
    return {'critics': critics, 'target': critics, 'popart': popart._asdict()}

  def before(self, critics: Params, states: Array, batch: Batch) -> tuple[Array, Array]:
    """(x, where): what the critics give before each token, [C, B, T, G], and where there is a state."""
    states = jax.lax.stop_gradient(states[0].astype(jnp.float32))
    there = batch.segment_ids > 0
    state, where = auxiliary_rewards.neighbours(states, there, side='before')
    return jax.vmap(mlp, (0, None))(critics, state), where

  def chosen(self, popart: valued.PopArt, x: Array, batch: Batch) -> Array:
    """Values of chosen tokens, [C, B, T, G], in units of the reward."""
    return valued.one_step(batch['rewards'], popart.values(x), batch.mask, discounts=self.discounts)

  def targets(self, params: Params, states: Array, batch: Batch) -> Array:
    """y, [B, T, G], in units of the reward. No gradient."""
    popart = valued.PopArt(**params['popart'])
    x, _ = self.before(params['target'], states, batch)
    values = self.chosen(popart, x, batch)
    count, _, length, discounts = values.shape
    # Which two critics make the target of a token and a discount; one may be drawn twice.
    draw = lambda key: jax.random.randint(
      jax.random.fold_in(key, LEARNING), (2, length, discounts), 0, count
    )
    pair = jnp.moveaxis(jax.vmap(draw)(row_keys(batch['uniform'])), 1, 0)
    two = jnp.take_along_axis(values, pair, axis=0)
    combined = jnp.min(two, axis=0) if self.improve else jnp.mean(two, axis=0)
    return jax.lax.stop_gradient(combined)

  def learns(self, batch: Batch) -> Array:
    there = batch.segment_ids > 0
    _, where = auxiliary_rewards.neighbours(there[..., None], there, side='before')
    return where & batch.mask & batch['valid'][:, None]

  def moments(self, params: Params, states: Array, batch: Batch) -> dict[str, Mean]:
    targets, where = self.targets(params, states, batch), self.learns(batch)
    total = lambda x: jnp.sum(jnp.where(where[..., None], x, 0), axis=(0, 1))
    count = jnp.sum(where, dtype=jnp.float32)
    numbers = {'mean': targets, 'square': jnp.square(targets)}
    return {name: Mean(total=total(x), count=count) for name, x in numbers.items()}

  def renewed(self, params: Params, moments: dict[str, Array]) -> Params:
    popart = valued.moved(valued.PopArt(**params['popart']), **moments, rate=self.normalize)
    near = lambda old, new: old + self.follow * (new - old)
    target = jax.tree.map(near, params['target'], params['critics'])
    return params | {'target': target, 'popart': popart._asdict()}

  def errors(self, params: Params, states: Array, batch: Batch) -> Array:
    popart = valued.PopArt(**params['popart'])
    x, _ = self.before(params['critics'], states, batch)
    gap = popart.output(x) - popart.normalized(self.targets(params, states, batch))[None]
    return jnp.mean(jnp.square(gap), axis=(0, -1))

  def scores(self, params: Params, states: Array, batch: Batch) -> Array:
    popart = valued.PopArt(**params['popart'])
    x, where = self.before(params['critics'], states, batch)
    value = jnp.mean(popart.values(x), axis=0)
    chosen = self.chosen(popart, x, batch)
    least = popart.scaled(jnp.min(chosen, axis=0) - value)
    advantages = popart.scaled(jnp.mean(chosen, axis=0) - value)
    score = self.improve * least + self.imitate * self.choose(advantages)
    return jnp.where(where & batch.mask, jnp.mean(score, axis=-1), 0)


TABLE = table('networks', Flow, RandomTargets, Critics)
Part = Annotated[Network, TABLE]
