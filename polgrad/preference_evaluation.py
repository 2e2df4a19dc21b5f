"""Numbers that say how good a policy is by preferences: win rates, their intervals, distances.

All are pure functions of NumPy arrays. A comparison that failed is NaN, and is left out of every mean;
it is never a loss or a tie. `polgrad.compare` is the command.
"""

from typing import NamedTuple

import numpy as np

Array = np.ndarray


def by_prompt(x: Array) -> Array:
  """The mean of each prompt's samples, without NaN; prompts that have only NaN are left out.

  Samples of one prompt are not independent, so intervals and errors are taken over prompts.

  Args:
    x: f[N, S], N prompts with S samples.

  Returns:
    f[n], n at most N.
  """
  known = np.isfinite(x)
  kept = known.any(axis=1)
  return np.where(known, x, 0.0)[kept].sum(axis=1) / known[kept].sum(axis=1)


def mean_and_error(x: Array) -> tuple[float, float]:
  """The mean of f[n] and its standard error, std / sqrt(n); NaN where there are too few."""
  mean = float(np.mean(x)) if len(x) else np.nan
  return mean, float(np.std(x, ddof=1) / np.sqrt(len(x))) if len(x) > 1 else np.nan


def bootstrap(
  x: Array, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
  """Percentile bootstrap interval of the mean: quantiles of the means of prompts drawn with replacement.

  Args:
    x: f[n], a number for each prompt.
    level: probability that the interval holds.
    resamples: number of draws.
    seed: of the draws.

  Returns:
    Both ends; NaN if there are no numbers.
  """
  if not len(x):
    return np.nan, np.nan
  random = np.random.default_rng(seed)
  means = [x[random.integers(len(x), size=len(x))].mean() for _ in range(resamples)]
  low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


class LengthControlled(NamedTuple):
  """What the regression on lengths finds."""

  win_rate: float  # sigmoid(theta), the win rate at equal lengths
  theta: float  # log-odds at equal lengths
  phi: float  # log-odds of a difference in length that is large against its spread


def length_controlled(
  wins: Array, lengths: Array, other_lengths: Array, *, ridge: float = 1e-2
) -> LengthControlled:
  """The win rate that there would be at equal lengths (AlpacaEval 2, arXiv:2404.04475).

      P(win_i) = sigmoid(theta + phi tanh(d_i / std(d))),   d_i = length_i - other length_i

  theta and phi minimise the mean cross-entropy with the wins as soft labels, plus
  ridge (theta^2 + phi^2) / 2, and the win rate is sigmoid(theta).

  The standard deviation is that of a sample (n - 1). This is what the authors' code calls
  `length_controlled_minimal`.

  Differences: The leaderboard's formula has a third term, the difficulty of a prompt, which needs many
  models judged on the same prompts, and adds two baselines that are too long or too short on purpose.
  Both are left out. The authors choose the penalty by cross-validation; here it is a constant, which
  keeps theta and phi finite if the longer answer always wins.

  Args:
    wins: f[n], probability that the policy's completion is the better one; NaN is left out.
    lengths: f[n], of the policy's completions, in any unit.
    other_lengths: f[n], of those that it is compared with.
    ridge: weight of the squares.
  """
  known = np.isfinite(wins)
  wins, d = wins[known], (lengths - other_lengths)[known].astype(float)
  if not len(wins):
    return LengthControlled(np.nan, np.nan, np.nan)
  spread = np.std(d, ddof=1) if len(d) > 1 else 0.0
  x = np.stack([np.ones(len(d)), np.tanh(d / spread) if spread > 0 else np.zeros(len(d))], axis=1)
  # Newton's method; the ridge makes the problem strictly convex.
  beta = np.zeros(2)
  for _ in range(50):
    p = 1 / (1 + np.exp(-x @ beta))
    gradient = x.T @ (p - wins) / len(wins) + ridge * beta
    hessian = (x * (p * (1 - p))[:, None]).T @ x / len(wins) + ridge * np.eye(2)
    step = np.linalg.solve(hessian, gradient)
    beta = beta - step / max(1.0, np.abs(step).max())
  theta, phi = beta
  return LengthControlled(float(1 / (1 + np.exp(-theta))), float(theta), float(phi))


class Divergence(NamedTuple):
  """Two estimates of KL(pi || reference) of whole completions, nats, with their standard errors."""

  k1: float
  k1_error: float
  k3: float
  k3_error: float


def divergence(log_ratio: Array, mask: Array) -> Divergence:
  """KL(pi || reference) from the policy's own samples, by two unbiased estimates.

      k1 = mean sum_t d_t,   k3 = mean sum_t (exp(-d_t) - 1 + d_t),   d_t = log(pi / reference)_t

  k1 can be negative. Each term of k3 is at least 0, and k3 has less noise where the policies are close,
  but a token that is much likelier under the reference can dominate it. If they differ by more than
  their errors, neither should be trusted.

  Args:
    log_ratio: f[N, S, T], d_t of N prompts with S samples.
    mask: bool[N, S, T], tokens that the policy made.
  """
  d = np.where(mask, log_ratio, 0.0).astype(float)
  k3 = np.where(mask, np.expm1(-d) + d, 0.0)
  first = mean_and_error(by_prompt(d.sum(axis=2)))
  return Divergence(*first, *mean_and_error(by_prompt(k3.sum(axis=2))))
