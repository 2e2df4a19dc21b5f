"""Win rates, intervals, length control and KL estimates are what their formulas say."""

import math

import numpy as np
import pytest

from polgrad import preference_evaluation as numbers

NAN = math.nan


def test_samples_of_a_prompt_are_averaged_first_and_failures_are_no_losses():
  wins = np.array([[1.0, NAN], [0.0, 0.5], [NAN, NAN]])
  np.testing.assert_allclose(numbers.by_prompt(wins), [1.0, 0.25])
  mean, error = numbers.mean_and_error(np.array([0.0, 1.0, 0.5]))
  np.testing.assert_allclose([mean, error], [0.5, 0.5 / np.sqrt(3)])
  assert np.isnan(numbers.mean_and_error(np.array([]))).all()


def test_the_bootstrap_interval_holds_the_mean_as_often_as_it_says():
  random = np.random.default_rng(0)
  held = 0
  for seed in range(60):
    low, high = numbers.bootstrap((random.random(60) < 0.3).astype(float), resamples=100, seed=seed)
    held += low <= 0.3 <= high
  assert 52 <= held <= 59
  assert np.isnan(numbers.bootstrap(np.array([]))).all()


def test_length_control_finds_the_log_odds_at_equal_lengths():
  """Soft labels of the model itself: the regression gives back its numbers, up to the ridge."""
  random = np.random.default_rng(1)
  lengths, others = random.integers(10, 200, 500), random.integers(10, 200, 500)
  d = (lengths - others) / np.std(lengths - others, ddof=1)
  wins = 1 / (1 + np.exp(-(-0.4 + 1.5 * np.tanh(d))))
  found = numbers.length_controlled(wins, lengths, others, ridge=1e-8)
  np.testing.assert_allclose([found.theta, found.phi], [-0.4, 1.5], rtol=1e-5)
  np.testing.assert_allclose(found.win_rate, 1 / (1 + np.exp(0.4)), rtol=1e-5)
  wins[::7] = NAN
  np.testing.assert_allclose(
    numbers.length_controlled(wins, lengths, others, ridge=1e-8).theta, -0.4, atol=1e-3
  )


def test_swapping_the_models_mirrors_the_length_controlled_win_rate():
  random = np.random.default_rng(2)
  lengths, others = random.integers(1, 99, (2, 80))
  wins = (random.random(80) < 0.7).astype(float)
  one = numbers.length_controlled(wins, lengths, others)
  two = numbers.length_controlled(1 - wins, others, lengths)
  np.testing.assert_allclose(one.win_rate + two.win_rate, 1, atol=1e-9)


def test_a_model_that_wins_only_by_length_loses_its_lead_and_the_fit_stays_finite():
  lengths, others = np.array([9, 8, 1, 7, 9, 2]), np.array([1, 2, 8, 1, 2, 9])
  found = numbers.length_controlled((lengths > others).astype(float), lengths, others)
  assert abs(found.win_rate - 0.5) < 0.1 and 1 < found.phi < 20
  same = numbers.length_controlled(np.array([1.0, 1.0, 0.0]), np.ones(3), np.ones(3), ridge=1e-9)
  np.testing.assert_allclose(same.win_rate, 2 / 3, rtol=1e-5)  # without differences it is the mean


@pytest.mark.parametrize('name', ['k1', 'k3'])
def test_both_estimates_of_the_kl_are_unbiased_over_sequences(name):
  """Two tokens, the second after the first: the mean over all sequences is the exact KL."""
  random = np.random.default_rng(3)
  first, second = random.dirichlet(np.ones(3), 2), random.dirichlet(np.ones(3), (2, 3))
  exact = sum(
    first[0, i]
    * second[0, i, j]
    * np.log(first[0, i] * second[0, i, j] / first[1, i] / second[1, i, j])
    for i in range(3)
    for j in range(3)
  )
  total = 0.0
  for i in range(3):
    for j in range(3):
      d = np.log([[[first[0, i] / first[1, i], second[0, i, j] / second[1, i, j], NAN]]])
      mask = np.array([[[True, True, False]]])
      total += first[0, i] * second[0, i, j] * getattr(numbers.divergence(d, mask), name)
  np.testing.assert_allclose(total, exact, rtol=1e-12)


def test_errors_of_the_kl_are_over_prompts():
  d = np.array([[[0.1], [0.3]], [[0.4], [0.6]]])
  found = numbers.divergence(d, np.ones_like(d, bool))
  np.testing.assert_allclose([found.k1, found.k1_error], [0.35, 0.15])
  np.testing.assert_allclose(found.k3, np.mean(np.exp(-d) - 1 + d))
