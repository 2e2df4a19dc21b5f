"""Hybrid natural policy gradient, and actors that follow optimistic critics."""

import numpy as np
import pytest

from polgrad.tabular import hybrid, optimism

SHAPE = (3, 2, 3)  # steps, states, actions


def random_process(seed=0, deterministic=False):
  random = np.random.default_rng(seed)
  moves = random.dirichlet(np.ones(2), size=SHAPE)
  if deterministic:
    moves = np.eye(2)[moves.argmax(axis=-1)]
  return hybrid.Process(moves, random.random(SHAPE), np.array([0.3, 0.7]))


def random_policy(seed=1):
  return hybrid.softmax(np.random.default_rng(seed).normal(size=SHAPE))


def test_the_exact_step_is_the_natural_gradient_of_a_softmax():
  """theta + eta F^+ grad, with the Fisher matrix of pi(. | s) and the gradient of E_pi Q, by hand."""
  random = np.random.default_rng(0)
  theta, q = random.normal(size=(2, 4))
  pi = hybrid.softmax(theta)
  fisher = np.diag(pi) - np.outer(pi, pi)
  natural = np.linalg.pinv(fisher) @ (pi * (q - pi @ q))
  moved = hybrid.npg_step(theta, q, step_size=0.7)
  want = pi * np.exp(0.7 * (q - pi @ q))
  np.testing.assert_allclose(hybrid.softmax(moved), want / want.sum(), atol=1e-12)
  np.testing.assert_allclose(hybrid.softmax(theta + 0.7 * natural), want / want.sum(), atol=1e-12)
  np.testing.assert_allclose(moved - theta, 0.7 * (q - pi @ q), atol=1e-12)


def test_both_parts_of_the_loss_vanish_at_the_values_of_the_policy():
  process, policy = random_process(deterministic=True), random_policy()
  q, v = hybrid.values(process, policy)
  # Returns that are exact, and every transition once.
  states, actions = (x.ravel() for x in np.indices(SHAPE[1:]))
  for h in range(3):
    own = hybrid.OnPolicy(states, actions, q[h][states, actions])
    then = process.moves[h][states, actions].argmax(axis=-1)
    offline = hybrid.Offline(states, actions, process.rewards[h][states, actions], then)
    after = {} if h == 2 else dict(next_policy=policy[h + 1], next_q=q[h + 1])
    assert hybrid.critic_loss(q[h], own, offline, **after) == pytest.approx(0, abs=1e-20)
    fitted = hybrid.fitted_critic(SHAPE[1:], own, offline, **after)
    np.testing.assert_allclose(fitted, q[h], atol=1e-12)
    assert hybrid.critic_loss(q[h] + 0.1, own, offline, weight=3.0, **after) == pytest.approx(0.04)
  assert v[0] @ process.start == pytest.approx((policy[0] * q[0]).sum(-1) @ process.start)


def test_the_fitted_critic_minimises_the_loss():
  process, policy = random_process(), random_policy()
  random = np.random.default_rng(0)
  own, _ = hybrid.episodes(process, policy, 30, random)
  _, offline = hybrid.episodes(process, np.full(SHAPE, 1 / 3), 50, random)
  after = dict(next_policy=policy[2], next_q=hybrid.values(process, policy)[0][2], weight=0.6)
  best = hybrid.fitted_critic(SHAPE[1:], own[1], offline[1], **after)
  loss = lambda q: hybrid.critic_loss(q, own[1], offline[1], **after)
  for index in np.ndindex(best.shape):
    for move in (-1e-3, 1e-3):
      other = best.copy()
      other[index] += move
      assert loss(other) > loss(best)
  # A part without data is left out, and what was never tried is 0.
  few = hybrid.OnPolicy(np.array([0]), np.array([1]), np.array([0.5]))
  assert hybrid.fitted_critic((2, 3), few, None)[0, 1] == 0.5
  assert np.count_nonzero(hybrid.fitted_critic((2, 3), few, None)) == 1
  assert hybrid.critic_loss(best, None, None) == 0


def test_episodes_have_the_values_of_the_policy():
  process, policy = random_process(), random_policy()
  own, _ = hybrid.episodes(process, policy, 40_000, np.random.default_rng(0))
  q, v = hybrid.values(process, policy)
  assert own[0].returns.mean() == pytest.approx(v[0] @ process.start, abs=0.01)
  fitted = hybrid.critics(SHAPE[1:], own, None, policy)
  np.testing.assert_allclose(fitted, q, atol=0.03)


def test_offline_data_alone_are_fitted_policy_iteration():
  process = random_process(deterministic=True)
  _, offline = hybrid.episodes(process, np.full(SHAPE, 1 / 3), 4000, np.random.default_rng(0))
  settings = dict(steps=60, number=0, step_size=20.0, random=None)
  policy = hybrid.train(process, offline, **settings)
  best = optimism.optimal_values(process)
  np.testing.assert_array_equal(policy.argmax(-1), best.argmax(-1))
  value = hybrid.values(process, policy)[1][0] @ process.start
  assert value == pytest.approx(best[0].max(-1) @ process.start, abs=1e-3)


