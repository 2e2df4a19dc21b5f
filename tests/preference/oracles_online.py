"""Losses of methods that sample, from their papers. What credit makes of rewards or comparisons is
constant; it is read from `const`."""

import numpy as np

from tests.preference.harness import logistic, ratio, sigmoid, total


def labelled(link, z, p, x, where=True):
  """Mean over complete pairs of p link(z) + (1 - p) link(-z)."""
  complete = x['mask'].any(axis=1).reshape(-1, 2).all(axis=1) & where
  return (p * link(z) + (1 - p) * link(-z))[complete].mean()


def first_less_second(v):
  return v[::2] - v[1::2]


def p_first(const):
  """P(row 2i beats row 2i + 1) from the comparisons of groups of G rows."""
  rows = np.arange(0, len(const['wins']), 2)
  return const['wins'][rows, (rows + 1) % const['wins'].shape[1]]


def by_rewards(const):
  """1 where the first row of a pair has the larger reward, and where a pair is no tie."""
  gap = first_less_second(const['rewards'])
  return (gap > 0).astype(float), gap != 0


def ipo_loss(a):
  return lambda h: (h - a) ** 2


def online_ipo(x, const):
  return labelled(ipo_loss(0.5), first_less_second(ratio(x)), p_first(const), x)


def online_ipo_better(x, const):
  h, p = first_less_second(ratio(x)), p_first(const)
  return labelled(ipo_loss(1.0), h, (p > 0.5).astype(float), x)


def online_ipo_drawn(x, const):
  h, p = first_less_second(ratio(x)), p_first(const)
  return labelled(ipo_loss(1.0), h, (const['uniform'][::2] < p).astype(float), x)


def online_slic(x, const):
  z, p = 0.002 * first_less_second(ratio(x)), p_first(const)
  return labelled(lambda z: np.maximum(0, 1 - z), z, (p > 0.5).astype(float), x)


def two_references(x, w):
  return w * ratio(x) + (1 - w) * ratio(x, 'previous_logp')


def inpo(x, const):
  h = first_less_second(two_references(x, 1 / 3))
  return labelled(ipo_loss(1 / 0.015), h, (p_first(const) > 0.5).astype(float), x)


def comal(x, const):
  h = first_less_second(two_references(x, 1 / 3))
  return labelled(ipo_loss(250.0), h, (p_first(const) > 0.5).astype(float), x)


def rates(wins):
  """Mean probability to beat the other rows of the group."""
  size = wins.shape[1]
  own = wins[np.arange(len(wins)), np.arange(len(wins)) % size]
  return (wins.sum(axis=1) - own) / (size - 1)


def dno(x, const):
  """Row 5 has no tokens, but its verifiers answered, so it counts in the win rates."""
  p = sigmoid(first_less_second(rates(const['wins'])))
  return labelled(logistic, 0.1 * first_less_second(ratio(x)), p, x)


def dno_prct(x, const):
  h = first_less_second(ratio(x))
  return labelled(logistic, 0.1 * h, (p_first(const) > 0.5).astype(float), x)


def dpo_by_rewards(beta):
  def oracle(x, const):
    p, no_tie = by_rewards(const)
    return labelled(logistic, beta * first_less_second(ratio(x)), p, x, no_tie)

  return oracle


def rso(x, const):
  p, no_tie = by_rewards(const)
  hinge = lambda z: np.maximum(0, 1 - z)
  return labelled(hinge, 0.05 * first_less_second(ratio(x)), p, x, no_tie)


def xpo(x, const, alpha=1e-5):
  """The bonus is on the second row of each pair, which the reference sampled."""
  rows = np.arange(1, len(x['mask']), 2)
  there = x['mask'][rows].any(axis=1)
  bonus = total(x['logp'], x['mask'])[rows][there].mean()
  return dpo_by_rewards(0.1)(x, const) + alpha * bonus


def xpo_large(x, const):
  return xpo(x, const, alpha=0.5)


def to_go(v, mask):
  """Sums of v over this and later tokens of the mask."""
  return np.cumsum(np.where(mask, v, 0)[:, ::-1], axis=1)[:, ::-1]


def policy_gradient(x, advantages):
  """-mean over rows with tokens of sum_t A_t log pi(y_t)."""
  rows = x['mask'].any(axis=1)
  return -total(advantages * x['logp'], x['mask'])[rows].mean()


def self_play(penalty):
  """The probability to beat the baseline, less one half, less the penalty of this and later tokens."""

  def oracle(x, const):
    win = const['baseline_wins'].mean(axis=1)[:, None] - 0.5
    return policy_gradient(x, win - to_go(penalty(const), const['mask']))

  return oracle


def log_ratio(const, other):
  return const['proximal_logp'] - const[f'{other}_logp']


