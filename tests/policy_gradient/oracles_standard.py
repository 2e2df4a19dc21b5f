"""Weights of the standard methods: REINFORCE and PPO, their baselines and off-policy corrections."""

import itertools

import numpy as np

from polgrad.losses import advantages, aggregation, surrogates, weights
from polgrad.registry import part
from tests.policy_gradient.harness import (
  constant_length,
  ppo,
  ratio_of,
  row_mean,
  row_sum,
  sequence_mean,
  sequence_sum,
  token_mean,
)

INF = float('inf')


def reinforce(x):
  return sequence_sum(x['advantages'], x['mask'])


def reinforce_of_tokens(x):
  return token_mean(x['advantages'], x['mask'])


def clipped(x, low=0.8, high=1.2):
  return ppo(x, ratio_of(x), low, high)


def delta(x):
  return x['logp'] - x['reference_logp']


def forward_kl(x):
  """-d k3 / d logp = -(1 - reference / pi)."""
  return -(1 - np.exp(-delta(x)))


def value_error(x, coefficient):
  return token_mean(-coefficient * (x['values'] - x['returns']), x['mask'])


def clipped_value_error(x, coefficient, eps=0.2):
  """The gradient of the larger of two squares; where the value is near, both are the same."""
  values, old, returns = x['values'], x['old_values'], x['returns']
  near = np.clip(values, old - eps, old + eps)
  live = (np.abs(values - old) <= eps) | ((values - returns) ** 2 > (near - returns) ** 2)
  return token_mean(-coefficient * live * (values - returns), x['mask'])


def entropy(x, coefficient):
  return token_mean(np.full(x['mask'].shape, coefficient), x['mask'])


def grpo(x):
  return sequence_mean(clipped(x) + 0.04 * forward_kl(x), x['mask'])


def dr_grpo(x):
  return constant_length(clipped(x), x['mask'], 5)


def dapo(x):
  return token_mean(clipped(x, 0.8, 1.28), x['mask'])


def gspo(x):
  ratio = np.exp(row_mean(x['logp'] - x['proximal_logp'], x['mask']))
  return sequence_mean(ppo(x, ratio, 1 - 3e-4, 1 + 4e-4), x['mask'])


def ppo_with_values(x):
  return {
    'logp': token_mean(clipped(x), x['mask']),
    'values': clipped_value_error(x, 0.5),
    'entropy': entropy(x, 0.001),
  }


def reinforce_plus_plus(x):
  return token_mean(clipped(x), x['mask'])


def reinforce_plus_plus_baseline(x):
  return token_mean(clipped(x) - 0.01 * delta(x), x['mask'])


def dual_clipped(x, cap):
  ratio = ratio_of(x)
  return ((x['advantages'] >= 0) | (ratio <= cap)) * clipped(x)


def dual_clip_ppo(x):
  return {
    'logp': token_mean(dual_clipped(x, 3), x['mask']),
    'values': clipped_value_error(x, 0.5),
  }


def spo_single_stream(x):
  ratio, a = ratio_of(x), x['advantages']
  return token_mean(((a >= 0) | (ratio <= 10)) * ppo(x, ratio, 0.8, 1.28), x['mask'])


def cispo(x):
  return token_mean(np.minimum(ratio_of(x), 5) * x['advantages'], x['mask'])


def gmpo(x):
  """K_t s A with the mean of the clipped log-ratios in s."""
  d, good = x['logp'] - x['proximal_logp'], x['advantages'] >= 0
  clip = np.where(good, np.minimum(d, 0.4), np.maximum(d, -0.4))
  ratio = np.exp(row_mean(clip, x['mask']))
  return sequence_mean((clip == d) * ratio * x['advantages'], x['mask'])


def sapo(x):
  ratio = ratio_of(x)
  tau = np.where(x['advantages'] > 0, 1, 1.05)
  p = 1 / (1 + np.exp(-tau * (ratio - 1)))
  return sequence_mean(4 * p * (1 - p) * ratio * x['advantages'], x['mask'])


