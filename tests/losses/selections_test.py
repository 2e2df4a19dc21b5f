"""Selections: published examples, plain transcriptions, and what holds for all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import registry
from polgrad.losses import selections, surrogates

B, T = 4, 8
MASK = np.random.default_rng(1).uniform(size=(B, T)) < 0.8
MASK[2] = False
TOKENS = [(b, t) for b in range(B) for t in range(T) if MASK[b, t]]


def make(seed):
  """The inputs of all selections, by name, zeroed where the mask is False."""
  rng = np.random.default_rng(seed)
  normal = ('logp', 'proxy_logp', 'log_ratio', 'advantages', 'proximal_logp', 'behavior_logp')
  uniform = ('noise', 'score_norm', 'score_fisher', 'hidden_norm', 'entropy')
  arrays = {name: rng.normal(size=(B, T)) for name in normal}
  arrays |= {name: rng.uniform(size=(B, T)) for name in uniform}
  arrays['injected'] = rng.uniform(size=(B, T)) < 0.5
  arrays = {name: np.where(MASK, x, 0) for name, x in arrays.items()}
  turn_ids = np.where(MASK, np.arange(T)[None] // 3, -1)
  own = {'rewards': np.array([1, 0, 1, 1]), 'turn_ids': turn_ids}
  return arrays | own | {'mask': MASK, 'group_ids': np.array([5, 2, 5, 5])}


def call(fn, arrays, **knobs):
  return fn(*(jnp.asarray(arrays[name]) for name in registry.inputs(fn)), **knobs)


def covariance(a):
  logp, advantages = (np.mean([a[n][p] for p in TOKENS]) for n in ('logp', 'advantages'))
  return lambda p: (a['logp'][p] - logp) * (a['advantages'][p] - advantages)


def top_entropy(a, share):
  threshold = np.quantile([a['entropy'][p] for p in TOKENS], 1 - share)
  return [p for p in TOKENS if a['entropy'][p] >= threshold]


def uncertain_hints(a, share):
  given = sorted((p for p in TOKENS if a['injected'][p]), key=lambda p: -a['entropy'][p])
  return [p for p in TOKENS if not a['injected'][p]] + given[: int(share * len(given))]


def gap(a, p):
  return a['proximal_logp'][p] - a['behavior_logp'][p]


def central_turns(a, low, high):
  turns = {}
  for b, t in TOKENS:
    if a['rewards'][b] == 1:
      turns.setdefault((b, t // 3), []).append((b, t))
  surprise = {k: -np.mean([a['logp'][p] for p in at]) for k, at in turns.items()}
  least, most = np.quantile(list(surprise.values()), [low, high])
  return [p for k, at in turns.items() if least <= surprise[k] <= most for p in at]


def token_band(a, low, high):
  return [p for p in TOKENS if low <= np.exp(gap(a, p)) <= high]


def rows_in(low, high, statistic):
  """The tokens of the rows whose statistic of the log-ratios lies between two bounds."""
  rows = {b: [p for p in TOKENS if p[0] == b] for b in range(B)}
  return [p for at in rows.values() if at and low <= np.exp(statistic(at)) <= high for p in at]


def sequence_band(a, low, high):
  return rows_in(low, high, lambda at: sum(gap(a, p) for p in at))


def geometric_band(a, low, high):
  return rows_in(low, high, lambda at: np.mean([gap(a, p) for p in at]))


def self_normalized(a, cap, floor):
  w = {p: np.clip(np.exp(gap(a, p)), floor, cap) for p in TOKENS}
  return {p: x / np.mean(list(w.values())) for p, x in w.items()}


def per_prompt(a):
  """The derivative of the mean over prompts of token means, in units of a token mean."""
  group = lambda p: a['group_ids'][p[0]]
  groups = [group(p) for p in TOKENS]
  return {p: len(TOKENS) / len(set(groups)) / groups.count(group(p)) for p in TOKENS}


def second_moment(a, limit):
  square = lambda p: a['log_ratio'][p] ** 2
  moved = [p for p in TOKENS if a['log_ratio'][p] * a['advantages'][p] > 0]
  prefix = sorted(moved, key=square)
  while prefix and np.mean([square(p) for p in prefix]) > limit:
    prefix.pop()
  return [p for p in TOKENS if p not in moved or p in prefix]


def top_covariance(a, share):
  ranked = sorted(TOKENS, key=covariance(a), reverse=True)
  return ranked[: max(int(share * len(TOKENS)), 1)]


def random_covariance(a, share, low, high, eps_low, eps_high):
  def candidate(p):
    ratio = np.exp(a['log_ratio'][p])
    clipped = ratio > 1 + eps_high if a['advantages'][p] > 0 else ratio < 1 - eps_low
    return low < covariance(a)(p) < high and not clipped

  ranked = sorted(filter(candidate, TOKENS), key=lambda p: a['noise'][p])
  return ranked[: max(int(share * len(TOKENS)), 1)]


def unlikely(a, share):
  ranked = sorted((p for p in TOKENS if a['advantages'][p] < 0), key=lambda p: a['logp'][p])
  count = max(int(share * len(ranked)), 1)
  return [p for p in ranked[:count] if a['logp'][p] < a['proxy_logp'][p]] if count > 1 else []


def curvature(a, learning_rate, limit_objective, limit_divergence):
  def keep(p):
    s, f, h, adv = (a[n][p] for n in ('score_norm', 'score_fisher', 'hidden_norm', 'advantages'))
    first = learning_rate * adv**2 * s * h
    second = learning_rate**2 / 2 * adv * ((adv * s * h) ** 2 - (adv * h) ** 2 * f)
    divergence = learning_rate**2 / 2 * (adv * s * h) ** 2
    return abs(first + second) < limit_objective and divergence < limit_divergence

  return filter(keep, TOKENS)


def balanced_bounds(a, share, upper_first=True):
  """The paper's loop with the published steps, in whole numbers of hundredths; or the lower first."""

  def reached(low, high):
    terms = [(np.exp(a['log_ratio'][p]), a['advantages'][p]) for p in TOKENS]
    good = sum(x * min(r, high / 100) for r, x in terms if x > 0)
    return good / (good - sum(x * max(r, low / 100) for r, x in terms if x < 0)) >= share

  low, high = 60, 120
  while not reached(low, high) and (low < 90 or high < 300):
    if high < 300 and (upper_first or low == 90):
      high += 5
    else:
      low += 2
  return [low / 100, high / 100]


