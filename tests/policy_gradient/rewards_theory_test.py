"""Estimators of methods that differ in rewards: the numbers of papers, and the laws of carried
states."""

import functools
import math
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import build, credit
from polgrad.credit import assign
from polgrad.losses import (
  advantages,
  difficulty,
  embedding_rewards,
  listwise,
  pareto,
  penalties,
  row_scores,
  strata,
)
from polgrad.registry import bind, part
from tests.policy_gradient.harness import scored

normalized = functools.partial(advantages.group_normalized, ddof=0, eps=0.0)


step = jax.jit(assign, static_argnums=0)


def of_rows(estimator, rewards, state=None, **arrays):
  """The batch that an estimator makes of rows of one token, and its next state."""
  state = estimator.init() if state is None else state
  return step(estimator, scored(rewards=jnp.asarray(rewards, jnp.float32), **arrays), state)


# COPO.

TWO_LEVEL = {
  'steep': credit.two_level(steepness=20.0, middle=0.5, consistent=True),
  'rewarded': credit.two_level(),
  'informative': credit.two_level(local='informative'),
  'all': credit.two_level(local='all'),
}


@jax.jit
def compared(rewards, answers, group_ids):
  """The entropy of the answers, and the batch of each estimator; one program for all."""
  batch = scored(rewards=rewards, answer_term=answers, group_ids=group_ids)
  batches = {name: assign(estimator, batch, ())[0] for name, estimator in TWO_LEVEL.items()}
  return strata.answer_entropy(answers, group_ids, batch.valid), batches


@pytest.mark.parametrize(
  ('sizes', 'entropy', 'coefficient', 'steep', 'gentle'),
  [
    ([8], 0, 1, 4.54e-5, 0.00669),
    ([7, 1], 0.54356, 0.84146, 0.70501, 0.09261),
    ([4, 4], 1, 0.70833, 0.99995, 0.5),
    ([2, 2, 2, 2], 2, 0.41667, 1, 0.99331),
    ([1] * 8, 3, 0.125, 1, 0.99995),
  ],
)
def test_the_entropy_of_the_answers_of_a_group_weighs_two_comparisons(
  sizes, entropy, coefficient, steep, gentle
):
  """Three groups: the first with these answers, one without rewards, and one that agrees."""
  answer = np.append(np.repeat(np.arange(len(sizes)), sizes), np.zeros(16)).astype(np.float32)
  groups = np.repeat(np.arange(3), 8)
  got, batches = compared(np.repeat(np.float32([1, 0, 1]), 8), answer, groups)
  np.testing.assert_allclose(got[:8], entropy, atol=1e-5)
  for name, weight, mean in (('steep', steep, coefficient), ('rewarded', gentle, 1)):
    np.testing.assert_allclose(batches[name]['local_weight'][:8], weight, atol=1e-5)
    means = np.array([mean, 0, 1])
    across = (means - means.mean()) / means.std(ddof=1)
    np.testing.assert_allclose(batches[name]['global_advantages'][::8, 0], across, atol=1e-4)


@pytest.mark.parametrize(
  ('local', 'kept'), [('all', [1, 1, 1]), ('rewarded', [1, 0, 1]), ('informative', [1, 1, 0])]
)
def test_rows_that_do_not_compare_with_their_own_group(local, kept):
  """A group of right and wrong rows, and one of right ones."""
  rewards, groups = np.repeat(np.float32([1, 0, 1]), 8), np.repeat([0, 0, 1], 8)
  _, batches = compared(rewards, np.arange(24, dtype=np.float32), groups)
  weight = batches[local]['local_weight']
  np.testing.assert_array_equal(weight > 0, np.repeat(np.array(kept, bool), 8))


# DRPO.

SCORES, RIGHT = np.array([-0.5, -1.0, -0.8, -0.3]), np.array([1.0, 1, 0, 0])


@jax.jit
@jax.value_and_grad
def decoupled(score, rewards, lengths, group_ids, longest, spread, temperature):
  mask = jnp.arange(100)[None] < lengths[:, None]
  knobs = dict(longest=longest, spread=spread, temperature=temperature)
  return jnp.sum(listwise.decoupled(score, rewards, mask, group_ids, **knobs))


