"""Two interfaces: `Environment`, and `Replies`, by which the sampler gets answers to its turns."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

from polgrad.registry import AtLeastOne


class Step(NamedTuple):
  """What an environment answers to a turn of the policy."""

  state: Any  # the next state
  # What the policy reads before its next turn: a text, which becomes a user turn, or messages as in
  # records, such as {'role': 'tool', 'content': '4'}. It is not read if the episode is over.
  observation: str | Sequence[Mapping] = ''
  reward: float = 0.0  # of this turn; the reward of a row is the sum over its turns
  done: bool = False  # whether the episode is over
  metrics: Mapping[str, float] = {}  # numbers of this turn by name, such as {'tool_errors': 1.0}
  # In a game that the policy plays against itself: who took this turn, and the rewards of other players,
  # each by its number. They are added to the last turn that this player took, if there was one. So the
  # player who has lost learns it although the other one moved last.
  player: int = 0
  others: Mapping[int, float] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Environment(abc.ABC):
  """Answers the turns of the policy; a frozen dataclass whose fields are its settings.

  It holds no state of an episode: `reset` makes one, and `step` returns the next one. So an episode can
  be continued in another process, or twice from the same place. States are picklable, except where the
  environment runs in the process of the trainer.
  """

  # Whether it is quick, starts nothing and evaluates nothing, so that it needs no process for itself.
  IN_PROCESS: ClassVar[bool] = False

  # Turns that the policy may take; an episode that is not done by then ends.
  max_turns: AtLeastOne = 8
  # Whether it answers turns at all; `OneTurn` does not.
  answers: ClassVar[bool] = True

  @property
  def roles(self) -> tuple[str, ...]:
    """The roles of its messages; a chat template that refuses one of them is refused before a run."""
    return ('user',)

  def prepare(self) -> None:  # noqa: B027  (most have nothing to do)
    """Imports libraries and reads files: called once in each process, before the first call is timed.

    An error ends the run.
    """

  def opened(self, record: Mapping) -> dict:
    """The record that the first prompt is made of, for example with tools or a system turn added."""
    return dict(record)

  @abc.abstractmethod
  def reset(self, record: Mapping, seed: int) -> Any:
    """The state in which an episode begins.

    Args:
      record: a record of the data.
      seed: differs between the samples of a prompt and between steps, for what is random.
    """

  @abc.abstractmethod
  def step(self, state: Any, text: str) -> Step:
    """The answer to a turn.

    Args:
      text: what the policy said in this turn, without the stop token.
    """


class Replies(Protocol):
  """Where the sampler gets the tokens from that a row reads after each turn.

  Rows are numbered 0 .. B - 1, prompt-major. The sampler asks when a turn has ended, and decodes other
  rows until the reply is there.
  """

  def ask(self, row: int, ids: Sequence[int], ended: bool) -> None:
    """Hands in a turn.

    Args:
      ids: the tokens drawn in this turn, stop token included.
      ended: whether a stop token or a stop string ended it, and not a budget.
    """

  def take(self, wait: bool) -> list[tuple[int, list[int] | None]]:
    """The replies that have come since the last call, each a row with the tokens to append to it.

    The tokens are those between the turn and the next one: what the chat template writes after a turn
    (the stop token itself where the policy did not draw it), the observation, and the beginning of the
    next assistant turn. They are at least one. None instead of tokens ends the row.

    Args:
      wait: whether to wait until there is at least one reply; some row is being answered then.
    """
