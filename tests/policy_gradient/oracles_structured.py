"""Weights of methods that select, compare with further policies, or bring their own optimizer."""

import jax
import numpy as np

from polgrad.losses import aggregation
from polgrad.registry import part
from tests.policy_gradient.harness import (
  constant_length,
  ppo,
  ratio_of,
  row_sum,
  sequence_mean,
  sequence_sum,
  token_mean,
)

INF = float('inf')


def log_ratio(x):
  return np.where(x['mask'], x['logp'] - x['proximal_logp'], 0.0)


def reinforce(x):
  return sequence_sum(x['advantages'], x['mask'])


def clipped(x):
  return token_mean(ppo(x, ratio_of(x), 0.8, 1.2), x['mask'])


def ones(x):
  return np.ones(x['mask'].shape)


def mdpo(x):
  """r A, and the exact KL with 1 / t = 1 in the first rollout."""
  weight = ratio_of(x) * x['advantages']
  return {'logp': token_mean(weight, x['mask']), 'kl': -token_mean(ones(x), x['mask'])}


def of_stream(x, number):
  return x['mask'] & (x['stream'] == number)[:, None]


def luffy(x):
  p = np.exp(x['logp'])
  demonstration = 0.1 * p / (p + 0.1) ** 2 * x['advantages']
  of_both = zip((demonstration, ratio_of(x) * x['advantages']), (0, 1))
  return {
    'logp': sum(constant_length(w, of_stream(x, k), 5) for w, k in of_both),
    'entropy': constant_length(0.001 * ones(x), x['mask'], 5),
  }


def hpt(x):
  demonstration, sampled = of_stream(x, 0), of_stream(x, 1)
  return {
    'logp': token_mean(1.0, demonstration)
    + 8 * constant_length(ratio_of(x) * x['advantages'], sampled, 5),
    'entropy': 8 * constant_length(0.001, sampled, 5),
  }


def bapo(x, share=0.5):
  """The two loops of the authors' code on the ratio of both sums, in hundredths; then dual clipping."""
  ratio, advantages = ratio_of(x), np.where(x['mask'], x['advantages'], 0.0)

  def balance(low, high):
    effective = np.where(advantages >= 0, np.minimum(ratio, high), np.maximum(ratio, low))
    gain = effective * advantages
    return gain[gain > 0].sum() / -gain[gain < 0].sum()

  low, high, target = 60, 120, share / (1 - share)
  while balance(low / 100, high / 100) < target and low < 80:
    low += 5
  while balance(low / 100, high / 100) < target and high < 200:
    high += 5
  capped = (advantages < 0) & (ratio > 3)
  return token_mean(np.where(capped, 0, ppo(x, ratio, low / 100, high / 100)), x['mask'])


def first(score, among, count):
  """The `count` smallest scores."""
  chosen = np.zeros(score.size, bool)
  chosen[np.argsort(np.where(among, score, np.inf), axis=None, kind='stable')[:count]] = True
  return among & chosen.reshape(score.shape)


def lp_reg(x, share=0.01):
  bad = x['mask'] & (x['advantages'] < 0)
  count = int(share * bad.sum())
  selected = first(x['logp'], bad, count if count > 1 else 0) & (x['logp'] < x['proxy_logp'])
  pull = np.where(selected, np.exp(x['proxy_logp'] - x['logp']) - 1, 0)
  return token_mean(ppo(x, ratio_of(x), 0.0, 10.0) + pull, x['mask'])


def epo(x):
  """Before the first update there is no history, so no band."""
  return {'logp': clipped(x), 'entropy': 0.001 * token_mean(ones(x), x['mask'])}


def otr(x):
  return {'loss': -sequence_mean(ones(x), x['mask'])}


def harpg(x):
  """The ratio of the row, which every token of it moves."""
  return sequence_sum(np.exp(row_sum(log_ratio(x), x['mask'])) * x['advantages'], x['mask'])


