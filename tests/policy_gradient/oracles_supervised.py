"""Transcriptions of the weights of supervised losses."""

import numpy as np

from polgrad.losses import weights
from tests.policy_gradient.harness import (
  constant_length,
  ppo,
  ratio_of,
  row_mean,
  sequence_mean,
  token_mean,
)


def delta(a):
  return np.where(a.mask, np.clip(a.logp - a.behavior_logp, -0.08, 0.3), 0.0)


def suffix_importance(a, block):
  """The tokens of each row's mask by number, block by block."""
  found = np.ones(a.mask.shape)
  for b, row in enumerate(a.mask):
    places = np.flatnonzero(row)
    for k in range(0, len(places), block):
      later = places[k + block :]
      found[b, places[k : k + block]] = 0.999 ** len(later) * np.exp(delta(a)[b, later].sum())
  return np.clip(found, 0.1, 10)


def row_importance(a):
  total = np.exp(delta(a).sum(axis=1, keepdims=True))
  return np.broadcast_to(np.clip(total, 0.1, 10), a.mask.shape)


def repeated_pairs(a):
  """Which tokens lie inside two neighbours of the mask that the row had before, by sets of pairs."""
  found = np.zeros(a.mask.shape)
  for b, (tokens, row) in enumerate(zip(a.tokens, a.mask)):
    seen = set()
    for t in range(1, len(tokens)):
      if row[t - 1] and row[t]:
        pair = tokens[t - 1], tokens[t]
        found[b, t - 1 : t + 1] = np.maximum(found[b, t - 1 : t + 1], pair in seen)
        seen.add(pair)
  return found


FUNCTIONS = {
  weights.row_entropy: ({}, lambda a: 0.5 / np.exp(row_mean(a.entropy, a.mask))),
  weights.positive_row_entropy: (
    {},
    lambda a: np.where(a.advantages > 0, 0.1 * np.exp(row_mean(a.entropy, a.mask)), 1.0),
  ),
  weights.probability: (
    {'exponent': 0.5, 'floor': 0.2},
    lambda a: np.sqrt(np.maximum(np.exp(a.logp), 0.2)),
  ),
  weights.undecided: ({}, lambda a: np.exp(a.logp) * (1 - np.exp(a.logp))),
  weights.suffix_importance: ({'block': 2}, lambda a: suffix_importance(a, 2)),
  weights.row_importance: ({}, row_importance),
  weights.repeated_ngram: ({'n': 2}, repeated_pairs),
}


def chord(x):
  """At update 3 of a rise over 200 updates to 0.5."""
  mu, p = 0.5 * 3 / 200, np.exp(x['logp'])
  demonstration, sampled = (x['mask'] & (x['stream'] == k)[:, None] for k in (0, 1))
  reinforced = token_mean(ppo(x, ratio_of(x), 0.8, 1.2), sampled)
  return mu * token_mean(p * (1 - p), demonstration) + (1 - mu) * reinforced


def srft(x):
  """The demonstrations are in two sums with different divisors."""
  demonstration, sampled = (x['mask'] & (x['stream'] == k)[:, None] for k in (0, 1))
  p, h, a = np.exp(x['logp']), row_mean(x['entropy'], x['mask']), x['advantages']
  imitated = token_mean(0.5 * np.exp(-h), demonstration)
  shaped = constant_length(a * 0.1 * p / (p + 0.1) ** 2, demonstration, 5)
  signed = constant_length(np.where(a > 0, 0.1 * np.exp(h) * a, a), sampled, 5)
  entropy = constant_length(np.full(a.shape, 0.001), x['mask'], 5)
  return {'logp': imitated + 8 * (shaped + signed), 'entropy': 8 * entropy}


def uft(x):
  """Given tokens are a thousandth of the loss of samples, which has a KL and an entropy bonus."""
  given, sampled = (x['mask'] & (x['stream'] == k)[:, None] for k in (0, 1))
  k3 = np.exp(x['reference_logp'] - x['logp']) - 1
  reinforced = token_mean(ppo(x, ratio_of(x), 0.8, 1.2) + 0.001 * k3, sampled)
  return {
    'logp': 0.001 * token_mean(1.0, given) + reinforced,
    'entropy': 0.001 * token_mean(1.0, sampled),
  }


def dypo(x):
  """Half GRPO with a KL, half logistic pairs of right and wrong samples, beside imitation."""
  given, sampled = (x['mask'] & (x['stream'] == k)[:, None] for k in (0, 1))
  k3 = np.exp(x['reference_logp'] - x['logp']) - 1
  grpo = sequence_mean(ppo(x, ratio_of(x), 0.8, 1.2) + 0.001 * k3, sampled)
  d = np.where(sampled, x['logp'] - x['reference_logp'], 0).sum(axis=1)
  pairs, prompts = np.zeros(len(d)), np.unique(x['group_ids'])
  for g in prompts:
    rows = np.flatnonzero((x['group_ids'] == g) & sampled.any(axis=1))
    right, wrong = (rows[(x['rewards'][rows] >= 1) == one] for one in (True, False))
    for s in right:
      for f in wrong:
        push = 1 / (1 + np.exp(d[s] - d[f])) / (len(right) * len(wrong)) / len(prompts)
        pairs[s] += push
        pairs[f] -= push
  return token_mean(1.0, given) + 0.5 * grpo + 0.5 * np.where(sampled, pairs[:, None], 0)


def relift(x):
  """The update of a step; that of answers which wait is another one."""
  return {
    'logp': constant_length(ratio_of(x) * x['advantages'], x['mask'], 5),
    'entropy': constant_length(np.full(x['mask'].shape, 0.001), x['mask'], 5),
  }


ORACLES = {'chord': chord, 'srft': srft, 'uft': uft, 'dypo': dypo, 'relift': relift}
