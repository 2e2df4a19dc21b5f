"""Shapes of a row's score: what a preference loss compares, as a function of log-ratio or log-prob.

A function of `TABLE` fills the slot `shape` of `objectives.Pairwise`. It reads `score` [B], and may
read any other array by its name. `preferred` [B] says which row of a pair is the preferred one, and
rows 2i and 2i + 1 are a pair, so a shape may treat the two rows differently.

The first shapes are derivatives f'(u) of an f-divergence sum_y ref(y) f(u), u = pi / ref = exp(score).
The policy that maximises a reward less beta times the divergence has r = beta f'(u) + constant, so
f'(u) takes the place of the log-ratio in DPO (arXiv:2309.16240). Constants cancel and are left out.
The score is clamped to +-20 nats before it is exponentiated; beyond that it has no gradient.
"""

from collections.abc import Callable
from typing import Annotated

from polgrad.registry import table
from polgrad.types import Array


def identity(score: Array) -> Array:
  """The score itself: the reverse KL divergence KL(pi || ref), DPO (arXiv:2305.18290).

  Args:
    score: [B].

  Returns:
    [B].
  """
  return score


TABLE = table('score_shapes', identity)
Part = Annotated[Callable, TABLE]
