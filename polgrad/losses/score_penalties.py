"""Penalties on the two scores of a preference pair, which fix the level of a reward model's scores.

A Bradley-Terry loss sees only the difference of the two scores, so without a penalty all scores may
drift together. A function of `TABLE` fills one of the `penalties` of `objectives.RewardModel`. It
returns one number a pair, [B / 2], and reads arrays of all rows: rows 2i and 2i + 1 are a pair.

The examples need `import jax.numpy as jnp, numpy as np` and
`from polgrad.losses import score_penalties`.
"""

from collections.abc import Callable
from typing import Annotated

import jax.numpy as jnp

from polgrad.losses._common import single
from polgrad.registry import Positive, table
from polgrad.types import Array


def centered(score: Array) -> Array:
  """(s_w + s_l)^2: keeps the mean of a pair's scores at zero (arXiv:2312.09244).

  Args:
    score: [B], s of each row; carries gradient.

  Returns:
    [B / 2], >= 0.

  >>> print(np.asarray(score_penalties.centered(jnp.array([2.0, 1.0, 1.0, -1.0]))))
  [9. 0.]
  """
  return jnp.square(jnp.sum(single(score).reshape(-1, 2), axis=1))


def barrier(score: Array, *, limit: Positive = 5.0) -> Array:
  """-mean over both rows of log(limit - s) + log(limit + s): keeps scores within (-limit, limit)
  (InternLM2, arXiv:2403.17297).

  Scores beyond the limit are clipped to 0.001 inside of it, where the penalty has no gradient.

  Args:
    score: [B], s of each row; carries gradient.
    limit: the bound of the scores.

  Returns:
    [B / 2]; least at scores of zero.

  >>> penalty = score_penalties.barrier(jnp.array([0.0, 0.0, 4.0, 0.0]), limit=5.0)
  >>> print(np.asarray(penalty).round(3))
  [-3.219 -2.708]
  """
  score = jnp.clip(single(score), -limit + 1e-3, limit - 1e-3)
  return -jnp.mean((jnp.log(limit - score) + jnp.log(limit + score)).reshape(-1, 2), axis=1)


TABLE = table('score_penalties', centered, barrier)
Part = Annotated[Callable, TABLE]