def drpo(
  score=SCORES, rewards=RIGHT, lengths=(4, 8, 5, 2), longest=8, spread=0.1, temperature=10.0
):
  """The loss of one group and its gradient. Wrong rows of a second group fill up six rows."""
  pad = lambda x: np.pad(np.asarray(x, float), (0, 6 - len(x)))
  group_ids = np.arange(6) >= len(score)
  value, gradient = decoupled(
    pad(score),
    pad(rewards),
    pad(lengths),
    group_ids.astype(int),
    float(longest),
    spread,
    temperature,
  )
  return value, np.asarray(gradient)[: len(score)]


@pytest.mark.parametrize(
  ('knobs', 'objective'),
  [({}, 0.04353), (dict(spread=1e9), -0.20312), (dict(temperature=1e6), 0.04665)],
)
def test_decoupled_rewards_have_the_published_objective(knobs, objective, x64):
  np.testing.assert_allclose(-drpo(**knobs)[0], objective, atol=1e-4)


def test_decoupled_rewards_have_the_published_weights(x64):
  weights = -drpo()[1]
  np.testing.assert_allclose(weights, [0.99331, 0.00669, -0.4875, -0.5125], atol=1e-5)
  hard = -drpo(temperature=0.1)[1]
  np.testing.assert_allclose(hard[2:], [-0.00669, -0.99331], atol=1e-5)


def test_a_long_right_answer_is_never_unlearned_as_it_is_by_a_normalised_penalty(x64):
  """Five right answers, one of which is long, and a wrong one; rewards less a penalty of length."""
  penalized = np.array([1, 0.3, 0, 0.95, 0.9, 0.95])
  grpo = normalized(penalized, jnp.zeros(6, int), jnp.ones(6, bool))
  np.testing.assert_allclose(grpo[1], -0.98793, atol=1e-4)
  right = np.array([1.0, 1, 0, 1, 1, 1])
  weights = -drpo(np.zeros(6), right, (10, 80, 50, 15, 20, 15), longest=100)[1]
  assert np.all(weights[right > 0] > 0) and weights[0] > weights[1]


def test_the_weights_of_right_answers_are_those_of_the_best_policy_near_them(x64):
  """argmax of E[1 - L / C] - spread KL(P || P+), P+ uniform over the right answers."""
  lengths, spread = np.array([2, 4, 8]), 0.5
  values = 1 - lengths / 8
  objective = lambda p: p @ values - spread * p @ np.log(3 * p)
  found = -drpo(np.zeros(4), [1, 1, 1, 0], (*lengths, 5), spread=spread)[1][:3]
  assert found.sum() == pytest.approx(1)
  for change in ([1, -1, 0], [0, 1, -1], [1, 0, -1]):
    for size in (1e-3, -1e-3):
      assert objective(found + size * np.array(change)) < objective(found)
  closed = np.exp(values / spread)
  np.testing.assert_allclose(found, closed / closed.sum(), rtol=1e-6)


def test_a_group_of_one_kind_has_no_loss_and_no_gradient(x64):
  for rewards in (np.zeros(4), np.ones(4)):
    value, gradient = drpo(rewards=rewards)
    assert value == 0 and np.all(gradient == 0)


# APO of View-R1.


def test_the_kl_spares_good_answers_to_hard_prompts(x64):
  expected = [1, 0.90731, 0.86980, 0.81712, 0.74312, 0.63917, 0.49317, 0.28808, 1]
  p = 1 - np.arange(9) / 8
  args = jnp.full((9, 1), -1.0), jnp.full((9, 1), -1.3)
  plain = penalties.k3(*args)
  good = penalties.easy_k3(*args, jnp.ones((9, 1)), p)
  np.testing.assert_allclose((good / plain)[:, 0], expected, atol=1e-4)
  np.testing.assert_array_equal(penalties.easy_k3(*args, -jnp.ones((9, 1)), p), plain)


