"""Losses of offline pair methods, from their papers."""

import numpy as np

from tests.preference.harness import (
  average,
  chosen_nll,
  logistic,
  mean,
  pair,
  ratio,
  soft,
  softplus,
  total,
)


def margin(x, other='reference_logp'):
  """h = log-ratio of the chosen less that of the rejected."""
  chosen, rejected = pair(ratio(x, other), x)
  return chosen - rejected


def dpo(x, const):
  return soft(logistic, 0.1 * margin(x), x)


def cdpo(x, const):
  z, p = 0.1 * margin(x), 0.8 * x['label'][::2] + 0.2 * (1 - x['label'][::2])
  z = np.where(x['label'][::2] >= 0.5, z, -z)  # of the first row
  return average(-p * np.log(1 / (1 + np.exp(-z))) - (1 - p) * np.log(1 / (1 + np.exp(z))), x)


def ipo(x, const):
  return soft(lambda h: (h - 5.0) ** 2, margin(x), x)


def simpo(x, const):
  chosen, rejected = pair(mean(x['logp'], x['mask']), x)
  return soft(logistic, 2.0 * (chosen - rejected) - 0.5, x)


def slic(x, const):
  chosen, rejected = pair(total(x['logp'], x['mask']), x)
  hinge = soft(lambda z: np.maximum(0, 1 - z), chosen - rejected, x)
  return hinge + 0.1 * chosen_nll(x, total)


def online_dpo(x, const):
  """The row with the larger reward is the chosen one; a tie is no pair."""
  first, second = x['rewards'][::2], x['rewards'][1::2]
  h = (ratio(x)[::2] - ratio(x)[1::2]) * np.sign(first - second)
  where = x['mask'].any(axis=1).reshape(-1, 2).all(axis=1) & (first != second)
  return softplus(-0.1 * h)[where].mean()


ORACLES = {
  'dpo': dpo,
  'ipo': ipo,
  'online_dpo': online_dpo,
  'simpo': simpo,
  'slic': slic,
}
VARIANTS = [
  ('dpo', dict(label_smoothing=0.2), cdpo),
]