def second_moment_bounds(a, limit, low, high):
  """tau by trying every |d|, and exp(-tau), exp(tau), at least as wide as low and high."""
  moved = [abs(a['log_ratio'][p]) for p in TOKENS if a['log_ratio'][p] * a['advantages'][p] > 0]
  if np.mean(np.square(moved)) <= limit:
    return [0.0, np.exp(20.0)]
  tau = max((t for t in moved if np.mean(np.minimum(moved, t) ** 2) < limit), default=0.0)
  return [min(np.exp(-tau), low), max(np.exp(tau), high)]


# fn -> (knobs, transcription -> the selected tokens); the bounds are tested separately.
ORACLES = {
  selections.second_moment: (dict(limit=0.3), second_moment),
  selections.top_covariance: (dict(share=0.2), top_covariance),
  selections.random_covariance: (
    dict(share=0.15, low=0.05, high=2.0, eps_low=0.5, eps_high=0.5),
    random_covariance,
  ),
  selections.unlikely: (dict(share=0.6), unlikely),
  selections.top_entropy: (dict(share=0.3), top_entropy),
  selections.uncertain_hints: (dict(share=0.3), uncertain_hints),
  selections.central_turns: (dict(low=0.15, high=0.8), central_turns),
  selections.token_band: (dict(low=0.5, high=2.0), token_band),
  selections.sequence_band: (dict(low=0.2, high=8.0), sequence_band),
  selections.geometric_band: (dict(low=0.8, high=1.2), geometric_band),
  selections.curvature: (
    dict(learning_rate=0.5, limit_objective=0.1, limit_divergence=0.02),
    curvature,
  ),
}
NUMBERS = {
  selections.self_normalized: (dict(cap=1.5, floor=0.5), self_normalized),
  selections.per_prompt: ({}, per_prompt),
}
# Functions that return other numbers of tokens.
LEVELS = {selections.signed_entropy: dict(share=0.7)}
# Functions that return numbers of the whole batch -> knobs, and the numbers of a batch without tokens.
BOUNDS = {
  selections.balanced_bounds: (dict(share=0.6), [0.6, 1.2]),
  selections.excess_drift: (dict(coefficient=2.0, limit=-0.5), 0.0),
  selections.second_moment_bounds: (dict(limit=0.2, low=0.9, high=1.1), [0.0, np.exp(20.0)]),
}
KNOBS = {fn: knobs for fn, (knobs, _) in (ORACLES | NUMBERS | BOUNDS).items()} | LEVELS

