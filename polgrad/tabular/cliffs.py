"""How the optimal policy changes with the reward: a greedy one may jump, a soft one does not.

The policy that maximises E[r] - a KL(pi || ref) is pi ~ ref exp(r / a). For a > 0 it is a continuous
function of the reward. Without the penalty it is the best action, and where two actions are equally good
an arbitrarily small error of the reward exchanges them: the policy cliff. The same holds for a weighted
sum of several rewards as a function of the weights.

NumPy, float64.
"""

import numpy as np

Array = np.ndarray


def optimal(rewards: Array, *, temperature: float, log_reference: Array | None = None) -> Array:
  """The policy that is optimal for a reward, f64[..., A].

      pi ~ ref exp(r / temperature);   temperature 0: all mass on the best action, the first of equals

  Args:
    rewards: [..., A].
    temperature: a, in the unit of the reward, at least 0.
    log_reference: log ref [..., A], up to a constant; None is uniform. At temperature 0 it only says
      which actions are never taken, those of probability 0.
  """
  rewards = np.asarray(rewards, np.float64)
  log_reference = np.zeros_like(rewards) if log_reference is None else np.asarray(log_reference)
  if not temperature:
    allowed = np.where(np.isfinite(log_reference), rewards, -np.inf)
    return np.eye(rewards.shape[-1])[np.argmax(allowed, axis=-1)]
  scores = rewards / temperature + log_reference
  powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
  return powers / powers.sum(axis=-1, keepdims=True)


def total_variation(first: Array, second: Array) -> Array:
  """sum_a |p(a) - q(a)| / 2, in [0, 1]: [..., A], [..., A] -> [...]."""
  return np.abs(np.asarray(first) - np.asarray(second)).sum(axis=-1) / 2


def soft_bound(rewards: Array, others: Array, *, temperature: float) -> Array:
  """The largest total variation between the optimal policies of two rewards, for any reference.

      TV <= tanh(d / (2 a)) <= d / (2 a),    d = max_a |r(a) - r'(a)|,  a = temperature > 0

  The second bound is returned: [..., A], [..., A] -> [...]. For temperature 0 there is none.

  >>> first, second = np.array([1, 0.999, 0]), np.array([0.999, 1, 0])
  >>> gap = total_variation(optimal(first, temperature=0.1), optimal(second, temperature=0.1))
  >>> print(gap.round(7), soft_bound(first, second, temperature=0.1).round(7))
  0.0049998 0.005
  >>> print(total_variation(optimal(first, temperature=0), optimal(second, temperature=0)))
  1.0
  """
  apart = np.max(np.abs(np.asarray(rewards) - np.asarray(others)), axis=-1)
  return apart / (2 * temperature)


def effective(rewards: Array, weights: Array) -> Array:
  """sum_k w_k r_k: the reward that a mixture of several rewards has, [K, A], [..., K] -> [..., A]."""
  return np.asarray(weights, np.float64) @ np.asarray(rewards, np.float64)


def crossings(first: Array, second: Array) -> Array:
  """The weights w in (0, 1) at which the best action of (1 - w) r + w r' changes, sorted.

  At each of them the greedy policy jumps, by a total variation of 1.

  Args:
    first, second: r and r', [A].

  >>> crossings(np.array([1.0, 0.8, 0.0]), np.array([0.0, 0.4, 1.0])).round(4).tolist()
  [0.3333, 0.5714]
  """
  first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
  found, w = [], 0.0
  # At weight 0 the best action, of equal ones the one that rises fastest.
  best = int(np.lexsort((second, first))[-1])
  while True:
    # The weight at which each action that rises faster than the best one reaches it.
    faster = (second - first) - (second[best] - first[best])
    behind = first[best] - first
    at = np.where(faster > 0, behind / np.where(faster > 0, faster, 1), np.inf)
    at[best] = np.inf
    w = float(at.min())
    if not w < 1:
      return np.array(found)
    ties = np.flatnonzero(np.isclose(at, w, rtol=1e-12, atol=0))
    best = int(ties[np.argmax(second[ties] - first[ties])])
    found += [w] if w > 0 else []
