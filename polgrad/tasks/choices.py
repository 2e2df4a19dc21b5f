from polgrad.data import sources
from polgrad.registry import part, weighted
from polgrad.rewards import verifiers
from polgrad.tasks.base import Task


def choices(*, digits: int = 2, data_seed: int = 0) -> Task:
  """Sums of two numbers with four choices A to D, answered by a letter; one problem in ten is held out.

  Wrong choices differ from the sum in one digit. Pairs are the right letter against a wrong one;
  feedback has one of the two; a list is all letters.

  Args:
    digits: digits of the two numbers.
    data_seed: seed of the problems, of the choices and of what is held out.
  """
  questions = lambda split: part(
    sources.with_choices,
    source=part(sources.arithmetic, digits=digits, split=split, seed=data_seed),
    seed=data_seed,
  )
  prompt_length = (2 * digits + 2) + 4 * (digits + 4) + 8  # 8: the system turn in tokens of SmolLM2
  return Task(
    problems=questions('train'),
    demonstrations=questions('train'),
    pairs=questions('train'),
    feedback=part(sources.split_pairs, source=questions('train')),
    lists=questions('train'),
    held_out=questions('heldout'),
    rewards={'letter': weighted(1.0, part(verifiers.choice_letter))},
    system='Reply with the right letter only.',
    alphabet='0123456789+=ABCD \n',
    prompt_length=prompt_length,
    max_new_tokens=4,
    rows=64,
    demonstration_rows=32,
    steps=50,
    evaluate_every=10,
  )
