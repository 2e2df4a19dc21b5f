"""Every function of every table against a plain NumPy transcription of its equation, in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import registry
from polgrad.losses import (
  advantages,
  aggregation,
  divergences,
  implicit_rewards,
  links,
  penalties,
  pointwise,
  ratios,
  returns,
  surrogates,
  weights,
)

RNG = np.random.default_rng(0)
B, T, V = 4, 5, 3
MASK = np.array([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0]], bool)
GROUPS = np.array([7, 2, 7, 7])


def logps():
  return -RNG.exponential(size=(B, T))


ARRAYS = dict(
  mask=MASK,
  where=MASK,
  group_ids=GROUPS,
  valid=np.array([True, True, False, True]),
  logp=logps(),
  reference_logp=logps(),
  proximal_logp=logps(),
  behavior_logp=logps(),
  entropy=-logps(),
  log_ratio=RNG.normal(size=(B, T)),
  advantages=RNG.normal(size=(B, T)),
  values=RNG.normal(size=(B, T)),
  old_values=RNG.normal(size=(B, T)),
  returns=RNG.normal(size=(B, T)),
  token_rewards=RNG.normal(size=(B, T)),
  loss=RNG.normal(size=(B, T)),
  rewards=RNG.normal(size=B),
  score=RNG.normal(size=B),
  residual=RNG.normal(size=B),
  margin=RNG.normal(size=B),
  label=np.array([0.0, 1.0, 0.3, 1.2]),
  logits=RNG.normal(size=(B, T, V)),
  teacher_logits=RNG.normal(size=(B, T, V)),
)


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


def others(own, group):
  return own - (group.sum() - own) / (len(group) - 1) if len(group) > 1 else 0.0


def z_score(own, group):
  return (own - group.mean()) / (group.std(ddof=1) + 1e-6) if len(group) > 1 else 0.0


def softmax(z):
  return np.exp(z) / np.exp(z).sum(-1, keepdims=True)


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
ORACLES = {
  returns.reward_to_go: (
    dict(discount=0.9),
    lambda a: by_row(lambda b, at: discounted(b, at, 0.9)),
  ),
  returns.gae: (
    dict(discount=0.9, trace=0.8),
    lambda a: by_row(lambda b, at: generalised(b, at, 0.9, 0.8)),
  ),
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
    dict(eps=0.1),
    lambda a: in_batch(
      lambda x, batch: (x - batch.mean()) / np.sqrt(batch.var(ddof=1) + 0.1),
      a['rewards'],
      a['valid'],
    ),
  ),
  advantages.identity: ({}, lambda a: a['advantages'] * MASK),
  advantages.whiten: (
    dict(eps=0.1),
    lambda a: (
      MASK
      * (a['advantages'] - a['advantages'][MASK].mean())
      / np.sqrt(a['advantages'][MASK].var(ddof=1) + 0.1)
    ),
  ),
  ratios.token: ({}, lambda a: a['log_ratio'] * MASK),
  ratios.sequence_geometric: ({}, lambda a: by_row(lambda b, at: a['log_ratio'][b, at].mean())),
  surrogates.reinforce: ({}, lambda a: -a['advantages'] * a['logp']),
  surrogates.importance_weighted: ({}, lambda a: -a['advantages'] * np.exp(a['log_ratio'])),
  surrogates.clipped: (
    dict(eps_low=0.2, eps_high=0.3),
    lambda a: (
      -np.minimum(
        np.exp(a['log_ratio']) * a['advantages'],
        np.clip(np.exp(a['log_ratio']), 0.8, 1.3) * a['advantages'],
      )
    ),
  ),
  surrogates.dual_clipped: (
    dict(eps_low=0.2, eps_high=0.3, cap=1.5),
    lambda a: np.where(
      a['advantages'] < 0,
      -np.maximum(
        np.minimum(
          np.exp(a['log_ratio']) * a['advantages'],
          np.clip(np.exp(a['log_ratio']), 0.8, 1.3) * a['advantages'],
        ),
        1.5 * a['advantages'],
      ),
      -np.minimum(np.exp(a['log_ratio']), 1.3) * a['advantages'],
    ),
  ),
  surrogates.truncated: (
    dict(cap=1.1),
    lambda a: -np.minimum(np.exp(a['log_ratio']), 1.1) * a['advantages'] * a['logp'],
  ),
  weights.truncated_importance: (
    dict(cap=1.2),
    lambda a: np.minimum(np.exp(a['proximal_logp'] - a['behavior_logp']), 1.2),
  ),
  weights.masked_importance: (
    dict(low=0.4, high=2.0),
    lambda a: np.array(
      [x if 0.4 <= x <= 2 else 0 for x in np.exp(a['proximal_logp'] - a['behavior_logp']).flat]
    ).reshape(B, T),
  ),
  weights.truncated_sequence_importance: (
    dict(cap=1.2),
    lambda a: np.repeat(
      np.minimum(np.exp(row_scores(a['proximal_logp'] - a['behavior_logp'])[0]), 1.2)[:, None],
      T,
      axis=1,
    ),
  ),
  penalties.k1: ({}, lambda a: a['logp'] - a['reference_logp']),
  penalties.k2: ({}, lambda a: (a['logp'] - a['reference_logp']) ** 2 / 2),
  penalties.k3: (
    {},
    lambda a: np.exp(a['reference_logp'] - a['logp']) - 1 - (a['reference_logp'] - a['logp']),
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
  penalties.nll: ({}, lambda a: -a['logp']),
  implicit_rewards.log_ratio_sum: ({}, lambda a: row_scores(a['logp'] - a['reference_logp'])[0]),
  implicit_rewards.log_ratio_mean: (
    {},
    lambda a: np.divide(*row_scores(a['logp'] - a['reference_logp'])),
  ),
  implicit_rewards.logp_sum: ({}, lambda a: row_scores(a['logp'])[0]),
  implicit_rewards.logp_mean: ({}, lambda a: np.divide(*row_scores(a['logp']))),
  links.logistic: ({}, lambda a: bernoulli(a['margin'], a['label'])),
  links.squared: (
    dict(target=2.0),
    lambda a: a['label'] * (2 - a['margin']) ** 2 + (1 - a['label']) * (2 + a['margin']) ** 2,
  ),
  links.hinge: (
    dict(threshold=0.5),
    lambda a: (
      a['label'] * np.maximum(0.5 - a['margin'], 0)
      + (1 - a['label']) * np.maximum(0.5 + a['margin'], 0)
    ),
  ),
  pointwise.logistic: ({}, lambda a: bernoulli(a['score'], a['label'])),
  pointwise.sigmoid: (
    {},
    lambda a: a['label'] * sigmoid(-a['score']) + (1 - a['label']) * sigmoid(a['score']),
  ),
  pointwise.squared: (
    dict(target=2.0),
    lambda a: (a['score'] - 4 * (a['label'] - 0.5)) ** 2,
  ),
  pointwise.consistency: (
    dict(beta=0.2),
    lambda a: (
      0.5 * by_group(lambda x, group: x - group.mean(), a['rewards'] / 0.2 - a['score']) ** 2
    ),
  ),
  pointwise.zero: ({}, lambda a: np.zeros(B)),
  pointwise.group_mean: ({}, lambda a: by_group(lambda x, group: group.mean(), a['residual'])),
  pointwise.group_mean_detached: (
    {},
    lambda a: by_group(lambda x, group: group.mean(), a['residual']),
  ),
  pointwise.leave_one_out: (
    {},
    lambda a: by_group(lambda x, group: x - others(x, group), a['residual']),
  ),
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
  aggregation.token_mean: ({}, lambda a: reduced(a['loss'][MASK].sum(), 9)),
  aggregation.sequence_mean: (
    {},
    lambda a: reduced(sum(a['loss'][b][MASK[b]].mean() for b in (0, 2, 3)), 3),
  ),
  aggregation.sequence_sum: ({}, lambda a: reduced(a['loss'][MASK].sum(), 3)),
  aggregation.constant_length: (
    dict(length=8),
    lambda a: reduced(a['loss'][MASK].sum(), 32),
  ),
}

TABLES = [
  returns.TABLE,
  advantages.TABLE,
  advantages.NORMALIZERS,
  ratios.TABLE,
  surrogates.TABLE,
  weights.TABLE,
  penalties.TABLE,
  implicit_rewards.TABLE,
  links.TABLE,
  pointwise.TABLE,
  pointwise.CENTERS,
  divergences.TABLE,
  aggregation.TABLE,
]


def test_every_function_of_every_table_has_a_transcription():
  assert {fn for table in TABLES for fn in table.values()} == set(ORACLES)


def name_of(fn):
  return f'{fn.__module__.split(".")[-1]}.{fn.__name__}'


@pytest.mark.parametrize('fn', ORACLES, ids=name_of)
def test_equals_the_transcription(fn, x64):
  knobs, oracle = ORACLES[fn]
  arrays = {name: jnp.asarray(x) for name, x in ARRAYS.items()}
  got = fn(*(arrays[name] for name in registry.inputs(fn)), **knobs)
  if fn in aggregation.TABLE.values():
    got = jnp.stack([got.total, got.count])
  assert got.dtype == jnp.float64
  np.testing.assert_allclose(got, oracle(ARRAYS), rtol=1e-10, atol=1e-12)
