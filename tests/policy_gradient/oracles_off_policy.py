"""Regressions and off-policy methods: minus the gradient of their losses, from the papers' equations.

`ORACLES` has a function of the arrays for every experiment; `FIX_A` has rows of the weight table,
(overrides, loss, weights of row 1, weights of row 2).
"""

import functools

import numpy as np

from polgrad.losses import aggregation
from polgrad.registry import part
from tests.policy_gradient.harness import (
  constant_length,
  ratio_of,
  row_sum,
  sequence_sum,
  token_mean,
)


def reinforce(x):
  return token_mean(x['advantages'], x['mask'])


# Masks and weights of tokens.


def one_sided(x, low, high):
  a, r = x['advantages'], ratio_of(x)
  return np.where(a >= 0, r <= high, r >= low)


def two_sided(x, low, high):
  r = ratio_of(x)
  return (r >= low) & (r <= high)


def rec_one_side(x):
  return token_mean(one_sided(x, 0.4, 3.0) * x['advantages'], x['mask'])


def rec_one_side_is(x):
  return token_mean(one_sided(x, 0.4, 3.0) * ratio_of(x) * x['advantages'], x['mask'])


def rec_two_side(x):
  return token_mean(two_sided(x, 0.8, 1.2) * x['advantages'], x['mask'])


def rec_ring(x):
  a, r = x['advantages'], ratio_of(x)
  keep = two_sided(x, 0.8, 1.2) | ((a >= 0) & (r <= 0.4)) | ((a <= 0) & (r >= 3.0))
  return token_mean(keep * a, x['mask'])


def softmax_ppo(x):
  return token_mean(two_sided(x, 1 / 1.3, 1.3) * x['advantages'], x['mask'])


def asymre(x):
  return token_mean(x['advantages'] + 0.1, x['mask'])


def mirror(x, coefficient):
  moved = x['logp'] - x['proximal_logp']
  return token_mean(x['advantages'] - coefficient * moved, x['mask'])


def topr(x):
  ratio = np.exp(row_sum(x['logp'] - x['proximal_logp'], x['mask']))
  taper = np.where(x['rewards'][:, None] > 0, 1, np.minimum(ratio, 1))
  return sequence_sum(taper * x['advantages'], x['mask'])


def topr_token(x):
  taper = np.where(x['rewards'][:, None] > 0, 1, np.minimum(ratio_of(x), 1))
  return token_mean(taper * x['advantages'], x['mask'])


def nft(x):
  q, r, c = np.clip(x['success_rate'], 0.02, 0.98)[:, None], ratio_of(x), x['advantages']
  w = np.where(c > 0, c, c * q * r / np.maximum(1 - q * r, 1 - q))
  return constant_length(w, x['mask'], 5)


# Rows. A row without tokens is in no group and in no mean.


def moved(x, anchor):
  return row_sum(x['logp'] - x[anchor], x['mask'])[:, 0]


def by_row(w, x):
  """Weights of rows at each of their tokens, over the number of rows with tokens."""
  return sequence_sum(np.broadcast_to(w[:, None], x['mask'].shape), x['mask'])


def at_first(w, x):
  """Weights of rows at their first token."""
  first = x['mask'] & (np.cumsum(x['mask'], axis=1) == 1)
  return np.where(first, by_row(w, x), 0)


def of_group(v, x, reduce):
  """reduce(the values of a row's group, its own place there) for every row with tokens, else 0."""
  out, used = np.zeros(len(v)), x['mask'].any(axis=1)
  for i in np.flatnonzero(used):
    group = np.flatnonzero(used & (x['group_ids'] == x['group_ids'][i]))
    out[i] = reduce(v[group], list(group).index(i))
  return out


def above_mean(v, x):
  return of_group(v, x, lambda group, i: group[i] - group.mean())


def opmd(x):
  return by_row(above_mean(x['rewards'] - moved(x, 'proximal_logp'), x), x)


def opmd_log_partition(x):
  log_z = of_group(x['rewards'], x, lambda group, i: np.log(np.exp(group).mean()))
  return by_row(x['rewards'] - log_z - moved(x, 'proximal_logp'), x)


def opmd_kimi_sequence(x):
  return by_row(above_mean(x['rewards'], x) - 0.1 * moved(x, 'proximal_logp'), x)


def tba(x, step=3, updates=300):
  """beta falls from .014 to .004 over the updates of 150 batches."""
  beta = 0.014 + (0.004 - 0.014) * step / updates
  return by_row(2 * above_mean(x['rewards'] / beta - moved(x, 'reference_logp'), x), x)


def copg(x):
  """R_beta(y) - R_beta(y') for the first of a pair, over the number of pairs."""
  regularised = x['rewards'] - 0.06 * moved(x, 'reference_logp')
  return by_row(
    2 * of_group(regularised, x, lambda pair, i: 2 * pair[i] - pair.sum() if len(pair) == 2 else 0),
    x,
  )


def first_of(v, x):
  return v[np.arange(len(v)), x['mask'].argmax(axis=1)]


def dro_v(x):
  """Policy weight tau (R - V - tau delta) with V = tau v; the value's is the same."""
  error = x['rewards'] - 0.2 * first_of(x['values'], x) - 0.2 * moved(x, 'reference_logp')
  return {'logp': by_row(0.2 * error, x), 'values': at_first(0.2 * error, x)}


def tbrm(x):
  error = first_of(x['log_normalizer'], x) + moved(x, 'reference_logp') - x['rewards'] / 0.02
  return {'logp': by_row(-2 * error, x), 'log_normalizer': at_first(-2 * error, x)}


def a_star_po(x):
  best = 0.5 * np.log(np.exp(x['baseline_rewards'] / 0.5).mean(axis=1))
  return by_row(2e-3 * (x['rewards'] - best - 1e-3 * moved(x, 'reference_logp')), x)


