from polgrad.data import sources
from polgrad.registry import part, weighted
from polgrad.rewards import verifiers
from polgrad.tasks.base import Task


def mixed_sums(*, digits: int = 3, problems: int = 1000) -> Task:
  """Sums of two numbers of one to `digits` digits; the number of digits is the `category` of a record.

  The categories differ in difficulty, so curricula have something to choose (docs/curricula.md). One
  problem in ten of every category is held out.

  Args:
    digits: of the longest numbers.
    problems: to train on, of every category; of one digit there are 90.
  """
  sums = lambda split: part(
    sources.mixture,
    sources={
      f'digits_{n}': part(sources.arithmetic, digits=n, split=split) for n in range(1, digits + 1)
    },
    most=problems,
  )
  prompt_length = 2 * digits + 2
  return Task(
    problems=sums('train'),
    demonstrations=sums('train'),
    held_out=sums('heldout'),
    rewards={'exact': weighted(1.0, part(verifiers.exact_match))},
    system='You are a calculator. Reply with the number only.',
    alphabet='0123456789+=',
    prompt_length=prompt_length,
    max_new_tokens=digits + 3,
    length=prompt_length + digits + 4,
    rows=256,
    demonstration_rows=64,
    steps=150,
    held_out_problems=400,
    evaluation_batch=400,
  )
