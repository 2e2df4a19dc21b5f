"""Comparisons of the preference pairs of a whole batch, such as ranks.

A function of `TABLE` fills one of the `selections` of `objectives.Pairwise`; shapes, offsets and weights
read the result by its name in the configuration. It is evaluated once per update on the whole minibatch,
before that is split into micro-batches, and no gradient flows through it. It returns one number a pair,
[B / 2], which its readers get as [B], the same in both rows; any other shape is one value of the whole
batch. Pairs of which a row has no tokens (`pairs.complete` is False) should have no say.
"""

from collections.abc import Callable
from typing import Annotated

import jax.numpy as jnp

from polgrad.losses import pairs
from polgrad.registry import Fraction, table
from polgrad.types import Array


def largest_gaps(gap: Array, mask: Array, *, fraction: Fraction = 0.7) -> Array:
  """1 for the given fraction of the pairs with the largest score differences, 0 for the others: SeRA
  (arXiv:2410.09362).

  Args:
    gap: [B], score of the preferred row less that of the other, the same in both rows of a pair.
    mask: bool[B, T]. A pair of which a row has no tokens is not selected and not counted.
    fraction: of the pairs; their number is rounded up. Of equal gaps the first pairs are selected.

  Returns:
    f32[B / 2], 0 or 1.
  """
  where = pairs.complete(mask)
  order = jnp.argsort(jnp.where(where, -pairs.first(gap), jnp.inf), stable=True)
  rank = jnp.zeros(len(order), jnp.int32).at[order].set(jnp.arange(len(order)))
  return (where & (rank < jnp.ceil(fraction * jnp.sum(where)))).astype(jnp.float32)


TABLE = table('pair_selections', largest_gaps)
Part = Annotated[Callable, TABLE]
