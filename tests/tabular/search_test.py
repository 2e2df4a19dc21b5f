"""One mirror step at decision time, and optimistic mirror descent, give the numbers of their papers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad.tabular import enumerable, games, search

BLUEPRINT = jnp.log(jnp.array([0.5, 0.3, 0.2]))
Q = jnp.array([1.0, 0.0, 2.0])


def test_one_step_of_search_with_and_without_a_magnet():
  mds = search.search_step(BLUEPRINT, Q, step_size=0.5)
  np.testing.assert_allclose(np.exp(mds), [0.494216, 0.179854, 0.325930], atol=1e-6)
  magnet = jnp.log(jnp.array([0.2, 0.2, 0.6]))
  mmds = search.search_step(BLUEPRINT, Q, step_size=0.5, alpha=0.4, log_magnet=magnet)
  np.testing.assert_allclose(np.exp(mmds), [0.438673, 0.188934, 0.372392], atol=1e-6)


def test_search_reduces_to_the_blueprint_and_to_the_best_action():
  step = lambda eta, **more: search.search_step(BLUEPRINT, Q, step_size=eta, **more)
  np.testing.assert_allclose(step(0.0), BLUEPRINT, atol=1e-6)
  np.testing.assert_allclose(np.exp(step(1e3)), [0, 0, 1], atol=1e-6)
  np.testing.assert_allclose(step(0.5, alpha=0.4, log_magnet=BLUEPRINT), step(0.5 / 1.2), atol=1e-6)
  shifted = search.search_step(BLUEPRINT, Q + 7.0, step_size=0.5)
  np.testing.assert_allclose(shifted, step(0.5), atol=1e-5)


def test_search_never_plays_what_is_not_legal():
  legal = jnp.array([True, False, True])
  blueprint = jnp.log(jnp.array([0.5, 0.0, 0.5]))
  found = search.search_step(blueprint, Q, step_size=0.5, alpha=0.4, legal=legal)
  assert found[1] == -jnp.inf
  assert np.exp(found).sum() == pytest.approx(1, abs=1e-6)
  only = search.search_step(blueprint[::2], Q[::2], step_size=0.5, alpha=0.4)
  np.testing.assert_allclose(found[::2], only, atol=1e-6)


def test_search_in_every_state_improves_a_policy_of_several_moves(x64):
  """Three moves of two actions, with exact values: a step is small, so the joint policy improves."""
  policy = enumerable.table(2, 3)
  params, rewards = jax.random.normal(jax.random.key(0), (7, 2)), jnp.arange(8.0) % 3
  value = lambda p: enumerable.objective(policy, p, rewards)

  @jax.jit
  def searched(step_size):
    log_pi = jax.nn.log_softmax(params)
    rest = jnp.cumsum(enumerable.logp(policy, params)[:, ::-1], axis=1)[:, ::-1]
    # Q of a move: rewards of the sequences that begin with it, weighted by the moves that follow it.
    after = jnp.pad(jnp.exp(rest[:, 1:]), ((0, 0), (0, 1)), constant_values=1)
    q = jnp.zeros((7, 2)).at[policy.prefixes, policy.tokens].add(after * rewards[:, None])
    return value(search.search_step(log_pi, q, step_size=step_size))

  values = [float(searched(eta)) for eta in (0.0, 0.1, 0.5, 2.0)]
  assert values[0] == pytest.approx(float(jax.jit(value)(params)))
  assert values == sorted(values) and values[3] > values[0] + 0.1


def test_rollouts_estimate_the_values_of_a_matrix_game():
  """The state that a player does not know is the other player's move, drawn from its blueprint."""
  payoff = jnp.array([[2.0, -1.0], [-1.0, 1.0]])
  other = jnp.log(jnp.array([0.4, 0.6]))
  rollout = lambda key, action: payoff[action, jax.random.categorical(key, other)]
  values = jax.jit(lambda key: search.rollout_values(rollout, key, actions=2, rollouts=4000))
  q = values(jax.random.key(0))
  game = games.game(payoff, players=2)
  exact = games.values(game, (other, other))[0]
  np.testing.assert_allclose(q, exact, atol=0.08)


@pytest.mark.parametrize(
  'noise, regret, bound, surprise', ((0.0, 1.044, 4.73, 1.0), (0.5, 12.74, 142.3, 989.6))
)
def test_optimistic_descent_pays_for_changes_of_the_losses_alone(
  noise, regret, bound, surprise, x64
):
  random = np.random.default_rng(0).normal(size=(2000, 3)) * noise / np.sqrt(3)
  losses = jnp.asarray(np.array([1.0, 0, 0]) + random)
  played = search.optimistic_descent(
    lambda x, round: losses[round], jnp.zeros(3), rounds=2000, radius=1.0, largest_gradient=2.0
  )
  best = -jnp.linalg.norm(jnp.sum(losses, axis=0))
  found = float(jnp.sum(losses * played.points) - best)
  changes = np.sum(np.square(np.diff(losses, axis=0, prepend=0)), axis=1)
  limit = 4 / (2 * played.step_sizes[-1]) + np.sum(played.step_sizes * changes)
  assert found == pytest.approx(regret, rel=1e-3)
  assert limit == pytest.approx(bound, rel=2e-3)
  assert played.surprise == pytest.approx(surprise, rel=1e-3)


def test_optimistic_descent_has_constant_regret_where_losses_do_not_change(x64):
  @functools.partial(jax.jit, static_argnames=('rounds', 'convexity'))
  def regret(rounds, **more):
    gradient = lambda x, round: x - jnp.array([0.5, 0.0])  # of |x - target|^2 / 2
    played = search.optimistic_descent(
      gradient, jnp.zeros(2), rounds=rounds, radius=1.0, largest_gradient=2.0, **more
    )
    gaps = played.points - jnp.array([[0.5, 0.0]])
    return jnp.sum(jnp.square(gaps)) / 2

  for convexity, tolerance in ((0.0, 1e-6), (1.0, 0.05)):
    short, long = (regret(rounds, convexity=convexity) for rounds in (100, 400))
    assert long == pytest.approx(float(short), rel=tolerance)