def st_ppo(x):
  """Turns are what stands together in the mask."""
  d = log_ratio(x)
  ratio = np.ones(d.shape)
  for mask, row, out in zip(x['mask'], d, ratio):
    for turn in np.split(np.arange(len(mask)), np.flatnonzero(np.diff(mask)) + 1):
      out[turn] = np.exp(row[turn].mean())
  return sequence_mean(ppo(x, ratio, 0.8, 1.2), x['mask'])


def capo(x, eta=1.5e-5):
  """Change of the objective and of the policy by eta g, g = A v h', with v v' - F for the Hessian."""
  a, v2, vfv, h2 = (x[k] for k in ('advantages', 'score_norm', 'score_fisher', 'hidden_norm'))
  moved = a * h2 * v2  # v . u, with u = G h
  objective = eta * a**2 * v2 * h2 + eta**2 / 2 * a * (moved**2 - (a * h2) ** 2 * vfv)
  kept = (np.abs(objective) < 0.01) & (eta**2 / 2 * moved**2 < 1e-4)
  return sequence_mean(ratio_of(x) * a, x['mask'] & kept)


def grpo_guard(x):
  return sequence_mean(ppo(x, np.exp(log_ratio(x) + x['old_kl']), 0.8, 1.2), x['mask'])


def covariance(x):
  centered = lambda v: v - v[x['mask']].mean()
  return centered(x['advantages']) * centered(x['logp'])


def clip_cov(x, share=0.002, low=1.0, high=5.0, step=3):
  ratio, cov, mask = ratio_of(x), covariance(x), x['mask']
  noise = jax.random.uniform(jax.random.fold_in(jax.random.key(0), step), mask.shape)
  live = ppo(x | {'advantages': np.sign(x['advantages'])}, ratio, 0.0, 2.0) != 0
  among = mask & live & (cov > low) & (cov < high)
  selected = first(np.asarray(noise), among, max(int(share * mask.sum()), 1))
  return token_mean(np.where(selected, 0, ppo(x, ratio, 0.0, 2.0)), mask)


def kl_cov(x, share=0.02):
  mask = x['mask']
  selected = first(-covariance(x), mask, max(int(share * mask.sum()), 1))
  return token_mean(ratio_of(x) * x['advantages'] - selected * np.sign(log_ratio(x)), mask)


def m2po(x, limit=0.04, low=0.7, high=1.5):
  """PPO between exp(-tau) and exp(tau), tau the largest |d| that keeps mean min(d^2, tau^2) small."""
  d = log_ratio(x)
  moved = np.abs(d[x['mask'] & (d * x['advantages'] > 0)])
  if np.mean(moved**2) <= limit:
    return token_mean(ratio_of(x) * x['advantages'], x['mask'])
  tau = max((t for t in moved if np.mean(np.minimum(moved, t) ** 2) < limit), default=0.0)
  bounds = min(np.exp(-tau), low), max(np.exp(tau), high)
  return token_mean(ppo(x, ratio_of(x), *bounds), x['mask'])


def remix(x):
  """The schedule is still at its start: all of the KL is to the reference."""
  center = np.exp(x['proximal_logp'] - x['behavior_logp'])
  mix = ppo(x, ratio_of(x, 'behavior_logp'), center - 0.2, center + 0.2)
  return token_mean(mix - 0.01 * (x['logp'] - x['reference_logp']), x['mask'])


def humanline(x):
  d = log_ratio(x)
  inside = (d >= -1) & (d <= 1.5)
  k3 = 0.01 * (np.exp(x['reference_logp'] - x['logp']) - 1)
  return token_mean(inside * ppo(x, np.exp(np.clip(d, -1, 1.5)), 0.85, 1.15) + k3, x['mask'])


