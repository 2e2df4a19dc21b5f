from polgrad import environments
from polgrad.data import sources
from polgrad.registry import part, weighted
from polgrad.rewards import verifiers
from polgrad.tasks.base import Task

ANSWER = 'End with the number alone.'


def calculator(
  *,
  digits: int = 3,
  calls: int = 2,
  form: str = 'inline',
  data_seed: int = 0,
) -> Task:
  """Word problems with a product that is too large to compute without the calculator.

  The policy may write a call, reads its result, and then answers with a number. Demonstrations are the
  right call as a first turn, and the right number after the result of a call; they are there in the form
  `inline` alone, in which a call is `<123*45>` and its result is put behind it: `<123*45>5535>`.

  Args:
    digits: digits of the numbers in a problem.
    calls: turns with calls, before the one that answers.
    form: of calls, `inline`, `described` or `template`, see `environments.Tools`. Tiny models know
      `inline` alone; `template` is for models whose chat template has tools.
    data_seed: seed of the problems.
  """
  inline = form == 'inline'
  problems = part(sources.word_problems, digits=digits, seed=data_seed)
  turn = 3 * digits + 6 if inline else 64  # a call, or an answer
  result = 2 * digits + 4 if inline else 48
  return Task(
    problems=problems,
    demonstrations=part(sources.calls_and_answers, source=problems) if inline else None,
    held_out=part(sources.word_problems, digits=digits, seed=data_seed, split='heldout'),
    rewards={'right': weighted(1.0, part(verifiers.numeric_answer))},
    environment=part(environments.calculator, form=form, max_turns=calls + 1),
    turn_tokens=turn,
    observation_tokens=result,
    stop_strings=('>',) if inline else (),
    system=f'Solve the problem with the calculator. {ANSWER}',
    prompt_length=98 + 3 * digits + (0 if inline else 280),
    max_new_tokens=(calls + 1) * turn + calls * result,
    length=78 + 3 * digits + turn + result + turn,
    rows=128,
    demonstration_rows=32,
    steps=200,
    evaluate_every=20,
    held_out_problems=100,
    evaluation_batch=50,
  )
