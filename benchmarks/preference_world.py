"""The world of the preference report: a tiny policy, two ways to prefer, and four ways to get pairs.

Everything is exact. A distribution over the sequences is f64[S]; logits of the policy are f64[P, 3].
"""

import functools
from typing import NamedTuple

import numpy as np

from polgrad.tabular import enumerable

POLICY = enumerable.table(3, 2, stop=0)  # seven sequences of one or two tokens
SIZE = len(POLICY.tokens)
TEMPERATURE = 0.25  # of methods with a reference: their `beta` or `tau`
REWARDS = np.array([0.1, 0.8, -0.6, 0.3, 1.0, -0.3, -0.8])
SEEN = np.array([1, 2, 4, 6])  # the sequences of the data that lacks some


class Preferences(NamedTuple):
  """Which sequence is preferred how often."""

  name: str
  wins: np.ndarray  # f64[S, S], probability that the first is preferred; wins + wins.T = 1
  # f64[S] with wins = sigmoid of their differences; None: no rewards explain the wins
  rewards: np.ndarray | None


class Data(NamedTuple):
  """Who samples the two sequences of a pair, independently."""

  name: str
  logits: np.ndarray | None  # of the policy that samples; None: the policy that is trained
  seen: np.ndarray  # bool[S], sequences that can occur


def sigmoid(x: np.ndarray) -> np.ndarray:
  return 1 / (1 + np.exp(-x))


@functools.cache
def bradley_terry() -> Preferences:
  return Preferences('bradley_terry', sigmoid(REWARDS[:, None] - REWARDS[None, :]), REWARDS)


@functools.cache
def game() -> Preferences:
  """Win probabilities that no reward explains: sequence 1 mostly beats 4, 4 beats 6, and 6 beats 1."""
  scores = 1.5 * np.random.default_rng(0).normal(size=(SIZE, SIZE)) + 2 * REWARDS[:, None]
  scores[[1, 4, 6], [4, 6, 1]] = 3.0
  scores[[4, 6, 1], [1, 4, 6]] = -3.0
  return Preferences('game', sigmoid(scores - scores.T), None)


def reference() -> np.ndarray:
  return _logits(1)


@functools.cache
def sources() -> tuple[Data, ...]:
  every = np.ones(SIZE, bool)
  return (
    Data('on_policy', None, every),
    Data('reference', reference(), every),
    Data('other', _logits(2), every),
    Data('partial', reference(), np.isin(np.arange(SIZE), SEEN)),
  )


def probabilities(logits) -> np.ndarray:
  return np.exp(np.asarray(enumerable.logp(POLICY, logits)).sum(axis=1))


def sampled(data: Data, logits) -> np.ndarray:
  """Distribution of one sequence of a pair, f64[S]; `logits` are those of the trained policy."""
  p = probabilities(logits if data.logits is None else data.logits) * data.seen
  return p / p.sum()


def _logits(seed: int) -> np.ndarray:
  return 0.7 * np.random.default_rng(seed).normal(size=(POLICY.prefixes.max() + 1, 3))
