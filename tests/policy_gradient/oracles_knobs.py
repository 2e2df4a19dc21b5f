"""Transcriptions of normalisations and corrections in which code bases differ by a knob."""

import numpy as np

from polgrad.losses import advantages, aggregation, penalties, pointwise, weights


def rows_of(a, i):
  """The valid rows of the group of row i, without row i."""
  group = np.flatnonzero((a.group_ids == a.group_ids[i]) & a.valid)
  return group[group != i]


def leave_one_out_normalized(a):
  out = np.zeros(len(a.rewards))
  for i in np.flatnonzero(a.valid):
    others = a.rewards[rows_of(a, i)]
    if len(others) > 1:
      out[i] = (a.rewards[i] - others.mean()) / (others.std(ddof=0) + 0.1)
  return out


def batch_scaled(a):
  out = np.zeros(len(a.rewards))
  for i in np.flatnonzero(a.valid):
    group = a.rewards[[i, *rows_of(a, i)]]
    out[i] = (a.rewards[i] - group.mean()) / (a.rewards[a.valid].std(ddof=0) + 0.1)
  return out


def huber(a):
  size = np.abs(a['values'] - a['returns'])
  return np.where(size <= 0.5, size**2 / 2, 0.5 * (size - 0.25))


def matched_bco(a):
  z, w = a.score - a.reference_point, np.minimum(np.maximum(a.density_ratio, 0.2), 0.6)
  return a.label * np.logaddexp(0, -z) + w * (1 - a.label) * np.logaddexp(0, z)


def kto(a):
  z = a.score - a.reference_point
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  return 1.5 * a.label * (1 - sigmoid(z)) + 0.8 * (1 - a.label) * (1 - sigmoid(-z))


def bco(a):
  z = a.score - a.reference_point
  return 1.5 * a.label * np.log1p(np.exp(-z)) + 0.8 * (1 - a.label) * np.log1p(np.exp(z))


def geometric_importance(a):
  out = np.ones(a.mask.shape)
  for b in np.flatnonzero(a.mask.any(axis=1)):
    at = a.mask[b]
    out[b] = np.exp(np.mean(a.proximal_logp[b, at] - a.behavior_logp[b, at]))
  return np.clip(out, 0.8, 1.2)


def near_behavior(a):
  out = np.ones(a.mask.shape)
  for b in np.flatnonzero(a.mask.any(axis=1)):
    at = a.mask[b]
    near = np.mean(a.behavior_logp[b, at] - a.logp[b, at]) <= 0.1
    out[b] = near | (a.advantages[b] >= 0)
  return out


FUNCTIONS = {
  advantages.leave_one_out_normalized: (dict(ddof=0, eps=0.1), leave_one_out_normalized),
  advantages.batch_scaled: (dict(ddof=0, eps=0.1), batch_scaled),
  penalties.importance_k1: ({}, lambda a: np.exp(a.log_ratio) * (a.logp - a.reference_logp)),
  penalties.huber_value_error: (dict(delta=0.5), huber),
  pointwise.matched_bco: (dict(least=0.2, most=0.6), matched_bco),
  pointwise.kto: (dict(desirable=1.5, undesirable=0.8), kto),
  pointwise.bco: (dict(desirable=1.5, undesirable=0.8), bco),
  aggregation.token_sum: (
    dict(rows=12),
    lambda a: np.array([a.loss[a.where].sum(), len(a.loss) / 12]),
  ),
  weights.truncated_geometric_importance: (dict(cap=1.2, floor=0.8), geometric_importance),
  weights.near_behavior_or_positive: (dict(limit=0.1), near_behavior),
  weights.normalized: ({}, lambda a: a.normalized_weights),
  weights.per_prompt: ({}, lambda a: a.prompt_weights),
  weights.fresh: (dict(oldest=2), lambda a: 1.0 - a.mask * (np.arange(6) < 2)),
  weights.replayed: ({}, lambda a: np.repeat(a.replay_weight[:, None], a.mask.shape[1], axis=1)),
}