def test_the_success_rate_is_of_valid_rows_and_comes_beside_the_advantages():
  estimator = credit.with_success_rate(credit=credit.outcome(advantage=normalized))
  valid = jnp.array([True, True, True, False])
  batch, _ = of_rows(estimator, [1, 1, 0, 1], valid=valid)
  np.testing.assert_allclose(batch['success_rate'][:3], 2 / 3)
  plain, _ = of_rows(credit.outcome(advantage=normalized), [1, 1, 0, 1], valid=valid)
  np.testing.assert_array_equal(batch.advantages, plain.advantages)


# HiPO.

MODES = credit.modes()


def test_the_choice_of_a_mode_is_credited_apart_from_the_answer():
  rewards = np.array([1, 1, 0, 1, 1, 0, 1, 1]) + 0.2
  mode = jnp.array([1.0] * 4 + [0.0] * 4)
  batch, _ = of_rows(MODES, rewards, length=3, mode_term=mode)
  choice = [0.17321, 0.17321, -0.51962, 0.17321, 0.19514, -0.49768, 0.19514, 0.19514]
  np.testing.assert_allclose(batch.advantages[:, 0], choice, atol=1e-4)
  answer = np.where(rewards > 1, 0.57735, -1.73205)
  np.testing.assert_allclose(batch.advantages[:, 1:], np.repeat(answer[:, None], 2, 1), atol=1e-4)


def test_with_one_mode_the_answer_has_the_normalised_reward_and_the_choice_a_part_of_it():
  rewards = np.array([1.0, 0.0, 0.0, 0.5, 0.2, 0.9, 0.4, 0.1])
  batch, _ = of_rows(MODES, rewards, length=3, mode_term=jnp.ones(8))
  plain = (rewards - rewards.mean()) / rewards.std()
  np.testing.assert_allclose(batch.advantages, np.stack([0.3 * plain, plain, plain], 1), rtol=1e-4)


# GFPO.


def test_only_the_rows_with_the_largest_scores_are_compared_and_learned():
  mask = np.arange(6) < np.array([2, 5, 1, 3, 6, 4])[:, None]
  estimator = credit.filtered(
    credit=credit.outcome(advantage=normalized), score=row_scores.brevity, keep=3
  )
  arrays = dict(length=6, mask=jnp.asarray(mask), valid=jnp.array([1, 1, 0, 1, 1, 1], bool))
  batch, _ = of_rows(estimator, [1, 1, 1, 0, 0, 0], **arrays)
  kept = np.array([1, 0, 0, 1, 0, 1], bool)  # the shortest valid ones
  np.testing.assert_array_equal(batch.mask, mask & kept[:, None])
  among = normalized(jnp.array([1.0, 0, 0]), jnp.zeros(3, int), jnp.ones(3, bool))
  np.testing.assert_allclose(batch.advantages[kept, 0], among, rtol=1e-6)
  every = credit.filtered(
    credit=credit.outcome(advantage=normalized), score=row_scores.efficiency, keep=6
  )
  whole, _ = of_rows(every, [1, 1, 1, 0, 0, 0], **arrays)
  plain, _ = of_rows(credit.outcome(advantage=normalized), [1, 1, 1, 0, 0, 0], **arrays)
  np.testing.assert_array_equal(whole.advantages, plain.advantages)


# Estimators that carry a state.


