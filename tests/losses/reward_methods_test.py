"""Advantages by difficulty, strata, factors and maps of rewards: the numbers and theorems of papers."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad.losses import advantages, difficulty, multipliers, reward_maps, strata

# All tests use one precision, and nearly all of them eight rows, so operations compile once.
pytestmark = pytest.mark.usefixtures('x64')
ROWS = 8


def group(fn, rewards, *arrays, **knobs):
  """A function of the rewards of one group, beside rows that are not valid, which have no result.

  Other arrays come after the rewards. All are padded to eight rows.
  """
  rows = len(rewards)
  pad = lambda x: jnp.asarray(np.pad(x, [(0, ROWS - rows)] + [(0, 0)] * (np.ndim(x) - 1)))
  rewards, *arrays = map(pad, (np.asarray(rewards, float), *arrays))
  groups, valid = jnp.zeros(ROWS, jnp.int32), jnp.arange(ROWS) < rows
  return np.asarray(fn(rewards, *arrays, groups, valid, **knobs))[:rows]


def binary(right, rows=8):
  return (np.arange(rows) < right).astype(float)


def lengths_as_mask(lengths):
  return np.arange(10240) < np.asarray(lengths)[:, None]


# BNPO.


BETA = jax.jit(difficulty.beta_normalized)


def beta_advantages(means, places=400):
  """Advantages of two rewards p - 0.05 and p + 0.05 for each p, beside rows that are not valid."""
  valid = np.arange(2 * places) < 2 * len(means)
  rewards = np.where(valid, np.resize(np.repeat(means, 2), 2 * places), 0)
  rewards = rewards + np.tile([-0.05, 0.05], places)
  got = BETA(rewards, np.repeat(np.arange(places), 2), valid)
  return np.asarray(got)[valid].reshape(-1, 2)


@pytest.mark.parametrize(
  ('means', 'expected'),
  [
    ([0.25, 0.5, 0.75], [0.9069, 0.7854, 0.9069]),
    ([0.1, 0.2, 0.9], [0.9994, 0.98145, 1.03868]),
    ([0.3], [1.0]),
    ([0.3, 0.3], [1.0, 1.0]),
    ([0, 1, 0, 1], [1.0] * 4),  # solved or not at all
    ([0, 0.25, 0.5, 0.75], [1, 0.89731, 0.89487, 1.00610]),  # the density at 0 is 0
  ],
)
def test_the_beta_density_divides_the_advantages(means, expected):
  factors = beta_advantages(means) / np.array([-0.05, 0.05])
  np.testing.assert_allclose(factors, np.repeat(np.array(expected)[:, None], 2, 1), atol=1e-4)


def test_the_fitted_beta_has_the_least_variance_and_parameters_of_three_halves_are_grpo():
  """p ~ Beta(2, 5), so the parameters are 1 + 2/3 and 1 + 5/3; the variance is E[p (1 - p) / f(p)^2]."""
  p = (np.arange(20000) + 0.5) / 20000
  density = lambda a, b: (
    math.gamma(a + b) / math.gamma(a) / math.gamma(b) * p ** (a - 1) * (1 - p) ** (b - 1)
  )
  prior = density(2, 5)
  variance = lambda a, b: np.mean(prior * p * (1 - p) / density(a, b) ** 2)
  best = variance(5 / 3, 8 / 3)
  np.testing.assert_allclose(best, 0.094657, atol=1e-5)
  near = [variance(5 / 3 + a, 8 / 3 + b) for a, b in ((0.1, 0), (-0.1, 0), (0, 0.1), (0, -0.1))]
  np.testing.assert_allclose(near, [0.09631, 0.09620, 0.09522, 0.09520], atol=2e-5)
  np.testing.assert_allclose([variance(1, 1), variance(1.5, 1.5)], [0.17857, 0.15421], atol=1e-4)
  np.testing.assert_allclose(density(1.5, 1.5), 8 / np.pi * np.sqrt(p * (1 - p)), rtol=1e-9)
  # The fit finds these parameters from 400 prompts whose p are quantiles of the prior.
  drawn = np.searchsorted(np.cumsum(prior) / len(p), (np.arange(400) + 0.5) / 400)
  factors = beta_advantages(p[drawn])[:, 1] / 0.05
  np.testing.assert_allclose(factors, 1 / density(5 / 3, 8 / 3)[drawn], rtol=0.03)


# A-GRAE.


@pytest.mark.parametrize(
  ('right', 'high', 'damped', 'low'),
  [
    (1, 2.11245, 0.63373, -0.30178),
    (4, 0.70711, 0.21213, -0.70711),
    (7, 0.43477, 0.13043, -3.04342),
  ],
)
def test_two_sided_difficulty_at_a_proficiency_of_three_tenths(right, high, damped, low):
  """One group of eight of interest, and others that make 24 of 80 rows right."""
  others = np.concatenate([binary(8)] * 2 + [binary(0)] * 6 + [binary(8 - right)])
  assert len(others) == 72
  # One row more, which is not valid, for the shape of the groups of a bandit below.
  rewards = np.concatenate([binary(right), others, [1.0]])
  groups, valid = np.arange(81) // 8, np.arange(81) < 80
  got = difficulty.two_sided(rewards, groups, valid, eps=0.0)[:8]
  np.testing.assert_allclose(np.asarray(got)[[0, 7]], [high, low], atol=1e-5)
  factor = multipliers.damped_positive(rewards, jnp.repeat(got[:1, None], 81, 0), valid)
  np.testing.assert_allclose(got[0] * factor[0, 0], damped, atol=1e-5)


@pytest.mark.parametrize('right', [1, 3, 7])
def test_group_normalisation_counts_hard_and_easy_prompts_alike(right):
  """sum |a| = 2 G sqrt(p (1 - p)); over sqrt(p), hard prompts have most, over sqrt(1 - p) easy ones."""
  p, rewards = right / 8, binary(right)
  a = group(advantages.group_normalized, rewards, ddof=0, eps=0.0)
  np.testing.assert_allclose(a[[0, 7]], [np.sqrt((1 - p) / p), -np.sqrt(p / (1 - p))], rtol=1e-9)
  assert np.abs(a).sum() == pytest.approx(16 * np.sqrt(p * (1 - p)))
  assert np.mean(a**2) == pytest.approx(1)
  assert np.abs(a / np.sqrt(p)).sum() == pytest.approx(16 * np.sqrt(1 - p))
  assert np.abs(a / np.sqrt(1 - p)).sum() == pytest.approx(16 * np.sqrt(p))


def test_a_negative_sum_of_advantages_raises_the_logits_of_arms_that_were_not_drawn():
  """A is the group-normalised reward, and then the same with its positive numbers damped."""
  logits, drawn, rewards = np.array([0.2, -0.1, 0.5, 0.0]), [0, 1, 1], [1.0, 0, 0]
  logp = lambda x: x - np.log(np.sum(np.exp(x)))
  plain = group(advantages.group_normalized, rewards)
  damped = plain * np.asarray(
    multipliers.damped_positive(jnp.array(rewards), jnp.array(plain)[:, None], jnp.ones(3, bool))
  ).squeeze(1)
  for a, raised in ((plain, 0), (damped, 1)):
    loss = lambda x, a=a: a @ logp(x)[drawn]
    steps = 1e-6 * np.eye(4)
    change = np.array([loss(logits + step) - loss(logits - step) for step in steps]) / 2e-6
    np.testing.assert_array_equal(np.sign(change[2:].round(6)), raised)


# PKPO and the best of a group.


def by_subsets(rewards, k):
  """Eq. 33 by all subsets, and the mean over subsets of their maximum."""
  n = len(rewards)
  subsets = list(itertools.combinations(range(n), k))
  best = lambda rows: max(rewards[list(rows)])
  added = [
    sum(best(s) - best([j for j in s if j != i]) for s in subsets if i in s) for i in range(n)
  ]
  return np.array(added) / len(subsets), np.mean([best(s) for s in subsets])


G5 = np.array([0.1, 0.7, 0.4, 0.9, 0.2])


@pytest.mark.parametrize(
  ('k', 'expected', 'rho'),
  [(2, [0, 0.14, 0.05, 0.22, 0.01], 0.67), (3, [0, 0.11, 0.02, 0.23, 0], 0.79)],
)
def test_the_best_of_k_has_the_published_numbers(k, expected, rho):
  brute, mean = by_subsets(G5, k)
  np.testing.assert_allclose(brute, expected, atol=1e-9)
  assert mean == pytest.approx(rho)
  np.testing.assert_allclose(group(difficulty.max_at_k, G5, k=k), 5 * brute, atol=1e-9)


@pytest.mark.parametrize('k', [2, 4, 5])
def test_the_best_of_k_equals_all_subsets_with_ties_and_negative_rewards(k):
  rewards = np.array([-1.0, 2.0, 2.0, 0.5, -3.0])
  np.testing.assert_allclose(
    group(difficulty.max_at_k, rewards, k=k), 5 * by_subsets(rewards, k)[0], atol=1e-9
  )


def test_the_best_of_four_of_two_right_answers_in_eight():
  got = group(difficulty.max_at_k, binary(2), k=4)
  np.testing.assert_allclose(got, 8 * np.where(binary(2), 0.28571, 0), atol=1e-4)


def test_the_best_of_one_is_leave_one_out_and_of_more_than_there_are_is_nothing():
  expected = group(advantages.leave_one_out, G5)
  np.testing.assert_allclose(group(difficulty.max_at_k, G5, k=1), expected, rtol=1e-6)
  np.testing.assert_array_equal(group(difficulty.max_at_k, G5, k=6), np.zeros(5))
  with pytest.raises(ValueError, match='at least 1'):
    group(difficulty.max_at_k, G5, k=0)


@pytest.mark.parametrize(('mean', 'slope', 'variance'), [(0.8, 1.2681, 0.676), (0.9387, 0.0, None)])
def test_the_best_of_four_of_normal_numbers_has_the_published_slope_and_noise(
  mean, slope, variance
):
  """x ~ N(mean, 0.1) earns x^2 in [0, 1] and nothing elsewhere; at .9387 the best of four is highest."""
  groups, rows = 4000, 8
  x = np.random.default_rng(0).normal(mean, 0.1, size=groups * rows)
  rewards = jnp.asarray(np.where((x >= 0) & (x <= 1), x**2, 0.0))
  ids, valid = jnp.repeat(jnp.arange(groups), rows), jnp.ones(len(x), bool)
  gains = np.asarray(difficulty.max_at_k(rewards, ids, valid, k=4))
  slopes = (gains * (x - mean) / 0.01).reshape(groups, rows).mean(axis=1)
  error = slopes.std() / np.sqrt(groups)
  assert slopes.mean() == pytest.approx(slope, abs=4 * error)
  if variance:
    assert slopes.var() == pytest.approx(variance, rel=0.15)


@pytest.mark.parametrize('k', [1, 2, 3])
def test_the_best_of_k_has_the_exact_gradient_on_a_bandit(k):
  """All groups of three draws of three arms, against the derivative of E[max of k rewards]."""
  rewards, pi = np.array([0.1, 0.7, 0.4]), np.exp([0.2, -0.1, 0.5])
  pi /= pi.sum()
  draws_of = lambda number: np.array(list(itertools.product(range(3), repeat=number)))
  scores = lambda draws: np.eye(3)[draws] - pi  # of every row
  draws = draws_of(k)
  best = pi[draws].prod(axis=1) * rewards[draws].max(axis=1)
  expected = best @ scores(draws).sum(axis=1)
  draws = draws_of(3)
  groups, valid = jnp.repeat(jnp.arange(27), 3), jnp.ones(81, bool)
  a = difficulty.max_at_k(jnp.asarray(rewards[draws].ravel()), groups, valid, k=k)
  a = np.asarray(a).reshape(27, 3)
  got = np.einsum('d,di,dia->a', pi[draws].prod(axis=1), a / 3, scores(draws))
  np.testing.assert_allclose(got, expected, atol=1e-9)


@pytest.mark.parametrize(
  ('rewards', 'expected'),
  [([3, 1, 1], [2, 0, 0]), ([3, 3, 1], [0, 0, 0]), ([1, 2, 5, 4], [0, 0, 1, 0]), ([7], [0])],
)
def test_only_the_best_row_has_its_gap_to_the_second(rewards, expected):
  np.testing.assert_array_equal(group(difficulty.best_only, rewards), expected)


# Strata.


def test_strata_have_the_published_numbers_and_unit_variance():
  rewards, stratum = np.array([1.0, 1, 0, 0, 0, 1]), jnp.array([0.0, 0, 0, 1, 1, 1])
  knobs = dict(ddof=0, eps=0.0)
  inside = group(strata.stratified, rewards, stratum, mix=1.0, **knobs)
  wide, narrow = np.sqrt(2), np.sqrt(0.5)
  np.testing.assert_allclose(inside, [narrow, narrow, -wide, -narrow, -narrow, wide])
  assert np.mean(inside) == pytest.approx(0) and np.mean(inside**2) == pytest.approx(1)
  half = group(strata.stratified, rewards, stratum, mix=0.5, **knobs)
  np.testing.assert_allclose(half[:3], [0.85355, 0.85355, -1.20711], atol=1e-5)
  within = np.mean([rewards[:3].var(), rewards[3:].var()])
  between = np.var([rewards[:3].mean(), rewards[3:].mean()])
  np.testing.assert_allclose([within, between], [0.22222, 0.02778], atol=1e-5)


def test_one_stratum_or_no_mix_is_group_normalisation_and_a_lone_row_has_its_share():
  plain = group(advantages.group_normalized, G5)
  kinds = jnp.array([1.0, 2, 3, 3, 3])
  same = group(strata.stratified, G5, jnp.zeros(5), mix=0.7)
  np.testing.assert_allclose(same, plain, rtol=1e-5)
  np.testing.assert_allclose(group(strata.stratified, G5, kinds, mix=0.0), plain, rtol=1e-6)
  lone = group(strata.stratified, G5, kinds, mix=0.75)
  np.testing.assert_allclose(lone[:2], 0.25 * plain[:2], rtol=1e-5)


# Factors.

RULE = dict(least=1.01, cut=4054)
IMAGES = dict(**RULE, no_right=1.0, no_wrong=0.1)


@pytest.mark.parametrize(
  ('rewards', 'lengths', 'knobs', 'expected'),
  [
    ([3, 3, -1, -1], [1000, 2000, 1200, 1500], RULE, 1),
    ([3, 3, -1, -1], [1000, 1200, 1800, 1500], RULE, 0.1),
    ([3, 3, -1, -1], [1000, 1200, 4096, 4096], RULE, 1),
    ([-1] * 4, [1000, 1200, 1800, 1500], RULE, 0.1),
    ([3] * 4, [1000, 1200, 1800, 1500], RULE, 1),
    ([3] * 4, [1000, 1200, 1800, 1500], IMAGES, 0.1),
    ([-1] * 4, [1000, 1200, 1800, 1500], IMAGES, 1),
  ],
)
def test_prompts_whose_long_answers_are_right_count_fully(rewards, lengths, knobs, expected):
  got = group(multipliers.longer_when_right, rewards, lengths_as_mask(lengths), **knobs)
  np.testing.assert_allclose(got, expected)


def test_wrong_answers_longer_than_the_right_ones_count_more():
  lengths = [100, 300, 200, 300, 1200, 10200]
  got = group(multipliers.long_and_wrong, [1, 1, 0, 0, 0, 0], lengths_as_mask(lengths))
  np.testing.assert_allclose(got, [1, 1, 1, 1.00100, 1.00995, 1.09516], atol=1e-5)
  got = group(multipliers.long_and_wrong, [0] * 6, lengths_as_mask(lengths))
  np.testing.assert_array_equal(got, np.ones(6))


@pytest.mark.parametrize(
  ('right', 'expected'),
  [(0, 1.49939), (1, 1.49264), (2, 1.41656), (3, 0.95), (4, 0.48344)],
)
def test_logistic_hardness_by_the_sign_of_the_advantage(right, expected):
  for sign, share in ((1.0, right), (-1.0, 4 - right)):
    a = jnp.full((4, 1), sign)
    got = group(multipliers.logistic_hardness, binary(share, 4), a)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_factor_of_groups_keeps_their_sum_at_zero_and_one_of_signs_does_not():
  rewards = binary(3)
  a = jnp.asarray(group(advantages.group_normalized, rewards))
  hard = a * group(multipliers.hardness, rewards)
  signs = a[:, None] * group(multipliers.logistic_hardness, rewards, a[:, None])
  assert abs(hard.sum()) < 1e-5 < 0.1 < abs(signs.sum())


# Maps of rewards.


def test_the_bent_reward_has_the_published_numbers():
  r = jnp.array([0, 0.2, 0.4, 0.6, 0.79, 0.8, 0.9, 1])
  expected = [0.08676, 0.32155, 0.51377, 0.67115, 0.79415, 0.8, 0.80095, 0.80182]
  np.testing.assert_allclose(reward_maps.bent(r), expected, atol=1e-5)
  near = np.asarray(reward_maps.bent(jnp.array([0.8 + 1e-6, 0.8 - 1e-6, *r[:6]])))[:2]
  np.testing.assert_allclose(np.abs(near - 0.8) / 1e-6, [0.01, 0.58198], atol=1e-5)


def test_the_bent_reward_lets_the_best_sample_stay_positive_beside_the_answer_of_the_data():
  r = jnp.array([0.2, 0.3, 0.1, 0.4, 1.0])
  of = lambda r: group(advantages.group_normalized, r, ddof=0, eps=0.0)
  np.testing.assert_allclose(of(r), [-0.632, -0.316, -0.949, 0, 1.897], atol=6e-4)
  bent = of(reward_maps.bent(r))
  np.testing.assert_allclose(bent, [-0.658, -0.156, -1.212, 0.297, 1.728], atol=6e-4)


def test_short_right_answers_get_more():
  mask = lengths_as_mask([4000, 5000, 6000, 100, 100])
  args = mask, jnp.array([True] * 4 + [False])
  got = group(reward_maps.brief_when_right, [1, 1, 1, 0, 0], *args)
  np.testing.assert_allclose(got, [1.05127, 1, 0.95123, -1, 0], atol=1e-5)
  lone = group(reward_maps.brief_when_right, [1, 0, 0, 0, 0], *args)
  np.testing.assert_array_equal(lone, [1, -1, -1, -1, 0])


# Noisy verifiers: false positives 0.1, false negatives 0.2.

NOISE = dict(false_positive=0.1, false_negative=0.2)
OBSERVED = np.array([0.0, 1.0])
SEEN = np.array([[0.9, 0.1], [0.2, 0.8]])  # P(observed | true reward)


def test_corrections_of_a_noisy_verifier_have_the_right_means_and_variances():
  backward = reward_maps.without_noise(OBSERVED, **NOISE)
  np.testing.assert_allclose(backward, [-0.14286, 1.28571], atol=1e-5)
  np.testing.assert_allclose(SEEN @ backward, [0, 1], atol=1e-12)
  variance = SEEN @ backward**2 - (SEEN @ backward) ** 2
  np.testing.assert_allclose(variance, [0.18367, 0.32653], atol=1e-5)
  forward = reward_maps.without_misses(OBSERVED, false_negative=0.2)
  np.testing.assert_allclose(forward, [-0.8, 0.2], atol=1e-12)
  np.testing.assert_allclose(SEEN @ forward, [-0.7, 0], atol=1e-12)


def test_noise_scales_the_gradient_and_the_backward_correction_restores_it():
  pi, rewards = np.exp([0.2, -0.1, 0.5]), np.array([1, 0, 0])
  pi /= pi.sum()
  gradient = lambda r: pi * (r - pi @ r)
  clean = gradient(rewards)
  np.testing.assert_allclose(clean, [0.21887, -0.07755, -0.14131], atol=1e-5)
  mean = lambda f: (SEEN @ f)[rewards]  # of each arm, over the verifier's mistakes
  np.testing.assert_allclose(gradient(mean(OBSERVED)), 0.7 * clean, atol=1e-12)
  backward = reward_maps.without_noise(OBSERVED, **NOISE)
  np.testing.assert_allclose(gradient(mean(backward)), clean, atol=1e-12)
  forward = reward_maps.without_misses(OBSERVED, false_negative=0.2)
  # The weights of the score itself, without a baseline.
  np.testing.assert_allclose(
    pi * mean(forward) - pi * (pi @ mean(forward)), 0.7 * clean, atol=1e-12
  )


def test_a_standard_deviation_undoes_the_correction_and_a_mean_undoes_a_constant():
  rewards = binary(3)
  for mapped in (
    reward_maps.without_noise(rewards, **NOISE),
    reward_maps.without_misses(rewards, false_negative=0.2),
  ):
    plain = group(advantages.group_normalized, rewards, eps=0.0)
    np.testing.assert_allclose(group(advantages.group_normalized, mapped, eps=0.0), plain)
  constant = reward_maps.without_misses(rewards, false_negative=0.2)
  loo = group(advantages.leave_one_out, rewards)
  np.testing.assert_allclose(group(advantages.leave_one_out, constant), loo)


def test_a_verifier_that_says_nothing_is_refused():
  with pytest.raises(ValueError, match='add up to 1 or more'):
    reward_maps.without_noise(OBSERVED, false_positive=0.5, false_negative=0.5)
