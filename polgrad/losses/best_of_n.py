"""The distribution of the best of n samples, and rewards and margins with which a policy learns it.

p(y) is the probability of a completion under a reference, r(y) its reward, F(y) the probability that a
sample of the reference has a reward of at most r(y), and F_<(y) that of a smaller one. The best of n
samples, with ties broken at random, is y with the probability

    p(y) (F(y)^n - F_<(y)^n) / (F(y) - F_<(y)).

The examples need `import jax.numpy as jnp, numpy as np` and `from polgrad.losses import best_of_n`.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax.numpy as jnp

from polgrad.registry import Positive, table
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


def log_quantile(not_better: Array, compared_with: Array) -> Array:
  """log of the estimated F(y): the reward of BOND's backward KL (arXiv:2407.14622).

  With a KL penalty of coefficient 1 / (n - 1) the policy gradient of this reward descends the divergence
  to the best of n. The row counts as a sample itself, so the logarithm is finite.

  Args:
    not_better: [...], how many samples of the reference have a reward of at most that of the row.
    compared_with: [...], how many samples of the reference there are for its prompt.

  Returns:
    [...], nats, at most 0 and at least -log(compared_with + 1).

  >>> print(np.asarray(best_of_n.log_quantile(jnp.array([4, 1]), jnp.array([4, 4]))).round(2))
  [ 0.   -0.92]
  """
  chex.assert_equal_shape([not_better, compared_with])
  return jnp.log((1 + not_better) / (1 + compared_with))


def worse_than_all(
  not_better: Array, compared_with: Array, *, cost: Positive = 2.772588722
) -> Array:
  """-cost where the reward is below all samples of the anchor, else 0: J-BOND (arXiv:2407.14622).

  Args:
    not_better, compared_with: see `log_quantile`; J-BOND takes two samples.
    cost: nats; J-BOND's is log 16.

  Returns:
    [...], nats; 0 where there are no samples.
  """
  chex.assert_equal_shape([not_better, compared_with])
  return jnp.where((not_better == 0) & (compared_with > 0), -cost, 0.0)


def _cumulative(probabilities: Array, rewards: Array) -> tuple[Array, Array]:
  """F and F_< of every completion, [..., K] each."""
  chex.assert_equal_shape([probabilities, rewards])
  own, other = rewards[..., :, None], rewards[..., None, :]
  others = probabilities[..., None, :]
  at_most = jnp.sum(jnp.where(other <= own, others, 0), axis=-1)
  return at_most, jnp.sum(jnp.where(other < own, others, 0), axis=-1)


REWARDS = table('best_of_n', log_quantile, worse_than_all)
RewardPart = Annotated[Callable, REWARDS]