nash_md_pg = self_play(lambda c: 0.008 * log_ratio(c, 'reference'))
nash_mp = self_play(lambda c: 0.1 * log_ratio(c, 'reference') + 0.5 * log_ratio(c, 'opponent'))


def self_play_spo(x, const):
  r = rates(const['wins'])
  groups = r.reshape(-1, const['wins'].shape[1])
  others = (groups.sum(axis=1, keepdims=True) - groups) / (groups.shape[1] - 1)
  return policy_gradient(x, (r - others.reshape(-1))[:, None])


def nll(x, const):
  return -total(x['logp'], x['mask']).sum() / x['mask'].sum()


def hypo(x, const):
  """Rows of a group: two samples, the chosen and the rejected completion. No reward is part of it."""
  rows = np.arange(len(x['mask']))
  given, p = rows[::2] % 4 == 2, const['label'][::2]
  pairs = labelled(logistic, 0.05 * first_less_second(ratio(x)), p, x, given)
  sampled = (rows % 4 < 2) & x['mask'].any(axis=1)
  kl = to_go(log_ratio(const, 'reference'), const['mask'])
  return pairs + 0.01 * total(kl * x['logp'], x['mask'])[sampled].mean()


def dr_po(x, const):
  """GAE backwards over the tokens of the mask, the reward at the last of them."""
  mask, old = const['mask'], const['old_values']
  reward = -0.05 * np.where(mask, log_ratio(const, 'reference'), 0)
  advantage = np.zeros(mask.shape)
  for row in range(len(mask)):
    places = np.flatnonzero(mask[row])
    if len(places):
      reward[row, places[-1]] += const['rewards'][row]
    later = next_value = 0.0
    for t in places[::-1]:
      later = reward[row, t] + next_value - old[row, t] + 0.95 * later
      advantage[row, t], next_value = later, old[row, t]
  target = advantage + old
  a = (advantage - advantage[mask].mean()) / (advantage[mask].std(ddof=1) + 1e-8)
  r = np.exp(x['logp'] - const['proximal_logp'])
  policy = -np.minimum(r * a, np.clip(r, 0.8, 1.2) * a)
  near = np.clip(x['values'], old - 0.2, old + 0.2)
  value = np.maximum((x['values'] - target) ** 2, (near - target) ** 2) / 2
  return total(policy + 0.1 * value, mask).sum() / mask.sum()


def learns_the_best(quantile, backward, forward, kl, size=4):
  """Groups of `size` rows, of which the reference sampled every second one.

  `quantile(not better, number)` is the reward of a row of the policy, by counting.
  """

  def oracle(x, const):
    mask, rewards, given = const['mask'], const['rewards'], const['opponent'] > 0
    k_to_go = to_go(log_ratio(const, 'reference'), mask)
    policy, imitated = [], []
    for start in range(0, len(mask), size):
      rows = range(start, start + size)
      theirs, ours = [i for i in rows if given[i]], [i for i in rows if not given[i]]
      q = {i: quantile(sum(rewards[j] <= rewards[i] for j in theirs), len(theirs)) for i in ours}
      for i in ours:
        a = backward * (q[i] - np.mean([q[j] for j in ours if j != i])) - kl * k_to_go[i]
        if mask[i].any():
          policy.append(-(a * x['logp'][i])[mask[i]].sum())
      best = max(theirs, key=lambda i: rewards[i])
      if mask[best].any():
        imitated.append(-forward * x['logp'][best][mask[best]].sum())
    return np.mean(policy) + np.mean(imitated)

  return oracle


def log_f(k, m):
  return np.log((1 + k) / (1 + m))


def below_both(k, m):
  return -np.log(16) if k == 0 else 0.0


ORACLES = {
  'bond': learns_the_best(log_f, 0.5 * 7, 0.5, 0.5),
  'j_bond': learns_the_best(below_both, 0.5, 0.5, 1.0),
  'vbon': learns_the_best(log_f, 7.0, 0.0, 1.0),
  'async_online_dpo': dpo_by_rewards(0.1),
  'comal': comal,
  'dno': dno,
  'dno_prct': dno_prct,
  'dr_po': dr_po,
  'hypo': hypo,
  'inpo': inpo,
  'ipo_md': online_ipo,
  'iterative_dpo': dpo_by_rewards(0.1),
  'nash_ema_pg': nash_md_pg,
  'nash_md_pg': nash_md_pg,
  'nash_mp': nash_mp,
  'online_ipo': online_ipo,
  'online_slic': online_slic,
  'raft': nll,
  'rest_em': nll,
  'rso': rso,
  'self_play_spo': self_play_spo,
  'xpo': xpo,
}
VARIANTS = [
  ('online_ipo', dict(tau=0.5, label='better'), online_ipo_better),
  ('online_ipo', dict(tau=0.5, label='drawn'), online_ipo_drawn),
  ('xpo', dict(alpha=0.5), xpo_large),
]
