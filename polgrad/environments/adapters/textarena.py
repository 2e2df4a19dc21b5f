"""Games of the package textarena (arXiv:2504.11442): `pip install "polgrad[environments]"`."""

import contextlib
import dataclasses
import difflib
import io
import pickle
import random
import re
import threading
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import numpy as np

from polgrad.environments.base import Environment, Step
from polgrad.registry import Count, inputs, table, unbound

MISSING = 'textarena is not installed: pip install "polgrad[environments]"'
MOST_PLAYERS = 15
LISTED = re.compile(r"'(\[[^\]\n]+\])'")  # a move that a game lists, with its quotes
RANDOM = threading.Lock()  # games draw from the random numbers of the whole process


def listed_move(observation: str, seed: int) -> str:
  """One of the moves that the game lists as available, each with the same probability.

  >>> listed_move("Available Moves: '[3]', '[3]'", 0)
  '[3]'

  Raises:
    ValueError: the game lists none.
  """
  _, _, after = observation.lower().rpartition('available')
  found = LISTED.findall(observation[len(observation) - len(after) :])
  if not after or not found:
    raise ValueError(f'this game lists no available moves: {observation[-200:]!r}')
  return random.Random(seed).choice(found)


def itself(observation: str, seed: int) -> str:
  """The policy: it takes the turns of all players. This function is only its name."""
  raise RuntimeError('the policy takes these turns; nobody calls this')


OPPONENTS = table('textarena', itself, listed_move)
Opponent = Annotated[Callable[[str, int], str], OPPONENTS]


class Playing(NamedTuple):
  """A game that is being played."""

  game: bytes  # the object of textarena and the states of its random numbers
  seat: int | None  # player that the policy is; None: whoever is to move
  turns: int  # that the policy has taken
  seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextArena(Environment):
  """A game of textarena by its name, such as `TicTacToe-v0`.

  The record says which game is dealt: its `seed` (see `sources.seeds`) decides the board, the cards or
  the secret word. So all samples of a prompt play the same deal. What is drawn after that, such as dice,
  differs between samples.

  The policy reads what the game sends to its player since the last turn, without its own words, and of
  several boards the last. It does not need the wrappers with which textarena repeats the whole history.

  With the opponent `itself` a game of several players is played by the policy alone (self-play). It
  takes every turn, and each observation ends with whose turn it is. The final rewards go to the last
  turn of each player. All that any player was sent is in the one transcript, so a game with hidden cards
  is not hidden in self-play. With another opponent the policy has the seat `seed % players`.

  Rewards are those of textarena, -1, 0 or 1 in most games, at the end. A game that is not over after
  `max_turns` turns has none. Metric: `invalid`, whether the game refused the turn.

  Attributes:
    game: name of the game, without the suffix `-raw`.
    players: number of players; 0: the least that the game takes.
    opponent: takes the turns of all other players: `(observation, seed) -> text`; `itself`: self-play.
  """

  game: str
  players: Count = 0
  opponent: Opponent = itself
  max_turns: int = 20

  def __post_init__(self):
    if inputs(self.opponent) != ('observation', 'seed'):
      raise ValueError('opponent: expected a function of observation and seed')

  def prepare(self) -> None:
    with _quiet():
      _textarena()

  def opened(self, record: Mapping) -> dict:
    """The record with the beginning of the game as its user turn, behind the record's system turn."""
    with _quiet():
      _, text = self._begin(record)
    kept = [turn for turn in record.get('messages', ()) if turn['role'] == 'system']
    fields = {name: value for name, value in record.items() if name != 'prompt'}
    return {**fields, 'messages': [*kept, {'role': 'user', 'content': text}]}

  def reset(self, record: Mapping, seed: int) -> Playing:
    with _quiet():
      game, _ = self._begin(record)
      noise = f'{record["seed"]} {seed}'
      random.seed(noise)
      np.random.seed(random.getrandbits(32))  # noqa: NPY002
      return Playing(_pack(game), self._seat(game, record), 0, random.getrandbits(32))

  def step(self, state: Playing, text: str) -> Step:
    with _quiet():
      game = _unpack(state.game)
      player = game.state.current_player_id
      game.step(text)
      metrics = {'invalid': float(_refused(game, player))}
      turns = state.turns + 1
      if state.seat is not None:
        self._opponents_move(game, state.seat, state.seed + turns)
      if game.state.done:
        rewards = dict(game.close()[0])
        mine = float(rewards.pop(player))
        others = {k: float(v) for k, v in rewards.items()} if state.seat is None else {}
        return Step(state, '', mine, True, metrics, player, others)
      observation = _read(game, state.seat)
      state = Playing(_pack(game), state.seat, turns, state.seed)
    return Step(state, observation, metrics=metrics, player=player)

  def _begin(self, record: Mapping) -> tuple[Any, str]:
    """The game of a record, in which the policy is to move, and what the policy reads first."""
    deal = int(record['seed'])
    game = make(self.game, self.players, deal)
    seat = self._seat(game, record)
    if seat is not None:
      self._opponents_move(game, seat, deal)
    if game.state.done:
      raise ValueError(f'{self.game}: the game with seed {deal} is over before the policy moves')
    return game, _read(game, seat)

  def _seat(self, game: Any, record: Mapping) -> int | None:
    players = game.state.num_players
    return (
      None if players > 1 and unbound(self.opponent) is itself else int(record['seed']) % players
    )

  def _opponents_move(self, game: Any, seat: int, seed: int) -> None:
    """Plays until the policy is to move or the game is over."""
    while not game.state.done and game.state.current_player_id != seat:
      observation = _read(game, game.state.current_player_id)
      game.step(self.opponent(observation, seed + 1000 * game.state.turn))


