"""Weights of methods that differ in rewards and advantages, and transcriptions of their functions."""

import itertools
import math

import numpy as np

from polgrad.losses import (
  difficulty,
  multipliers,
  penalties,
  reward_maps,
  strata,
  surrogates,
)
from tests.policy_gradient.harness import (
  ppo,
  ratio_of,
  sequence_mean,
  sequence_sum,
  token_mean,
)


def clipped(x, low=0.8, high=1.2):
  return token_mean(ppo(x, ratio_of(x), low, high), x['mask'])


def prioritized_replay(x):
  return token_mean(x['replay_weight'][:, None] * ppo(x, ratio_of(x), 0.8, 1.2), x['mask'])


def bnpo(x):
  ratio = ratio_of(x)
  keep = (x['advantages'] >= 0) | (ratio <= 10)
  return sequence_sum(keep * ppo(x, ratio, 0.8, 1.28), x['mask'])


def reinforce(x):
  return sequence_sum(x['advantages'], x['mask'])


def copo(x):
  ratio, w = ratio_of(x), x['local_weight'][:, None]

  def dual(a):
    keep = (a >= 0) | (ratio <= 3)
    return keep * ppo(x | {'advantages': a}, ratio, 0.8, 1.2)

  weight = w * dual(x['advantages']) + (1 - w) * dual(x['global_advantages'])
  return sequence_mean(weight, x['mask'])


def drpo(x):
  """Budgets of a run on addition: 5 tokens. A row without tokens is in no group."""
  mask, lengths = x['mask'], x['mask'].sum(axis=1)
  out = np.zeros(mask.shape)
  groups = sorted(set(x['group_ids']))
  for g in groups:
    rows = [i for i in range(len(mask)) if x['group_ids'][i] == g and lengths[i]]
    right = [i for i in rows if x['rewards'][i] >= 1]
    wrong = [i for i in rows if x['rewards'][i] < 1]
    if not right or not wrong:
      continue
    w = np.exp((1 - lengths[right] / 5) / 0.1)
    s = np.array([x['logp'][i][mask[i]].mean() for i in wrong])
    p = np.exp(s / 10) / np.exp(s / 10).sum()
    for rows, weights in ((right, w / w.sum()), (wrong, -p)):
      for i, weight in zip(rows, weights):
        out[i] = mask[i] * weight / lengths[i] / len(groups)
  drift = -(x['logp'] - x['proximal_logp'])[mask].mean()
  return out + mask * max(1e3 * (drift - 1e-4), 0) / mask.sum()


def view_r1(x):
  p = x['success_rate'][:, None]
  kappa = np.where((x['advantages'] > 0) & (p > 0) & (p < 1), 1 - np.exp(-2.71828 * p), 1)
  forward_kl = -(1 - np.exp(x['reference_logp'] - x['logp']))
  return sequence_mean(ppo(x, ratio_of(x), 0.8, 1.2) + 0.001 * kappa * forward_kl, x['mask'])


ORACLES = {
  'copo': copo,
  'drpo': drpo,
  'view_r1': view_r1,
  'confucius3': clipped,  # the bonus begins with the coefficient 0
  'exit_iteration': clipped,
  'l1_exact': clipped,
  'l1_max': clipped,
  'hipo': clipped,
  'grace': clipped,
  'v0': clipped,
  'rl_struct': clipped,
  'gfpo': clipped,
  'gfpo_adaptive': clipped,
  'hypervolume_guided': reinforce,
  'gradient_guided': lambda x: sequence_sum(ratio_of(x) * x['advantages'], x['mask']),
  'prioritized_replay': prioritized_replay,
  'noisy_appeals': reinforce,
  'adora': clipped,
  'bnpo': bnpo,
  'a_grae': clipped,
  'stratified_grpo': clipped,
  'pkpo': reinforce,
  'grpo_lead': clipped,
  'tempsamp_r1': lambda x: clipped(x, 0.8, 1.28),
  'noisy_backward': reinforce,
  'noisy_forward': reinforce,
}

# Functions of the rewards of groups, as loops over rows.


def groups_of(a, *more):
  """The valid rows of each group, as lists of indices; `more` are further keys of a group."""
  keys = list(zip(a.group_ids.tolist(), *(x.tolist() for x in more)))
  rows = [i for i in range(len(keys)) if a.valid[i]]
  return [[i for i in rows if keys[i] == key] for key in sorted(set(keys[i] for i in rows))]


def per_row(a, fn, *more, other=0.0):
  """fn(rows of the group) -> {row: number}, as an array; rows that are not valid get `other`."""
  out = np.full(len(a.rewards), other)
  for rows in groups_of(a, *more):
    for row, value in fn(rows).items():
      out[row] = value
  return out


def beta_density(p, a, b):
  beta = math.gamma(a) * math.gamma(b) / math.gamma(a + b)
  return p ** (a - 1) * (1 - p) ** (b - 1) / beta


