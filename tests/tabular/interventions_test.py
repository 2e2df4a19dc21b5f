"""Plans that ask for help at a price."""

import doctest
import itertools

import numpy as np
import pytest

from polgrad.tabular import interventions

PROCESS = interventions.chain([0.9, 0.5, 0.7], [0.98, 0.95, 0.9])


def test_doctests():
  assert not doctest.testmod(interventions).failed


@pytest.mark.parametrize(
  ('prices', 'steps', 'usage', 'solved'),
  [
    ((0.0,), (0, 1, 2), 2.911, 0.8379),
    ((0.1, 0.15), (1, 2), 1.755, 0.7695),
    ((0.2, 0.3), (1,), 0.9, 0.5985),
    ((0.4, 1.0), (), 0.0, 0.315),
  ],
)
def test_the_chain_of_three_steps(prices, steps, usage, solved):
  for price in prices:
    plan = interventions.planned(PROCESS, price)
    assert tuple(np.flatnonzero(plan.ask[:, 0])) == steps
    assert not plan.ask[:, 1].any()  # help does not undo a failure
    assert plan.usage[0, 0] == pytest.approx(usage, abs=1e-12)
    assert plan.solved[0, 0] == pytest.approx(solved, abs=1e-12)
    assert plan.value[0, 0] == pytest.approx(solved - price * usage, abs=1e-12)


def test_the_price_of_a_budget_of_one():
  price = interventions.affordable(PROCESS, 0, 1.0)
  assert 0.15 < price <= 0.2 + 1e-8
  # Step 3 is worth asking for while .9 - .7 exceeds the price.
  assert price == pytest.approx(0.2, abs=1e-8)
  assert interventions.planned(PROCESS, price).usage[0, 0] == pytest.approx(0.9)
  assert interventions.planned(PROCESS, price - 1e-6).usage[0, 0] > 1
  assert interventions.affordable(PROCESS, 0, 3.0) == 0
  assert interventions.planned(PROCESS, interventions.affordable(PROCESS, 0, 0.0)).usage[0, 0] == 0
  with pytest.raises(ValueError, match='budget'):
    interventions.affordable(PROCESS, 0, -1.0)


def random_process(seed, horizon=3, states=3):
  random = np.random.default_rng(seed)
  moves = random.dirichlet(np.ones(states), size=(2, horizon, states))
  return interventions.Process(moves[0], moves[1], random.random(states))


@pytest.mark.parametrize('seed', range(3))
def test_the_plan_is_the_best_of_all_plans(seed):
  """Against every deterministic plan of three steps and three states, evaluated from its definition."""
  process, price = random_process(seed), 0.07
  best = interventions.planned(process, price)
  found = []
  for bits in itertools.product([False, True], repeat=9):
    ask = np.array(bits).reshape(3, 3)
    worth = process.success
    for h in (2, 1, 0):
      move = np.where(ask[h][:, None], process.helped[h], process.alone[h])
      worth = move @ worth - price * ask[h]
    found.append(worth)
  np.testing.assert_allclose(best.value[0], np.max(found, axis=0), atol=1e-12)
  np.testing.assert_allclose(best.value, best.solved - price * best.usage, atol=1e-12)


def test_requests_do_not_grow_with_the_price():
  process = random_process(5)
  usage = [interventions.planned(process, p).usage[0, 0] for p in np.linspace(0, 1, 60)]
  assert (np.diff(usage) <= 1e-12).all() and usage[0] > usage[-1] == 0


def test_random_requests_give_the_labels_of_the_true_process():
  random = np.random.default_rng(0)
  rollouts = interventions.sampled(PROCESS, 0, 40_000, random)
  found = interventions.fitted(rollouts, 2)
  np.testing.assert_allclose(found.alone[:, 0, 0], [0.9, 0.5, 0.7], atol=0.02)
  np.testing.assert_allclose(found.helped[:, 0, 0], [0.98, 0.95, 0.9], atol=0.02)
  assert found.success.tolist() == [1, 0]
  for budget, steps in ((2.0, [1, 2]), (1.0, [1]), (0.0, [])):
    price = interventions.affordable(found, 0, budget)
    plan = interventions.planned(found, price)
    got = interventions.labels(plan, rollouts)
    assert [h for h, s, ask in got if ask] == steps
    assert {(h, s) for h, s, _ in got} == {(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)}


def test_what_was_never_seen():
  one = interventions.Rollouts(np.array([[0, 0, 1]]), np.array([[True, False]]), np.array([True]))
  found = interventions.fitted(one, 3)
  np.testing.assert_array_equal(found.alone[0], np.eye(3))
  assert found.success.tolist() == [0, 1, 0] and np.isfinite(found.success).all()
  smooth = interventions.fitted(one, 3, prior=1.0)
  np.testing.assert_allclose(smooth.helped[0, 0], [0.5, 0.25, 0.25])
  np.testing.assert_allclose(smooth.success, [0.5, 2 / 3, 0.5])
