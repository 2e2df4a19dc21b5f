"""Jumps of the greedy policy, and continuity of the soft one."""

import doctest

import numpy as np
import pytest

from polgrad.tabular import cliffs


def test_doctests():
  assert not doctest.testmod(cliffs).failed


def test_a_tie_is_a_cliff_of_the_greedy_policy_alone():
  reward = np.array([1.0, 1.0, 0.0])
  bump = np.array([1.0, 0.0, 0.0])
  for eps in (1e-1, 1e-6, 1e-12):
    above, below = reward + eps * bump, reward - eps * bump
    greedy = [cliffs.optimal(r, temperature=0) for r in (above, below)]
    assert greedy[0].argmax() == 0 and greedy[1].argmax() == 1
    assert cliffs.total_variation(*greedy) == 1
    soft = [cliffs.optimal(r, temperature=0.5) for r in (above, below)]
    # p (1 - p) per unit of reward over the temperature, at p = softmax of the tie
    p = np.exp(2) / (2 * np.exp(2) + 1)
    want = p * (1 - p) * 2 * eps / 0.5
    assert cliffs.total_variation(*soft) == pytest.approx(want, rel=0.02, abs=1e-15)


def test_numbers():
  first, second = np.array([1, 0.999, 0]), np.array([0.999, 1, 0])
  found = cliffs.total_variation(*(cliffs.optimal(r, temperature=0.1) for r in (first, second)))
  assert found == pytest.approx(0.0049998, abs=5e-8)
  assert cliffs.soft_bound(first, second, temperature=0.1) == pytest.approx(0.005)


def test_the_bound_holds_for_any_reference_and_is_reached():
  random = np.random.default_rng(0)
  rewards, moves = random.normal(size=(2, 400, 5))
  reference = random.normal(size=(400, 5)) * 3
  for temperature in (0.03, 0.3, 3.0):
    others = rewards + 0.2 * moves
    how = dict(temperature=temperature, log_reference=reference)
    gap = cliffs.total_variation(cliffs.optimal(rewards, **how), cliffs.optimal(others, **how))
    bound = cliffs.soft_bound(rewards, others, temperature=temperature)
    assert (gap <= np.tanh(bound) + 1e-12).all() and (np.tanh(bound) <= bound).all()
  # Two actions that change places reach tanh(d / 2a).
  d, a = 0.3, 0.2
  pair = [cliffs.optimal(np.array(r), temperature=a) for r in ([d, 0], [0, d])]
  assert cliffs.total_variation(*pair) == pytest.approx(np.tanh(d / (2 * a)), rel=1e-12)


def test_policies_are_those_of_the_definition():
  rewards, reference = np.array([0.3, -1.0, 2.0]), np.log([0.5, 0.5, 1e-9])
  grid = np.stack(np.meshgrid(*[np.linspace(1e-6, 1, 60)] * 2), -1).reshape(-1, 2)
  grid = grid[grid.sum(axis=1) < 1 - 1e-6]
  policies = np.column_stack([grid, 1 - grid.sum(axis=1)])
  worth = policies @ rewards - 0.7 * (policies * (np.log(policies) - reference)).sum(axis=1)
  best = cliffs.optimal(rewards, temperature=0.7, log_reference=reference)
  own = best @ rewards - 0.7 * (best * (np.log(best) - reference)).sum()
  assert own >= worth.max() and np.abs(policies[worth.argmax()] - best).max() < 0.02
  # At temperature 0 an action that the reference never takes is never taken.
  never = np.array([0.0, 0.0, -np.inf])
  assert cliffs.optimal(rewards, temperature=0, log_reference=never).tolist() == [1, 0, 0]


def test_mixtures_of_rewards_jump_at_ties_of_the_weights():
  random = np.random.default_rng(1)
  for _ in range(20):
    rewards = random.normal(size=(2, 6))
    found = cliffs.crossings(*rewards)
    grid = np.linspace(0, 1, 20_001)[:, None] * np.array([-1, 1]) + np.array([1, 0])
    best = cliffs.effective(rewards, grid).argmax(axis=1)
    jumps = grid[np.flatnonzero(np.diff(best)), 1]
    assert len(jumps) == len(found)
    np.testing.assert_allclose(jumps, found, atol=1e-4)
    soft = cliffs.optimal(cliffs.effective(rewards, grid), temperature=0.5)
    steps = cliffs.total_variation(soft[1:], soft[:-1])
    assert steps.max() <= np.abs(rewards[1] - rewards[0]).max() / 20_000  # / (2 a), a = 0.5
  # Equal at weight 0: the action that rises is the best at once, which is no crossing inside.
  assert cliffs.crossings(np.array([1.0, 1.0]), np.array([0.0, 1.0])).tolist() == []
