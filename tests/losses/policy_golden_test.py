"""Ratios, surrogates and weights against plain NumPy transcriptions of their equations, in float64."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import registry
from polgrad.losses import ratios, surrogates, weights
from tests.policy_gradient import oracles

RNG = np.random.default_rng(0)
B, T = 4, 6
MASK = np.array(
  [[0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0]], bool
)


def logps():
  return np.where(MASK, -RNG.exponential(size=(B, T)), 0)


def numbers():
  return np.where(MASK, RNG.normal(size=(B, T)), 0)


ARRAYS = dict(
  mask=MASK,
  tokens=np.array([[3, 3, 3, 3, 1, 3], [1] * 6, [1, 2, 1, 2, 1, 1], [5] * 6]),
  turn_ids=np.where(MASK, [0, 0, 1, 1, 1, 4], -1),
  logp=logps(),
  reference_logp=logps(),
  proximal_logp=logps(),
  behavior_logp=logps(),
  log_ratio=numbers(),
  advantages=numbers(),
  values=numbers(),
  old_kl=np.abs(numbers()),
  rewards=np.array([0.7, -0.2, -1.3, 0.4]),
  staleness=np.array([0.0, 1.0, 2.0, 5.0]),
  token_staleness=np.tile([5.0, 3.0, 2.0, 2.0, 1.0, 0.0], (B, 1)),
  success_rate=np.array([0.25, 0.0, 0.5, 1.0]),
  bounds=np.array([0.7, 1.3]),
  normalized_weights=np.exp(numbers()),
  prompt_weights=np.exp(numbers()),
  global_advantages=-numbers()[::-1],
  local_weight=np.array([0.2, 0.5, 0.9, 0.0]),
  replay_weight=np.array([0.2, 1.0, 0.7, 0.0]),
  excess_drift=np.array(0.7),
  entropy=np.where(MASK, np.random.default_rng(2).uniform(0.1, 2, (B, T)), 0),
  signed_entropy=np.where(MASK, np.random.default_rng(1).uniform(-1, 1, (B, T)), 0),
  selected=MASK & (RNG.uniform(size=(B, T)) < 0.5),
)


def by_row(fn):
  """Applies fn(row index, valid positions) -> values at those positions; 0 elsewhere."""
  out = np.zeros((B, T))
  for b in range(B):
    at = np.flatnonzero(MASK[b])
    if len(at):
      out[b, at] = fn(b, at)
  return out


def by_token(fn):
  """Applies fn(b, t) at every token, masked or not."""
  return np.array([[fn(b, t) for t in range(T)] for b in range(B)], float)


def tiled(fn):
  """Applies fn(row index, valid positions) -> number of the row."""
  return np.repeat([[fn(b, np.flatnonzero(MASK[b]))] for b in range(B)], T, axis=1)


def row_ratio(new, old):
  return lambda b, at: np.exp(sum(new[b, t] - old[b, t] for t in at))


def geometric(new, old):
  return lambda b, at: np.exp(np.mean(new[b, at] - old[b, at])) if len(at) else 1.0


def pessimistic(ratio, advantages, low, high):
  return -np.minimum(ratio * advantages, np.clip(ratio, low, high) * advantages)


def turn_mean(d, turn_ids, b, at):
  return [np.mean([d[b, k] for k in at if turn_ids[b, k] == turn_ids[b, t]]) for t in at]


def one_sided(x, a, low, high):
  return x <= high if a > 0 else x >= low if a < 0 else True


def path(a, beta, window):
  def row(b, at):
    out = []
    for i in range(len(at)):
      end = min(i + window, len(at))
      gap = -a.values[b, at[i]]
      gap += a.values[b, at[end]] if end < len(at) else a.rewards[b]
      gap -= beta * sum(a.logp[b, at[k]] - a.reference_logp[b, at[k]] for k in range(i, end))
      out.append(gap**2 / 2)
    return out

  return by_row(row)


def negative_aware(a):
  def loss(b, t):
    q, c = np.clip(a.success_rate[b], 0.02, 0.98), a.advantages[b, t]
    r = np.exp(min(a.log_ratio[b, t], 0.3))
    return -c * np.log(r) if c >= 0 else c * np.log(max((1 - q * r) / (1 - q), 1))

  return by_token(loss)


def gamma_shaped(a):
  ratio = np.exp(a.log_ratio)
  k, rate = np.where(a.advantages >= 0, 1.5, 2.5), np.where(a.advantages >= 0, 2.0, 0.5)
  return np.exp(rate) * ratio**k * np.exp(-rate * ratio)


def tapered(a, ratio):
  good = a.rewards[:, None] > 0.5
  return np.where(good, np.clip(ratio, 0.9, 1.5), np.clip(ratio, 0.1, 0.8))


TAPER = dict(
  positive_low=0.9, positive_high=1.5, negative_low=0.1, negative_high=0.8, threshold=0.5
)

# fn -> (knobs, transcription); a is a namespace of the arrays above.
ORACLES = {
  ratios.token: ({}, lambda a: a.log_ratio * MASK),
  ratios.sequence_geometric: ({}, lambda a: by_row(lambda b, at: a.log_ratio[b, at].mean())),
  ratios.sequence_geometric_clipped: (
    dict(eps_low=0.3, eps_high=0.5),
    lambda a: by_row(
      lambda b, at: np.mean(
        [
          min(d, 0.5) if x > 0 else max(d, -0.3)
          for d, x in zip(a.log_ratio[b, at], a.advantages[b, at])
        ]
      )
    ),
  ),
  ratios.sequence_product: ({}, lambda a: by_row(lambda b, at: a.log_ratio[b, at].sum())),
  ratios.turn_geometric: (
    {},
    lambda a: by_row(lambda b, at: turn_mean(a.log_ratio, a.turn_ids, b, at)),
  ),
  ratios.clamped: (
    dict(low=-0.5, high=0.3),
    lambda a: MASK * np.clip(a.log_ratio, -0.5, 0.3),
  ),
  ratios.centered: (dict(scale=0.3), lambda a: MASK * 0.3 * (a.log_ratio + a.old_kl)),
  ratios.recorded: ({}, lambda a: a.proximal_logp),
  ratios.behavior: ({}, lambda a: a.behavior_logp),
  ratios.interpolated: (
    {},
    lambda a: by_token(
      lambda b, t: [1, 1, 0.5, 0.2][b] * a.behavior_logp[b, t] + [0, 0, 0.5, 0.8][b] * a.logp[b, t]
    ),
  ),
  ratios.interpolated_by_token: (
    {},
    lambda a: by_token(
      lambda b, t: (
        [0.2, 1 / 3, 0.5, 0.5, 1, 1][t] * a.behavior_logp[b, t]
        + [0.8, 2 / 3, 0.5, 0.5, 0, 0][t] * a.logp[b, t]
      )
    ),
  ),
  surrogates.reinforce: ({}, lambda a: -a.advantages * a.logp),
  surrogates.importance_weighted: ({}, lambda a: -a.advantages * np.exp(a.log_ratio)),
  surrogates.clipped: (
    dict(eps_low=0.2, eps_high=0.3),
    lambda a: pessimistic(np.exp(a.log_ratio), a.advantages, 0.8, 1.3),
  ),
  surrogates.clipped_between: (
    dict(cap=1.6),
    lambda a: np.where(
      a.advantages < 0,
      np.minimum(pessimistic(np.exp(a.log_ratio), a.advantages, 0.7, 1.3), -1.6 * a.advantages),
      pessimistic(np.exp(a.log_ratio), a.advantages, 0.7, 1.3),
    ),
  ),
  surrogates.clipped_away: (
    dict(eps_low=0.2, eps_high=0.3),
    lambda a: by_token(
      lambda b, t: (
        0
        if one_sided(np.exp(a.log_ratio[b, t]), a.advantages[b, t], 0.8, 1.3)
        else -a.advantages[b, t] * np.exp(a.log_ratio[b, t])
      )
    ),
  ),
  surrogates.dual_clipped: (
    dict(eps_low=0.2, eps_high=0.3, cap=1.5),
    lambda a: np.minimum(
      pessimistic(np.exp(a.log_ratio), a.advantages, 0.8, 1.3),
      np.where(a.advantages < 0, -1.5 * a.advantages, np.inf),
    ),
  ),
  surrogates.centered_clip: (
    dict(eps=0.3),
    lambda a: pessimistic(
      np.exp(a.logp - a.behavior_logp),
      a.advantages,
      np.exp(a.proximal_logp - a.behavior_logp) - 0.3,
      np.exp(a.proximal_logp - a.behavior_logp) + 0.3,
    ),
  ),
  surrogates.truncated: (
    dict(cap=1.1, floor=0.6),
    lambda a: -np.clip(np.exp(a.log_ratio), 0.6, 1.1) * a.advantages * a.logp,
  ),
  weights.soft_gate: (
    dict(tau_positive=2.0, tau_negative=3.0),
    lambda a: by_token(
      lambda b, t: (
        (4 / (tau := 2 if a.advantages[b, t] > 0 else 3))
        / (1 + np.exp(-tau * (np.exp(a.log_ratio[b, t]) - 1)))
      )
    ),
  ),
  surrogates.soft_gated: (
    dict(tau_positive=2.0, tau_negative=3.0),
    lambda a: by_token(
      lambda b, t: (
        -a.advantages[b, t]
        * (4 / (tau := 2 if a.advantages[b, t] > 0 else 3))
        / (1 + np.exp(-tau * (np.exp(a.log_ratio[b, t]) - 1)))
      )
    ),
  ),
  surrogates.negative_aware: (dict(limit=0.3), negative_aware),
  surrogates.probability_shaped: (
    dict(gamma=0.2),
    lambda a: -a.advantages * np.exp(a.logp) / (np.exp(a.logp) + 0.2),
  ),
  surrogates.probability_power: (
    dict(exponent=0.4),
    lambda a: -a.advantages * np.exp(a.logp) ** 0.4,
  ),
  surrogates.path_consistency: (
    dict(beta=0.3, window=2),
    lambda a: path(a, 0.3, 2),
  ),
  weights.truncated_importance: (
    dict(cap=1.2, floor=0.6),
    lambda a: np.clip(np.exp(a.proximal_logp - a.behavior_logp), 0.6, 1.2),
  ),
  weights.masked_importance: (
    dict(low=0.4, high=2.0),
    lambda a: np.array(
      [x if 0.4 <= x <= 2 else 0 for x in np.exp(a.proximal_logp - a.behavior_logp).flat]
    ).reshape(B, T),
  ),
  weights.truncated_sequence_importance: (
    dict(cap=1.2, floor=0.6),
    lambda a: np.clip(tiled(row_ratio(a.proximal_logp, a.behavior_logp)), 0.6, 1.2),
  ),
  weights.masked_sequence_importance: (
    dict(low=0.9, high=2.0),
    lambda a: np.array(
      [x if 0.9 <= x <= 2 else 0 for x in tiled(row_ratio(a.proximal_logp, a.behavior_logp)).flat]
    ).reshape(B, T),
  ),
  weights.geometric_band: (
    dict(low=0.8, high=1.3),
    lambda a: np.array(
      [0.8 <= x <= 1.3 for x in tiled(geometric(a.proximal_logp, a.behavior_logp)).flat]
    ).reshape(B, T),
  ),
  weights.one_sided: (
    dict(low=0.7, high=1.3),
    lambda a: by_token(
      lambda b, t: one_sided(np.exp(a.log_ratio[b, t]), a.advantages[b, t], 0.7, 1.3)
    ),
  ),
  weights.two_sided: (
    dict(low=0.7, high=1.3),
    lambda a: by_token(lambda b, t: 0.7 <= np.exp(a.log_ratio[b, t]) <= 1.3),
  ),
  weights.ring: (
    dict(low=0.9, high=1.1, outer_low=0.6, outer_high=1.3),
    lambda a: by_token(
      lambda b, t: (
        0.9 <= (r := np.exp(a.log_ratio[b, t])) <= 1.1
        or (a.advantages[b, t] >= 0 and r <= 0.6)
        or (a.advantages[b, t] <= 0 and r >= 1.3)
      )
    ),
  ),
  weights.probability_one_sided: (
    dict(low=0.1, high=0.15),
    lambda a: by_token(
      lambda b, t: one_sided(
        np.exp(a.logp[b, t]) - np.exp(a.behavior_logp[b, t]), a.advantages[b, t], -0.1, 0.15
      )
    ),
  ),
  weights.near_or_positive: (
    dict(limit=0.1),
    lambda a: np.where(
      a.advantages >= 0, 1, tiled(geometric(a.proximal_logp, a.logp)) <= np.exp(0.1)
    ),
  ),
  weights.tapered: (TAPER, lambda a: tapered(a, np.exp(a.log_ratio))),
  weights.gamma_shaped: (
    dict(power_positive=1.5, rate_positive=2.0, power_negative=2.5, rate_negative=0.5),
    gamma_shaped,
  ),
  weights.selected: ({}, lambda a: a.selected * 1.0),
  weights.unselected: ({}, lambda a: 1.0 - a.selected),
}
TABLES = [ratios.TABLE, ratios.PROXIMALS, surrogates.TABLE, weights.TABLE]
LISTED = [fn for table in TABLES for fn in table.values()]
ORACLES |= oracles.functions(LISTED)


def test_every_function_of_every_table_has_a_transcription():
  missing = set(LISTED) - ORACLES.keys()
  assert not missing, (
    'write their transcriptions into FUNCTIONS of tests/policy_gradient/oracles_*.py'
  )
  assert not ORACLES.keys() - set(LISTED)


@pytest.mark.parametrize(
  'fn', ORACLES, ids=lambda fn: f'{fn.__module__.split(".")[-1]}.{fn.__name__}'
)
def test_equals_the_transcription(fn, x64):
  knobs, oracle = ORACLES[fn]
  arrays = {name: jnp.asarray(x) for name, x in ARRAYS.items()}
  got = fn(*(arrays[name] for name in registry.inputs(fn)), **knobs)
  assert got.dtype == jnp.float64
  expected = oracle(types.SimpleNamespace(**ARRAYS))
  np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)
  assert np.any(np.abs(expected) > 1e-6), 'zeros say little: choose other knobs'


@pytest.mark.parametrize('fn', weights.TABLE.values(), ids=lambda fn: fn.__name__)
def test_the_arrays_lie_on_both_sides_of_a_bound(fn):
  """A transcription of a keep-mask says little if everything is kept."""
  kept = ORACLES[fn][1](types.SimpleNamespace(**ARRAYS)).astype(float)
  assert len(np.unique(kept[MASK].round(12))) > 1
