"""Values at several discounts, in normalised units: the critics of AMAGO (arXiv:2310.09971).

`G` discounts, `C` critics. A critic gives x; its value in units of the reward is
scale (weight x + bias) + mean. Mean and scale are those of the targets, one for each discount, and
move slowly. Weight and bias change with them, so that no value does (PopArt, arXiv:1602.07714).
"""

from collections.abc import Callable
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from polgrad.losses import _common, returns
from polgrad.registry import Fraction, NotNegative, table
from polgrad.types import Array


class PopArt(NamedTuple):
  """Statistics of targets, and the affine function between them and a network's output, each [G]."""

  mean: Array
  square: Array  # mean of squares
  weight: Array
  bias: Array
  count: Array  # updates of the statistics

  @property
  def scale(self) -> Array:
    """Standard deviation, between 0.01 and 10,000 units of the reward."""
    return jnp.sqrt(jnp.clip(self.square - self.mean**2, 1e-4, 1e8))

  def normalized(self, values: Array) -> Array:
    """Values [..., G] in units of the reward -> normalised units."""
    return self.scaled(values - jnp.broadcast_to(self.mean, values.shape))

  def scaled(self, gaps: Array) -> Array:
    """Differences of values [..., G] in units of the reward -> normalised units."""
    return gaps / jnp.broadcast_to(self.scale, gaps.shape)

  def output(self, x: Array) -> Array:
    """Values in normalised units of what a network gives, [..., G]."""
    weight, bias = (jnp.broadcast_to(a, x.shape) for a in (self.weight, self.bias))
    return weight * x + bias

  def values(self, x: Array) -> Array:
    """Values in units of the reward of what a network gives, [..., G]."""
    scale, mean = (jnp.broadcast_to(a, x.shape) for a in (self.scale, self.mean))
    return scale * self.output(x) + mean


def first_popart(discounts: int) -> PopArt:
  """PopArt before it has seen targets: values are what the network gives."""
  zeros, ones = jnp.zeros(discounts), jnp.ones(discounts)
  return PopArt(mean=zeros, square=ones, weight=ones, bias=zeros, count=zeros)


def rescaled(old: PopArt, mean: Array, square: Array) -> PopArt:
  """PopArt with other statistics (mu', s'), whose values are the same for every x:

      weight' = weight s / s',   bias' = (s bias + mu - mu') / s'

  Args:
    old: with the statistics (mu, s).
    mean: [G], mu', in units of the reward.
    square: [G], mean of the squared targets.
  """
  new = old._replace(mean=mean, square=square)
  return new._replace(
    weight=old.weight * old.scale / new.scale,
    bias=(old.scale * old.bias + old.mean - mean) / new.scale,
  )


def moved(old: PopArt, mean: Array, square: Array, *, rate: Fraction = 5e-4) -> PopArt:
  """PopArt with moving averages of the statistics, `rescaled`.

  The n-th batch has the weight rate / (1 - (1 - rate)^n), so the first one replaces what was there.

  Args:
    old: before.
    mean: [G], of the targets of a batch, in units of the reward.
    square: [G], of their squares.
    rate: of the averages; 0 leaves everything unchanged.
  """
  count = old.count + 1
  # 1 - (1 - rate)^n without loss of digits.
  total = -jnp.expm1(count * jnp.log1p(-rate))
  step = rate / jnp.where(rate > 0, total, 1)
  near = lambda a, b: a + step * (b - a)
  return rescaled(old, near(old.mean, mean), near(old.square, square))._replace(count=count)


def one_step(rewards: Array, values: Array, mask: Array, *, discounts: tuple) -> Array:
  """r_t + discount V_{t+1}, without V at the last token of the mask.

  Args:
    rewards: [B], given at the last token of the row.
    values: [..., B, T, G], before each token, in units of the reward.
    mask: bool[B, T].
    discounts: of the G values, per token.

  Returns:
    [..., B, T, G], the value of having chosen the token, in units of the reward.
  """

  def of_one(values):
    following, there = _common.at_next(values, mask)
    given = returns.place_last(rewards, mask)[..., None]
    factor = jnp.broadcast_to(jnp.array(discounts, values.dtype), values.shape)
    return given + jnp.where(there[..., None], factor * following, 0)

  batched = of_one
  for _ in range(values.ndim - 3):
    batched = jax.vmap(batched)
  return batched(values)


def positive(advantages: Array) -> Array:
  """1[A > 0]: only tokens that are better than the policy's mean are imitated (AMAGO; the binary rule of
  CRR, arXiv:2006.15134).

  Args:
    advantages: [...], A, in normalised units.

  Returns:
    [...], 0 or 1.
  """
  return jnp.where(advantages > 0, 1.0, 0.0).astype(advantages.dtype)


def exponential(advantages: Array, *, rate: NotNegative = 1.0, cap: NotNegative = 20.0) -> Array:
  """min(exp(rate A), cap): better tokens are imitated more (CRR, arXiv:2006.15134).

  With rate 0 all tokens are imitated alike.

  Args:
    advantages: [...], A, in normalised units.
    rate: per normalised unit.
    cap: largest weight.

  Returns:
    [...], in [0, cap].
  """
  return jnp.minimum(jnp.exp(_common.bounded(rate * advantages)), cap)


TABLE = table('discounted_values', positive, exponential)
Part = Annotated[Callable, TABLE]