def test_hard_prompts_keep_more_answers_by_the_quantiles_of_recent_ones(x64):
  """Random batches against a list of all means so far; quantiles of the last ten of them."""
  keeps, capacity, rng = (1, 2, 3, 4), 10, np.random.default_rng(5)
  estimator = credit.filtered_by_difficulty(
    credit=credit.outcome(advantage=advantages.group_normalized),
    score=row_scores.efficiency,
    keeps=keeps,
    capacity=capacity,
    warmup=9,
  )
  seen, state = [], estimator.init()
  for number in range(6):
    rewards, ids = rng.integers(0, 5, 24) / 4, np.arange(24) // 4
    valid = rng.uniform(size=24) < 0.9
    valid[:4] = number != 3  # a group without valid rows is not seen
    batch = scored(
      rewards=jnp.asarray(np.where(valid, rewards, 0)),
      group_ids=jnp.asarray(ids),
      valid=jnp.asarray(valid),
    )
    got, state = step(estimator, batch, state)
    means = {g: rewards[(ids == g) & valid].mean() for g in range(6) if valid[ids == g].any()}
    seen += [*means.values()]
    cuts = np.quantile(seen[-capacity:], [0.25, 0.5, 0.75])
    for g, mean in means.items():
      harder = 3 if len(seen) < 9 else 3 - sum(mean > c for c in cuts)
      rows = np.flatnonzero((ids == g) & valid)
      kept = sorted(rows, key=lambda i: -rewards[i])[: keeps[harder]]
      np.testing.assert_array_equal(rows[np.asarray(got.mask[rows, 0])], sorted(kept))
      own = rewards[kept] - rewards[kept].mean()
      own = own / (rewards[kept].std(ddof=1) + 1e-6) if len(kept) > 1 else 0 * own
      np.testing.assert_allclose(got.advantages[np.array(kept), 0], own, atol=1e-6)
  assert int(state['recent']['number']) == len(seen) == 35
  # State laws: no valid rows change nothing, and a scan is two calls.
  none = batch.replace(valid=jnp.zeros(24, bool))
  jax.tree.map(np.testing.assert_array_equal, step(estimator, none, state)[1], state)
  pair = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), batch)
  scanned, _ = jax.lax.scan(lambda s, b: (assign(estimator, b, s)[1], 0), state, pair)
  twice = state
  for i in range(2):
    twice = step(estimator, jax.tree.map(lambda x, i=i: x[i], pair), twice)[1]
  jax.tree.map(np.testing.assert_array_equal, scanned, twice)
  # More groups than there is room for: the last ones. One number for all parts is `filtered`.
  one = dict(credit=RAW, score=row_scores.efficiency)
  small = credit.filtered_by_difficulty(keeps=(2, 2), capacity=4, warmup=0, **one)
  got, state = step(small, batch, small.init())
  np.testing.assert_allclose(np.sort(state['recent']['means']), np.sort([*means.values()][-4:]))
  fixed = credit.filtered(keep=2, **one)
  np.testing.assert_array_equal(got.mask, step(fixed, batch, ())[0].mask)
  with pytest.raises(ValueError, match='whole numbers of at least 1'):
    credit.filtered_by_difficulty(keeps=(0, 1), **one)


RAW = credit.outcome(advantage=advantages.raw)
APPEALED = credit.appealed(credit=RAW, false_positive=0.1, decay=0.5)
GUIDED = credit.hypervolume_guided(credit=RAW, terms={'brevity': 1.0}, capacity=2)


def test_appeals_measure_the_rate_of_false_negatives():
  """Four of ten right answers are rejected, and appealed: 4 / (4 + 6), from the second batch on."""
  estimator = credit.appealed(credit=RAW, decay=0.9, missed=1e-9, accepted=1e-9)
  rewards, appeal = [1] * 6 + [0] * 6, jnp.array([0.0] * 6 + [1] * 4 + [0] * 2)
  first, state = of_rows(estimator, rewards, appeal_term=appeal)
  np.testing.assert_allclose(
    first.advantages[0], 1 / (1 - 0.49), rtol=1e-5
  )  # 1/2 of the prior, cut
  second, state = of_rows(estimator, rewards, state, appeal_term=appeal)
  np.testing.assert_allclose(second.advantages[[0, 6], 0], [1 / 0.6, 0], rtol=1e-5)
  np.testing.assert_allclose(state['counts']['missed'], 4 + 0.9 * 4)
  half = credit.appealed(credit=RAW, checked=0.5)
  _, state = of_rows(half, rewards, appeal_term=appeal)
  assert state['counts']['missed'] == 8


