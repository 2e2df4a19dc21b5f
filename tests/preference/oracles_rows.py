"""Losses of single rows and of lists of rows, from their papers."""

import functools

import numpy as np

from tests.preference.harness import (
  average,
  chosen_nll,
  logistic,
  pair,
  ratio,
  sigmoid,
  softplus,
  total,
)


def rows(x):
  """Rows that have tokens, bool[B]."""
  return x['mask'].any(axis=1)


def over_rows(loss, x):
  return float(loss[rows(x)].mean())


def over_prompts(loss, x):
  """The mean of loss(indices of the rows of a prompt), over prompts with two rows or more."""
  found = []
  for group in np.unique(x['group_ids']):
    at = np.flatnonzero((x['group_ids'] == group) & rows(x))
    found += [loss(at)] if len(at) > 1 else []
  return float(np.mean(found))


def over_pairs(loss, x):
  """The mean over pairs of loss(chosen row, rejected row), with soft labels of both orders."""
  chosen, rejected = x['label'], 1 - x['label']
  each = [
    chosen[i] * loss(i, i + 1) + rejected[i] * loss(i + 1, i) for i in range(0, len(chosen), 2)
  ]
  return average(np.array(each), x)


def kto(x, const, beta=0.1, desirable=1.0, undesirable=1.0):
  z0 = max(beta * const['mismatched_log_ratio'][rows(x)].mean(), 0)
  z, p = beta * ratio(x), x['label']
  good, bad = 1 - sigmoid(z - z0), 1 - sigmoid(z0 - z)
  return over_rows(desirable * p * good + undesirable * (1 - p) * bad, x)


def bco(x, const):
  delta = (0.01 * ratio(const))[rows(x)].mean()
  z, p = 0.01 * ratio(x), x['label']
  return over_rows(p * logistic(z - delta) + (1 - p) * logistic(delta - z), x)


def bco_matched(x, const, beta=0.1):
  """Weights of bad rows are ratios of densities, clipped to [1/2, 10]."""
  delta = (beta * ratio(const))[rows(x)].mean()
  z, p = beta * ratio(x), x['label']
  w = np.minimum(np.maximum(x['density_ratio'], 0.5), 10)
  return over_rows(p * logistic(z - delta) + w * (1 - p) * logistic(delta - z), x)


def bco_paired(x, const):
  delta = (0.1 * ratio(const))[rows(x)].mean()
  z = 0.1 * ratio(x)
  return over_pairs(lambda w, l: logistic(z[w] - delta) + logistic(delta - z[l]), x)


def apo_zero(x, const):
  z = 0.1 * ratio(x)
  return over_pairs(lambda w, l: 1 - sigmoid(z[w]) + sigmoid(z[l]), x)


def apo_zero_unpaired(x, const):
  z, p = 0.3 * ratio(x), x['label']
  return over_rows(p * (1 - sigmoid(z)) + (1 - p) * sigmoid(z), x)


def apo_down(x, const):
  z = 0.1 * ratio(x)
  return over_pairs(lambda w, l: sigmoid(z[w]) + 1 - sigmoid(z[w] - z[l]), x)


def srpo(x, const, beta=0.01, alpha=0.5):
  """Rows of a pair are w, l after the prompt, after one that shows l, and after one that shows w."""
  z, losses = beta * ratio(x).reshape(-1, 6), []
  for (u_w, u_l, a_wl, a_ll, a_ww, a_lw), there in zip(z, rows(x).reshape(-1, 6)):
    robust = ((u_w - a_ww) - (u_l - a_ll)) ** 2
    improve = (0.5 - (a_wl - a_ll)) ** 2 + (-0.5 - (a_lw - a_ww)) ** 2
    losses.append(((1 - alpha) * robust + alpha * improve) * there.all())
  return float(np.mean(losses))


def cal_dpo(x, const):
  """The target of a soft label p is (2 p - 1) t."""
  d, t = ratio(x), 1 / (2 * 0.001)
  margin = over_pairs(lambda w, l: logistic(d[w] - d[l]), x)
  calibration = (d - (2 * x['label'] - 1) * t) ** 2 / 2
  return margin + average(calibration[::2] + calibration[1::2], x)