name_of = lambda fn: fn.__name__
every = pytest.mark.parametrize('fn', selections.TABLE.values(), ids=name_of)


def test_every_selection_has_a_transcription():
  assert set(KNOBS) == set(selections.TABLE.values())


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('fn', ORACLES, ids=name_of)
def test_equals_the_transcription(fn, seed, x64):
  knobs, oracle = ORACLES[fn]
  a = make(seed)
  expected = np.zeros((B, T), bool)
  for p in oracle(a, **knobs):
    expected[p] = True
  np.testing.assert_array_equal(call(fn, a, **knobs), expected)


@pytest.mark.parametrize('fn', ORACLES, ids=name_of)
def test_the_transcribed_cases_select_some_tokens_and_not_others(fn):
  knobs, oracle = ORACLES[fn]
  counts = {len(list(oracle(make(seed), **knobs))) for seed in range(4)}
  assert counts & set(range(1, len(TOKENS)))


@pytest.mark.parametrize('fn', NUMBERS, ids=name_of)
def test_weights_of_the_batch_equal_the_transcription(fn, x64):
  knobs, oracle = NUMBERS[fn]
  a = make(0)
  expected = np.zeros((B, T))
  for p, x in oracle(a, **knobs).items():
    expected[p] = x
  got = call(fn, a, **knobs)
  np.testing.assert_allclose(got, expected, rtol=1e-12)
  np.testing.assert_allclose(np.mean(got[MASK]), 1)


@pytest.mark.parametrize('share', [0.0, 0.5, 0.8, 1.0])
def test_the_signed_entropy_is_its_transcription(share, x64):
  a = make(0)
  x = np.log([a['entropy'][p] for p in TOKENS])
  h = x - np.quantile(x, share, method='nearest')
  scale = lambda y: y / max(h.max(), 1e-300) if y > 0 else y / max(-h.min(), 1e-300)
  expected = np.zeros((B, T))
  for p, y in zip(TOKENS, h):
    expected[p] = scale(y)
  got = call(selections.signed_entropy, a, share=share)
  np.testing.assert_allclose(got, expected, rtol=1e-12)
  released = call(selections.signed_entropy, a, share=share, released_sign=True)
  np.testing.assert_allclose(released, np.abs(expected), rtol=1e-12)


def test_the_entropies_from_zero_to_nine_have_two_in_the_top_fifth():
  entropy = jnp.arange(10.0)[None]
  mask = jnp.ones((1, 10), bool)
  np.testing.assert_array_equal(selections.top_entropy(entropy, mask)[0], entropy[0] >= 8)
  assert np.all(selections.top_entropy(jnp.full((1, 10), 0.3), mask))
  assert np.all(selections.top_entropy(entropy, mask, share=1.0))


