"""Weights of methods that credit the tokens of a row differently."""

import numpy as np

from polgrad.losses import baselines, surrogates
from tests.policy_gradient.harness import ppo, ratio_of, sequence_mean, token_mean
from tests.policy_gradient.oracles_standard import clipped_value_error


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


def hnpg(x):
  """Each stream has its own mean; stream 0 begins in states of the data."""
  found = {'logp': 0.0, 'values': 0.0}
  for stream in (0, 1):
    rows = x['mask'] & (x['stream'] == stream)[:, None]
    found['logp'] += token_mean(ppo(x, ratio_of(x), 0.8, 1.2), rows)
    found['values'] += token_mean(-0.5 * (x['values'] - x['returns']), rows)
  return found


def igpo(x):
  """Of the given tokens a fifth is learned from, those of the highest entropy."""
  given = sorted(zip(*np.nonzero(x['mask'] & (x['injected'] > 0))), key=lambda p: -x['entropy'][p])
  weight = ppo(x, ratio_of(x), 0.8, 1.2)
  for p in given[int(0.2 * len(given)) :]:
    weight[p] = 0
  return token_mean(weight, x['mask'])


def adaptive(ratio, advantages, h, eps, widening, emphasis):
  """The bounds and the advantage of every token, by cases."""
  low = np.where(h <= 0, 1 - eps * (1 - widening * h), 1 - eps)
  high = np.where(h > 0, 1 + eps * (1 + widening * h), 1 + eps)
  inside = (1 - (1 - low) / 2 < ratio) & (ratio < 1 + (high - 1) / 2)
  shaped = (1 + emphasis * h) * advantages
  shaped = np.where(
    h > 0, np.where(inside, advantages, shaped), np.where(inside, shaped, advantages)
  )
  return low, high, shaped


def entropy_adaptive(a, eps, widening, emphasis, cap):
  ratio = np.exp(a.log_ratio)
  low, high, shaped = adaptive(ratio, a.advantages, a.signed_entropy, eps, widening, emphasis)
  loss = -np.minimum(ratio * shaped, np.clip(ratio, low, high) * shaped)
  return np.where(shaped < 0, np.minimum(loss, -cap * shaped), loss)


def signed(entropy, share):
  """HAPO's entropy-hat of the tokens of a batch: a list of numbers."""
  x = np.log(entropy)
  h = x - np.quantile(x, share, method='nearest')
  return np.where(h > 0, h / h.max(), h / -h.min())


def hapo(x):
  h = np.zeros(x['mask'].shape)
  h[x['mask']] = signed(x['entropy'][x['mask']], 0.8)
  low, high, shaped = adaptive(ratio_of(x), x['advantages'], h, 0.2, 1, 1)
  return token_mean(ppo(x | {'advantages': shaped}, ratio_of(x), low, high), x['mask'])


def token_normalized(a, limit):
  lengths, out = a.mask.sum(axis=1), np.zeros(len(a.rewards))
  for group in set(a.group_ids):
    rows = np.flatnonzero((a.group_ids == group) & a.valid)
    tokens = np.repeat(a.rewards[rows], lengths[rows])
    if not len(tokens):
      continue
    found = (a.rewards[rows] - tokens.mean()) / (tokens.std() + 1e-6)
    if np.abs(found).max() >= limit:
      found = (a.rewards[rows] - a.rewards[rows].mean()) / (a.rewards[rows].std(ddof=1) + 1e-6)
    out[rows] = found
  return out


FUNCTIONS = {
  surrogates.entropy_adaptive: (
    KNOBS := dict(eps=0.3, widening=0.6, emphasis=0.8, cap=1.5),
    lambda a: entropy_adaptive(a, **KNOBS),
  ),
  baselines.token_normalized: (dict(limit=5.0), lambda a: token_normalized(a, 5.0)),
}


def prime(x):
  return token_mean(ppo(x, ratio_of(x), 0.8, 1.2), x['mask'])


def text2grad(x):
  return {
    'logp': token_mean(ppo(x, ratio_of(x), 0.8, 1.2), x['mask']),
    'values': clipped_value_error(x, 0.1),
  }


ORACLES = {
  'text2grad': text2grad,
  'prime': prime,
  'hapo': hapo,
  'gtpo': gtpo,
  'd3s': d3s,
  'forking_tokens': forking_tokens,
  'hnpg': hnpg,
  'igpo': igpo,
  'pure': pure,
  'vc_ppo': vc_ppo,
  'vapo': vapo,
}
