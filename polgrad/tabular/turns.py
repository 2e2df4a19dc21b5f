"""Environments of several turns with so few episodes that every expectation is a finite sum.

A turn is a few tokens of a tiny language. The environment answers it with a reward and an observation,
with known probabilities, and the policy reads the observation as one token before its next turn. An
episode is a sequence of `enumerable`, with the mask False at observations, so the logits, prefixes and
log-probabilities of that module work here.

Letters in shapes: `S` episodes, `H` tokens of the longest one.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from polgrad.tabular import enumerable
from polgrad.tabular.estimators import Setting
from polgrad.types import Array, Params

Turn = tuple[int, ...]
END = -1  # in the place of an observation: the episode is over
# (observation before the turn, turn) -> what may follow: probability, reward, next observation. The
# first turn has the observation 0, the prompt.
Answer = Callable[[int, Turn], Sequence[tuple[float, float, int]]]


class World(NamedTuple):
  """All episodes of an environment."""

  policy: enumerable.Policy  # tokens are 0 at observations, where the mask is False
  chance: np.ndarray  # f64[S], probability of what the environment answered, given the turns
  turn_rewards: np.ndarray  # f64[S, H], the reward of a turn at its last token
  observation_ids: np.ndarray  # i32[S, H], the observation before the turn; 0 outside the mask

  @property
  def rewards(self) -> np.ndarray:
    """f64[S], the sum of the rewards of the turns."""
    return self.turn_rewards.sum(axis=1)


def deterministic(observation: int, turn: Turn) -> Sequence[tuple[float, float, int]]:
  """Two turns of one or two tokens. What is right in the second depends on what the first one led to.

  Two first turns lead to the same observation; the one that is paid at once leads to the worse one.
  """
  if observation == 0:
    return {
      (0,): [(1.0, 0.2, 1)],
      (1, 0): [(1.0, 0.0, 2)],
      (1, 1): [(1.0, 0.0, 1)],
    }[turn]
  reward = {1: {(1, 0): 1.0}, 2: {(0,): 1.0, (1, 1): 0.5}}[observation].get(turn, 0.0)
  return [(1.0, reward, END)]


def stochastic(observation: int, turn: Turn) -> Sequence[tuple[float, float, int]]:
  """`deterministic`, but the shortest first turn ends the episode, and another one has two answers."""
  if observation == 0 and turn == (0,):
    return [(1.0, 0.5, END)]
  if observation == 0 and turn == (1, 1):
    return [(0.7, 0.0, 1), (0.3, 0.0, 2)]
  return deterministic(observation, turn)


def episodes(answer: Answer = deterministic, *, vocabulary: int = 2, length: int = 2) -> World:
  """All episodes of an environment, for a policy with a free logit for every token after every history.

  Args:
    answer: the environment; its episodes must end.
    vocabulary: number of tokens; token 0 ends a turn.
    length: the most tokens of a turn.
  """
  tokens, mask = enumerable.sequences(vocabulary, length, stop=0)
  turns = [tuple(row[where].tolist()) for row, where in zip(tokens, mask)]
  found = []

  # A history is a list of turns, each with the observation before it and its reward.
  def grow(history, observation, chance):
    for turn in turns:
      for probability, reward, following in answer(observation, turn):
        longer = [*history, (observation, turn, reward)]
        if following == END:
          found.append((longer, chance * probability))
        else:
          grow(longer, following, chance * probability)

  grow([], 0, 1.0)
  return _laid_out(found, vocabulary)


def _laid_out(found: list, vocabulary: int) -> World:
  """The arrays of episodes, each a history and its chance; one column for an observation."""
  width = max(sum(1 + len(turn) for _, turn, _ in history) - 1 for history, _ in found)
  shape = len(found), width
  tokens, prefixes, seen = (np.zeros(shape, np.int32) for _ in range(3))
  mask, rewards = np.zeros(shape, bool), np.zeros(shape)
  rows: dict[tuple, int] = {}
  for s, (history, _) in enumerate(found):
    column, read = 0, ()
    for observation, turn, reward in history:
      read += (('observation', observation),)
      for token in turn:
        mask[s, column], tokens[s, column], seen[s, column] = True, token, observation
        prefixes[s, column] = rows.setdefault(read, len(rows))
        read += (token,)
        column += 1
      rewards[s, column - 1] = reward
      column += 1  # of the next observation
  init = lambda key: jax.random.normal(key, (len(rows), vocabulary))
  policy = enumerable.Policy(tokens, mask, prefixes, init, logits=lambda params: params)
  return World(policy, np.array([chance for _, chance in found]), rewards, seen)


def objective(world: World, params: Params, x: Array | None = None) -> Array:
  """E[x], the mean over episodes, exactly; its gradient is the true policy gradient.

  Args:
    world: the episodes.
    params: of the policy.
    x: [S], by default the rewards of the episodes.
  """
  return enumerable.objective(
    world.policy, params, jnp.asarray(world.chance * (world.rewards if x is None else x))
  )


def probabilities(world: World, params: Params) -> np.ndarray:
  """The probability of every episode, f64[S]."""
  log_p = np.asarray(enumerable.logp(world.policy, params), np.float64).sum(axis=1)
  return world.chance * np.exp(log_p)


def values(world: World, params: Params) -> np.ndarray:
  """E[later rewards | what was read so far], before every token: f64[S, H], 0 outside the mask."""
  mask, prefixes = world.policy.mask, world.policy.prefixes
  future = np.cumsum(world.turn_rewards[:, ::-1], axis=1)[:, ::-1]
  weight = np.broadcast_to(probabilities(world, params)[:, None], mask.shape)
  total, reach = np.zeros(prefixes.max() + 1), np.zeros(prefixes.max() + 1)
  np.add.at(total, prefixes[mask], (weight * future)[mask])
  np.add.at(reach, prefixes[mask], weight[mask])
  return np.where(mask, (total / reach)[prefixes], 0.0)


def setting(world: World, params: Params) -> Setting:
  """The environment as `estimators` takes it: on-policy, with an exact critic; the reference is the
  policy."""
  logits = jnp.asarray(params)
  return Setting(
    policy=world.policy,
    rewards=world.rewards,
    params=logits,
    behavior=logits,
    anchors={'reference': logits},
    values=values(world, params),
    chance=world.chance,
    arrays={'turn_rewards': world.turn_rewards, 'observation_ids': world.observation_ids},
  )
