"""Every function of every table against a plain NumPy transcription of its equation, in float64.

Ratios, surrogates and weights have theirs in policy_golden_test.py, selections in
selections_test.py; further rows are in `FUNCTIONS` of tests/policy_gradient/oracles_*.py.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import registry
from polgrad.losses import (
  advantages,
  aggregation,
  baselines,
  divergences,
  f_divergences,
  implicit_rewards,
  log_partition,
  multipliers,
  penalties,
  pointwise,
  preference_losses,
  returns,
  reward_maps,
  reward_penalties,
  score_shapes,
)
from tests.policy_gradient import oracles

RNG = np.random.default_rng(0)
B, T, V = 6, 5, 3
# Holes, an empty row, a whole row; a group of four with an invalid row, and two groups of one.
MASK = np.array(
  [
    [0, 1, 1, 0, 1],
    [0, 0, 0, 0, 0],
    [1, 1, 1, 1, 1],
    [0, 0, 0, 1, 0],
    [0, 1, 1, 1, 1],
    [1, 1, 0, 1, 1],
  ],
  bool,
)
GROUPS = np.array([7, 2, 7, 7, 7, 5])


def logps():
  return -RNG.exponential(size=(B, T))


ARRAYS = dict(
  mask=MASK,
  where=MASK,
  turn_ids=np.where(MASK, [0, 0, 1, 1, 2], -1),
  group_ids=GROUPS,
  valid=np.array([True, True, False, True, True, True]),
  logp=logps(),
  reference_logp=logps(),
  proximal_logp=logps(),
  behavior_logp=logps(),
  entropy=-logps(),
  log_ratio=RNG.normal(size=(B, T)),
  advantages=RNG.normal(size=(B, T)),
  values=RNG.normal(size=(B, T)),
  values_after=np.random.default_rng(1).normal(size=(B, T)),
  target=np.random.default_rng(2).normal(size=B),
  old_values=RNG.normal(size=(B, T)),
  returns=RNG.normal(size=(B, T)),
  token_rewards=RNG.normal(size=(B, T)),
  loss=RNG.normal(size=(B, T)),
  rewards=RNG.normal(size=B),
  score=RNG.normal(size=B),
  residual=RNG.normal(size=B),
  margin=RNG.normal(size=B),
  label=np.array([0.0, 1.0, 0.3, 1.2, 0.5, 0.9]),
  logits=RNG.normal(size=(B, T, V)),
  teacher_logits=RNG.normal(size=(B, T, V)),
)
ARRAYS |= dict(
  tokens=np.random.default_rng(4).integers(9, size=(B, T)),
  uniform=RNG.uniform(size=B),
  tracked_value=np.random.default_rng(3).uniform(size=B),
  baseline_rewards=RNG.normal(size=(B, 3)),
  bonus_scores=np.random.default_rng(4).uniform(size=(B, T)),
  scaled_rewards=RNG.normal(size=B),
  beta=np.array(0.3),
  first_value=RNG.normal(size=B),
  log_t=RNG.normal(size=B),
  log_ratio_sum=2 * RNG.normal(size=B),
  score_norm=RNG.uniform(0, 2, size=(B, T)),
  token_returns=RNG.normal(size=(B, T)),
  log_rho=RNG.normal(size=(B, T)),
  log_normalizer=RNG.normal(size=(B, T)),
  reference_point=np.array(0.3),
  density_ratio=np.linspace(0.1, 1.1, B),
  proxy_logp=logps(),
  selected=RNG.uniform(size=(B, T)) < 0.5,
  mean_entropy=np.array(1.1),
  matched_score=np.append(RNG.normal(size=B - 1), np.inf),
  token_weights=RNG.uniform(0.5, 2, size=(B, T)),
  reference_selected=RNG.uniform(size=(B, T)) < 0.5,
  preferred=np.array([True, False, False, True, True, False]),
  previous_logp=logps(),
  stratum_term=np.array([1.0, 1, 1, 1, 0, 1]),
  mode_term=np.array([1.0, 0, 1, 0, 1, 0]),
  success_rate=np.array([0.25, 0.0, 0.5, 1.0, 0.75, 0.5]),
  finished=np.array([True, True, False, True, False, True]),
  user_score=np.linspace(-1, 1, B),
)
PAIRS = dict(group_ids=np.array([7, 2, 7, 2, 5, 5]))


def both_orders(link, a):
  """p l(z) + (1 - p) l(-z)."""
  return a['label'] * link(a['margin']) + (1 - a['label']) * link(-a['margin'])


def tracked(a):
  gap = (a['rewards'] - a['tracked_value'])[a['valid']]
  found = np.zeros(B)
  found[a['valid']] = (gap - gap.mean()) / (gap.std(ddof=1) + 0.1)
  return found


def kl_of_coins(q, p):
  return q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))


def adaptive(a, row):
  """ARPO's score of one row; the rows of a pair are 2i and 2i + 1."""
  lengths = np.maximum(MASK.sum(-1), 1)
  means = (a['score'] / lengths)[row // 2 * 2 : row // 2 * 2 + 2]
  c = min(1, 0.8 * np.exp(0.3 * abs(means[0] - means[1])) - 1)
  return a['score'][row] * (1 if a['preferred'][row] else c)


def by_row(fn):
  """Applies fn(row index, valid positions) -> values at those positions; 0 elsewhere."""
  out = np.zeros((B, T))
  for b in range(B):
    at = np.flatnonzero(MASK[b])
    if len(at) == 0:
      continue
    out[b, at] = fn(b, at)
  return out


def by_group(fn, x, valid=(True,) * B):
  """Applies fn(own value, values of the group) to every valid row."""
  members = [[j for j in range(B) if GROUPS[j] == GROUPS[i] and valid[j]] for i in range(B)]
  return np.array([fn(x[i], x[members[i]]) if valid[i] else 0.0 for i in range(B)])


def in_batch(fn, x, valid):
  return np.array([fn(x[i], x[valid]) if valid[i] else 0.0 for i in range(B)])


def weighted_mean(a, x, w):
  """Mean of [B] or [B, T] values over the valid rows of the group, weighed by w; 0 / 0 = 0."""
  out = np.zeros_like(x)
  for i in np.flatnonzero(a['valid']):
    at = [j for j in range(B) if GROUPS[j] == GROUPS[i] and a['valid'][j]]
    weight = w[at].sum(0)
    out[i] = np.where(weight > 0, (w[at] * x[at]).sum(0) / np.where(weight > 0, weight, 1), x[i])
  return out


def baselined(a, w):
  return a['valid'] * (a['rewards'] - weighted_mean(a, a['rewards'], w))


def group_gap(a):
  return a['rewards'] - weighted_mean(a, a['rewards'], np.ones(B))


def balanced(a):
  """Of the bad rows of a group as many as there are good ones are kept, those with the least numbers."""
  out = np.zeros(B)
  for group in set(GROUPS):
    rows = np.flatnonzero((group == GROUPS) & a['valid'])
    good = a['rewards'][rows] >= a['rewards'][rows].mean()
    bad = sorted(rows[~good], key=lambda i: a['uniform'][i])
    kept = [*rows[good], *bad[: good.sum()]]
    x = a['rewards'][kept]
    out[kept] = (x - x.mean()) / (x.std() + 0.1)
  return out


def token_baselined(a, lone_baseline=False):
  """By number of the token: n-th tokens of the rows of a group are compared."""
  out = np.zeros((B, T))
  at = [np.flatnonzero(row) for row in MASK]
  for b in np.flatnonzero(a['valid']):
    for n, t in enumerate(at[b]):
      others = [j for j in np.flatnonzero(GROUPS[b] == GROUPS) if a['valid'][j] and n < len(at[j])]
      w = [a['score_norm'][j, at[j][: n + 1]].sum() for j in others]
      g = [a['token_returns'][j, at[j][n]] for j in others]
      lone = len(others) == 1 and not lone_baseline
      out[b, t] = a['token_returns'][b, t] - (0 if lone else np.dot(w, g) / sum(w))
  return out


def vtrace(b, at, discount, trace, rho_bar, c_bar):
  """(rewards, values with a 0 at the end, ratios, corrections) of one row, as sums of errors."""
  r, rho = ARRAYS['token_rewards'][b, at], np.exp(ARRAYS['log_rho'][b, at])
  v = np.append(ARRAYS['values'][b, at], 0)
  delta = np.minimum(rho_bar, rho) * (r + discount * v[1:] - v[:-1])
  c, n = discount * trace * np.minimum(c_bar, rho), len(at)
  e = [sum(np.prod(c[t:k]) * delta[k] for k in range(t, n)) for t in range(n)]
  return r, v, rho, np.append(e, 0)


def vtrace_advantage(b, at, discount, trace, rho_bar, c_bar, rho_pg):
  r, v, rho, e = vtrace(b, at, discount, trace, rho_bar, c_bar)
  return np.minimum(rho_pg, rho) * (r + discount * (v[1:] + trace * e[1:]) - v[:-1])


def retrace(b, at, discount, trace):
  r, v, rho, _ = vtrace(b, at, discount, trace, 1, 1)
  c, delta, n = trace * np.minimum(1, rho), r + discount * v[1:] - v[:-1], len(at)
  powers = [[discount ** (k - t) * np.prod(c[t + 1 : k + 1]) for k in range(n)] for t in range(n)]
  return [v[t] + sum(powers[t][k] * delta[k] for k in range(t, n)) for t in range(n)]


def pairs(a, loss):
  """loss(gap of rewards, log-ratio and log-probability of own and other row), for every row."""
  moved = ((a['logp'] - a['proximal_logp']) * MASK).sum(-1)
  score = (a['logp'] * MASK).sum(-1)
  out = []
  for i in range(B):
    j = next(j for j in range(B) if j != i and a['group_ids'][j] == a['group_ids'][i])
    out.append(loss(a['rewards'][i] - a['rewards'][j], moved[i], moved[j], score[i] - score[j]))
  return np.array(out)


def product_clip(gap, own, other, odds):
  x = np.exp(own + other)
  return -min(gap * x, gap * np.clip(x, 0.7, 1.3))


def joint_clip(gap, own, other, odds):
  c, old = np.exp(own + other) * gap / 2, odds - own + other
  return -min(c * odds, c * np.clip(odds, old - 0.3, old + 0.3))


def clipped_ratio(a, limit):
  return np.clip(np.exp(a['log_ratio_sum']), 1 / limit, limit)


def root_chi_square(a):
  rho = clipped_ratio(a, 4.0)
  chi_square = np.mean(((rho - 1) ** 2 / rho)[a['valid']])
  return a['valid'] * (rho - 1) / np.sqrt(chi_square)


def others(own, group):
  return own - (group.sum() - own) / (len(group) - 1) if len(group) > 1 else 0.0


def z_score(own, group):
  return (own - group.mean()) / (group.std(ddof=1) + 1e-6) if len(group) > 1 else 0.0


def softmax(z):
  return np.exp(z) / np.exp(z).sum(-1, keepdims=True)


def skewed(divergence, a):
  """A divergence of the probabilities of teacher and student."""
  return divergence(softmax(a['teacher_logits']), softmax(a['logits']))


def entropy_aware(t, s):
  unsure = -(t * np.log(t)).sum(-1) > 0.8
  assert 0 < unsure.sum() < unsure.size
  return np.where(unsure, 0.4 * kl(s, t) + kl(t, s), kl(s, t))


def bucketed(t, s):
  """Forward KL of the teacher's two most likely tokens and one class of all others."""
  order = np.argsort(-t, axis=-1)
  cut = lambda x: np.take_along_axis(x, order, axis=-1)
  classes = lambda x: np.concatenate([cut(x)[..., :2], cut(x)[..., 2:].sum(-1, keepdims=True)], -1)
  return kl(classes(t), classes(s))


def kl(p, q):
  return (p * np.log(p / q)).sum(-1)


def sigmoid(z):
  return 1 / (1 + np.exp(-z))


def bernoulli(z, p):
  return -p * np.log(sigmoid(z)) - (1 - p) * np.log(sigmoid(-z))


def discounted(b, at, discount):
  rewards = ARRAYS['token_rewards'][b, at]
  n = len(at)
  return [sum(discount ** (k - t) * rewards[k] for k in range(t, n)) for t in range(n)]


def generalised(b, at, discount, trace):
  n = len(at)
  value = np.append(ARRAYS['values'][b, at], 0)
  delta = ARRAYS['token_rewards'][b, at] + discount * value[1:] - value[:-1]
  return [sum((discount * trace) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]


def row_scores(x):
  """Per row: (sum, number) over the mask."""
  return (x * MASK).sum(-1), np.maximum(MASK.sum(-1), 1)


def reduced(total, count):
  return np.array([total, count])


def js(t, s, w):
  mixture = w * t + (1 - w) * s
  return w * kl(t, mixture) + (1 - w) * kl(s, mixture)


# fn -> (knobs, transcription); a is a namespace of the arrays above.
def inverse_soft_q(a):
  """The squared implied reward, from the last token of each row to the first."""
  found = np.zeros(a['logp'].shape)
  for b, live in enumerate(np.asarray(a['mask'])):
    after = 0.0
    for t in np.flatnonzero(live)[::-1]:
      value = a['log_normalizer'][b, t]
      found[b, t] = (value + a['logp'][b, t] - 0.9 * after) ** 2
      after = value
  return found


ORACLES = {
  returns.reward_to_go: (
    dict(discount=0.9),
    lambda a: by_row(lambda b, at: discounted(b, at, 0.9)),
  ),
  returns.gae: (
    dict(discount=0.9, trace=0.8),
    lambda a: by_row(lambda b, at: generalised(b, at, 0.9, 0.8)),
  ),
  returns.vtrace_targets: (
    dict(discount=0.9, trace=0.8, rho_bar=1.2, c_bar=0.7),
    lambda a: by_row(lambda b, at: np.add(*vtrace(b, at, 0.9, 0.8, 1.2, 0.7)[1::2])[:-1]),
  ),
  returns.vtrace_advantages: (
    dict(discount=0.9, trace=0.8, rho_bar=1.2, c_bar=0.7, rho_pg=0.9),
    lambda a: by_row(lambda b, at: vtrace_advantage(b, at, 0.9, 0.8, 1.2, 0.7, 0.9)),
  ),
  returns.retrace_targets: (
    dict(discount=0.9, trace=0.8),
    lambda a: by_row(lambda b, at: retrace(b, at, 0.9, 0.8)),
  ),
  baselines.sampled_baseline: (
    {},
    lambda a: a['valid'] * (a['rewards'] - a['baseline_rewards'].mean(-1)),
  ),
  baselines.tracked_baseline: (dict(eps=0.1), lambda a: tracked(a)),
  baselines.length_weighted: ({}, lambda a: baselined(a, MASK.sum(-1))),
  baselines.gradient_weighted: ({}, lambda a: baselined(a, (a['score_norm'] * MASK).sum(-1))),
  baselines.informative_mean: ({}, lambda a: group_gap(a) * a['valid'] * 5 / 3),
  baselines.nonzero_mean: ({}, lambda a: group_gap(a) * a['valid']),
  baselines.balanced_group_mean: (
    dict(standardized=True, eps=0.1),
    balanced,
  ),
  baselines.exponential_group_mean: (
    dict(temperature=0.7),
    lambda a: np.exp(group_gap(a) / 0.7) * baselined(a, np.exp(group_gap(a) / 0.7)),
  ),
  baselines.exponential_times_advantage: (
    dict(temperature=0.7),
    lambda a: a['valid'] * group_gap(a) * np.exp(group_gap(a) / 0.7),
  ),
  baselines.optimal_token_baseline: (dict(lone_baseline=False), token_baselined),
  advantages.raw: ({}, lambda a: a['rewards'] * a['valid']),
  advantages.group_mean: (
    {},
    lambda a: by_group(lambda x, group: x - group.mean(), a['rewards'], a['valid']),
  ),
  advantages.group_normalized: ({}, lambda a: by_group(z_score, a['rewards'], a['valid'])),
  advantages.leave_one_out: ({}, lambda a: by_group(others, a['rewards'], a['valid'])),
  advantages.batch_mean: (
    {},
    lambda a: in_batch(lambda x, batch: x - batch.mean(), a['rewards'], a['valid']),
  ),
  advantages.batch_normalized: (
    dict(ddof=0, eps=0.1),
    lambda a: in_batch(
      lambda x, batch: (x - batch.mean()) / np.sqrt(batch.var(ddof=0) + 0.1),
      a['rewards'],
      a['valid'],
    ),
  ),
  advantages.identity: ({}, lambda a: a['advantages'] * MASK),
  advantages.whiten: (
    dict(ddof=0, eps=0.1),
    lambda a: (
      MASK
      * (a['advantages'] - a['advantages'][MASK].mean())
      / np.sqrt(a['advantages'][MASK].var(ddof=0) + 0.1)
    ),
  ),
  penalties.k1: ({}, lambda a: a['logp'] - a['reference_logp']),
  penalties.k2: ({}, lambda a: (a['logp'] - a['reference_logp']) ** 2 / 2),
  penalties.squared_log_ratio: ({}, lambda a: a['log_ratio'] ** 2 / 2),
  penalties.k3: (
    dict(limit=0.5),
    lambda a: np.minimum(
      np.exp(a['reference_logp'] - a['logp']) - 1 - (a['reference_logp'] - a['logp']), 0.5
    ),
  ),
  penalties.importance_k3: (
    {},
    lambda a: (
      np.exp(a['log_ratio'])
      * (np.exp(a['reference_logp'] - a['logp']) - 1 - (a['reference_logp'] - a['logp']))
    ),
  ),
  penalties.negative_entropy: ({}, lambda a: -a['entropy']),
  penalties.value_error: ({}, lambda a: (a['values'] - a['returns']) ** 2 / 2),
  penalties.clipped_value_error: (
    dict(eps=0.3),
    lambda a: (
      0.5
      * np.maximum(
        (a['values'] - a['returns']) ** 2,
        (np.clip(a['values'], a['old_values'] - 0.3, a['old_values'] + 0.3) - a['returns']) ** 2,
      )
    ),
  ),
  penalties.nll: (dict(cutoff=0.3), lambda a: -np.minimum(a['logp'], np.log(0.3))),
  penalties.unlikelihood: (
    dict(floor=0.3),
    lambda a: -np.log(np.maximum(1 - np.exp(a['logp']), 0.3)),
  ),
  penalties.selected_absolute: ({}, lambda a: a['selected'] * np.abs(a['log_ratio'])),
  penalties.selected_k3: (
    {},
    lambda a: (
      a['selected']
      * np.minimum(np.exp(a['proxy_logp'] - a['logp']) - 1 + a['logp'] - a['proxy_logp'], 10)
    ),
  ),
  penalties.inverse_soft_q: (dict(discount=0.9), inverse_soft_q),
  penalties.entropy_band: (
    dict(low=0.5, high=1.5),
    lambda a: np.abs(a['entropy'] - np.clip(a['entropy'], 0.55, 1.65)),
  ),
  penalties.entropy_band_published: (
    dict(low=0.5, high=1.5, height=0.3),
    lambda a: 0.3 * ((a['entropy'] <= 0.55) | (a['entropy'] >= 1.65)),
  ),
  implicit_rewards.old_log_ratio_sum: (
    {},
    lambda a: row_scores(a['logp'] - a['proximal_logp'])[0],
  ),
  implicit_rewards.bellman_sum: (
    {},
    lambda a: (
      row_scores(a['logp'] - a['reference_logp'])[0]
      + MASK.any(-1) * a['log_normalizer'][np.arange(B), MASK.argmax(-1)]
    ),
  ),
  implicit_rewards.log_ratio_sum: ({}, lambda a: row_scores(a['logp'] - a['reference_logp'])[0]),
  implicit_rewards.log_ratio_mean: (
    {},
    lambda a: np.divide(*row_scores(a['logp'] - a['reference_logp'])),
  ),
  implicit_rewards.logp_sum: ({}, lambda a: row_scores(a['logp'])[0]),
  implicit_rewards.logp_mean: ({}, lambda a: np.divide(*row_scores(a['logp']))),
  implicit_rewards.two_references: (
    dict(reference_weight=0.25),
    lambda a: row_scores(a['logp'] - 0.25 * a['reference_logp'] - 0.75 * a['previous_logp'])[0],
  ),
  implicit_rewards.weighted_log_ratio_sum: (
    {},
    lambda a: row_scores(a['token_weights'] * (a['logp'] - a['reference_logp']))[0],
  ),
  implicit_rewards.clipped_log_ratio_sum: (
    dict(low=-0.5, high=0.7),
    lambda a: row_scores(np.clip(a['logp'] - a['reference_logp'], -0.5, 0.7))[0],
  ),
  implicit_rewards.selected_log_ratio_sum: (
    {},
    lambda a: row_scores(a['selected'] * (a['logp'] - a['reference_logp']))[0],
  ),
  implicit_rewards.separately_selected_sum: (
    {},
    lambda a: row_scores(a['selected'] * a['logp'] - a['reference_selected'] * a['reference_logp'])[
      0
    ],
  ),
  preference_losses.exponential: ({}, lambda a: both_orders(lambda z: np.exp(-z), a)),
  preference_losses.truncated_square: (
    {},
    lambda a: both_orders(lambda z: np.maximum(1 - z, 0) ** 2, a),
  ),
  preference_losses.savage: ({}, lambda a: both_orders(lambda z: sigmoid(-z) ** 2, a)),
  preference_losses.sigmoid: ({}, lambda a: both_orders(lambda z: sigmoid(-z), a)),
  preference_losses.modulated: (
    dict(temperature=0.7),
    lambda a: both_orders(
      lambda z: sigmoid(-z / 0.7) * -np.log(sigmoid(z)) + sigmoid(z / 0.7) * np.exp(-z), a
    ),
  ),
  preference_losses.clipped_logistic: (
    dict(bound=0.5),
    lambda a: both_orders(lambda z: -np.log(sigmoid(np.clip(z, -0.5, 0.5))), a),
  ),
  preference_losses.reverse_kl: (
    {},
    lambda a: kl_of_coins(sigmoid(a['margin']), np.clip(a['label'], 1e-6, 1 - 1e-6)),
  ),
  score_shapes.identity: ({}, lambda a: a['score']),
  score_shapes.forward_kl: ({}, lambda a: -1 / np.exp(a['score'])),
  score_shapes.jensen_shannon: (
    {},
    lambda a: np.log(2 * np.exp(a['score']) / (1 + np.exp(a['score']))),
  ),
  score_shapes.alpha_divergence: (
    dict(alpha=0.3),
    lambda a: (1 - np.exp(a['score']) ** -0.3) / 0.3,
  ),
  score_shapes.chi_square_kl: (
    dict(chi=0.5),
    lambda a: 0.5 * np.exp(a['score']) + a['score'],
  ),
  score_shapes.power: (dict(alpha=-0.4), lambda a: (np.exp(0.4 * a['score']) - 1) / 0.4),
  score_shapes.log_odds: (
    {},
    lambda a: (lambda p: np.log(p / (1 - p)))(np.exp(np.minimum(a['score'], -1e-6))),
  ),
  score_shapes.anchored: (
    dict(penalty=3.0),
    lambda a: a['score'] + 3 * a['preferred'] * np.minimum(a['score'], 0),
  ),
  score_shapes.damped: (
    dict(factor=0.4),
    lambda a: np.where(a['preferred'], 1.0, 0.4) * a['score'],
  ),
  score_shapes.adaptive_rejection: (
    dict(scale=0.8, rate=0.3),
    lambda a: np.array([adaptive(a, i) for i in range(B)]),
  ),
  preference_losses.logistic: ({}, lambda a: bernoulli(a['margin'], a['label'])),
  preference_losses.squared: (
    dict(target=2.0),
    lambda a: a['label'] * (2 - a['margin']) ** 2 + (1 - a['label']) * (2 + a['margin']) ** 2,
  ),
  preference_losses.hinge: (
    dict(threshold=0.5),
    lambda a: (
      a['label'] * np.maximum(0.5 - a['margin'], 0)
      + (1 - a['label']) * np.maximum(0.5 + a['margin'], 0)
    ),
  ),
  pointwise.logistic: ({}, lambda a: bernoulli(a['score'], a['label'])),
  pointwise.matched: (
    dict(label_smoothing=0.1),
    lambda a: np.where(
      np.isfinite(a['matched_score']),
      bernoulli(np.nan_to_num(a['score'] - a['matched_score'], neginf=0), 0.1 + 0.8 * a['label']),
      0,
    ),
  ),
  pointwise.sigmoid: (
    dict(desirable=1.5, undesirable=0.8),
    lambda a: (
      1.5 * a['label'] * sigmoid(-a['score']) + 0.8 * (1 - a['label']) * sigmoid(a['score'])
    ),
  ),
  pointwise.squared: (
    dict(target=2.0),
    lambda a: (a['score'] - 4 * (a['label'] - 0.5)) ** 2,
  ),
  pointwise.paired_product_clip: (dict(eps=0.3), lambda a: pairs(a, product_clip)),
  pointwise.paired_joint_clip: (dict(delta=0.3), lambda a: pairs(a, joint_clip)),
  log_partition.zero: ({}, lambda a: np.zeros(B)),
  log_partition.group_mean: ({}, lambda a: by_group(lambda x, group: group.mean(), a['residual'])),
  log_partition.group_mean_detached: (
    {},
    lambda a: by_group(lambda x, group: group.mean(), a['residual']),
  ),
  log_partition.leave_one_out: (
    {},
    lambda a: by_group(lambda x, group: x - others(x, group), a['residual']),
  ),
  log_partition.reward_mean: (
    {},
    lambda a: by_group(lambda x, group: group.mean(), a['scaled_rewards']),
  ),
  log_partition.log_partition: (
    {},
    lambda a: by_group(lambda x, group: np.log(np.exp(group).mean()), a['scaled_rewards']),
  ),
  log_partition.value: ({}, lambda a: a['first_value']),
  log_partition.soft_baseline: (
    dict(baseline_temperature=0.4),
    lambda a: 0.4 * np.log(np.exp(a['baseline_rewards'] / 0.4).mean(-1)) / 0.3,
  ),
  f_divergences.forward_kl: ({}, lambda a: -1 / np.exp(a['log_t'])),
  f_divergences.reverse_kl: ({}, lambda a: a['log_t'] + 1),
  f_divergences.jensen_shannon: (
    {},
    lambda a: a['log_t'] - np.log((np.exp(a['log_t']) + 1) / 2),
  ),
  f_divergences.total_variation: ({}, lambda a: np.where(a['log_t'] > 0, 0.5, -0.5)),
  f_divergences.forward_chi_square: ({}, lambda a: 1 - np.exp(a['log_t']) ** -2.0),
  f_divergences.reverse_chi_square: ({}, lambda a: 2 * np.exp(a['log_t']) - 2),
  reward_penalties.chi_square: (dict(limit=4.0), lambda a: clipped_ratio(a, 4.0) - 1),
  reward_penalties.root_chi_square: (dict(limit=4.0), root_chi_square),
  divergences.forward_kl: (
    {},
    lambda a: kl(softmax(a['teacher_logits']), softmax(a['logits'])),
  ),
  divergences.reverse_kl: (
    {},
    lambda a: kl(softmax(a['logits']), softmax(a['teacher_logits'])),
  ),
  divergences.jensen_shannon: (
    dict(teacher_weight=0.3),
    lambda a: js(softmax(a['teacher_logits']), softmax(a['logits']), 0.3),
  ),
  divergences.skew_forward_kl: (
    dict(skew=0.2),
    lambda a: skewed(lambda t, s: kl(t, 0.2 * t + 0.8 * s), a),
  ),
  divergences.skew_reverse_kl: (
    dict(skew=0.2),
    lambda a: skewed(lambda t, s: kl(s, 0.8 * t + 0.2 * s), a),
  ),
  divergences.symmetric_kl: (
    dict(reverse_weight=0.9),
    lambda a: skewed(lambda t, s: 0.1 * kl(t, s) + 0.9 * kl(s, t), a),
  ),
  divergences.alpha_divergence: (
    dict(alpha=1.5),
    lambda a: skewed(lambda t, s: ((t**1.5 / s**0.5).sum(-1) - 1) / 0.75, a),
  ),
  divergences.total_variation: (
    {},
    lambda a: skewed(lambda t, s: np.maximum(t - s, 0).sum(-1), a),
  ),
  divergences.entropy_aware: (
    dict(threshold=0.8, kept=0.4),
    lambda a: skewed(entropy_aware, a),
  ),
  divergences.top_k: (dict(k=2), lambda a: skewed(bucketed, a)),
  aggregation.token_mean: ({}, lambda a: reduced(a['loss'][MASK].sum(), 17)),
  aggregation.sequence_mean: (
    dict(empty_rows=True),
    lambda a: reduced(sum(a['loss'][b][MASK[b]].mean() for b in (0, 2, 3, 4, 5)), 6),
  ),
  aggregation.sequence_sum: (dict(empty_rows=True), lambda a: reduced(a['loss'][MASK].sum(), 6)),
  aggregation.constant_length: (
    dict(length=8),
    lambda a: reduced(a['loss'][MASK].sum(), 48),
  ),
}

TABLES = [
  returns.TABLE,
  returns.TARGETS,
  returns.CORRECTED,
  returns.OF_TURNS,
  baselines.TOKEN_BASELINES,
  advantages.TABLE,
  advantages.NORMALIZERS,
  penalties.TABLE,
  implicit_rewards.TABLE,
  score_shapes.TABLE,
  preference_losses.TABLE,
  pointwise.TABLE,
  log_partition.TABLE,
  f_divergences.TABLE,
  reward_penalties.TABLE,
  multipliers.TABLE,
  reward_maps.TABLE,
  divergences.TABLE,
  aggregation.TABLE,
]
LISTED = [fn for table in TABLES for fn in table.values()]
ORACLES |= oracles.functions(LISTED)


def test_every_function_of_every_table_has_a_transcription():
  missing = set(LISTED) - ORACLES.keys()
  assert not missing, (
    'write their transcriptions into FUNCTIONS of tests/policy_gradient/oracles_*.py'
  )
  assert not ORACLES.keys() - set(LISTED)


def name_of(fn):
  return f'{fn.__module__.split(".")[-1]}.{fn.__name__}'


@pytest.mark.parametrize('fn', ORACLES, ids=name_of)
def test_equals_the_transcription(fn, x64):
  knobs, oracle = ORACLES[fn]
  given = ARRAYS | (PAIRS if fn.__name__.startswith('paired') else {})
  arrays = {name: jnp.asarray(x) for name, x in given.items()}
  got = fn(*(arrays[name] for name in registry.inputs(fn)), **knobs)
  if fn in aggregation.TABLE.values():
    got = jnp.stack([got.total, got.count])
  assert got.dtype == jnp.float64
  expected = oracle(oracles.Arrays(given))
  np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)
  assert fn is log_partition.zero or np.any(np.abs(expected) > 1e-6), (
    'zeros say little: choose other knobs'
  )
