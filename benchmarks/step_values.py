"""The noise of policy gradients whose steps are valued by further completions, exactly.

    python -m benchmarks.step_values     # prints the table of docs/trees.md

The world is that of the estimator report (`tiny_world`): one prompt, 15 completions of one to three
tokens, each token a step. A gradient is that of a group of four rows, (1 / 4) sum_i sum_j A_ij g_ij with
g_ij the gradient of the log-probability of step j. With A = r + V(s_{j+1}) - V(s_j) it is linear in the
estimates V, each of which is the mean of K independent rewards of 0 or 1, shared by the rows with its
prefix. So mean and variance follow from those of single completions:

    Var = Var(exact values) / G + sum_p p (1 - p) / (K G) (E |c_p|^2 + (G - 1) |E c_p|^2)

The sum is over prefixes; p is the value of the prefix, and c_p the factor of its estimate in the
gradient of one row. RLOO, the baseline without values, is a U-statistic of pairs of rows.
"""

from typing import NamedTuple

import jax
import numpy as np

from benchmarks import tiny_world as world

ROWS = 4
SAMPLES = (1, 3, 9)  # K


class World(NamedTuple):
  """The policy with which rows are sampled; S completions, H positions, P prefixes, D parameters."""

  probability: np.ndarray  # [S]
  steps: np.ndarray  # [S, H, D], gradient of the log-probability of each token
  values: np.ndarray  # [P], probability that a completion of the prefix is right
  remaining: np.ndarray  # [P], expected tokens behind the prefix


def make() -> World:
  policy, logits = world.POLICY, world.trajectory()[-1]
  count, width = logits.shape
  p = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
  # Of log softmax of one row of the table: one-hot minus probabilities.
  steps = np.zeros((*policy.tokens.shape, count, width))
  for s, t in zip(*np.nonzero(policy.mask)):
    prefix = policy.prefixes[s, t]
    steps[s, t, prefix] = np.eye(width)[policy.tokens[s, t]] - p[prefix]
  probability = world.probabilities(logits)
  visit = np.zeros((len(probability), count))
  rest = np.zeros_like(visit)
  for s, t in zip(*np.nonzero(policy.mask)):
    visit[s, policy.prefixes[s, t]] = 1
    rest[s, policy.prefixes[s, t]] = policy.mask[s, t:].sum()
  reached = probability @ visit
  values = (probability * world.REWARDS) @ visit / reached
  remaining = probability @ rest / reached
  return World(probability, steps.reshape(*policy.tokens.shape, -1), values, remaining)


class Gradient(NamedTuple):
  """An estimator of the gradient from `ROWS` rows, or from as many as fit a number of tokens."""

  mean: np.ndarray  # [D]
  noise: float  # standard deviation over the length of the mean
  tokens: float  # expected number that is sampled


def vines(one: World, samples: float, group: int = ROWS) -> Gradient:
  """With steps valued by `samples` completions; infinity: by their values."""
  policy, count = world.POLICY, len(one.values)
  p, steps, mask = one.probability, one.steps, policy.mask
  # Factor of each prefix's value: the gradient of the step that leads to it, minus that of the next one.
  factors = np.zeros((len(p), count, steps.shape[-1]))
  for s, t in zip(*np.nonzero(mask)):
    factors[s, policy.prefixes[s, t]] = (steps[s, t - 1] if t else 0) - steps[s, t]
  last = steps[np.arange(len(p)), mask.sum(axis=1) - 1]
  rows = world.REWARDS[:, None] * last + np.einsum('p,spd->sd', one.values, factors)
  mean = p @ rows
  variance = (p @ np.sum(rows**2, axis=1) - mean @ mean) / group
  square = np.einsum('s,spd,spd->p', p, factors, factors)
  both = square + (group - 1) * np.sum(np.einsum('s,spd->pd', p, factors) ** 2, axis=1)
  variance += np.sum(one.values * (1 - one.values) * both) / (samples * group)
  tokens = group * one.remaining[0]
  if np.isfinite(samples):
    reached = [p @ (policy.prefixes == i).any(axis=1, where=mask) for i in range(count)]
    seen = 1 - (1 - np.array(reached)) ** group  # that a row of the group has the prefix
    tokens += samples * seen @ one.remaining
  return Gradient(mean, float(np.sqrt(variance) / np.linalg.norm(mean)), float(tokens))


def rloo(one: World, rows: float) -> Gradient:
  """With the mean reward of the other rows as the baseline; `rows` may be a fraction."""
  p, score, rewards = one.probability, one.steps.sum(axis=1), world.REWARDS
  pair = 0.5 * (rewards[:, None] - rewards)[:, :, None] * (score[:, None] - score)
  given = np.einsum('t,std->sd', p, pair)  # the mean over the other row
  mean = p @ given
  first = p @ np.sum(given**2, axis=1) - mean @ mean
  second = np.einsum('s,t,std,std->', p, p, pair, pair) - mean @ mean
  variance = (4 * (rows - 2) * first + 2 * second) / (rows * (rows - 1))
  noise = np.sqrt(variance) / np.linalg.norm(mean)
  return Gradient(mean, float(noise), float(rows * one.remaining[0]))


def table() -> str:
  """The lines of the table."""
  one = make()
  lines = [
    '| values | noise | tokens | noise of RLOO with as many tokens |',
    '|---|---|---|---|',
    f'| none: RLOO | {rloo(one, ROWS).noise:.2f} | {rloo(one, ROWS).tokens:.1f} | |',
  ]
  for samples in SAMPLES:
    found = vines(one, samples)
    rows = found.tokens / one.remaining[0]
    lines.append(
      f'| {samples} completions | {found.noise:.2f} | {found.tokens:.1f} | {rloo(one, rows).noise:.2f} |'
    )
  return '\n'.join([*lines, f'| exact | {vines(one, np.inf).noise:.2f} | | |'])


if __name__ == '__main__':
  with jax.enable_x64(True):
    print(table())