ORACLES = {
  'mdpo': mdpo,
  'luffy': luffy,
  'hpt': hpt,
  'correlated_proxies': reinforce,
  'oblr_po': reinforce,
  'bapo': bapo,
  'lp_reg': lp_reg,
  'epo': epo,
  'otr': otr,
  'n_pg_igt': reinforce,
  'harpg': harpg,
  'st_ppo': st_ppo,
  'capo': capo,
  'f_dpg': reinforce,
  'grpo_guard': grpo_guard,
  'clip_cov': clip_cov,
  'kl_cov': kl_cov,
  'm2po': m2po,
  'remix': remix,
  'props': clipped,
  'humanline': humanline,
  'demo_regularized': reinforce,
}

# (overrides, loss, weights of the first row, of the second).
TOKENS = {'aggregation': part(aggregation.token_mean)}
SEQUENCE_SUM = ({}, 1.025, [0.5, 0.5, 0.5], [-0.25, -0.25, 0])
IMPORTANCE = (-0.553565, [0.221034, 0.364424, 0.163746], [-0.060653, -0.134986, 0])
PPO = (-0.409794, [0.221034, 0, 0.163746], [0, -0.134986, 0])
GSPO = (-0.364471, [0.196893] * 3, [-0.113105, -0.113105, 0])
BOUNDS = {'low': 0.8, 'low_limit': 0.8, 'high': 1.2, 'high_limit': 1.2}
FIX_A = {
  'mdpo': [({}, *IMPORTANCE)],
  'luffy': [
    (
      {
        'streams__demonstration__weight': 0.0,
        'streams__sampled__aggregation': part(aggregation.token_mean),
        'streams__sampled__penalties__bonus__weight': 0.0,
      },
      *IMPORTANCE,
    )
  ],
  'hpt': [
    (
      {
        'streams__demonstration__weight': 0.0,
        'streams__sampled__weight': 1.0,
        'streams__sampled__aggregation': part(aggregation.token_mean),
        'streams__sampled__penalties__bonus__weight': 0.0,
      },
      *IMPORTANCE,
    )
  ],
  'correlated_proxies': [SEQUENCE_SUM],
  'oblr_po': [SEQUENCE_SUM],
  'bapo': [
    ({f'selections__bounds__{k}': v for k, v in BOUNDS.items()}, *PPO),
    (
      {f'selections__bounds__{k}': v for k, v in BOUNDS.items()} | {'surrogate__cap': 1.2},
      -0.424780,
      [0.221034, 0, 0.163746],
      [0, 0, 0],
    ),
  ],
  'epo': [({'penalties__bonus__weight': 0.0}, *PPO)],
  'n_pg_igt': [SEQUENCE_SUM],
  'st_ppo': [
    ({}, *GSPO),
    (
      {'surrogate__eps_low': 0.15, 'surrogate__eps_high': 0.15},
      -0.348791,
      [0, 0, 0],
      [-0.113105, -0.113105, 0],
    ),
    ({'surrogate__eps_low': INF, 'surrogate__eps_high': INF}, *GSPO),
  ],
  'f_dpg': [SEQUENCE_SUM],
  'grpo_guard': [(TOKENS, *PPO)],
  'clip_cov': [
    (
      {
        'surrogate__eps_low': 0.2,
        'surrogate__eps_high': 0.2,
        'selections__selected__eps_low': 0.2,
        'selections__selected__eps_high': 0.2,
      },
      *PPO,
    ),
    ({'surrogate__eps_low': INF, 'surrogate__eps_high': INF}, *IMPORTANCE),
  ],
  'kl_cov': [({'penalties__kl__weight': 0.0}, *IMPORTANCE)],
  # Squares .01, .25 and .36: tau = .1, so the floors .7 and 1.5 are the bounds.
  'm2po': [({}, -0.479795, [0.221034, 0, 0.163746], [0, -0.134986, 0])],
  'props': [({}, *PPO)],
  'humanline': [
    (
      {
        'ratio__low': -0.15,
        'ratio__high': 0.4,
        'surrogate__eps_low': 0.9,
        'surrogate__eps_high': 0.9,
        'penalties__kl__weight': 0.0,
      },
      -0.470484,
      [0.221034, 0, 0],
      [0, -0.134986, 0],
    )
  ],
  'demo_regularized': [SEQUENCE_SUM],
}
