from typing import Annotated

from polgrad.data import sources
from polgrad.registry import Range, part
from polgrad.tasks.base import Task


def same_sums(*, digits: Annotated[int, Range(at_least=1, at_most=4)] = 2) -> Task:
  """Sums that should have close embeddings if their results are equal, `12+34=` and `17+29=`.

  Every record has a `query` with the same result and `negatives` with other results, for the method
  `grace`. There is no verifier. One problem in ten is held out.
  """
  sums = part(sources.same_sums, source=part(sources.arithmetic, digits=digits))
  prompt_length = 2 * digits + 2
  return Task(
    problems=sums,
    demonstrations=sums,
    system='You are a calculator. Reply with the number only.',
    alphabet='0123456789+=',
    prompt_length=prompt_length,
    max_new_tokens=digits + 3,
    length=prompt_length + digits + 4,
    rows=64,
    demonstration_rows=64,
    steps=100,
  )