def test_false_positives_make_the_measured_rate_of_false_negatives_smaller():
  """Of 60 right answers 12 are missed; of 40 wrong ones 4 are accepted: 12 / (12 + 48 + 4) = .1875."""
  estimator = credit.appealed(credit=RAW, missed=1e-9, accepted=1e-9)
  rewards = [1] * 48 + [0] * 12 + [1] * 4 + [0] * 36
  appeal = jnp.array([0.0] * 48 + [1.0] * 12 + [0.0] * 40)
  _, state = of_rows(estimator, rewards, appeal_term=appeal)
  counts = state['counts']
  assert counts['missed'] / (counts['missed'] + counts['accepted']) == pytest.approx(0.1875)
  with pytest.raises(ValueError, match='must be below'):
    credit.appealed(credit=RAW, false_positive=0.5)


def test_a_rung_counts_only_if_those_before_it_hold():
  estimator = credit.laddered(credit=RAW, rungs=('mode', 'brevity'), weights=(1.0, 0.5))
  terms = dict(mode_term=jnp.array([0.0, 1, 1, 1]), brevity_term=jnp.array([1.0, 0, 0.5, 1]))
  batch, _ = of_rows(estimator, [1, 1, 1, 1], **terms)
  np.testing.assert_allclose(batch.advantages[:, 0], [0, 1, 1 + 0.25 + 0.5, 2.5])
  with pytest.raises(ValueError, match='one weight for each'):
    credit.laddered(credit=RAW, rungs=('mode',), weights=(1.0, 2.0))


def test_a_new_trade_off_makes_the_rewards_of_its_step_larger():
  """Places (.5, .4), (.4, .6) and (.3, .3): the second adds .08, the third nothing."""
  factors, state = [], None
  for rest, brevity in ((0.5, 0.4), (0.4, 0.6), (0.3, 0.3)):
    rows = dict(brevity_term=jnp.array([brevity] * 2))
    batch, state = of_rows(GUIDED, [rest + brevity] * 2, state, **rows)
    factors.append(float(batch.advantages[0, 0]) / (rest + brevity))
  np.testing.assert_allclose(factors, [1, 0.61974, 0.5], atol=1e-5)
  assert state['places']['number'] == 2
  np.testing.assert_allclose(state['places']['points'], [[0.5, 0.4], [0.4, 0.6]], rtol=1e-6)
  batch, state = of_rows(GUIDED, [20.0] * 2, state, brevity_term=jnp.full(2, 10.0))
  np.testing.assert_allclose(batch.advantages[0, 0], 40, rtol=1e-4)  # at most twice the reward
  np.testing.assert_allclose(state['places']['points'][0], [10, 10])  # in place of the oldest
  with pytest.raises(ValueError, match='needs terms'):
    credit.hypervolume_guided(credit=RAW)


@pytest.mark.parametrize('axes', [1, 2, 3])
def test_the_hypervolume_is_the_share_of_random_places_that_are_dominated(axes, x64):
  rng = np.random.default_rng(axes)
  points, counted = rng.uniform(size=(5, axes)), np.array([1, 1, 0, 1, 1], bool)
  places = rng.uniform(size=(100_000, axes))
  dominated = (points[counted][None] >= places[:, None]).all(2).any(1)
  volume = jax.jit(pareto.hypervolume)
  assert volume(points, counted, np.zeros(axes)) == pytest.approx(dominated.mean(), abs=6e-3)
  assert volume(points, np.zeros(5, bool), np.zeros(axes)) == 0


def test_a_reward_whose_gradient_agrees_with_the_others_gains_weight(x64):
  gradients = jnp.array([[1, 0], [0.5, 0.5], [-0.2, 1]])
  equal = jnp.full(3, -jnp.log(3.0))
  move = jax.jit(pareto.influence_weights)
  influences = gradients @ gradients.sum(axis=0)
  np.testing.assert_allclose(influences, [1.3, 1.4, 1.24])
  got = move(equal, influences)
  np.testing.assert_allclose(jnp.exp(got), [0.33288, 0.33623, 0.33089], atol=1e-5)
  np.testing.assert_allclose(move(equal, jnp.full(3, 6.0)), equal)  # equal gradients
  np.testing.assert_allclose(move(got, influences, rate=0.0), got)


