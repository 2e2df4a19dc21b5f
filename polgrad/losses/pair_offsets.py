"""Offsets: what the margin of a preference pair must exceed, apart from a constant.

A function of `TABLE` fills one of the `offsets` of `objectives.Pairwise`, where it has a coefficient
and is subtracted from beta (r_w - r_l). It returns one number a pair, [B / 2], and reads arrays of all
rows: rows 2i and 2i + 1 are a pair, and `preferred` [B] says which of them is the preferred one.
"""

from collections.abc import Callable
from typing import Annotated

import jax.numpy as jnp

from polgrad.losses import pairs
from polgrad.registry import table
from polgrad.types import Array


def length_difference(mask: Array, preferred: Array) -> Array:
  """|w| - |l|: tokens of the preferred row less those of the other, R-DPO (arXiv:2403.19159).

  With the coefficient -alpha the argument of the link is beta h + alpha (|w| - |l|): the policy is
  pushed less where the preferred completion is the longer one.

  Args:
    mask: bool[B, T].
    preferred: bool[B], one True in each pair.

  Returns:
    [B / 2], tokens.
  """
  chosen, rejected = pairs.split(jnp.sum(mask, axis=1, dtype=jnp.float32), preferred)
  return chosen - rejected


def annotated(annotated_margin: Array) -> Array:
  """m, the margin that the data give to a pair, such as how much better annotators found the chosen
  completion (Llama 2, arXiv:2307.09288; ODPO, arXiv:2402.10571).

  Args:
    annotated_margin: [B], the same in both rows of a pair.

  Returns:
    [B / 2].
  """
  return pairs.first(annotated_margin)


def log_annotated(annotated_margin: Array) -> Array:
  """log(1 + m), m the margin that the data give to a pair: ODPO (arXiv:2402.10571).

  Args:
    annotated_margin: [B], at least 0, the same in both rows of a pair.

  Returns:
    [B / 2].
  """
  return jnp.log1p(pairs.first(annotated_margin))


def matched(matched_gap: Array) -> Array:
  """n_(k) - n, the reference margin of the pair's rank less the pair's own: AOT (arXiv:2406.05882).

  Subtracted from the DPO margin m - n of a pair, it gives m - n_(k), the comparison of sorted margins.

  Args:
    matched_gap: [B], the same in both rows of a pair, see `pair_selections.sorted_reference`.

  Returns:
    [B / 2], nats.
  """
  return pairs.first(matched_gap)


TABLE = table('pair_offsets', length_difference, annotated, log_annotated, matched)
Part = Annotated[Callable, TABLE]