def aspo(x):
  """w A, w the inverse ratio of good tokens and the ratio of bad ones, and 0 where PPO clips."""
  ratio, good = ratio_of(x), x['advantages'] >= 0
  keep = np.where(good, ratio <= 1.2, ratio >= 0.8)
  weight = keep * np.minimum(np.where(good, 1 / ratio, ratio), 3) * x['advantages']
  return token_mean(weight + 0.001 * forward_kl(x), x['mask'])


def ce_gppo(x):
  """r A, or where PPO clips 1.2 A of good tokens and 0.75 times 0.8 A of bad ones."""
  ratio, a = ratio_of(x), x['advantages']
  weight = np.where((a > 0) & (ratio > 1.2), 1.2, ratio)
  weight = np.where((a < 0) & (ratio < 0.8), 0.75 * 0.8, weight)
  return token_mean(weight * a, x['mask'])


def pass_at_two(a):
  """The mean normalised advantage of the pairs of rows of the group that a row is in."""
  out = np.zeros(len(a.rewards))
  for group in set(a.group_ids):
    rows = np.flatnonzero((a.group_ids == group) & a.valid)
    pairs = list(itertools.combinations(rows, 2))
    passed = np.array([max(a.rewards[list(pair)] >= 0.1) for pair in pairs], float)
    for row in rows if pairs else ():
      own = [row in pair for pair in pairs]
      out[row] = (passed[own].mean() - passed.mean()) / (passed.std() + 0.1)
  return out


def log_rho(x):
  return x['proximal_logp'] - x['behavior_logp']


def tis(x):
  return token_mean(np.minimum(np.exp(log_rho(x)), 2) * clipped(x, 0.8, 1.28), x['mask'])


def mis(x):
  rho = np.exp(row_sum(log_rho(x), x['mask']))
  return token_mean(np.where(rho <= 3, rho, 0) * clipped(x, 0.8, 1.28), x['mask'])


def icepop(x):
  rho = np.exp(log_rho(x))
  return token_mean(np.where((rho >= 0.5) & (rho <= 5), rho, 0) * clipped(x), x['mask'])


def decoupled_ppo(x):
  return token_mean(np.minimum(np.exp(log_rho(x)), 5) * clipped(x), x['mask'])


def a3po(x):
  alpha = 1 / np.maximum(x['staleness'], 1)[:, None]
  x = x | {'proximal_logp': alpha * x['behavior_logp'] + (1 - alpha) * x['logp']}
  rho = np.exp(log_rho(x))
  return token_mean(np.where(rho <= 5, rho, 0) * clipped(x), x['mask'])


def impala(x):
  return {
    'logp': reinforce_of_tokens(x),
    'values': value_error(x, 0.5),
    'entropy': entropy(x, 0.001),
  }


def retrace(x):
  weight = np.minimum(np.exp(log_rho(x)), 2) * clipped(x)
  return {'logp': token_mean(weight, x['mask']), 'values': value_error(x, 0.5)}


def deepseek_v32(x):
  distance = row_mean(x['proximal_logp'] - x['logp'], x['mask'])
  keep = (x['advantages'] >= 0) | (distance <= 0.5)
  return sequence_mean(keep * clipped(x) - 0.001 * ratio_of(x) * delta(x), x['mask'])


def intellect2(x):
  """Two-sided clipping as the paper writes it: the ratio is cut at 4 before anything else."""
  ratio = ratio_of(x)
  weight = np.where(ratio < 4, ppo(x, np.minimum(ratio, 4), 0.8, 1.2), 0)
  return {
    'logp': token_mean(weight + 0.001 * forward_kl(x), x['mask']),
    'entropy': entropy(x, 0.0001),
  }


def vespo(x):
  ratio = np.exp(row_sum(x['logp'] - x['proximal_logp'], x['mask']))
  good = ratio**2 * np.exp(3 * (1 - ratio))
  bad = ratio**3 * np.exp(2 * (1 - ratio))
  return token_mean(np.where(x['advantages'] >= 0, good, bad) * x['advantages'], x['mask'])


def dppo(x):
  ratio = ratio_of(x, 'behavior_logp')
  gap = np.exp(x['logp']) - np.exp(x['behavior_logp'])
  keep = np.where(x['advantages'] >= 0, gap <= 0.15, gap >= -0.15)
  return constant_length(keep * np.minimum(ratio, 10) * x['advantages'], x['mask'], 5)