@pytest.mark.parametrize('upper_first', [True, False])
@pytest.mark.parametrize('share', [0.3, 0.4, 0.5, 0.6, 0.7])
def test_bounds_equal_those_of_the_papers_loop(share, upper_first, x64):
  for seed in range(4):
    got = call(selections.balanced_bounds, make(seed), share=share, upper_first=upper_first)
    np.testing.assert_allclose(got, balanced_bounds(make(seed), share, upper_first), rtol=1e-12)


def test_the_excess_drift_is_a_slope_times_what_the_mean_exceeds(x64):
  a = make(0)
  drift = -np.mean(a['log_ratio'][MASK])
  got = call(selections.excess_drift, a, coefficient=3.0, limit=drift - 0.2)
  np.testing.assert_allclose(got, 0.6)
  assert call(selections.excess_drift, a, limit=drift + 0.2) == 0


@every
def test_what_stands_behind_the_mask_is_neither_read_nor_selected(fn):
  a = make(0)
  dirty = {n: np.where(MASK, x, np.nan) if x.dtype == float else x for n, x in a.items()}
  got = call(fn, dirty, **KNOBS[fn])
  np.testing.assert_array_equal(got, call(fn, a, **KNOBS[fn]))
  numbers = NUMBERS | BOUNDS | LEVELS
  assert got.dtype == (jnp.float32 if fn in numbers else bool)
  if got.dtype == bool:
    assert got.shape == MASK.shape and not np.any(got & ~MASK)


@every
def test_permuting_rows_with_their_noise_permutes_the_selection(fn):
  a, order = make(0), np.array([2, 0, 3, 1])
  got = call(fn, {n: x[order] for n, x in a.items()}, **KNOBS[fn])
  expected = call(fn, a, **KNOBS[fn])
  np.testing.assert_allclose(got, expected if fn in BOUNDS else expected[order], rtol=1e-6)


@every
def test_compiled_and_eager_selections_agree(fn):
  a = {n: jnp.asarray(x) for n, x in make(0).items()}
  compiled = jax.jit(lambda a: call(fn, a, **KNOBS[fn]))
  np.testing.assert_allclose(compiled(a), call(fn, a, **KNOBS[fn]), rtol=1e-6)


@every
def test_a_batch_without_tokens_selects_nothing(fn):
  got = call(fn, dict(make(0), mask=np.zeros_like(MASK)))
  expected = BOUNDS[fn][1] if fn in BOUNDS else np.zeros_like(MASK)
  np.testing.assert_allclose(got, expected, rtol=1e-6)


@every
def test_an_array_of_another_shape_is_refused(fn):
  a = make(0)
  for name in registry.inputs(fn):
    with pytest.raises(AssertionError):
      call(fn, dict(a, **{name: a[name][0]}))


def test_m2po_drops_the_largest_moves_along_the_advantage_until_the_moment_is_small():
  d = jnp.array([[0.05, 0.5, -0.3, 0.1, -0.6, 0.2, 0.9, -0.1]])
  a = jnp.array([[1.0, 1, -1, 1, 1, 1, 1, -1]])
  keep = selections.second_moment(d, a, d == d)
  np.testing.assert_array_equal(keep, [[1, 0, 1, 1, 1, 1, 0, 1]])
  assert np.all(selections.second_moment(d, a, d == d, limit=0.1733))  # the moment of all of them
  trusted = keep & (a * d > 0)
  np.testing.assert_allclose(jnp.mean(d[trusted] ** 2), 0.0305, rtol=1e-5)


@pytest.mark.parametrize('limit', [0.01, 0.1, 0.3, 1.0, 9.0])
def test_m2po_bounds_equal_a_search_over_every_log_ratio(limit, x64):
  for seed in range(4):
    knobs = dict(limit=limit, low=0.9, high=1.1)
    got = call(selections.second_moment_bounds, make(seed), **knobs)
    np.testing.assert_allclose(got, second_moment_bounds(make(seed), **knobs), rtol=1e-12)


