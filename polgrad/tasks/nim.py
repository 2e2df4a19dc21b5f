from polgrad import environments
from polgrad.data import sources
from polgrad.registry import part
from polgrad.tasks.base import Task


def nim(*, piles: int = 3, most: int = 3, opponent: str = 'self') -> Task:
  """The game of Nim, played by the policy against itself, and evaluated against perfect play.

  Who takes the last stone wins; `environments.Nim` has the rules and the form. In self-play a row is one
  whole game, so credit must be by turn and player. Evaluation begins in the positions that can be won,
  against a perfect opponent and with a reward of 1 for a game that is won: the accuracy is the rate of
  games in which no mistake was made. Demonstrations are all legal moves, good and bad: a model made from
  nothing learns the form of a move from them.

  Args:
    piles: number of piles.
    most: stones of the largest pile.
    opponent: 'self', 'random' or 'perfect', in training.
  """
  turns = piles * most
  game = lambda **settings: part(environments.Nim, max_turns=turns, **settings)
  return Task(
    problems=part(sources.nim_positions, piles=piles, most=most),
    demonstrations=part(sources.nim_moves, piles=piles, most=most),
    held_out=part(sources.nim_positions, piles=piles, most=most, winnable=True),
    environment=game(opponent=opponent),
    held_out_environment=game(opponent='perfect', loss=0.0),
    turn_tokens=3,
    system=(
      'A digit is a pile of stones. Take any number of stones from one pile: b2 takes two from the '
      'second. Who takes the last stone wins. Reply with your move only.'
    ),
    alphabet='0123456789abcde',
    prompt_length=piles,
    max_new_tokens=turns * (3 + piles),
    length=piles + 3,
    rows=256,
    demonstration_rows=64,
    steps=200,
    evaluate_every=20,
    held_out_problems=48,
    evaluation_batch=48,
  )