def entropy_bonus(x):
  return {'logp': token_mean(clipped(x), x['mask']), 'entropy': entropy(x, 0.001)}


ORACLES = {
  'reinforce': reinforce,
  'rloo': reinforce,
  'remax': reinforce,
  'opo': reinforce,
  'otb': reinforce,
  'gpg': reinforce_of_tokens,
  'grpo': grpo,
  'dr_grpo': dr_grpo,
  'dapo': dapo,
  'pass_at_k': dapo,
  'gspo': gspo,
  'ppo': ppo_with_values,
  'pf_ppo': ppo_with_values,
  'dual_clip_ppo': dual_clip_ppo,
  'spo_single_stream': spo_single_stream,
  'reinforce_plus_plus': reinforce_plus_plus,
  'reinforce_plus_plus_baseline': reinforce_plus_plus_baseline,
  'cispo': cispo,
  'gmpo': gmpo,
  'sapo': sapo,
  'aspo': aspo,
  'ce_gppo': ce_gppo,
  'tis': tis,
  'mis': mis,
  'icepop': icepop,
  'decoupled_ppo': decoupled_ppo,
  'a3po': a3po,
  'impala': impala,
  'retrace': retrace,
  'deepseek_v32': deepseek_v32,
  'intellect2': intellect2,
  'vespo': vespo,
  'dppo': dppo,
  'entropy_bonus': entropy_bonus,
}

FUNCTIONS = {
  advantages.pass_at_k: (dict(k=2, least=0.1, eps=0.1), pass_at_two),
  surrogates.flipped: (
    dict(eps_low=0.2, eps_high=0.3, cap=1.5),
    lambda a: (
      -a.advantages
      * np.where(
        a.advantages >= 0,
        np.minimum(1 / np.minimum(np.exp(a.log_ratio), 1.3), 1.5),
        np.minimum(np.maximum(np.exp(a.log_ratio), 0.8), 1.5),
      )
    ),
  ),
  surrogates.gradient_preserving: (
    dict(eps_low=0.2, eps_high=0.3, beta_low=0.5, beta_high=0.9),
    lambda a: (
      -a.advantages
      * np.select(
        [
          (a.advantages > 0) & (np.exp(a.log_ratio) > 1.3),
          (a.advantages < 0) & (np.exp(a.log_ratio) < 0.8),
        ],
        [0.9 * 1.3, 0.5 * 0.8],
        np.exp(a.log_ratio),
      )
    ),
  ),
}

TOKENS = {'aggregation': part(aggregation.token_mean)}
SEQUENCES = {'aggregation': part(aggregation.sequence_mean)}
WIDE = {'surrogate__eps_low': 0.9, 'surrogate__eps_high': 0.9}
PPO = (-0.409794, [0.221034, 0, 0.163746], [0, -0.134986, 0])
K2 = (0.094250, [-0.01, -0.14, 0.08], [0.1, -0.04, 0])
K3 = (0.091418, [-0.009754, -0.100683, 0.098365], [0.129744, -0.036254, 0])
LIVE_K3 = (0.110046, [-0.011052, -0.255097, 0.065498], [0.060653, -0.053994, 0])


def plus(*rows):
  """The fixture's rows of two terms with coefficient 1, added."""
  return tuple(np.sum(column, axis=0) for column in zip(*rows))


