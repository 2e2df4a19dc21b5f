from polgrad.data import sources
from polgrad.registry import part, weighted
from polgrad.rewards import verifiers
from polgrad.tasks.base import Task


def worked_sums(*, digits: int = 2) -> Task:
  """Sums of two numbers, `16+91=`, where a longer answer is right more often.

  The last number of an answer counts. A third of the demonstrations has the sum alone (`107`), a third
  the sum of every column first, with the carry (`:07 10 107`), and a third these sums in full
  (`:6+1+0=07:1+9+0=10 107`). A small model that has seen few of them is best at the last kind, so a
  method can trade accuracy for length (docs/curricula.md). One problem in ten is held out.
  """
  sums = part(sources.arithmetic, digits=digits)
  prompt_length, longest = 2 * digits + 2, 10 * digits + 4
  return Task(
    problems=sums,
    demonstrations=part(sources.worked_sums, source=sums),
    held_out=part(sources.arithmetic, digits=digits, split='heldout'),
    rewards={'exact': weighted(1.0, part(verifiers.numeric_answer))},
    alphabet='0123456789+=: ',
    prompt_length=prompt_length,
    max_new_tokens=longest,
    length=prompt_length + longest + 1,
    rows=256,
    demonstration_rows=64,
    steps=100,
    held_out_problems=400,
    evaluation_batch=400,
  )