@pytest.mark.parametrize(
  ('limit', 'tau'), [(0.04, 0.2), (0.0145, 0.1), (0.1733, None), (0.0001, 0.0)]
)
def test_m2po_caps_the_moves_along_the_advantage_at_the_largest_that_keeps_the_moment_small(
  limit, tau
):
  """Moves .05, .1, .1, .2, .3, .5, .9: capped at .2 their mean square is .0261, at .3 it is .0475;
  capped at .1 it is .0089, and at .05 it is .0025."""
  d = jnp.array([[0.05, 0.5, -0.3, 0.1, -0.6, 0.2, 0.9, -0.1]])
  a = jnp.array([[1.0, 1, -1, 1, 1, 1, 1, -1]])
  got = selections.second_moment_bounds(d, a, d == d, limit=limit, low=1.0, high=1.0)
  expected = [0.0, np.exp(20.0)] if tau is None else np.exp([-tau, tau])
  np.testing.assert_allclose(got, expected, rtol=1e-6)
  wide = selections.second_moment_bounds(d, a, d == d, limit=limit)
  np.testing.assert_allclose(wide, expected if tau is None else [0.7, 1.5], rtol=1e-6)


def test_m2po_bounds_that_clip_on_policy_tokens_are_refused():
  x = jnp.ones((1, 2))
  with pytest.raises(ValueError, match='low <= 1 <= high'):
    selections.second_moment_bounds(x, x, x > 0, low=1.1)


COVARIANCE = dict(
  advantages=np.array([[1.0, 1, -1, -1, 2, 0]]),
  logp=np.array([[-0.1, -3, -0.2, -2, -4, -1]]),
  log_ratio=np.zeros((1, 6)),
  mask=np.ones((1, 6), bool),
)


@pytest.mark.parametrize(('share', 'count'), [(0.0002, 1), (0.34, 2), (0.5, 3), (1.0, 6)])
def test_kl_cov_takes_the_tokens_that_sharpen_most(share, count):
  """In the order of the covariances 1.0778, .3778, -.2389, -.8556, -2.0222, -3.8056."""
  got = call(selections.top_covariance, COVARIANCE, share=share)
  assert set(np.flatnonzero(got)) == set([0, 3, 5, 1, 2, 4][:count])


def test_equal_covariances_are_taken_in_the_order_of_positions():
  x, mask = jnp.ones((2, 3)), jnp.array([[False, True, True], [True, True, False]])
  got = selections.top_covariance(x, x, mask, share=0.5)
  np.testing.assert_array_equal(got, [[0, 1, 1], [0, 0, 0]])


@pytest.mark.parametrize(('noise', 'chosen'), [([0.1, 0.2], 0), ([0.9, 0.2], 3)])
def test_clip_cov_takes_the_candidate_with_the_least_noise(noise, chosen):
  draw = np.array([[noise[0], 0, 0, noise[1], 0, 0]])
  a = dict(COVARIANCE, noise=draw)
  got = call(selections.random_covariance, a, low=0.3)
  np.testing.assert_array_equal(np.flatnonzero(got), [chosen])


def test_clip_cov_passes_over_tokens_that_are_clipped_already():
  a = dict(COVARIANCE, noise=np.zeros((1, 6)), log_ratio=np.array([[1.0, 0, 0, 0, 0, 0]]))
  got = call(selections.random_covariance, a, low=0.3)
  np.testing.assert_array_equal(np.flatnonzero(got), [3])
  np.testing.assert_array_equal(call(selections.random_covariance, a), np.zeros((1, 6)))


@pytest.mark.parametrize(('bad', 'count'), [(100, 0), (199, 0), (200, 2), (300, 3)])
def test_lp_reg_protects_one_percent_of_the_bad_tokens_or_none(bad, count):
  logp = -jnp.arange(400.0)[None]
  advantages = jnp.where(jnp.arange(400) < bad, -1.0, 1.0)[None]
  got = selections.unlikely(logp, logp + 1, advantages, logp == logp)
  np.testing.assert_array_equal(np.flatnonzero(got), np.arange(bad - count, bad))