def test_gradient_guided_credit_is_that_of_the_weights_after_its_own_gradients(x64):
  """Two batches in a row against a transcription: terms alphabetically behind the rest of the reward."""
  rng = np.random.default_rng(0)
  terms = {'mode': 0.5, 'brevity': 2.0}
  estimator = credit.gradient_guided(
    credit=credit.outcome(advantage=advantages.group_normalized), terms=terms
  )
  weights, state = np.full(3, 1 / 3), None
  for _ in range(2):
    accuracy, brevity, mode = rng.normal(size=(3, 8))
    influences, ids = rng.normal(size=3), np.arange(8) // 4
    arrays = dict(brevity_term=jnp.asarray(brevity), mode_term=jnp.asarray(mode))
    arrays['influences'] = jnp.tile(influences, (8, 1))
    batch = scored(
      rewards=jnp.asarray(accuracy + 2 * brevity + 0.5 * mode),
      group_ids=jnp.asarray(ids),
      **arrays,
    )
    np.testing.assert_allclose(
      estimator.contrasts.make(batch)[..., 0],
      [standardized(x, ids) for x in (accuracy, brevity, mode)],
      rtol=1e-6,
    )
    got, state = credit.assign(estimator, batch, estimator.init() if state is None else state)
    weights = weights * np.exp(0.1 * influences)
    weights /= weights.sum()
    mixed = weights @ np.stack([accuracy, brevity, mode])
    np.testing.assert_allclose(got.advantages[:, 0], standardized(mixed, ids), rtol=1e-6)
    np.testing.assert_allclose(np.exp(state['log_weights']), weights, rtol=1e-6)
  # A batch of failures has no gradients, whatever the numbers are.
  _, after = credit.assign(estimator, batch.replace(valid=jnp.zeros(8, bool)), state)
  np.testing.assert_allclose(after['log_weights'], state['log_weights'], rtol=1e-12)
  with pytest.raises(ValueError, match='gradient_guided: it needs the weights of terms'):
    credit.gradient_guided(credit=RAW)


def test_decomposed_advantages_are_means_over_the_terms_each_with_its_own_density(x64):
  """BNPO of two terms, one in [-1, 0], against a transcription; densities of their own group means."""
  rng = np.random.default_rng(3)
  ids = np.arange(12) // 4
  format_, exact = rng.uniform(size=12), rng.integers(0, 2, 12) - 1.0
  estimator = credit.decomposed(
    credit=credit.outcome(advantage=difficulty.beta_normalized),
    terms=('format', 'exact'),
    lows=(0.0, -1.0),
    highs=(1.0, 0.0),
  )
  batch = scored(
    rewards=jnp.full(12, jnp.nan),  # not read
    group_ids=jnp.asarray(ids),
    format_term=jnp.asarray(format_),
    exact_term=jnp.asarray(exact),
  )
  got, _ = credit.assign(estimator, batch, estimator.init())
  want = 0.0
  for x in (format_, exact + 1):
    p = np.array([x[ids == g].mean() for g in range(3)])
    m, v = p.mean(), p.var(ddof=1)
    a, b = (max(1.0, 1 + (m * (1 - m) / v - 1) * q / 3) for q in (m, 1 - m))
    beta = math.gamma(a) * math.gamma(b) / math.gamma(a + b)
    inside = (p > 0) & (p < 1)
    density = np.where(inside, p ** (a - 1) * (1 - p) ** (b - 1) / beta, 1.0)
    want = want + (x - p[ids]) / density[ids] / 2
  np.testing.assert_allclose(got.advantages[:, 0], want, rtol=1e-6)
  one = credit.decomposed(credit=estimator_of_bnpo(), terms=('exact',), lows=(-1.0,), highs=(0.0,))
  alone, _ = credit.assign(one, batch, one.init())
  plain, _ = credit.assign(estimator_of_bnpo(), batch.replace(rewards=jnp.asarray(exact + 1)), ())
  np.testing.assert_allclose(alone.advantages, plain.advantages)  # one term is the method itself
  for wrong, said in (
    (dict(terms=()), 'it needs terms'),
    (dict(terms=('a',), lows=(0.0,)), 'one low and one high for each'),
    (dict(terms=('a',), lows=(1.0,), highs=(0.0,)), 'each low must be below its high'),
  ):
    with pytest.raises(ValueError, match=said):
      credit.decomposed(credit=RAW, **wrong)
  with pytest.raises(ValueError, match='it needs one that makes advantages'):
    credit.decomposed(credit=credit.generalized(), terms=('a',))


