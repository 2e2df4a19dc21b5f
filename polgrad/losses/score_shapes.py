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

import chex
import jax
import jax.numpy as jnp

from polgrad.losses import pairs
from polgrad.losses._common import bounded
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


def forward_kl(score: Array) -> Array:
  """-exp(-score): f = -log u, KL(ref || pi), which covers the reference (arXiv:2309.16240).

  Args:
    score: [B], log-ratio D to the reference, nats.

  Returns:
    [B], negative; its derivative by D is exp(-D).
  """
  return -jnp.exp(-bounded(score))


def jensen_shannon(score: Array) -> Array:
  """log(2 u / (1 + u)) = log 2 + log sigmoid(score): the Jensen-Shannon divergence (arXiv:2309.16240).

  Its f is u log u - (u + 1) log((u + 1) / 2), twice the divergence that is usually called so.

  Args:
    score: [B], log-ratio D to the reference, nats.

  Returns:
    [B], below log 2; its derivative by D is 1 / (1 + exp(D)).
  """
  return jnp.log(2.0) + jax.nn.log_sigmoid(score)


def alpha_divergence(score: Array, *, alpha: float = 0.5) -> Array:
  """(1 - exp(-alpha score)) / alpha: alpha-divergences between both KLs (arXiv:2309.16240).

  f = (u^(1 - alpha) - (1 - alpha) u - alpha) / (alpha (alpha - 1)). alpha -> 0 is the reverse KL, so
  0 gives `identity`, and alpha = 1 is `forward_kl` plus a constant. TRL's alpha is 1 - alpha.

  Args:
    score: [B], log-ratio D to the reference, nats.
    alpha: in [0, 1].

  Returns:
    [B]; its derivative by D is exp(-alpha D).
  """
  return _tilted(score, alpha)


def chi_square_kl(score: Array, *, chi: float = 1.0) -> Array:
  """score + chi exp(score): f = chi (u - 1)^2 / 2 + u log u, chiPO (arXiv:2407.13399).

  The chi-square part keeps pi / ref bounded where the reference has little mass. chi = 0 is DPO.

  Args:
    score: [B], log-ratio D to the reference, nats.
    chi: weight of the chi-square divergence, beside the reverse KL.

  Returns:
    [B]; its derivative by D is 1 + chi exp(D).
  """
  return score + chi * jnp.exp(bounded(score))


def power(score: Array, *, alpha: float = 0.25) -> Array:
  """(1 - exp(-alpha score)) / alpha of a mean log-prob: AlphaPO (arXiv:2501.03884).

  alpha > 0 gives unlikely rows more gradient, and alpha = 0 is SimPO.

  Args:
    score: [B], mean log-prob, nats per token.
    alpha: any number; 0 gives the score itself.

  Returns:
    [B]; its derivative by the score is exp(-alpha score).
  """
  return _tilted(score, alpha)


def log_odds(score: Array) -> Array:
  """log(p / (1 - p)), p = exp(score) of a mean log-prob: ORPO (arXiv:2403.07691).

  Args:
    score: [B], mean log-prob, nats per token, at most 0. It is clamped to at most -1e-6, beyond which it
      has no gradient: rows without tokens have a score of 0.

  Returns:
    [B]; its derivative by the score is 1 / (1 - p).
  """
  score = jnp.minimum(score, -1e-6)
  # log(1 - p), by the form that is exact for small or for large 1 - p.
  near = score > -0.6931
  close, far = jnp.where(near, score, -1.0), jnp.where(near, -1.0, score)
  return score - jnp.where(near, jnp.log(-jnp.expm1(close)), jnp.log1p(-jnp.exp(far)))


def anchored(score: Array, preferred: Array, *, penalty: float = 50.0) -> Array:
  """score - penalty max(0, -score) of the preferred row: DPOP (arXiv:2402.13228).

  DPO may lower the likelihood of both rows; here the preferred one has 1 + penalty times the gradient
  while it is less likely than under the reference. penalty = 0 is DPO.

  Args:
    score: [B], log-ratio to the reference, nats.
    preferred: bool[B], one True in each pair.
    penalty: lambda in the paper.

  Returns:
    [B].
  """
  chex.assert_equal_shape([score, preferred])
  return jnp.where(preferred, score - penalty * jax.nn.relu(-score), score)


def damped(score: Array, preferred: Array, *, factor: float = 0.5) -> Array:
  """factor * score of the other row: its likelihood is pushed down less (arXiv:2301.12842).

  Args:
    score: [B], log-prob, nats.
    preferred: bool[B], one True in each pair.
    factor: lambda in the paper; 1 treats both rows alike.

  Returns:
    [B].
  """
  chex.assert_equal_shape([score, preferred])
  return jnp.where(preferred, score, factor * score)


def adaptive_rejection(
  score: Array, mask: Array, preferred: Array, *, scale: float = 0.9, rate: float = 0.4
) -> Array:
  """c * score of the other row, c = min(1, scale exp(rate |gap of the mean log-probs|) - 1): ARPO
  (arXiv:2410.03115).

  The rejected row is pushed down less where both rows are about as likely a token, as two good
  translations are. No gradient is stopped, and c is scale - 1 where the means are equal.

  Args:
    score: [B], summed log-prob, nats.
    mask: bool[B, T], tokens of the sum.
    preferred: bool[B], one True in each pair.
    scale: of the exponential.
    rate: per nat and token.

  Returns:
    [B].
  """
  chosen, rejected = pairs.split(score / jnp.maximum(jnp.sum(mask, axis=1), 1), preferred)
  factor = scale * jnp.exp(bounded(rate * jnp.abs(chosen - rejected))) - 1
  return jnp.where(preferred, score, jnp.repeat(jnp.minimum(factor, 1), 2) * score)


def _tilted(score: Array, alpha: float) -> Array:
  """(1 - exp(-alpha score)) / alpha, and its limit for alpha = 0."""
  return score if alpha == 0 else -jnp.expm1(bounded(-alpha * score)) / alpha


TABLE = table(
  'score_shapes',
  identity,
  forward_kl,
  jensen_shannon,
  alpha_divergence,
  chi_square_kl,
  power,
  log_odds,
  anchored,
  damped,
  adaptive_rejection,
)
Part = Annotated[Callable, TABLE]
