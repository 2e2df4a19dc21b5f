"""Nim, a game of two players whose perfect strategy is known, so self-play can be measured exactly."""

import dataclasses
import functools
import operator
import random
import re
import string
from collections.abc import Mapping
from typing import NamedTuple

from polgrad.environments.base import Environment, Step

OPPONENTS = ('self', 'random', 'perfect')
MOVE = re.compile(r'([a-z])\s*(\d+)')


class Game(NamedTuple):
  """A position, and what the moves of an opponent depend on."""

  piles: tuple[int, ...]
  turns: int  # turns that the policy has taken
  seed: int


def nim_sum(piles) -> int:
  """The exclusive or of the piles: 0 where the player to move loses against perfect play.

  >>> nim_sum((1, 2, 3)), nim_sum((3, 3, 1))
  (0, 1)
  """
  return functools.reduce(operator.xor, piles, 0)


def moves(piles) -> list[tuple[int, int]]:
  """All moves (pile, stones that are taken).

  >>> moves((2, 0, 1))
  [(0, 1), (0, 2), (2, 1)]
  """
  return [(i, n) for i, pile in enumerate(piles) for n in range(1, pile + 1)]


def best_moves(piles) -> list[tuple[int, int]]:
  """The moves after which the other player loses against perfect play; none in a lost position.

  >>> best_moves((3, 2, 0))
  [(0, 1)]
  """
  return [move for move in moves(piles) if nim_sum(after(piles, move)) == 0]


def after(piles, move) -> tuple[int, ...]:
  """The piles after a move.

  >>> after((3, 2, 0), (0, 1))
  (2, 2, 0)
  """
  pile, taken = move
  return (*piles[:pile], piles[pile] - taken, *piles[pile + 1 :])


def shown(piles) -> str:
  """The position as the policy reads it, one digit a pile.

  >>> shown((3, 2, 0))
  '320'
  """
  return ''.join(map(str, piles))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nim(Environment):
  """Nim: a player takes stones from one pile; who takes the last stone of all wins.

  A position is written as one digit a pile, `332`; a move as a letter and a number, `b2`, two stones
  from the second pile. The first match in the text counts. A record has the first position as `piles`, a
  list, and in its prompt. What the policy reads is always the position in which it moves, so a policy
  that has learned against itself plays against others unchanged.

  With opponent='self' the policy takes every turn, for player 0 and player 1 alternately, and the row
  is the transcript of the game. The winner's last turn gets the reward `win` and the loser's last turn
  the reward `loss`. The sum over such a row does not depend on how well it was played, so credit must be
  by turn and player. Other opponents move inside the environment, after the policy, and their reward is
  not the policy's concern.

  An illegal move ends the game: its player gets `loss` and the other one 0.

  Metrics: `illegal`, by turn; `best`, in turns where a winning move exists: whether it was found; `won`,
  in the last turn against an opponent.

  Attributes:
    opponent: 'self', 'random' (any legal move) or 'perfect' (a winning move if there is one, else any).
    win: reward of the winner.
    loss: reward of the loser. With 0, the mean reward against an opponent is the rate of games won.
  """

  IN_PROCESS = True

  opponent: str = 'self'
  win: float = 1.0
  loss: float = -1.0
  max_turns: int = 27

  def __post_init__(self):
    if self.opponent not in OPPONENTS:
      raise ValueError(f'opponent {self.opponent!r}; valid: {list(OPPONENTS)}')

  def reset(self, record: Mapping, seed: int) -> Game:
    piles = tuple(record['piles'])
    if not any(piles) or not all(isinstance(n, int) and 0 <= n <= 9 for n in piles):
      raise ValueError(f'piles {piles}: expected numbers from 0 to 9, not all 0')
    return Game(piles, 0, seed)

  def step(self, state: Game, text: str) -> Step:
    piles, turns, seed = state
    player = turns % 2 if self.opponent == 'self' else 0
    ends = functools.partial(self._end, state, player)
    move = _read(text)
    if move not in moves(piles):
      return ends(self.loss, 0.0, {'illegal': 1.0})
    best = best_moves(piles)
    metrics = {'illegal': 0.0} | ({'best': float(move in best)} if best else {})
    piles = after(piles, move)
    if not any(piles):
      return ends(self.win, self.loss, metrics)
    if self.opponent != 'self':
      piles = after(piles, self._answer(piles, turns, seed))
      if not any(piles):
        return ends(self.loss, self.win, metrics)
    return Step(Game(piles, turns + 1, seed), shown(piles), metrics=metrics, player=player)

  def _answer(self, piles, turns: int, seed: int):
    """The opponent's move; the same for the same seed and number of turns."""
    best = best_moves(piles) if self.opponent == 'perfect' else []
    return random.Random(f'{seed} {turns}').choice(best or moves(piles))

  def _end(self, state, player, reward, of_other, metrics):
    if self.opponent == 'self':
      others = {1 - player: of_other}
    else:
      others, metrics = {}, metrics | {'won': float(reward == self.win)}
    return Step(state, '', reward, True, metrics, player, others)


def _read(text: str) -> tuple[int, int] | None:
  found = MOVE.search(text.lower())
  return found and (string.ascii_lowercase.index(found[1]), int(found[2]))