def estimator_of_bnpo():
  return credit.outcome(advantage=difficulty.beta_normalized)


def standardized(x, ids):
  """(x - mean) / (std + 1e-6) in each group, with the unbiased deviation."""
  out = np.zeros(len(x))
  for g in set(ids.tolist()):
    own = x[ids == g]
    out[ids == g] = (own - own.mean()) / (own.std(ddof=1) + 1e-6)
  return out


# GRACE.


contrastive = jax.jit(embedding_rewards.contrastive, static_argnames='negatives')


def embeddings(seed=0, rows=6, width=4):
  rng = np.random.default_rng(seed)
  unit = lambda *shape: (lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True))(
    rng.normal(size=(*shape, width))
  )
  return unit(rows), unit(rows), unit(rows, 3)


@pytest.mark.parametrize('negatives', ['own', 'first'])
def test_rewards_of_embeddings_equal_a_loop(negatives, x64):
  q, p, n = embeddings()
  ids, valid = np.array([0, 0, 1, 1, 1, 2]), np.array([1, 1, 1, 0, 1, 1], bool)
  got = contrastive(q, p, n, ids, valid, negatives=negatives)
  for i in range(6):
    group = [j for j in range(6) if valid[j] and ids[j] == ids[i]]
    others = [[j for j in range(6) if valid[j] and ids[j] == g] for g in {*ids} - {ids[i]}]
    far = max(n[i] @ q[i]) if negatives == 'own' else n[group[0], 0] @ q[group[0]]
    inside = [p[i] @ p[j] for j in group if j != i]
    across = np.mean([max(q[i] @ p[j] for j in rows) for rows in others])
    expected = q[i] @ p[i] - far + 0.2 * (np.mean(inside) if inside else 0) - 0.2 * across
    np.testing.assert_allclose(got[i], valid[i] * expected / 0.1, atol=1e-9)


def test_a_negative_of_the_first_row_alone_changes_no_advantage(x64):
  q, p, n = embeddings()
  ids, valid = np.zeros(6, int), np.ones(6, bool)
  of = lambda n: advantages.group_mean(
    contrastive(q, p, n, ids, valid, negatives='first'), ids, valid
  )
  np.testing.assert_allclose(of(n), of(-n), atol=1e-9)
  alone = contrastive(q, q, 0 * n, ids, valid, cluster=0.0, across=0.0)
  np.testing.assert_allclose(alone, 10)


def rows_of(seed, rows=6):
  rng = np.random.default_rng(seed)
  terms = {name: jnp.asarray(rng.integers(0, 2, rows), jnp.float32) for name in
           ('appeal_term', 'brevity_term')}  # fmt: skip
  return scored(rewards=jnp.asarray(rng.integers(0, 2, rows), jnp.float32), **terms)


def same(a, b):
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), a, b)


@pytest.mark.parametrize('estimator', [APPEALED, GUIDED, credit.moving_baseline()])
def test_a_carried_state_forgets_nothing_for_an_empty_batch_and_no_order_of_rows(estimator):
  after = lambda batch, state: step(estimator, batch, state)[1]
  state = after(rows_of(0), estimator.init())
  assert any(np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (state, estimator.init()))))
  batch = rows_of(1)
  same(after(batch.replace(valid=jnp.zeros(6, bool)), state), state)
  order = jnp.array([3, 0, 5, 1, 4, 2])
  same(after(jax.tree.map(lambda x: x[order], batch), state), after(batch, state))
  # Two steps of one compiled scan are two calls.
  batches = jax.tree.map(lambda *x: jnp.stack(x), rows_of(2), rows_of(3))
  scanned, _ = jax.lax.scan(lambda s, b: (after(b, s), None), state, batches)
  same(scanned, after(rows_of(3), after(rows_of(2), state)))
  assert jax.tree.structure(scanned) == jax.tree.structure(estimator.init())


