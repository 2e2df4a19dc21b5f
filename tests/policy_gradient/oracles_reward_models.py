"""Transcriptions of the functions that reward models are trained with."""

import numpy as np

from polgrad.losses import implicit_rewards, pointwise, preference_losses


def last_value(a):
  """The entry of the last token in each row's mask; the second row has none."""
  ends = [np.flatnonzero(row) for row in a.mask]
  return np.array([x[at[-1]] if len(at) else 0.0 for x, at in zip(a.values_after, ends)])


def focal(a):
  sure = lambda z: 1 / (1 + np.exp(-z))
  one = lambda z: (1 - 2 * np.maximum(sure(z) - 0.5, 0)) ** 2 * -np.log(sure(z))
  return a.label * one(a.margin) + (1 - a.label) * one(-a.margin)


FUNCTIONS = {
  implicit_rewards.last_value: ({}, last_value),
  implicit_rewards.user_score: ({}, lambda a: a.user_score),
  preference_losses.focal: ({}, focal),
  pointwise.squared_error: ({}, lambda a: (a.score - a.target) ** 2 / 2),
}
