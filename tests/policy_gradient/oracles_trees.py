"""Weights of methods whose rollouts branch: VinePPO, TreeRL and agentic ARPO."""

import numpy as np

from tests.policy_gradient.harness import ppo, ratio_of, sequence_mean, token_mean


def vineppo(x):
  """PPO with k3 in the loss; min(k3, 10) has no gradient beyond its limit."""
  delta = x['logp'] - x['reference_logp']
  k3 = np.exp(-delta) - 1 + delta
  penalty = (k3 < 10) * 1e-4 * (1 - np.exp(-delta))
  return token_mean(ppo(x, ratio_of(x), 0.8, 1.2) - penalty, x['mask'])


def treerl(x):
  return sequence_mean(ppo(x, ratio_of(x), 0.8, 1.2), x['mask'])


def agentic_arpo(x):
  return token_mean(ppo(x, ratio_of(x), 0.8, 1.2), x['mask'])


ORACLES = {'vineppo': vineppo, 'treerl': treerl, 'agentic_arpo': agentic_arpo}
