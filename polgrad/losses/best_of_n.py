"""The distribution of the best of n samples, and rewards and margins with which a policy learns it.

p(y) is the probability of a completion under a reference, r(y) its reward, F(y) the probability that a
sample of the reference has a reward of at most r(y), and F_<(y) that of a smaller one. The best of n
samples, with ties broken at random, is y with the probability

    p(y) (F(y)^n - F_<(y)^n) / (F(y) - F_<(y)).

The examples need `import jax.numpy as jnp, numpy as np` and `from polgrad.losses import best_of_n`.
"""

import chex
import jax.numpy as jnp

from polgrad.types import Array


def law(probabilities: Array, rewards: Array, *, n: int) -> Array:
  """The distribution of the best of n samples over all K completions (arXiv:2407.14622).

  Args:
    probabilities: [..., K] of the reference; they sum to 1.
    rewards: [..., K].
    n: number of samples.

  Returns:
    [..., K].

  >>> probabilities, rewards = jnp.array([0.1, 0.2, 0.3, 0.4]), jnp.arange(4.0)
  >>> print(np.asarray(best_of_n.law(probabilities, rewards, n=4)).round(4))
  [1.000e-04 8.000e-03 1.215e-01 8.704e-01]
  """
  at_most, below = _cumulative(probabilities, rewards)
  # The quotient of the powers is a sum, which needs no division where at_most - below is small.
  quotient = sum(at_most ** (n - 1 - i) * below**i for i in range(n))
  return probabilities * quotient


def variational_law(probabilities: Array, rewards: Array, *, n: int) -> Array:
  """p F^(n - 1) / Z, the maximiser of E[(n - 1) log F] - KL(pi, reference): vBoN (arXiv:2407.06057).

  Args:
    probabilities: [..., K] of the reference; they sum to 1.
    rewards: [..., K].
    n: number of samples.

  Returns:
    [..., K].
  """
  at_most, _ = _cumulative(probabilities, rewards)
  weights = probabilities * at_most ** (n - 1)
  return weights / jnp.sum(weights, axis=-1, keepdims=True)


def kl_bound(n: int) -> float:
  """log n - (n - 1) / n, nats: the largest possible KL(best of n, reference).

  It is reached in the limit where every single completion has probability 0.

  >>> round(best_of_n.kl_bound(4), 5)
  0.63629
  """
  return float(jnp.log(n)) - (n - 1) / n


def mean_margin(n: int) -> float:
  """(n - 1) (1 + 1/2 + ... + 1/(n - 1)), nats: BonBon's target margin (arXiv:2406.00832).

  It is the mean of log(pi / p)(best) - log(pi / p)(worst) over draws of n samples, where pi is the
  distribution of the best of n.

  >>> round(best_of_n.mean_margin(8), 2)
  18.15
  """
  return (n - 1) * sum(1 / k for k in range(1, n))


def log_quantile(rewards: Array, reference_rewards: Array) -> Array:
  """log of the estimated F(y): the reward of BOND's backward KL (arXiv:2407.14622).

  With a KL penalty of coefficient 1 / (n - 1) the policy gradient of this reward descends the divergence
  to the best of n. The row counts as a sample itself, so the logarithm is finite.

  Args:
    rewards: [...] of samples of the policy.
    reference_rewards: [..., m] of m samples of the reference for the same prompts.

  Returns:
    [...], nats, at most 0 and at least -log(m + 1).
  """
  chex.assert_equal_shape_prefix([rewards, reference_rewards], rewards.ndim)
  below = jnp.sum(reference_rewards <= rewards[..., None], axis=-1)
  return jnp.log((1 + below) / (1 + reference_rewards.shape[-1]))


def worse_than_both(rewards: Array, anchor_rewards: Array) -> Array:
  """-log 16 where the reward is below both of two samples of the anchor, else 0: J-BOND
  (arXiv:2407.14622).

  Args:
    rewards: [...] of samples of the policy.
    anchor_rewards: [..., 2] of two samples of the anchor for the same prompts.

  Returns:
    [...], nats.
  """
  chex.assert_shape(anchor_rewards, (*rewards.shape, 2))
  worse = jnp.all(rewards[..., None] < anchor_rewards, axis=-1)
  return jnp.where(worse, -jnp.log(16.0), 0.0)


def _cumulative(probabilities: Array, rewards: Array) -> tuple[Array, Array]:
  """F and F_< of every completion, [..., K] each."""
  chex.assert_equal_shape([probabilities, rewards])
  own, other = rewards[..., :, None], rewards[..., None, :]
  others = probabilities[..., None, :]
  at_most = jnp.sum(jnp.where(other <= own, others, 0), axis=-1)
  return at_most, jnp.sum(jnp.where(other < own, others, 0), axis=-1)
