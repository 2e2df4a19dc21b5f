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

from polgrad.losses import pairs
from polgrad.losses._common import single
from polgrad.registry import Count, Fraction, Positive, table
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


def user_divergence(
  user_kl: Array, step: Array, *, period: Count = 0, least: Fraction = 0.1
) -> Array:
  """c KL(q(z | context) || N(0, I)): keeps the latent of a user near its prior (arXiv:2408.10075).

  In each period of updates the coefficient c rises from `least` to 1, along half of a cosine.

      c = least + (1 - least) (1 - cos(pi (step mod period) / period)) / 2

  Args:
    user_kl: [B], nats, the same in all rows of a user; carries gradient.
    step: number of the update.
    period: updates after which the coefficient begins again; 0: it is 1.
    least: coefficient at the beginning of a period.

  Returns:
    [B / 2], >= 0, nats.

  >>> print(np.asarray(score_penalties.user_divergence(jnp.ones(2), jnp.array(5.0), period=10)))
  [0.55]
  """
  kl = pairs.first(single(user_kl))
  if not period:
    return kl
  ramp = 0.5 - 0.5 * jnp.cos(jnp.pi * (step % period) / period)
  return (least + (1 - least) * ramp) * kl


def views(view_loss: Array) -> Array:
  """What two samples of a prompt do not tell of each other: the term L_M of RLP (arXiv:2403.19279).

  Args:
    view_loss: [B], nats, the same in all rows of a prompt, see `shared_information`; carries gradient.

  Returns:
    [B / 2], the same.
  """
  return pairs.first(single(view_loss))


TABLE = table('score_penalties', centered, barrier, user_divergence, views)
Part = Annotated[Callable, TABLE]