def solved(offline, seed):
  """How surely a lock of 5 steps with 3 actions is opened after 6 steps of 8 episodes."""
  process = hybrid.lock(seed=seed)
  settings = dict(steps=6, number=8, step_size=10.0, random=np.random.default_rng(seed))
  policy = hybrid.train(process, offline(process) if offline else None, **settings)
  return hybrid.values(process, policy)[1][0, 0]


def test_a_lock_is_opened_with_offline_data_and_rarely_without():
  uniform = np.full((5, 2, 3), 1 / 3)
  assert hybrid.values(hybrid.lock(), uniform)[1][0, 0] == pytest.approx(3.0**-5)
  right = lambda process: optimism.optimal_values(process)[:, 0].argmax(-1)

  def mostly_right(process):
    """50 episodes of a behaviour that takes the right action with probability 0.8."""
    policy = np.where(np.arange(3) == right(process)[:, None, None], 0.8, 0.1) * np.ones((5, 2, 3))
    return hybrid.episodes(process, policy, 50, np.random.default_rng(9))[1]

  with_data = [solved(mostly_right, seed) for seed in range(10)]
  without = [solved(None, seed) for seed in range(10)]
  assert min(with_data) > 0.95 and np.mean(np.array(without) > 0.5) <= 0.3


# Optimistic critics.


def class_of(process, seed=0, others=6):
  """Critics, of which number 2 is Q*; the others are it with errors, some of them too high."""
  best = optimism.optimal_values(process)
  random = np.random.default_rng(seed)
  wrong = best + random.normal(size=(others, *SHAPE)) * 0.4
  return np.insert(wrong, 2, best, axis=0)


@pytest.mark.parametrize('seed', range(4))
def test_with_infinite_data_and_no_tolerance_the_critic_is_the_optimal_one(seed):
  process = random_process(seed, deterministic=True)
  critics = class_of(process, seed)
  states, actions = (x.ravel() for x in np.indices(SHAPE[1:]))
  every = [
    hybrid.Offline(
      states,
      actions,
      process.rewards[h][states, actions],
      process.moves[h][states, actions].argmax(axis=-1),
    )
    for h in range(3)
  ]
  found = optimism.residuals(critics, every)
  assert found[2] == pytest.approx(0, abs=1e-18) and (np.delete(found, 2) > 0).all()
  # The residual is that of the definition.
  by_hand = np.zeros(7)
  for f in range(7):
    for h, some in enumerate(every):
      after = critics[f, h + 1].max(-1) if h < 2 else np.zeros(2)
      wanted = some.rewards + after[some.next_states]
      loss = [((critics[g, h][states, actions] - wanted) ** 2).sum() for g in range(7)]
      by_hand[f] += loss[f] - min(loss)
  np.testing.assert_allclose(found, by_hand, atol=1e-12)
  assert optimism.optimistic(critics, every, process.start, beta=0.0) == 2
  # Without data, or with any tolerance, the most optimistic critic of all is chosen.
  values = critics[:, 0].max(-1) @ process.start
  assert optimism.optimistic(critics, every, process.start, beta=1e9) == values.argmax()


def test_the_actor_is_greedy_after_long_and_uniform_after_a_change():
  critic = optimism.optimal_values(random_process())
  log_policy = np.zeros(SHAPE)
  for _ in range(50):
    log_policy = optimism.followed(log_policy, critic, step_size=10.0, changed=False)
  np.testing.assert_allclose(np.exp(log_policy).sum(-1), 1)
  np.testing.assert_allclose(np.exp(log_policy).max(-1), 1, atol=1e-6)
  np.testing.assert_array_equal(log_policy.argmax(-1), critic.argmax(-1))
  again = optimism.followed(log_policy, critic, step_size=0.3, changed=True)
  np.testing.assert_allclose(np.exp(again), hybrid.softmax(0.3 * critic), atol=1e-12)


def test_play_finds_the_optimal_critic_and_offline_data_save_rounds():
  process = random_process(3, deterministic=True)
  critics = class_of(process, 3, others=20)
  settings = dict(rounds=12, number=20, step_size=20.0, beta=0.02)
  policy, chosen = optimism.play(process, critics, random=np.random.default_rng(0), **settings)
  best = optimism.optimal_values(process)[0].max(-1) @ process.start
  assert hybrid.values(process, policy)[1][0] @ process.start == pytest.approx(best, abs=0.02)
  assert chosen[-1] == 2 and chosen[0] != 2  # at first the most optimistic one
  random = np.random.default_rng(1)
  _, offline = hybrid.episodes(process, np.full(SHAPE, 1 / 3), 400, random)
  _, hybrid_chosen = optimism.play(process, critics, random=random, offline=offline, **settings)
  assert hybrid_chosen[0] == 2
