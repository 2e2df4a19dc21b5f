"""All results of code that draws random numbers, with their probabilities.

Collectors and curricula choose rows by functions of a `numpy.random.Generator`. Where each draw has few
results, their expectations are finite sums: `outcomes` calls such a function once for every result of
its draws. Where a function adds Gumbel noise to logarithms of weights it does not show, `first_chances`
finds the weights from what it chooses.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

Array = np.ndarray
T = TypeVar('T')
CELLS = 40  # of a uniform number


class Choices:
  """Stands in for a `numpy.random.Generator`: it takes one path through the results of all draws.

  `choice`, `integers` and `binomial` have all their results. A uniform number in [low, high) has
  `CELLS` results, the middles of cells of equal size: that is exact for code that compares it with
  multiples of 1 / `CELLS` of the range. `permutation` has one result, the order that was there, and is
  exact where the rows that are ordered are exchangeable.
  """

  def __init__(self, path: list[int]):
    self.path = path  # number of the result of each draw; 0 for those beyond its end
    self.sizes: list[int] = []  # numbers of results
    self.chance = 1.0

  def choice(self, a, size: int | None = None, replace: bool = True, p: Array | None = None):
    """As in NumPy, for numbers below `a` or the elements of `a`."""
    values = np.arange(a) if np.ndim(a) == 0 else np.asarray(a)
    weights = np.full(len(values), 1 / len(values)) if p is None else np.array(p, np.float64)
    found = []
    for _ in range(1 if size is None else size):
      found.append(self._draw(weights / weights.sum()))
      if not replace:
        weights[found[-1]] = 0.0
    return values[found[0]] if size is None else values[np.array(found, int)]

  def integers(self, low: int, high: int) -> int:
    return low + self._draw(np.full(high - low, 1 / (high - low)))

  def binomial(self, n: int, p: float) -> int:
    chances = np.ones(1)
    for _ in range(n):
      chances = np.convolve(chances, [1 - p, p])
    return self._draw(chances)

  def uniform(self, low: float = 0.0, high: float = 1.0, size: int | None = None):
    cells = np.full(CELLS, 1 / CELLS)
    numbers = [self._draw(cells) for _ in range(1 if size is None else size)]
    found = low + (high - low) * (np.array(numbers) + 0.5) / CELLS
    return float(found[0]) if size is None else found

  def random(self, size: int | None = None):
    return self.uniform(size=size)

  def permutation(self, n: int) -> Array:
    return np.arange(n)

  def _draw(self, chances: Array) -> int:
    """A number by its chances; those of chance 0 are left out."""
    usable = np.flatnonzero(chances > 0)
    place = len(self.sizes)
    if place == len(self.path):
      self.path.append(0)
    self.sizes.append(len(usable))
    number = int(usable[self.path[place]])
    self.chance *= float(chances[number])
    return number


def outcomes(run: Callable[[Choices], T]) -> Iterator[tuple[float, T]]:
  """(probability, result) of a function of a random generator, for every result of its draws.

  Results are not merged, so equal ones may come several times.

  >>> sum(chance * number for chance, number in outcomes(lambda random: random.binomial(3, 0.25)))
  0.75
  """
  path: list[int] = []
  while True:
    random = Choices(path)
    result = run(random)
    yield random.chance, result
    while path and path[-1] + 1 == random.sizes[len(path) - 1]:
      path.pop()
    if not path:
      return
    path[-1] += 1


def first_chances(first: Callable[[Array], int], size: int) -> Array:
  """The probabilities f64[size] with which each row is the first, of draws by Gumbel noise.

  Such a draw takes the row with the largest log w_i + g_i, so P(i) = w_i / sum_j w_j. The weights are
  found by bisection: row i wins against row 0, with noise s and 0, exactly if s > log w_0 - log w_i.

  Args:
    first: noise f64[size] -> the row that is taken; -inf keeps a row out.
    size: number of rows.

  >>> weights = np.array([1.0, 2.0, 5.0])
  >>> print(first_chances(lambda noise: int(np.argmax(np.log(weights) + noise)), 3).round(6))
  [0.125 0.25  0.625]
  """
  logs = np.zeros(size)
  for row in range(1, size):
    low, high = -200.0, 200.0
    while high - low > 1e-12:
      middle = (low + high) / 2
      noise = np.full(size, -np.inf)
      noise[0], noise[row] = 0.0, middle
      low, high = (low, middle) if int(first(noise)) == row else (middle, high)
    logs[row] = -(low + high) / 2
  weights = np.exp(logs - logs.max())
  return weights / weights.sum()


def best_chances(beats: Callable[[float, float], bool], laws: Sequence, points: int = 200) -> Array:
  """The probabilities f64[size] of each row to have the best of the numbers that rows draw.

  There is one best number in (0, 1), and those on either side are worse the further away they are. So
  the numbers that beat x lie between x and another one, which bisection finds. Then P(i) is the mean of
  prod_(j != i) P(x_j does not beat x_i) over x_i, by Gauss-Legendre quadrature on both sides.

  Args:
    beats: (x, y) -> whether x is taken before y, both in (0, 1).
    laws: of the number of each row, with `pdf` and `cdf`, as those of scipy.stats.
    points: of the quadrature, on each side.

  >>> import scipy.stats
  >>> laws = [scipy.stats.beta(1, 1), scipy.stats.beta(1, 2)]
  >>> print(best_chances(lambda x, y: x * (1 - x) > y * (1 - y), laws).round(6))
  [0.5 0.5]
  """
  low, high = 0.0, 1.0
  while high - low > 1e-9:
    one, two = low + (high - low) / 3, high - (high - low) / 3
    low, high = (one, high) if beats(two, one) else (low, two)
  peak = (low + high) / 2

  def partner(x: float) -> float:
    """The number on the other side that is as good as x; the end of that side if all are better."""
    near, far = peak, float(x < peak)
    for _ in range(50):
      middle = (near + far) / 2
      near, far = (middle, far) if beats(middle, x) else (near, middle)
    return (near + far) / 2

  nodes, weights = np.polynomial.legendre.leggauss(points)
  chances = np.zeros(len(laws))
  for begin, end in ((0.0, peak), (peak, 1.0)):
    x = (begin + end) / 2 + (end - begin) / 2 * nodes
    y = np.array([partner(one) for one in x])
    worse = np.stack([1 - np.abs(law.cdf(x) - law.cdf(y)) for law in laws])
    for i, law in enumerate(laws):
      others = np.delete(worse, i, axis=0).prod(axis=0)
      chances[i] += (end - begin) / 2 * weights @ (law.pdf(x) * others)
  return chances
