"""The bandit of docs/on_policy.md keeps the orderings of arXiv:2404.14367."""

import pytest

from benchmarks import on_policy
from benchmarks.on_policy import REWARDS, best_of_n, ipo, measure

FAR, NEAR = REWARDS.values()


def value(method, rewards=FAR, *, on_policy):
  return measure(method, rewards, on_policy=on_policy, seeds=1)[0]


def test_on_policy_samples_beat_offline_ones_and_more_so_far_from_the_data():
  gaps = []
  for rewards in (FAR, NEAR):
    gaps.append(value(best_of_n, rewards, on_policy=True))
    gaps[-1] -= value(best_of_n, rewards, on_policy=False)
  assert gaps[0] > 0.5 > gaps[1] > 0


def test_a_negative_gradient_helps_on_policy_and_not_offline():
  assert value(ipo, on_policy=True) >= value(best_of_n, on_policy=True) > 0.95
  assert value(ipo, on_policy=False) < value(best_of_n, on_policy=False) < 0.5


def test_the_data_have_the_stated_rewards():
  """0.038 in the paper's draw of 10,000."""
  assert on_policy.data_distribution() @ FAR == pytest.approx(0.038, abs=0.01)