def bonbon(x, const):
  best, worst = pair(ratio(x), x)
  target = 7 * sum(1 / k for k in range(1, 8))
  assert round(target, 2) == 18.15
  p = np.maximum(x['label'][::2], 1 - x['label'][::2])
  h = best - worst
  margin = average(p * (h - target) ** 2 + (1 - p) * (-h - target) ** 2, x)
  return 0.995 * margin + 0.005 * chosen_nll(x, total)


def softmax(z):
  e = np.exp(z - z.max())
  return e / e.sum()


def one_hot(rewards):
  return np.eye(len(rewards))[np.argmax(rewards)]


def infonca(x, const):
  r = 0.01 * ratio(x)
  return over_prompts(lambda k: -one_hot(x['rewards'][k]) @ np.log(softmax(r[k])), x)


def infonca_soft(x, const):
  r = 2.0 * ratio(x)
  return over_prompts(lambda k: -softmax(x['rewards'][k] / 0.3) @ np.log(softmax(r[k])), x)


def nca_loss(r, p):
  return p @ softplus(-r) + softplus(r).mean()


def nca(x, const):
  r = 0.01 * ratio(x)
  return over_prompts(lambda k: nca_loss(r[k], one_hot(x['rewards'][k])), x)


def nca_soft(x, const):
  r = 2.0 * ratio(x)
  return over_prompts(lambda k: nca_loss(r[k], softmax(x['rewards'][k] / 0.3)), x)


def exo_reward(x, const):
  def loss(k):
    q, p = softmax(0.5 * ratio(x)[k]), softmax(x['rewards'][k] / 0.5)
    return q @ np.log(q / p)

  return over_prompts(loss, x)


def mc_po(x, const, negatives=1):
  """Negatives by Gumbel's trick, with the noise -log(-log u)."""
  r, noise = 0.1 * ratio(x), -np.log(-np.log(x['uniform']))

  def loss(k):
    best = k[np.argmax(x['rewards'][k])]
    others = [i for i in k if i != best]
    drawn = sorted(others, key=lambda i: -(0.1 * ratio(const) + noise)[i])[:negatives]
    return -np.log(softmax(r[[best, *drawn]])[0])

  return over_prompts(loss, x)


def two_negatives(x, const):
  return mc_po(x, const, negatives=2)


def weighted_kto(x, const):
  return kto(x, const, beta=0.5, desirable=1.5, undesirable=0.8)


def spin(x, const):
  """The demonstration is preferred to the sample, whatever their rewards."""
  sampled, demonstration = (ratio(x)[x['stream'] == i] for i in (1, 0))
  return average(logistic(0.1 * (demonstration - sampled)), x)


ORACLES = {
  'srpo': srpo,
  'apo_down': apo_down,
  'apo_zero': apo_zero,
  'bco': bco,
  'bonbon': bonbon,
  'cal_dpo': cal_dpo,
  'exo_reward': exo_reward,
  'infonca': infonca,
  'kto': kto,
  'mc_po': mc_po,
  'nca': nca,
  'spin': spin,
}
LISTED = dict(candidates=4, samples_per_prompt=4)
VARIANTS = [
  ('apo_zero', dict(beta=0.3, paired=False), apo_zero_unpaired),
  ('bco', dict(beta=0.1, paired=True), bco_paired),
  ('bco', dict(beta=0.1, density_ratio=True), bco_matched),
  ('infonca', dict(beta=2.0, alpha=0.3, **LISTED), infonca_soft),
  ('infonca', dict(beta=2.0, alpha=0.3, sampled=True, **LISTED), infonca_soft),
  ('srpo', dict(beta=0.3, alpha=0.2), functools.partial(srpo, beta=0.3, alpha=0.2)),
  ('kto', dict(beta=0.5, desirable=1.5, undesirable=0.8), weighted_kto),
  ('mc_po', dict(negatives=2, **LISTED), two_negatives),
  ('nca', dict(beta=2.0, alpha=0.3, **LISTED), nca_soft),
]
