"""How much of the record's answer a completion begins with, where a collector reveals some of it.

A function of `TABLE` fills the slot `beginning` of `collect.Rollouts`. It gives the number of tokens.
All samples of a prompt begin with the same tokens. The stop token of an answer is never given.
"""

from collections.abc import Callable
from typing import Annotated

import numpy as np

from polgrad.data import chunks
from polgrad.registry import AtLeastOne, Fraction, table


def nothing(length: int, random: np.random.Generator, step: int) -> int:
  """0: completions are sampled whole (standard).

  Args:
    length: tokens of the answer without its stop token.
    random: of the step.
    step: batches that the phase collected before.
  """
  del length, random, step
  return 0


def uniform(
  length: int, random: np.random.Generator, step: int, *, probability: Fraction = 1.0
) -> int:
  """With some probability a uniform number in 1..length, else 0: DR-PO (arXiv:2404.08495).

  Args:
    length: tokens of the answer without its stop token; 0 gives 0.
    random: of the step; two numbers are drawn of it.
    step: batches that the phase collected before; it is not read.
    probability: that a completion begins with tokens of the answer.
  """
  del step
  begins, number = random.random() < probability, random.random()
  return 1 + int(number * length) if begins and length else 0


def annealed_chunks(
  length: int,
  random: np.random.Generator,
  step: int,
  *,
  low: Fraction = 0.05,
  high: Fraction = 0.95,
  steps: AtLeastOne = 300,
  chunks_at_most: AtLeastOne = 5,
) -> int:
  """A binomial number of chunks of the answer, fewer as the run proceeds: UFT (arXiv:2505.16984).

  The answer is cut into n <= `chunks_at_most` chunks of nearly equal length, and the first k of them are
  given, with k ~ Binomial(n, p). p follows half a cosine from `high` to `low`, see `chance`.

  Args:
    length: tokens of the answer without its stop token.
    random: of the step; one number is drawn of it.
    step: batches that the phase collected before.
    low: p at the end of the schedule.
    high: p at its beginning.
    steps: batches after which nothing is given any more.
    chunks_at_most: n, unless the answer has fewer tokens.
  """
  pieces = chunks.equal(length, most=chunks_at_most)
  given = random.binomial(len(pieces), chance(step + 1, low=low, high=high, steps=steps))
  return pieces[given - 1].stop if given else 0


def staged_chunks(
  length: int,
  random: np.random.Generator,
  step: int,
  *,
  steps: AtLeastOne = 300,
  chunks_at_most: AtLeastOne = 5,
) -> int:
  """One chunk of the answer less after each of n + 1 equal stages: `stage` of UFT (arXiv:2505.16984).

  The answer is cut into n <= `chunks_at_most` chunks of nearly equal length. Batch s, from 1, gives the
  first n - s // max(steps // (n + 1), 1) of them, at least 0, and none after batch `steps`.

  Args:
    length: tokens of the answer without its stop token.
    random: of the step; it is not read.
    step: batches that the phase collected before.
    steps: batches after which nothing is given any more.
    chunks_at_most: n, unless the answer has fewer tokens.
  """
  del random
  pieces, number = chunks.equal(length, most=chunks_at_most), step + 1
  stage = number // max(steps // (len(pieces) + 1), 1)
  given = 0 if number > steps else max(len(pieces) - stage, 0)
  return pieces[given - 1].stop if given else 0


def uniform_chunks(
  length: int, random: np.random.Generator, step: int, *, chunks_at_most: AtLeastOne = 5
) -> int:
  """A uniform number of chunks of the answer, in every batch: R3 (arXiv:2402.05808) as in UFT's code.

  The answer is cut into n <= `chunks_at_most` chunks of nearly equal length, and the first k of them are
  given, with k uniform in 0..n.

  Args:
    length: tokens of the answer without its stop token.
    random: of the step; one number is drawn of it.
    step: batches that the phase collected before; it is not read.
    chunks_at_most: n, unless the answer has fewer tokens.
  """
  del step
  pieces = chunks.equal(length, most=chunks_at_most)
  given = int(random.integers(len(pieces) + 1))
  return pieces[given - 1].stop if given else 0


def chance(number: int, *, low: float, high: float, steps: int) -> float:
  """low + (high - low) (1 + cos(pi number / steps)) / 2 up to batch `steps`, and 0 after it.

  Args:
    number: of the batch, from 1.
  """
  if number > steps:
    return 0.0
  return low + 0.5 * (high - low) * (1 + np.cos(np.pi * number / steps))


TABLE = table('beginnings', nothing, uniform, annealed_chunks, staged_chunks, uniform_chunks)
Part = Annotated[Callable, TABLE]