def test_lp_reg_leaves_what_the_proxy_finds_even_less_likely():
  logp = -jnp.arange(200.0)[None]
  proxy = (logp + 1).at[0, 199].set(-1e4)
  got = selections.unlikely(logp, proxy, -jnp.ones((1, 200)), logp == logp)
  np.testing.assert_array_equal(np.flatnonzero(got), [198])


RATIOS = jnp.array([[2, 1.5, 1, 0.9, 1, 1.1, 0.5, 0.8, 1]])
SIGNS = jnp.array([[1.0] * 3 + [-1.0] * 6])


@pytest.mark.parametrize(
  ('share', 'bounds'), [(0.4, (0.6, 1.3)), (0.45, (0.6, 1.95)), (0.6, (0.9, 3.0)), (0, (0.6, 1.2))]
)
def test_bapo_widens_until_good_tokens_have_their_share(share, bounds):
  """At the first bounds the share is exactly 0.4: no step more for a rounding error."""
  got = selections.balanced_bounds(jnp.log(RATIOS), SIGNS, RATIOS > 0, share=float(share))
  np.testing.assert_allclose(got, bounds, rtol=1e-6)


@pytest.mark.parametrize(
  ('share', 'bounds'),
  [(0.38, (0.6, 1.2)), (0.4, (0.8, 1.45)), (0.42, (0.8, 1.7)), (0.6, (0.8, 2.0))],
)
def test_bapo_of_the_code_lifts_the_lower_bound_first_and_its_last_step_may_be_short(share, bounds):
  """Good tokens have 3.4 of 8.8 = .386 at first. Lifting the lower bound adds to the bad ones, .378 at
  .8; then the upper bound gives .411 at 1.45, .429 at 1.7 and .446 at its limit."""
  knobs = dict(low_limit=0.8, high_limit=2.0, step_low=0.06, step_high=0.25, upper_first=False)
  got = selections.balanced_bounds(jnp.log(RATIOS), SIGNS, RATIOS > 0, share=share, **knobs)
  np.testing.assert_allclose(got, bounds, rtol=1e-6)


def test_bapo_stays_where_it_starts_if_good_and_bad_are_balanced():
  got = selections.balanced_bounds(
    jnp.zeros((1, 2)), jnp.array([[1.0, -1.0]]), jnp.ones((1, 2), bool)
  )
  np.testing.assert_allclose(got, [0.6, 1.2], rtol=1e-6)


def test_bapo_with_nowhere_to_go_is_ppo():
  knobs = dict(low=0.8, low_limit=0.8, high=1.2, high_limit=1.2)
  d = jnp.log(RATIOS)
  bounds = selections.balanced_bounds(d, SIGNS, RATIOS > 0, share=1.0, **knobs)
  got = surrogates.clipped_between(d, SIGNS, bounds)
  np.testing.assert_allclose(got, surrogates.clipped(d, SIGNS), rtol=1e-6)


def test_bounds_have_no_gradient():
  total = lambda d: jnp.sum(selections.balanced_bounds(d, SIGNS, RATIOS > 0))
  np.testing.assert_array_equal(jax.grad(total)(jnp.log(RATIOS)), np.zeros((1, 9)))


@pytest.mark.parametrize(
  'knobs', [dict(low=0.95), dict(high_limit=1.1), dict(high_limit=np.inf), dict(step_high=0.0)]
)
def test_bounds_that_cannot_be_searched_are_refused(knobs):
  with pytest.raises(ValueError, match=r'low_limit|step_low'):
    selections.balanced_bounds(jnp.log(RATIOS), SIGNS, RATIOS > 0, **knobs)


