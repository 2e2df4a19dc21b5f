from polgrad import environments
from polgrad.data import sources
from polgrad.environments.adapters.textarena import OPPONENTS
from polgrad.registry import find, part
from polgrad.tasks.base import Task

HELD_OUT_SEED = 1_000_000  # of the first deal that is not trained on


def textarena(
  *,
  game: str,
  players: int = 0,
  opponent: str = 'itself',
  turns: int = 20,
  size: int = 1000,
  prompt_length: int = 512,
  max_new_tokens: int = 1024,
  turn_tokens: int = 64,
) -> Task:
  """A game of the package textarena by its name, such as `TicTacToe-v0`.

  Each record is a deal of the game. A game of several players is played by the policy against itself,
  which needs credit by player, such as `method=spiral`, or against another opponent.

  Args:
    game: its name; `environments.TextArena` says what is played how.
    players: number of players; 0: the least that the game takes.
    opponent: `itself`; `listed_move`, any move that the game lists; or `file.py:function`, your own.
    turns: that the policy may take.
    size: number of deals to train on.
    prompt_length: tokens of the beginning of the game.
    max_new_tokens: tokens of all turns and of what is read between them.
    turn_tokens: tokens of one turn.
  """
  return Task(
    problems=part(sources.seeds, size=size),
    held_out=part(sources.seeds, size=64, first=HELD_OUT_SEED),
    environment=part(
      environments.TextArena,
      game=game,
      players=players,
      opponent=part(find(opponent, OPPONENTS, 'opponent')),
      max_turns=turns,
    ),
    turn_tokens=turn_tokens,
    prompt_length=prompt_length,
    max_new_tokens=max_new_tokens,
    rows=32,
    evaluate_every=10,
    held_out_problems=32,
    evaluation_batch=32,
  )


def verifiers(
  *,
  load: str,
  options: dict = {},  # noqa: B006
  prompt_length: int = 512,
  max_new_tokens: int = 1024,
  turn_tokens: int = 256,
) -> Task:
  """An environment of the package verifiers, with its data, tools and rewards.

  Args:
    load: name of an installed package of an environment, or `file.py:function` for your own.
    options: arguments of its `load_environment`, or of your function.
    prompt_length: tokens of a prompt of its data set, without those of a chat template.
    max_new_tokens: tokens of all turns and of what is read between them.
    turn_tokens: tokens of one turn.
  """
  source = lambda split: part(sources.verifiers, load=load, options=dict(options), split=split)
  return Task(
    problems=source('train'),
    held_out=source('eval'),
    environment=part(environments.Verifiers, load=load, options=dict(options)),
    turn_tokens=turn_tokens,
    prompt_length=prompt_length,
    max_new_tokens=max_new_tokens,
    rows=32,
    evaluate_every=10,
    held_out_problems=32,
    evaluation_batch=32,
  )
