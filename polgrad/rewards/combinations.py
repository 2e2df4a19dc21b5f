"""How the terms of a reward become one number: the slot `combine` of whatever is judged.

A function of `TABLE` has the arguments `components` f64[n, B], what each verifier said of each row, and
`weights` f64[n] of the terms. It returns f64[B]; NaN where the terms of a row have no such combination,
which makes the row invalid and is reported as a failure.
"""

from collections.abc import Callable
from typing import Annotated

import numpy as np

from polgrad.registry import table


def weighted_sum(components: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """sum_i w_i x_i, f64[n, B], f64[n] -> f64[B].

  >>> weighted_sum(np.array([[1.0, 0.5], [0.0, 1.0]]), np.array([1.0, 0.5]))
  array([1., 1.])
  """
  # One term after the other: the sum of a row does not depend on how many rows there are.
  return sum((w * x for w, x in zip(weights, components)), np.zeros(components.shape[1]))


def product(components: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """prod_i x_i^w_i, f64[n, B], f64[n] -> f64[B]: a row is good only if all of its scores are.

  STEER (arXiv:2311.07167) chooses completions by the product of style, similarity and fluency, each in
  [0, 1] and with the weight 1. A negative score has no product: the row is NaN. So is the row of a score
  of 0 with a negative weight.

  >>> product(np.array([[1.0, 0.5, -1.0], [0.5, 1.0, 1.0]]), np.array([1.0, 2.0]))
  array([0.25, 0.5 ,  nan])
  """
  fits = np.all((components > 0) | ((components == 0) & (weights[:, None] >= 0)), axis=0)
  powers = np.where(fits, components, 1.0) ** weights[:, None]
  return np.where(fits, np.prod(powers, axis=0), np.nan)


TABLE = table('combinations', weighted_sum, product)
Part = Annotated[Callable, TABLE]