FIX_A = {
  'reinforce': [
    (TOKENS, 0.410000, [0.2, 0.2, 0.2], [-0.1, -0.1, 0]),
    (SEQUENCES, 0.262500, [0.166667] * 3, [-0.125, -0.125, 0]),
    ({}, 1.025000, [0.5, 0.5, 0.5], [-0.25, -0.25, 0]),
    (
      {'aggregation': part(aggregation.constant_length, length=3)},
      0.341667,
      [0.166667] * 3,
      [-0.083333, -0.083333, 0],
    ),
  ],
  'gpg': [({}, 0.410000, [0.2, 0.2, 0.2], [-0.1, -0.1, 0])],
  'dapo': [
    ({'surrogate__eps_high': 0.2}, *PPO),
    (
      {'surrogate__eps_low': INF, 'surrogate__eps_high': INF},
      -0.553565,
      [0.221034, 0.364424, 0.163746],
      [-0.060653, -0.134986, 0],
    ),
  ],
  'dr_grpo': [(TOKENS, *PPO)],
  'ppo': [({'penalties': {}}, *PPO)],
  'grpo': [
    (TOKENS | {'penalties': {}}, *PPO),
    (TOKENS | {'penalties__kl__weight': 1.0}, *plus(PPO, K3)),
  ],
  'reinforce_plus_plus': [({}, *PPO)],
  'reinforce_plus_plus_baseline': [({'penalties__kl__weight': 1.0}, *plus(PPO, K2))],
  'entropy_bonus': [({'penalties': {}}, *PPO)],
  'dual_clip_ppo': [
    (
      {'surrogate__cap': 1.2, 'penalties': {}},
      -0.424780,
      [0.221034, 0, 0.163746],
      [0, 0, 0],
    )
  ],
  'gspo': [
    (
      {'surrogate__eps_low': 0.2, 'surrogate__eps_high': 0.2},
      -0.364471,
      [0.196893] * 3,
      [-0.113105, -0.113105, 0],
    ),
    (
      {'surrogate__eps_low': 0.15, 'surrogate__eps_high': 0.15},
      -0.348791,
      [0, 0, 0],
      [-0.113105, -0.113105, 0],
    ),
  ],
  'cispo': [
    ({'surrogate__cap': 1.28}, 0.337515, [0.221034, 0.256, 0.163746], [-0.060653, -0.128, 0])
  ],
  'gmpo': [({}, -0.314778, [0.184195, 0, 0.184195], [0, -0.118904, 0])],
  'sapo': [({}, -0.646232, [0.183687, 0.257644, 0.135340], [-0.072671, -0.163165, 0])],
  'aspo': [
    (
      {'surrogate__cap': 1.1, 'penalties': {}},
      -0.377634,
      [0.180967, 0, 0.22],
      [0, -0.11, 0],
    )
  ],
  'tis': [
    ({}, -0.680713, [0.221034, 0, 0.148164], [0, -0.134986, 0]),
    (
      WIDE | {'weights__mismatch': part(weights.truncated_sequence_importance, cap=2.0)},
      -1.338233,
      [0.442068, 0.728848, 0.327492],
      [-0.049659, -0.110517, 0],
    ),
  ],
  'icepop': [
    (
      WIDE | {'weights__mismatch__high': 2.0},
      -0.184553,
      [0.221034, 0, 0.148164],
      [-0.049659, -0.134986, 0],
    )
  ],
  'decoupled_ppo': [
    (
      WIDE | {'weights__behavior__cap': 2.0},
      -0.913401,
      [0.221034, 0.728848, 0.148164],
      [-0.049659, -0.134986, 0],
    )
  ],
  'a3po': [
    ({}, -0.685917, [0.221034, 0, 0.148164], [0, -0.134986, 0]),
    # Without clipping the weight is pi / behavior; rho = exp(.75) of the second token is above 2.
    (
      {
        'surrogate__eps_low': INF,
        'surrogate__eps_high': INF,
        'weights__behavior__high': 2.0,
      },
      -0.184553,
      [0.221034, 0, 0.148164],
      [-0.049659, -0.134986, 0],
    ),
  ],
  # Differences of probabilities .0387, .8585, -.0388 and -.5034, .0781; ratios e^.1, e^-.3 and e^.3.
  'dppo': [
    (TOKENS, 0.362908, [0.221034, 0, 0.148164], [0, -0.134986, 0]),
    (TOKENS | {'surrogate__cap': 1.2}, 0.380891, [0.221034, 0, 0.148164], [0, -0.12, 0]),
  ],
  'retrace': [
    (
      {'penalties': {}, 'surrogate__eps_high': 0.28},
      -0.680713,
      [0.221034, 0, 0.148164],
      [0, -0.134986, 0],
    )
  ],
  'deepseek_v32': [(TOKENS | {'penalties__kl__weight': 1.0}, *plus(PPO, LIVE_K3))],
  'intellect2': [
    (
      {
        'surrogate': part(surrogates.clipped),
        'penalties__kl__weight': 1.0,
        'penalties__bonus__weight': 0.0,
      },
      *plus(PPO, K3),
    )
  ],
}
