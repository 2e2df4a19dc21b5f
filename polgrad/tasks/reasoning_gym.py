import dataclasses

from polgrad import environments
from polgrad.data import sources
from polgrad.registry import AtLeastOne, check_ranges, part, weighted
from polgrad.rewards import verifiers
from polgrad.tasks.base import Task

HELD_OUT_SEED = 1_000_000  # item i + 1 of a seed is item i of the next, so seeds must be far apart
BETWEEN = 32  # tokens between two turns: a sentence, and what a chat template writes around it
NUMBER = r'-?\d+'


def reasoning_gym(
  *,
  task: str,
  size: int = 2000,
  data_seed: int = 0,
  pattern: str = '<answer>(.*?)</answer>',
  system: str = 'Think, then give the answer alone in <answer></answer>.',
  prompt_length: int = 192,
  max_new_tokens: int = 192,
  tries: AtLeastOne = 1,
  try_discount: float = 1.0,
  options: dict = {},  # noqa: B006
) -> Task:
  """Any task of reasoning-gym (arXiv:2505.24760) by its name, judged by its own score.

  With `tries` above 1, a wrong answer is sent back and the policy answers again
  (`environments.Attempts`). The reward is the score of the last answer.

  Args:
    task: name of the task, for example `countdown`.
    size: number of problems to train on.
    data_seed: seed of the first problem.
    pattern: regular expression of the answer in a completion; the first group of the last match.
    system: system turn of a chat, which must ask for the form that `pattern` finds.
    max_new_tokens: tokens of an answer.
    tries: answers that the policy may give.
    try_discount: factor of the reward for each wrong answer before the last one.
    options: settings of the task itself, such as `min_terms`.
  """
  check_ranges(reasoning_gym, {'tries': tries})
  source = lambda seed, size: part(
    sources.reasoning_gym, task=task, size=size, seed=seed, options=dict(options)
  )
  problems = source(data_seed, size)
  score = part(verifiers.reasoning_gym_score, pattern=pattern)
  task = Task(
    problems=problems,
    demonstrations=problems,
    held_out=source(data_seed + HELD_OUT_SEED, 64),
    rewards={'score': weighted(1.0, score)},
    system=system,
    prompt_length=prompt_length,
    max_new_tokens=max_new_tokens,
    rows=32,
    demonstration_rows=16,
    temperature=0.7,
    steps=30,
    evaluate_every=10,
    held_out_problems=64,
    evaluation_batch=32,
  )
  if tries == 1:
    return task
  return dataclasses.replace(
    task,
    rewards={},
    environment=part(environments.Attempts, verifier=score, max_turns=tries, discount=try_discount),
    turn_tokens=max_new_tokens,
    max_new_tokens=tries * max_new_tokens + (tries - 1) * BETWEEN,
  )


def chain_sum(
  *,
  min_terms: int = 2,
  max_terms: int = 2,
  min_digits: int = 1,
  max_digits: int = 2,
  size: int = 2000,
  data_seed: int = 0,
) -> Task:
  """Sums and differences (reasoning-gym's `chain_sum`), answered by a number alone.

  Pairs are the right answer against the answer with one digit changed; feedback has one of the two; a
  list is the right answer and three others. One-digit problems are few, so some held-out problems also
  occur in training.
  """
  numbers = dict(
    min_terms=min_terms, max_terms=max_terms, min_digits=min_digits, max_digits=max_digits
  )
  base = reasoning_gym(
    task='chain_sum',
    size=size,
    data_seed=data_seed,
    pattern=NUMBER,
    system='You are a calculator. Reply with the number only.',
    prompt_length=22 + 6 * max_terms * max_digits // 4,
    max_new_tokens=6 + 2 * max_digits,
    options=numbers,
  )
  # Another seed: in a run with a supervised phase first, that phase saw the answers of `problems`.
  unseen = reasoning_gym(
    task='chain_sum', size=size, data_seed=data_seed + 100_000, options=numbers
  )
  pairs = part(sources.wrong_digit_pairs, source=unseen.problems)
  return dataclasses.replace(
    base,
    pairs=pairs,
    feedback=part(sources.split_pairs, source=pairs),
    lists=part(sources.wrong_digit_lists, source=unseen.problems),
    pairs_per_batch=8,
  )


def gym_names() -> tuple[str, ...]:
  """Names of all tasks of reasoning-gym; none if it is not installed."""
  try:
    from reasoning_gym.factory import DATASETS  # an optional dependency
  except ImportError:
    return ()
  return tuple(sorted(DATASETS))


def gym_settings(task: str) -> frozenset[str] | None:
  """Names of the settings of a task of reasoning-gym; None if there is no such task."""
  if task not in gym_names():
    return None
  from reasoning_gym.factory import DATASETS

  fields = dataclasses.fields(DATASETS[task][1])
  return frozenset(f.name for f in fields) - {'seed', 'size'}