def test_an_estimator_that_makes_no_advantages_cannot_be_scaled():
  with pytest.raises(ValueError, match='makes advantages'):
    credit.scaled(credit=credit.preference(), multiplier=lambda rewards: rewards)


# The experiment with a verifier that makes mistakes.

NOISY = runpy.run_path(str(pathlib.Path(__file__).parents[2] / 'experiments/noisy_addition.py'))
GROUPS = 10


@functools.cache
def expected_advantages(correction):
  """The exact mean over the verifier's mistakes, of four answers, the first of which is right.

  Of ten groups one has each wrong answer accepted and three have the right one rejected. Advantages are
  linear in the verdicts, so it does not matter that the mistakes of a group are not independent.
  """
  estimator = bind(NOISY['credited'](correction, 0.1, 0.3), credit.TABLE)
  arrays = dict(
    group_ids=jnp.repeat(jnp.arange(GROUPS), 4),
    uniform=jnp.repeat((jnp.arange(GROUPS) + 0.5) / GROUPS, 4),
    appeal_term=jnp.tile(jnp.array([1.0, 0, 0, 0]), GROUPS),
  )
  state = estimator.init()
  for _ in range(2 if correction == 'appeals' else 1):
    batch, state = of_rows(estimator, np.tile([1.0, 0, 0, 0], GROUPS), state, **arrays)
  return np.asarray(batch.advantages.reshape(GROUPS, 4)).mean(axis=0)


@pytest.mark.parametrize(
  ('correction', 'expected'),
  [
    ('clean', [1, -1 / 3, -1 / 3, -1 / 3]),
    ('none', [0.6, -0.2, -0.2, -0.2]),  # smaller by 1 - 0.1 - 0.3
    ('backward', [1, -1 / 3, -1 / 3, -1 / 3]),
    ('forward', [0, -0.6, -0.6, -0.6]),
  ],
)
def test_what_a_correction_makes_of_a_verifier_that_makes_mistakes(correction, expected):
  np.testing.assert_allclose(expected_advantages(correction), expected, atol=1e-6)


def test_appeals_count_accepted_wrong_answers_as_right():
  """Of ten right answers three are missed, and of the wrong ones three are accepted."""
  # With the prior counts 0.5 and 4.5.
  measured = (3 + 0.5) / (3 + 0.5 + 7 + 3 + 4.5)
  factor = 0.6 / (1 - 0.1 - measured)
  np.testing.assert_allclose(
    expected_advantages('appeals'), factor * expected_advantages('clean'), rtol=1e-5
  )


def test_a_deviation_of_the_group_undoes_a_correction():
  """The same as normalised rewards of the mistaken verifier."""
  plain = part(credit.outcome, advantage=part(advantages.group_normalized))
  noise = NOISY['credited']('none', 0.1, 0.3).reward
  estimator = bind(part(credit.shaped, credit=plain, reward=noise), credit.TABLE)
  arrays = dict(group_ids=jnp.repeat(jnp.arange(16), 4), uniform=jnp.linspace(0, 0.99, 64))
  expected, _ = of_rows(estimator, np.tile([1.0, 0, 0, 1], 16), **arrays)
  corrected = bind(NOISY['credited']('normalized', 0.1, 0.3), credit.TABLE)
  got, _ = of_rows(corrected, np.tile([1.0, 0, 0, 1], 16), **arrays)
  np.testing.assert_allclose(got.advantages, expected.advantages, atol=1e-4)
  assert np.abs(expected.advantages).max() > 0.5


def test_the_experiment_refuses_a_correction_that_there_is_not():
  with pytest.raises(ValueError, match='valid are'):
    NOISY['get_config']('correction=sideways')
  assert 'appeals' in NOISY['CORRECTIONS']
  build.build(NOISY['get_config']('correction=appeals,smoke'))