def pcl(x, *, beta=0.3, window=3):
  policy, value = np.zeros(x['mask'].shape), np.zeros(x['mask'].shape)
  for b, mask in enumerate(x['mask']):
    places = np.flatnonzero(mask)
    for i, t in enumerate(places):
      path, after = places[i : i + window], places[i + window : i + window + 1]
      moved = (x['logp'] - x['reference_logp'])[b, path].sum()
      end = x['values'][b, after].sum() if len(after) else x['rewards'][b]
      error = end - x['values'][b, t] - beta * moved
      policy[b, path] += beta * error
      value[b, t] += error
      value[b, after] -= error
  return {'logp': token_mean(policy, x['mask']), 'values': token_mean(value, x['mask'])}


def sppo(x):
  target = 10 * (x['label'] - 0.5)
  return by_row(2 * (target - moved(x, 'reference_logp')), x)


def pairs(x):
  """R - R' and the log of s s' of every row's pair; 0 in a row whose partner has no tokens."""
  gap = lambda pair, i: 2 * pair[i] - pair.sum() if len(pair) == 2 else 0
  both = lambda pair, i: pair.sum() if len(pair) == 2 else 0
  ratios = moved(x, 'proximal_logp')
  return of_group(x['rewards'], x, gap), of_group(ratios, x, both), of_group(ratios, x, gap)


def p3o(x):
  """The mean over pairs is that over rows of twice a pair's weight."""
  gap, log_product, log_odds = pairs(x)
  keep = np.where(gap >= 0, log_odds <= 0.2, log_odds >= -0.2)
  return by_row(2 * keep * np.exp(log_product) * gap / 2, x)


def p3o_separate(x):
  gap, log_product, _ = pairs(x)
  product = np.exp(log_product)
  keep = np.where(gap >= 0, product <= 1.2, product >= 0.8)
  return by_row(keep * product * gap, x)


ORACLES = {
  'rec_one_side': rec_one_side,
  'rec_one_side_is': rec_one_side_is,
  'rec_two_side': rec_two_side,
  'rec_ring': rec_ring,
  'red_drop': reinforce,
  'red_weight': reinforce,
  'asymre': asymre,
  'opmd': opmd,
  'opmd_log_partition': opmd_log_partition,
  'opmd_kimi': functools.partial(mirror, coefficient=0.1),
  'opmd_kimi_sequence': opmd_kimi_sequence,
  'opmd_simple': reinforce,
  'topr': topr,
  'topr_token': topr_token,
  'softmax_ppo': softmax_ppo,
  'nft': nft,
  'tba': tba,
  'copg': copg,
  'dro_v': dro_v,
  'dro': functools.partial(mirror, coefficient=0.1),
  'pcl': pcl,
  'tbrm': tbrm,
  'a_star_po': a_star_po,
  'sppo': sppo,
  'p3o': p3o,
  'p3o_separate': p3o_separate,
}

REINFORCE = ({}, 0.41, [0.2, 0.2, 0.2], [-0.1, -0.1, 0])
NARROW = {'weights__region__low': 0.8, 'weights__region__high': 1.2}
PER_TOKEN = {'aggregation': part(aggregation.token_mean)}
FIX_A = {
  'rec_one_side': [(NARROW, 0.5, [0.2, 0, 0.2], [0, -0.1, 0])],
  # The value is that of r A; the table has that of sg(r) A log pi.
  'rec_one_side_is': [(NARROW, -0.249794, [0.221034, 0, 0.163746], [0, -0.134986, 0])],
  'rec_two_side': [({}, 0.62, [0.2, 0, 0.2], [0, 0, 0])],
  'rec_ring': [({'weights__region__outer_high': 1.3}, 0.5, [0.2, 0, 0.2], [0, -0.1, 0])],
  'red_drop': [REINFORCE],
  'red_weight': [REINFORCE],
  'asymre': [({}, 0.508, [0.22, 0.22, 0.22], [-0.08, -0.08, 0])],
  'opmd_kimi': [
    ({'penalties__mirror__weight': 0.2}, 0.425, [0.196, 0.176, 0.208], [-0.08, -0.112, 0])
  ],
  'opmd_simple': [REINFORCE],  # halved by the learning rate
  'topr': [({}, 1.111103, [0.5, 0.5, 0.5], [-0.204683, -0.204683, 0])],
  'topr_token': [({}, 0.437543, [0.2, 0.2, 0.2], [-0.060653, -0.1, 0])],
  'softmax_ppo': [({}, 0.62, [0.2, 0, 0.2], [0, 0, 0])],
  # The advantage of row 1 is 1 in the fixture, twice c = 1 - q, and so are its weights.
  'nft': [(PER_TOKEN, -0.133180, [0.2, 0.2, 0.2], [-0.043527, -0.134986, 0])],
  'tba': [({'beta': 0.5}, 1.380625, [1.175] * 3, [-1.175, -1.175, 0])],
  # The square is completed: (R - R')^2 / (2 beta) = 2.25 above the table's -0.869375.
  'copg': [({'beta': 0.5, 'scale': 0.5}, 1.380625, [1.175] * 3, [-1.175, -1.175, 0])],
  'dro': [({}, 0.4175, [0.198, 0.188, 0.204], [-0.09, -0.106, 0])],
  'p3o': [
    ({}, 1.619831, [0, 0, 0], [0, 0, 0]),
    ({'loss__delta': 0.8}, 1.113634, [1.012394] * 3, [-1.012394, -1.012394, 0]),
  ],
  'p3o_separate': [({}, 0.112394, [0, 0, 0], [-1.012394, -1.012394, 0])],
}
