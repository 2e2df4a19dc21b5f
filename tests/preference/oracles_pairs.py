"""Losses of offline pair methods, from their papers."""

import numpy as np

from tests.preference.harness import (
  average,
  chosen_nll,
  confidence,
  logistic,
  mean,
  pair,
  ratio,
  sigmoid,
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


def ipo_per_token(x, const):
  chosen, rejected = pair(mean(x['logp'] - x['reference_logp'], x['mask']), x)
  return soft(lambda h: (h - 5.0) ** 2, chosen - rejected, x)


def robust_dpo(x, const, e=0.1):
  """Labels are probabilities, so each pair is the mean of both orders."""
  unbiased = lambda z: ((1 - e) * logistic(z) - e * logistic(-z)) / (1 - 2 * e)
  return soft(unbiased, 0.1 * margin(x), x)


def orpo(x, const):
  likelihood = np.exp(mean(x['logp'], x['mask']) - 1e-9 * ~x['mask'].any(axis=1))
  chosen, rejected = pair(np.log(likelihood / (1 - likelihood)), x)
  return chosen_nll(x) + 0.1 * soft(logistic, chosen - rejected, x)


def cpo(x, const):
  chosen, rejected = pair(total(x['logp'], x['mask']), x)
  return soft(logistic, 0.1 * (chosen - rejected), x) + chosen_nll(x)


def arpo(x, const):
  chosen, rejected = pair(total(x['logp'], x['mask']), x)
  means = pair(mean(x['logp'], x['mask']), x)
  c = np.minimum(1, 0.9 * np.exp(0.4 * np.abs(means[0] - means[1])) - 1)
  return soft(logistic, 0.1 * (chosen - c * rejected), x) + chosen_nll(x)


def alphapo(x, const, alpha=0.25):
  chosen, rejected = pair((1 - np.exp(-alpha * mean(x['logp'], x['mask']))) / alpha, x)
  return soft(logistic, 2.5 * (chosen - rejected) - 0.1, x)


def dpop(x, const):
  chosen, rejected = pair(ratio(x), x)
  return soft(logistic, 0.3 * (chosen - rejected - 50 * np.maximum(0, -chosen)), x)


def rdpo(x, const):
  longer, other = pair(x['mask'].sum(axis=1), x)
  return soft(logistic, 0.1 * margin(x) + 0.01 * (longer - other), x)


def gpo(link):
  return lambda x, const: soft(link, 0.1 * margin(x), x)


def discopop(x, const):
  def link(z):
    m = 1 / (1 + np.exp(-z / 0.05))
    return (1 - m) * logistic(z) + m * np.exp(-z)

  return soft(link, 0.05 * margin(x), x)


def chipo(x, const):
  chosen, rejected = pair(np.exp(ratio(x)) + ratio(x), x)
  return soft(logistic, np.clip(0.1 * (chosen - rejected), -10, 10), x)


def tight_chipo(x, const):
  """Some pairs are beyond the bound."""
  chosen, rejected = pair(np.exp(ratio(x)) + ratio(x), x)
  return soft(logistic, np.clip(0.1 * (chosen - rejected), -0.4, 0.4), x)


def exo_pref(x, const):
  p = confidence(x) * (1 - 1e-3) + (1 - confidence(x)) * 1e-3
  q = sigmoid(0.5 * margin(x))
  return average(q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p)), x)


def odpo(x, const):
  return soft(logistic, 0.1 * margin(x) - np.log(1 + x['annotated_margin'][::2]), x)


def odpo_linear(x, const):
  return soft(logistic, 0.1 * margin(x) - 0.5 * x['annotated_margin'][::2], x)


def dpo_length_normalized(x, const):
  chosen, rejected = pair(mean(x['logp'] - x['reference_logp'], x['mask']), x)
  return soft(logistic, 5.0 * (chosen - rejected), x)


def rpo(x, const):
  return soft(logistic, 0.5 * margin(x), x) + 0.2 * chosen_nll(x)


def rpo_of_sums(x, const):
  return soft(logistic, 0.5 * margin(x), x) + 0.2 * chosen_nll(x, total)


def tr_dpo(x, const):
  return soft(logistic, 0.05 * margin(x), x)


def step_dpo(x, const):
  return soft(logistic, 0.5 * margin(x), x)


def contrastive_preference(x, const):
  """With the distances d = -mean log-prob: log(e^(-d_w / T) / (e^(-d_w / T) + e^(-lam d_l / T)))."""
  winner, loser = pair(-mean(x['logp'], x['mask']), x)
  a, b = -winner / 0.1, -0.5 * loser / 0.1
  return soft(logistic, a - b, x)


def f_dpo(derivative, beta):
  """The derivative f'(u) of the generator, at u = pi / reference of the whole row."""

  def oracle(x, const):
    chosen, rejected = pair(derivative(np.exp(ratio(x))), x)
    return soft(logistic, beta * (chosen - rejected), x)

  return oracle


JENSEN_SHANNON = f_dpo(lambda u: np.log(2 * u / (1 + u)), 0.3)
ORACLES = {
  'alphapo': alphapo,
  'arpo': arpo,
  'chipo': chipo,
  'contrastive_preference': contrastive_preference,
  'cpo': cpo,
  'discopop': discopop,
  'dpo': dpo,
  'dpo_length_normalized': dpo_length_normalized,
  'dpop': dpop,
  'exo_pref': exo_pref,
  'f_dpo': JENSEN_SHANNON,
  'gpo': gpo(lambda z: np.exp(-z)),
  'ipo': ipo,
  'odpo': odpo,
  'online_dpo': online_dpo,
  'orpo': orpo,
  'rdpo': rdpo,
  'robust_dpo': robust_dpo,
  'rpo': rpo,
  'simpo': simpo,
  'slic': slic,
  'step_dpo': step_dpo,
  'tr_dpo': tr_dpo,
}
VARIANTS = [
  ('dpo', dict(label_smoothing=0.2), cdpo),
  ('ipo', dict(per_token=True), ipo_per_token),
  ('rpo', dict(per_token=False), rpo_of_sums),
  ('odpo', dict(alpha=0.5, log=False), odpo_linear),
  ('chipo', dict(reward_range=0.2), tight_chipo),
  ('f_dpo', dict(divergence='reverse_kl'), f_dpo(np.log, 0.9)),
  ('f_dpo', dict(divergence='forward_kl'), f_dpo(lambda u: -1 / u, 0.03)),
  ('f_dpo', dict(divergence='alpha', alpha=0.3), f_dpo(lambda u: (1 - u**-0.3) / 0.3, 0.3)),
  ('f_dpo', dict(divergence='chi_square_kl', beta=0.2), f_dpo(lambda u: u + np.log(u), 0.2)),
  ('gpo', dict(link='logistic'), gpo(logistic)),
  ('gpo', dict(link='squared'), gpo(lambda z: (1 - z) ** 2)),
  ('gpo', dict(link='truncated_square'), gpo(lambda z: np.maximum(0, 1 - z) ** 2)),
  ('gpo', dict(link='savage'), gpo(lambda z: sigmoid(-z) ** 2)),
  ('gpo', dict(link='sigmoid'), gpo(lambda z: sigmoid(-z))),
]
