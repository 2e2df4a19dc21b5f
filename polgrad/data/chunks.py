"""Chunks of a completion: consecutive pieces of its tokens, some of which a collector may reveal."""

from collections.abc import Sequence

import numpy as np


def equal(length: int, *, most: int) -> list[slice]:
  """At most `most` chunks whose lengths differ by at most one token, the longer ones first.

  A completion with fewer tokens than `most` has chunks of one token. An empty one has none.

  >>> equal(7, most=3)
  [slice(0, 3, None), slice(3, 5, None), slice(5, 7, None)]

  Raises:
    ValueError: `most` is below 1.
  """
  if most < 1:
    raise ValueError(f'most: expected at least 1 chunk, got {most}')
  number = min(most, length)
  if not number:
    return []
  short, longer = divmod(length, number)
  return _slices([short + 1] * longer + [short] * (number - longer))


def random(
  length: int, generator: np.random.Generator, *, shortest: int, longest: int
) -> list[slice]:
  """Chunks of uniformly drawn lengths in [shortest, longest]; the last one has what is left.

  Raises:
    ValueError: lengths that are not 1 <= shortest <= longest.
  """
  if not 1 <= shortest <= longest:
    raise ValueError(
      f'shortest and longest: expected 1 <= shortest <= longest, got {shortest} and {longest}'
    )
  sizes = []
  while (left := length - sum(sizes)) > 0:
    sizes.append(min(int(generator.integers(shortest, longest + 1)), left))
  return _slices(sizes)


def _slices(sizes: Sequence[int]) -> list[slice]:
  """Consecutive slices of these lengths."""
  ends = np.cumsum(sizes)
  return [slice(int(end - size), int(end)) for size, end in zip(sizes, ends)]
