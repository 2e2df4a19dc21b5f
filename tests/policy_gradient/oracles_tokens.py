"""Weights of methods that credit the tokens of a row differently."""

import numpy as np

from tests.policy_gradient.harness import ppo, ratio_of, sequence_mean, token_mean


def value_error(x):
  return token_mean(-0.5 * (x['values'] - x['returns']), x['mask'])


def vc_ppo(x):
  return {'logp': token_mean(ppo(x, ratio_of(x), 0.8, 1.2), x['mask']), 'values': value_error(x)}


def vapo(x):
  """The likelihood of right rows is a mean over their own tokens."""
  right = x['mask'] & (x['rewards'] > 0.5)[:, None]
  weight = token_mean(ppo(x, ratio_of(x), 0.8, 1.28), x['mask']) + 0.1 * right / right.sum()
  return {'logp': weight, 'values': value_error(x)}


def pure(x):
  return token_mean(ppo(x, ratio_of(x), 0.8, 1.2), x['mask'])


def gtpo(x):
  return sequence_mean(x['advantages'], x['mask'])


def d3s(x):
  return token_mean(ppo(x, ratio_of(x), 0.8, 1.2), x['mask'])


def forking_tokens(x):
  """Tokens below the quantile have no gradient, and count in the mean."""
  tau = np.quantile(x['entropy'][x['mask']], 0.8)
  weight = ppo(x, ratio_of(x), 0.8, 1.28)
  return token_mean(np.where(x['entropy'] >= tau, weight, 0), x['mask'])


ORACLES = {
  'gtpo': gtpo,
  'd3s': d3s,
  'forking_tokens': forking_tokens,
  'pure': pure,
  'vc_ppo': vc_ppo,
  'vapo': vapo,
}
