"""Rewards and losses of auxiliary networks: flows of hidden states, RDD's bonus and V0's loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad.losses import auxiliary_rewards as aux
from polgrad.losses.returns import reward_to_go


def flow_rewards_oracle(scores, mask, threshold=0.6, keep=15, coefficient=-0.01):
  out = np.zeros_like(scores, dtype=np.float64)
  for row, (x, m) in enumerate(zip(scores, mask, strict=True)):
    at = [t for t in range(len(x)) if m[t] and x[t] != 0]
    if not at or max(x[at]) == min(x[at]):
      continue
    low, high = min(x[at]), max(x[at])
    n = {t: (x[t] - low) / (high - low) for t in at}
    left = sorted((t for t in at if n[t] > threshold), key=lambda t: (-n[t], t))[:keep]
    for t in left:
      out[row, t] = coefficient * n[t]
  return out


def test_the_rewards_of_a_row_are_those_of_the_worked_example():
  scores, mask = jnp.array([[0.1, 0.7, 1.0, 0.4]]), jnp.ones((1, 4), bool)
  rewards = aux.flow_rewards(scores, mask)
  np.testing.assert_allclose(rewards, [[0, -0.0066667, -0.01, 0]], atol=1e-7)
  to_go = reward_to_go(rewards, mask)
  np.testing.assert_allclose(to_go, [[-0.0166667, -0.0166667, -0.01, 0]], atol=1e-7)


@pytest.mark.parametrize('keep', [1, 3, 15])
def test_the_rewards_are_those_of_a_loop_over_rows(keep):
  rng = np.random.default_rng(keep)
  scores, mask = rng.uniform(0.1, 2, (5, 24)), rng.random((5, 24)) < 0.7
  scores[0, :6] = 0  # tokens without a score
  scores[1, 3:9] = 1.9  # ties
  scores[2] = 0.5  # all equal
  mask[3] = False
  got = aux.flow_rewards(jnp.asarray(scores), jnp.asarray(mask), keep=keep)
  wanted = flow_rewards_oracle(scores.astype(np.float32), mask, keep=keep)
  np.testing.assert_allclose(got, wanted, atol=1e-7)
  assert np.count_nonzero(got[:2], axis=1).max() <= keep and not got[2:4].any()


def test_no_reward_is_left_at_threshold_one_or_coefficient_zero():
  scores, mask = jnp.array([[0.1, 0.7, 1.0]]), jnp.ones((1, 3), bool)
  assert aux.flow_rewards(scores, mask, keep=3).any()
  assert not aux.flow_rewards(scores, mask, threshold=1.0).any()
  assert not aux.flow_rewards(scores, mask, coefficient=0.0).any()


def test_the_exact_flow_of_a_point_gives_it_the_score_zero_and_others_their_distance():
  rng = np.random.default_rng(0)
  point, noise = rng.normal(size=(2, 7, 4))
  s = 0.8
  exact = lambda x: (point - x) / (1 - s)
  on = aux.noised(jnp.asarray(point), jnp.asarray(noise), jnp.full(7, s))
  np.testing.assert_allclose(on, s * point + (1 - s) * noise, atol=1e-6)
  np.testing.assert_allclose(aux.flow_score(exact(on), point, noise, s=s), 0, atol=1e-9)
  # Another target h: v - u = (point - h) / (1 - s).
  other = point + 1.0
  off = exact(aux.noised(jnp.asarray(other), jnp.asarray(noise), jnp.full(7, s)))
  wanted = np.full(7, s / (1 - s) / (1 - s) ** 2)
  np.testing.assert_allclose(aux.flow_score(off, other, noise, s=s), wanted, rtol=1e-4)


@pytest.mark.parametrize(('s', 'factor'), [(0.5, 1.0), (0.8, 4.0)])
def test_the_weight_of_a_time_is_its_odds(s, factor):
  one, zero = jnp.ones((3, 2)), jnp.zeros((3, 2))
  np.testing.assert_allclose(aux.flow_score(one, zero, zero, s=s), factor, rtol=1e-6)
  assert not jax.grad(lambda v: aux.flow_score(v, zero, zero, s=s).sum())(one).any()
  assert jax.grad(lambda v: aux.flow_error(v, zero, zero).sum())(one).all()


def test_the_condition_of_a_token_is_its_neighbour_inside_the_mask():
  hidden = jnp.arange(1.0, 6)[None, :, None]
  mask = jnp.array([[False, True, True, True, False]])
  before, has = aux.neighbours(hidden, mask)
  assert before[0, :, 0].tolist() == [0, 0, 2, 3, 0] and has[0].tolist() == [0, 0, 1, 1, 0]
  after, has = aux.neighbours(hidden, mask, side='after')
  assert after[0, :, 0].tolist() == [0, 3, 4, 0, 0] and has[0].tolist() == [0, 1, 1, 0, 0]


def test_a_predictor_that_averages_its_targets_has_a_bonus_that_counts_visits():
  rng = np.random.default_rng(0)
  states, size = 500, 64
  mean = rng.normal(size=(states, size))
  loss = lambda f, noise: jnp.sum(aux.distilled_error(f, mean, noise))
  gradient = jax.jit(jax.grad(loss))
  prediction, found = jnp.zeros((states, size)), {}
  for visit in range(1, 17):
    # A step of rate 1 / (2 n) on the squared error is the running mean of n targets.
    step = gradient(prediction, rng.normal(size=(states, size))) * size / (2 * visit)
    prediction = prediction - step
    found[visit] = float(jnp.mean(aux.distilled_bonus(prediction, mean)))
  for visit in (1, 4, 16):
    assert found[visit] == pytest.approx(1 / visit, rel=0.04)  # 4 standard errors are .032


def test_without_noise_the_targets_are_those_of_a_fixed_network():
  f, mean, noise = np.random.default_rng(0).normal(size=(3, 5, 8))
  quiet = aux.distilled_error(f, mean, noise, sigma=0.0)
  np.testing.assert_allclose(quiet, aux.distilled_bonus(f, mean), rtol=1e-6)
  loud = aux.distilled_error(f, mean, noise, sigma=0.5)
  np.testing.assert_allclose(loud, np.mean((f - mean - 0.5 * noise) ** 2, axis=-1), rtol=1e-5)


def context_oracle(score, rewards, ids, valid, rank):
  rows = [i for i in range(len(score)) if valid[i]]
  pairs = [
    np.log1p(np.exp(score[j] - score[i]))
    for i in rows
    for j in rows
    if ids[i] == ids[j] and rewards[i] == 1 and rewards[j] == 0
  ]
  entropy = [np.log1p(np.exp(-score[i] if rewards[i] else score[i])) for i in rows]
  mean = lambda x: np.mean(x) if x else 0.0
  return rank * mean(pairs) + (1 - rank) * mean(entropy)


@pytest.mark.parametrize('rank', [0.0, 0.25, 1.0])
def test_the_loss_of_prompts_is_that_of_a_loop_over_pairs(rank):
  rng = np.random.default_rng(1)
  score, ids = rng.normal(size=12), rng.integers(0, 3, 12)
  rewards, valid = rng.integers(0, 2, 12), rng.random(12) < 0.8
  got = aux.context_loss(score, rewards, ids, valid, rank=rank)
  assert got == pytest.approx(context_oracle(score, rewards, ids, valid, rank), rel=1e-5)
  nothing = aux.context_loss(score, rewards, ids, np.zeros(12, bool), rank=rank)
  assert nothing == 0


def test_only_the_ranking_ignores_the_mean_success_of_a_context():
  # Two contexts with 8 and 2 right rows of 10, and prompts that say nothing.
  ids, valid = np.repeat([0, 1], 10), np.ones(20, bool)
  rewards = np.array([1] * 8 + [0] * 2 + [1] * 2 + [0] * 8)
  shortcut = np.where(ids == 0, np.log(4), -np.log(4))
  pooled = np.zeros(20)
  loss = lambda score, rank: float(aux.context_loss(score, rewards, ids, valid, rank=rank))
  assert loss(shortcut, 0.0) == pytest.approx(-0.8 * np.log(0.8) - 0.2 * np.log(0.2), rel=1e-5)
  assert loss(shortcut, 0.0) < loss(pooled, 0.0) == pytest.approx(np.log(2))
  assert loss(shortcut, 1.0) == pytest.approx(np.log(2)) == loss(pooled, 1.0)