@pytest.mark.parametrize('scale', [0.1, 1.0, 10.0])
def test_capo_measures_the_second_order_change_of_the_tokens_own_step(scale, x64):
  """Against A (ratio - 1) and its exact derivatives in the last layer's weights W, logits W h."""
  rng = np.random.default_rng(0)
  hidden, weight = jnp.asarray(rng.normal(size=3)), jnp.asarray(rng.normal(size=(4, 3)))
  action, advantage, rate = 2, -0.7, 0.01 * scale
  logp = lambda w: jax.nn.log_softmax(w @ hidden)
  gain = lambda w: advantage * jnp.exp(logp(w)[action] - logp(weight)[action])
  step = jax.grad(gain)(weight)
  bend = jax.jvp(jax.grad(gain), (weight,), (step,))[1]
  objective = rate * jnp.sum(step * step) + rate**2 / 2 * jnp.sum(step * bend)
  score = jax.nn.one_hot(action, 4) - jnp.exp(logp(weight))
  divergence = (score @ (rate * step @ hidden)) ** 2 / 2
  p = jnp.exp(logp(weight))
  fisher = score @ (jnp.diag(p) - jnp.outer(p, p)) @ score
  inputs = (score @ score, fisher, hidden @ hidden, jnp.asarray(advantage), jnp.asarray(True))

  def keep(objective_limit, divergence_limit):
    return selections.curvature(
      *(x.reshape(1, 1) for x in inputs),
      learning_rate=rate,
      limit_objective=float(objective_limit),
      limit_divergence=float(divergence_limit),
    )[0, 0]

  size = jnp.abs(objective)
  assert keep(size * (1 + 1e-9), divergence * (1 + 1e-9))
  assert not keep(size * (1 - 1e-9), np.inf)
  assert not keep(np.inf, divergence * (1 - 1e-9))


def test_central_turns_are_the_middle_of_the_likelihoods_whatever_their_level(x64):
  rng = np.random.default_rng(0)
  logp = -(2 + rng.normal(size=(2000, 1)))
  ones, ids, mask = np.ones(2000), np.zeros((2000, 1), int), np.ones((2000, 1), bool)
  keep = selections.central_turns(logp, ones, ids, mask)
  assert abs(np.mean(keep) - 0.8) < 0.001
  np.testing.assert_array_equal(selections.central_turns(logp + 7, ones, ids, mask), keep)
  assert np.all(selections.central_turns(logp, ones, ids, mask, low=0.0, high=1.0))
  assert np.all(selections.central_turns(0 * logp - 0.3, ones, ids, mask))
  with pytest.raises(ValueError, match='low must be at most high'):
    selections.central_turns(logp, ones, ids, mask, low=0.6, high=0.5)


@pytest.mark.parametrize(('high', 'bounds'), [(1.0, (5.8, 6.5)), (0.9, (5.0, 5.05))])
def test_expert_iteration_without_the_least_likely_steps_finds_the_shortest_way(high, bounds):
  """Five states; action 0 advances, 1 stays, 2 and 3 fail; at most ten steps an episode.

  A policy by counts of the kept steps of successes, as in the method, learns to succeed either way.
  Without the filter it also keeps the steps that lead nowhere.
  """
  rng = np.random.default_rng(0)
  filtered = jax.jit(lambda *a: selections.central_turns(*a, low=0.0, high=high))
  policy = np.full((5, 4), 0.25)
  for _ in range(6):
    at, live = np.zeros(3000, int), np.ones(3000, bool)
    states, actions = np.zeros((2, 3000, 10), int)
    mask = np.zeros((3000, 10), bool)
    for t in range(10):
      cumulative = policy[np.minimum(at, 4)].cumsum(1)
      action = np.minimum((rng.random((3000, 1)) > cumulative).sum(1), 3)
      states[:, t], actions[:, t], mask[:, t] = np.minimum(at, 4), action, live
      at = at + (live & (action == 0))
      live &= (action < 2) & (at < 5)
    success = at == 5
    logp = np.log(policy[states, actions])
    turn_ids = np.broadcast_to(np.arange(10), mask.shape)
    keep = np.asarray(filtered(logp, success.astype(float), turn_ids, mask))
    counts = np.full((5, 4), 0.5)
    np.add.at(counts, (states[keep], actions[keep]), 1)
    policy = counts / counts.sum(1, keepdims=True)
  assert success.mean() > 0.98
  assert bounds[0] <= mask[success].sum(1).mean() <= bounds[1]