def make(name: str, players: int, seed: int) -> Any:
  """A game of textarena after its reset.

  Raises:
    ImportError: textarena is not installed.
    ValueError: there is no such game, it cannot be played here (some want to download words or to ask a
      model), or not by this number of players.
  """
  textarena = _textarena()
  registered = textarena.envs.registration.ENV_REGISTRY
  names = sorted(n.removesuffix('-raw') for n in registered if n.endswith('-raw'))
  if name not in names:
    near = difflib.get_close_matches(name, names, 5)
    raise ValueError(f'game {name!r}: textarena has no such game; near: {near}')
  reasons = []
  for number in [players] if players else range(1, MOST_PLAYERS + 1):
    try:
      game = textarena.make(f'{name}-raw')
      game.reset(num_players=number, seed=seed)
    except (
      Exception
    ) as error:  # whatever a game raises at a number of players that it does not take
      reasons.append(' '.join(f'{type(error).__name__}: {error}'.split())[:200])
      continue
    if game.state.num_players == number:
      return game
  raise ValueError(
    f'game {name!r} cannot be played by {players or "any number of"} players: {reasons[0]}'
  )


def _textarena() -> Any:
  try:
    import textarena
    import textarena.envs.registration
  except ImportError as error:
    raise ImportError(MISSING) from error
  return textarena


def _refused(game: Any, player: int) -> bool:
  """Whether the game did not take the last turn of a player."""
  allowance = getattr(game.state, 'error_count', 0) > 0 and game.state.current_player_id == player
  return bool(game.state.game_info[player].get('invalid_move')) or allowance


def _read(game: Any, seat: int | None) -> str:
  """What the player to move has been sent since its last turn, as one text."""
  from textarena import ObservationType

  player, messages = game.get_observation()
  policy = range(game.state.num_players) if seat is None else (seat,)
  if seat is None:  # other players were sent the same: the transcript has it
    for waiting in game.state.observations.values():
      for message in messages:
        if message in waiting:
          waiting.remove(message)
  boards = [i for i, m in enumerate(messages) if m[2] == ObservationType.GAME_BOARD]
  lines = []
  for i, (sender, text, kind) in enumerate(messages):
    own = kind == ObservationType.PLAYER_ACTION and sender in policy
    if not own and not (kind == ObservationType.GAME_BOARD and i != boards[-1]):
      lines.append(text.strip() if sender < 0 else f'Player {sender}: {text.strip()}')
  if seat is None:
    lines.append(f'Player {player} is to move.')
  return '\n'.join(lines) or 'It is your turn.'


@contextlib.contextmanager
def _quiet():
  """Games print, and draw from the random numbers of the process: both are kept from the others."""
  with RANDOM, contextlib.redirect_stdout(io.StringIO()):
    kept = _noise()
    try:
      yield
    finally:
      _set_noise(kept)


def _pack(game: Any) -> bytes:
  return pickle.dumps((game, _noise()))


def _unpack(packed: bytes) -> Any:
  game, noise = pickle.loads(packed)
  _set_noise(noise)
  return game


def _noise() -> tuple:
  """The states of the random numbers that games draw from: there are no others that they would use."""
  return random.getstate(), np.random.get_state()  # noqa: NPY002


def _set_noise(noise: tuple) -> None:
  random.setstate(noise[0])
  np.random.set_state(noise[1])  # noqa: NPY002