def fitted(means):
  """The two parameters of BNPO, from the mean rewards of the groups."""
  m, v = np.mean(means), np.var(means, ddof=1)
  excess = m * (1 - m) / v - 1
  return max(1, 1 + excess * m / 3), max(1, 1 + excess * (1 - m) / 3)


def beta_normalized(a, low, high):
  x = (a.rewards - low) / (high - low)
  means = [x[rows].mean() for rows in groups_of(a)]
  alpha, beta = fitted(means)
  factor = lambda rows: 1 / beta_density(x[rows].mean(), alpha, beta)
  return per_row(a, lambda rows: {i: (x[i] - x[rows].mean()) * factor(rows) for i in rows})


def two_sided(a, least, eps):
  right = (a.rewards >= least) * 1.0
  w = right[a.valid].mean()

  def of(rows):
    p = right[rows].mean()
    if p in (0, 1):
      return {}
    weight = (w / np.sqrt(p) + (1 - w) / np.sqrt(1 - p)) / 2
    return {i: weight * (right[i] - p) / (np.sqrt(p * (1 - p)) + eps) for i in rows}

  return per_row(a, of)


def max_at_k(a, k):
  def of(rows):
    added = dict.fromkeys(rows, 0.0)
    for subset in itertools.combinations(rows, k):
      for i in subset:
        without = max(a.rewards[j] for j in subset if j != i)
        added[i] += max(a.rewards[list(subset)]) - without
    return {i: len(rows) * x / math.comb(len(rows), k) for i, x in added.items() if len(rows) >= k}

  return per_row(a, of)


def best_only(a):
  def of(rows):
    ranked = sorted(rows, key=lambda i: -a.rewards[i])
    return {ranked[0]: a.rewards[ranked[0]] - a.rewards[ranked[1]]} if len(rows) > 1 else {}

  return per_row(a, of)


def z_scores(a, ddof, eps, *more):
  def of(rows):
    x = a.rewards[rows]
    std = x.std(ddof=ddof) if len(rows) > ddof else 0.0
    return {i: (a.rewards[i] - x.mean()) / (std + eps) for i in rows}

  return per_row(a, of, *more)


def stratified(a, mix):
  inside, across = z_scores(a, 1, 1e-6, a.stratum_term), z_scores(a, 1, 1e-6)
  return mix * inside + (1 - mix) * across


def longer_when_right(a, otherwise, no_right, no_wrong, least, cut):
  lengths = a.mask.sum(axis=1)

  def of(rows):
    right = [lengths[i] for i in rows if a.rewards[i] >= least]
    wrong = [lengths[i] for i in rows if a.rewards[i] < least and lengths[i] < cut]
    if not right:
      return dict.fromkeys(rows, no_right)
    if not wrong:
      return dict.fromkeys(rows, no_wrong)
    return dict.fromkeys(rows, 1.0 if max(right) > np.mean(wrong) else otherwise)

  return per_row(a, of, other=1.0)


def long_and_wrong(a, least, base):
  lengths = a.mask.sum(axis=1)

  def of(rows):
    right = [lengths[i] for i in rows if a.rewards[i] >= least]
    excess = lambda i: lengths[i] - np.mean(right) if right and a.rewards[i] < least else 0.0
    return {i: 2 - base ** -max(excess(i), 0.0) for i in rows}

  return per_row(a, of, other=1.0)


def share(a, least):
  return per_row(a, lambda rows: dict.fromkeys(rows, np.mean(a.rewards[rows] >= least)))


def logistic(x):
  return 0.4 + 1.1 / (1 + np.exp(10 * (x - 0.75)))


def brief_when_right(a, least, weight):
  lengths = a.mask.sum(axis=1)
  out = np.where(a.rewards >= least, 1.0, np.where(a.finished, -1.0, 0.0)) * a.valid
  for rows in groups_of(a):
    right = [i for i in rows if a.rewards[i] >= least]
    if len(right) > 1:
      mean, std = lengths[right].mean(), lengths[right].std(ddof=1)
      out[right] = np.exp(-weight * (lengths[right] - mean) / (std + 1e-6))
  return out


def dual_clipped(a, advantages, low, high, cap):
  ratio = np.exp(a.log_ratio)
  loss = np.maximum(-ratio * advantages, -np.clip(ratio, low, high) * advantages)
  return np.where(advantages < 0, np.minimum(loss, -cap * advantages), loss)


def two_level(a):
  w = a.local_weight[:, None]
  local, across = (dual_clipped(a, x, 0.8, 1.3, 1.5) for x in (a.advantages, a.global_advantages))
  return w * local + (1 - w) * across


def easy_k3(a):
  p, d = a.success_rate[:, None], a.reference_logp - a.logp
  kappa = np.where((a.advantages > 0) & (p > 0) & (p < 1), 1 - np.exp(-2 * p), 1)
  return kappa * (np.exp(d) - 1 - d)


