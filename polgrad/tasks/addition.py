from polgrad.data import sources
from polgrad.registry import part, weighted
from polgrad.rewards import verifiers
from polgrad.tasks.base import Task


def addition(*, digits: int = 2) -> Task:
  """Sums of two numbers, `12+34=`, with an exact answer; one problem in ten is held out.

  Pairs are the right sum against the sum with one digit changed; feedback has one of the two; a list is
  the right sum and three others. A transformer with 0.4 million parameters learns two digits in minutes
  on a CPU, so this is the task of the quickstart and of tests.
  """
  problems = part(sources.arithmetic, digits=digits)
  pairs = part(sources.wrong_digit_pairs, source=problems)
  prompt_length = 2 * digits + 2
  return Task(
    problems=problems,
    demonstrations=problems,
    pairs=pairs,
    feedback=part(sources.split_pairs, source=pairs),
    lists=part(sources.wrong_digit_lists, source=problems),
    held_out=part(sources.arithmetic, digits=digits, split='heldout'),
    rewards={'exact': weighted(1.0, part(verifiers.exact_match))},
    system='You are a calculator. Reply with the number only.',
    alphabet='0123456789+=',
    prompt_length=prompt_length,
    max_new_tokens=digits + 3,
    length=prompt_length + digits + 4,
    rows=256,
    demonstration_rows=64,
    pairs_per_batch=64,
    steps=150,
    held_out_problems=400,
    evaluation_batch=400,
  )
