"""A guessing game: the policy finds a number, and is told whether it is larger or smaller."""

import dataclasses
import random
import re
from collections.abc import Mapping
from typing import NamedTuple

from polgrad.environments.base import Environment, Step


class State(NamedTuple):
  """A game that is being played."""

  secret: int
  guesses: int  # that were made


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guess(Environment):
  """The policy guesses a number until it is right, or until its turns are used up.

  The number is the record's `answer`, or is drawn from `low` .. `high` by the seed if there is none. The
  last integer of a turn is its guess. The reward is 1 for the right number, and 0 for a wrong one; a
  turn without a number is counted as the metric `void`.
  """

  IN_PROCESS = True

  low: int = 0
  high: int = 9
  larger: str = '>'  # what the policy reads if the number is larger than its guess
  smaller: str = '<'

  def __post_init__(self):
    if self.low > self.high:
      raise ValueError(f'low: expected at most high, {self.high}, got {self.low}')

  def reset(self, record: Mapping, seed: int) -> State:
    secret = record.get('answer')
    drawn = random.Random(seed).randint(self.low, self.high)
    return State(drawn if secret is None else int(secret), 0)

  def step(self, state: State, text: str) -> Step:
    state = state._replace(guesses=state.guesses + 1)
    found = re.findall(r'-?\d{1,9}', text)
    metrics = {'void': float(not found)}
    guess = int(found[-1]) if found else state.secret - 1
    if found and guess == state.secret:
      return Step(state, reward=1.0, done=True, metrics=metrics)
    return Step(state, self.larger if guess < state.secret else self.smaller, metrics=metrics)
