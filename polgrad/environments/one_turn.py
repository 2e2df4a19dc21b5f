"""The environment of ordinary tasks."""

import dataclasses
from collections.abc import Mapping

from polgrad.environments.base import Environment, Step


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneTurn(Environment):
  """An episode is one turn: nothing answers, and verifiers alone give the reward.

  It is what collectors have by default. They never call it: a row of one turn ends in the decode loop.
  """

  max_turns: int = 1

  def reset(self, record: Mapping, seed: int) -> None:
    """There is no state."""

  def step(self, state: None, text: str) -> Step:
    return Step(None, done=True)
