from polgrad import environments
from polgrad.data import sources
from polgrad.registry import AtLeastOne, check_ranges, part
from polgrad.tasks.base import Task


def guess(*, highest: int = 20, guesses: AtLeastOne = 4) -> Task:
  """A number in a range such as `3-17:` is to be found; the policy reads `>` or `<` after each guess.

  The smallest task of several turns: its environment is `environments.Guess`, and demonstrations are the
  right number in the first turn. In a chat template the words are the same.

  Args:
    highest: largest number of a range.
    guesses: turns that the policy has.
  """
  check_ranges(guess, {'guesses': guesses})
  problems = part(sources.hidden_numbers, highest=highest)
  turn = len(str(highest)) + 1  # with the stop token
  return Task(
    problems=problems,
    demonstrations=problems,
    held_out=part(sources.hidden_numbers, highest=highest, split='heldout'),
    environment=part(environments.Guess, max_turns=guesses),
    turn_tokens=turn + 1,
    system=(
      'Guess a number in the range. Reply with the number only. > means that the number is larger, '
      'and < that it is smaller.'
    ),
    alphabet='0123456789-:<>',
    prompt_length=2 * turn + 1,
    max_new_tokens=guesses * (turn + 2),
    length=3 * turn + 1,
    rows=256,
    demonstration_rows=64,
    steps=100,
    evaluate_every=10,
    held_out_problems=20,
    evaluation_batch=20,
  )
