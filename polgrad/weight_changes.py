"""Which weights a training run has changed: sparsity, rank and overlap of updates.

Reinforcement learning is reported to leave most weights of a model where they were, while its update
has nearly full rank. How many weights seem unchanged depends on the precision that they are stored and
compared in: a step below the distance of two bfloat16 numbers is rounded away if the weight itself is
kept in bfloat16, and is only hidden if a float32 copy is. So a fraction means little without both
precisions, and everything here says them.

Pure functions on NumPy arrays, one parameter at a time.
"""

from collections.abc import Iterable
from typing import NamedTuple

import ml_dtypes
import numpy as np

Array = np.ndarray
# Precisions that weights may be rounded to before they are compared; '' compares them as stored.
PRECISIONS = {
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
  'float16': np.dtype(np.float16),
  'float32': np.dtype(np.float32),
  '': None,
}
ATOL = 1e-5


class Change(NamedTuple):
  """How one parameter changed; `total` adds several."""

  entries: int
  unchanged: int  # in the precision of the comparison
  unchanged_as_stored: int
  rank: int  # of the update, 0 for a vector or if it was not computed
  full_rank: int  # min of its dimensions, 0 as above

  @property
  def sparsity(self) -> float:
    """Fraction of the entries that are unchanged, nan without entries."""
    return self.unchanged / self.entries if self.entries else float('nan')

  @property
  def relative_rank(self) -> float:
    """Rank of the update as a fraction of the full one, nan for vectors."""
    return self.rank / self.full_rank if self.full_rank else float('nan')


class Overlap(NamedTuple):
  """Sizes of the sets of entries that two runs changed; add them over parameters with `together`."""

  entries: int
  first: int
  second: int
  both: int

  def of_first(self) -> float:
    """o1: the fraction of what the first run changed that the second one changed too."""
    return self.both / self.first if self.first else float('nan')

  def of_second(self) -> float:
    """o2: the fraction of what the second run changed that the first one changed too."""
    return self.both / self.second if self.second else float('nan')

  def chance(self) -> tuple[float, float]:
    """What o1 and o2 would be if the sets were independent: the density of the other set."""
    return self.second / max(self.entries, 1), self.first / max(self.entries, 1)


def changed(
  before: Array, after: Array, *, atol: float = ATOL, precision: str = 'bfloat16'
) -> Array:
  """Entries with |after - before| > atol, both rounded to a precision first, bool.

  Not a number in one of them counts as changed.

  Args:
    before, after: of equal shapes, in the dtypes that they are stored in.
    atol: largest absolute difference of entries that count as unchanged.
    precision: a name of `PRECISIONS`.

  Raises:
    ValueError: the shapes differ, or no such precision.

  >>> before = np.array([1.0, 0.001], np.float32)
  >>> changed(before, before + 1e-4).tolist(), changed(before, before + 1e-4, precision='').tolist()
  ([False, True], [True, True])
  """
  if before.shape != after.shape:
    raise ValueError(f'the parameter has shape {before.shape} before and {after.shape} after')
  if precision not in PRECISIONS:
    raise ValueError(f'precision {precision!r}; valid: {list(PRECISIONS)}')
  to = PRECISIONS[precision]
  rounded = lambda x: (x if to is None else x.astype(to)).astype(np.float64)
  return ~(np.abs(rounded(after) - rounded(before)) <= atol)


def numerical_rank(update: Array) -> int:
  """The rank of a matrix [..., M, N] in float64; of several, the sum of their ranks.

  A singular value counts if it is above max(M, N) eps times the largest one.
  """
  return int(np.sum(np.linalg.matrix_rank(np.asarray(update, np.float64))))


def change(
  before: Array,
  after: Array,
  *,
  atol: float = ATOL,
  precision: str = 'bfloat16',
  rank: bool = True,
) -> Change:
  """How a parameter changed.

  Args:
    before, after, atol, precision: of `changed`.
    rank: compute the rank of the update, which costs a singular value decomposition of each matrix.
  """
  moved = changed(before, after, atol=atol, precision=precision)
  stored = changed(before, after, atol=atol, precision='')
  found = full = 0
  if rank and before.ndim >= 2:
    found = numerical_rank(after.astype(np.float64) - before.astype(np.float64))
    full = min(before.shape[-2:]) * int(np.prod(before.shape[:-2]))
  size = int(before.size)
  return Change(size, size - int(moved.sum()), size - int(stored.sum()), found, full)


def total(changes: Iterable[Change]) -> Change:
  """The sums over parameters; `relative_rank` is then that of all matrices together."""
  return Change(*(sum(column) for column in zip(Change(0, 0, 0, 0, 0), *changes)))


def overlap(first: Array, second: Array) -> Overlap:
  """How much two sets of changed entries have in common, bool arrays of equal shapes."""
  if first.shape != second.shape:
    raise ValueError(f'the sets have shapes {first.shape} and {second.shape}')
  both = int(np.sum(first & second))
  return Overlap(int(first.size), int(first.sum()), int(second.sum()), both)


def together(parts: Iterable[Overlap]) -> Overlap:
  """The sums over parameters."""
  return Overlap(*(sum(column) for column in zip(Overlap(0, 0, 0, 0), *parts)))
