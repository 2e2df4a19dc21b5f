"""Masks that a policy network draws over inputs, trained by REINFORCE.

The technique is called policy gradient-driven noise mask (arXiv:2406.14568)."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from polgrad.types import Array

sg = jax.lax.stop_gradient


class Shape(NamedTuple):
  """The two parameters of a Beta distribution, for each cell of a grid."""

  alpha: Array
  beta: Array


def blend(
  base: Shape, outputs: Shape, *, share: float = 0.1, decay: float = 0.99
) -> tuple[Shape, Shape]:
  """The distributions of a batch, and the running mean that its next batch starts from.

      shape = (1 - share) base + share exp(outputs)
      base <- decay base + (1 - decay) mean over rows of shape, detached

  Args:
    base: [H, W] each, the running mean; ones at the start give uniform masks.
    outputs: [B, H, W] each, logarithms, the outputs of the policy network.
    share: of the network in the parameters.
    decay: of the running mean.

  Returns:
    The parameters [B, H, W], and the new running mean [H, W].
  """
  made = jax.tree.map(lambda b, x: (1 - share) * sg(b)[None] + share * jnp.exp(x), base, outputs)
  mean = lambda b, x: sg(decay * b + (1 - decay) * jnp.mean(x, axis=0))
  return made, jax.tree.map(mean, base, made)


def draw(key: Array, shape: Shape) -> Array:
  """Mask cells in (0, 1), each from its Beta distribution, without a gradient: [B, H, W]."""
  edge = jnp.finfo(shape.alpha.dtype).eps
  cells = jax.random.beta(key, sg(shape.alpha), sg(shape.beta), dtype=shape.alpha.dtype)
  return jnp.clip(cells, edge, 1 - edge)  # log-densities are infinite at 0 and 1


def log_prob(mask: Array, shape: Shape) -> Array:
  """Log-density of each cell under its Beta distribution: [B, H, W] -> [B, H, W].

  >>> rising = Shape(jnp.full((1, 1, 1), 2.0), jnp.ones((1, 1, 1)))  # its density is 2 x
  >>> print(log_prob(jnp.full((1, 1, 1), 0.8), rising).item().__round__(3))
  0.47
  """
  a, b = shape
  norm = jax.scipy.special.betaln(a, b)
  return (a - 1) * jnp.log(mask) + (b - 1) * jnp.log1p(-mask) - norm


def apply(inputs: Array, mask: Array, *, sigma: float = 1.0) -> Array:
  """Multiplies images by masks that are enlarged to their size and blurred.

  Args:
    inputs: [B, H', W', C].
    mask: [B, H, W]; H' and W' need not be multiples of H and W (bilinear interpolation).
    sigma: standard deviation of the Gaussian blur, in pixels; 0 does not blur. Windows are cut at 3
      sigma, and their weights renormalised at the edges.
  """
  chex.assert_rank([inputs, mask], [4, 3])
  chex.assert_equal_shape_prefix([inputs, mask], 1)
  mask = jax.image.resize(mask, inputs.shape[:3], 'bilinear')
  if sigma:
    for axis in (1, 2):
      places = jnp.arange(mask.shape[axis])
      apart = places[:, None] - places[None]
      window = jnp.where(jnp.abs(apart) <= 3 * sigma, jnp.exp(-((apart / sigma) ** 2) / 2), 0)
      window = window / jnp.sum(window, axis=1, keepdims=True)
      mask = jnp.moveaxis(jnp.tensordot(mask, window.astype(mask.dtype), [[axis], [1]]), -1, axis)
  return inputs * mask[..., None]


def policy_loss(
  logp: Array, cross_entropy: Array, *, baseline: float = 0.0, logsumexp: bool = False
) -> Array:
  """mean over rows of log p(mask) (CE - baseline): REINFORCE, where a lower cross entropy is the reward.

  The mask's log-density is the sum over its cells, which are independent. Cross entropies are detached,
  so the classifier is trained by the plain mean of them. A constant baseline changes the variance of
  the gradient, not its mean.

  Differences: the released code takes log sum_k exp(logp_k) over the cells in place of their sum, and
  trains the classifier by this same loss, which weighs cross entropies by numbers that may be negative.

  Confidence: CODE.

  Args:
    logp: [B, H, W], from `log_prob`.
    cross_entropy: [B], of the classifier on masked inputs.
    baseline: subtracted from the cross entropies.
    logsumexp: the released code's log-probability of a mask.

  >>> print(policy_loss(jnp.zeros((2, 1, 2)) - 1.0, jnp.array([1.0, 3.0])))
  -4.0
  """
  chex.assert_rank([logp, cross_entropy], [3, 1])
  total = jax.nn.logsumexp(logp, axis=(1, 2)) if logsumexp else jnp.sum(logp, axis=(1, 2))
  return jnp.mean(total * sg(cross_entropy - baseline))