def mode_choice(a):
  on = a.mode_term > 0

  def of(rows):
    r = a.rewards
    mean = {m: np.mean([r[i] for i in rows if on[i] == m]) for m in set(on[rows])}
    if len(mean) == 2 and 0 <= mean[True] - mean[False] <= 0.9 * mean[True]:
      mean[False] += 0.9 * mean[True]
    overall, std = r[rows].mean(), r[rows].std()
    return {i: (mean[on[i]] - overall + 0.4 * (r[i] - overall)) / (std + 1e-6) for i in rows}

  return per_row(a, of)


def different(a, strength, buckets):
  counts = np.array(
    [
      np.bincount(tokens[mask] % buckets, minlength=buckets) / max(mask.sum(), 1e-300)
      for tokens, mask in zip(a.tokens, a.mask)
    ]
  )
  lengths = np.sqrt((counts**2).sum(axis=1, keepdims=True))
  e = counts / np.where(lengths > 0, lengths, 1)

  def of(rows):
    d = np.sqrt(((e[rows] - e[rows].mean(axis=0)) ** 2).sum(axis=1))
    mean = d.mean()
    return {i: 1 + strength * (x / mean - 1) if mean > 1e-6 else 1.0 for i, x in zip(rows, d)}

  found = per_row(a, of)
  return np.where(a.valid, found, 1.0)


def early(a, strength):
  size = np.abs(np.where(a.mask, a.advantages, 0))
  earlier = np.array([[row[:t].sum() for t in range(len(row))] for row in size])
  total = size.sum(axis=1, keepdims=True)
  return 1 + strength * (1 - earlier / np.where(total, total, 1))


FUNCTIONS = {
  strata.mode_choice: (dict(tie=0.9, own=0.4), mode_choice),
  surrogates.two_level_clipped: (dict(eps_low=0.2, eps_high=0.3, cap=1.5), two_level),
  surrogates.drift: ({}, lambda a: -a.excess_drift * a.log_ratio),
  penalties.easy_k3: (dict(rate=2.0), easy_k3),
  difficulty.beta_normalized: (
    dict(low=-3.0, high=3.0),
    lambda a: beta_normalized(a, -3.0, 3.0),
  ),
  difficulty.two_sided: (dict(least=0.1, eps=0.1), lambda a: two_sided(a, 0.1, 0.1)),
  difficulty.max_at_k: (dict(k=2), lambda a: max_at_k(a, 2)),
  difficulty.best_only: ({}, best_only),
  strata.stratified: (dict(mix=0.7), lambda a: stratified(a, 0.7)),
  multipliers.longer_when_right: (
    dict(otherwise=0.3, no_right=0.2, no_wrong=0.7, least=-0.2, cut=5),
    lambda a: longer_when_right(a, 0.3, 0.2, 0.7, -0.2, 5),
  ),
  multipliers.early: (dict(strength=0.7), lambda a: early(a, 0.7)),
  multipliers.long_and_wrong: (
    dict(least=0.1, base=1.5),
    lambda a: long_and_wrong(a, 0.1, 1.5),
  ),
  multipliers.damped_positive: (
    dict(least=0.1, goal=0.9),
    lambda a: np.where(a.advantages > 0, np.mean(a.rewards[a.valid] >= 0.1) / 0.9, 1),
  ),
  multipliers.hardness: (
    dict(least=0.1, extra=0.7, power=2.0),
    lambda a: 1 + 0.7 * (1 - share(a, 0.1)) ** 2,
  ),
  multipliers.logistic_hardness: (
    dict(least=0.1),
    lambda a: np.where(
      a.advantages > 0, logistic(share(a, 0.1))[:, None], logistic(1 - share(a, 0.1))[:, None]
    ),
  ),
  multipliers.different: (
    dict(strength=0.7, buckets=3),
    lambda a: different(a, 0.7, 3),
  ),
  reward_maps.bent: (
    dict(knee=0.2, above=0.5, below=2.0),
    lambda a: np.array(
      [
        0.2 + 0.5 * np.log(r - 0.2 + 1)
        if r >= 0.2
        else 0.2 - (np.exp(2 * (0.2 - r)) - 1) / (np.exp(2) - 1)
        for r in a.rewards
      ]
    ),
  ),
  reward_maps.signed: (
    dict(threshold=0.3),
    lambda a: np.array([1.0 if r >= 0.3 else -1.0 for r in a.rewards]),
  ),
  reward_maps.mistaken: (
    dict(false_positive=0.6, false_negative=0.3),
    lambda a: np.where(a.rewards >= 0.5, a.uniform >= 0.3, a.uniform < 0.6) * 1.0,
  ),
  reward_maps.without_noise: (
    dict(false_positive=0.1, false_negative=0.2),
    lambda a: (a.rewards - 0.1) / 0.7,
  ),
  reward_maps.without_misses: (dict(false_negative=0.2), lambda a: a.rewards - 0.8),
  reward_maps.brief_when_right: (
    dict(least=-0.2, strength=0.3),
    lambda a: brief_when_right(a, -0.2, 0.3),
  ),
}
