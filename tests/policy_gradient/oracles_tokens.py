"""Weights of methods that credit the tokens of a row differently."""

from tests.policy_gradient.harness import ppo, ratio_of, token_mean


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


ORACLES = {'pure': pure, 'vc_ppo': vc_ppo, 'vapo': vapo}
