"""Centres of the regression on rewards: identities, and where gradient descent comes to rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import registry
from polgrad.losses import log_partition
from polgrad.losses.implicit_rewards import bellman_sum

GROUPS = jnp.array([4, 1, 4, 1, 4])
REWARDS = jnp.array([1.0, 0.2, -0.5, 0.9, 0.0])
SCORES = jnp.array([0.3, -0.2, 0.1, 0.5, -0.7])
OF_RESIDUAL = [
  log_partition.group_mean,
  log_partition.group_mean_detached,
  log_partition.leave_one_out,
]


def losses(score, center, rewards=REWARDS, groups=GROUPS, beta=0.5, **arrays):
  """e^2 / 2 of every row, e = zeta - center, zeta = R / beta - score."""
  scaled = rewards / beta
  residual = scaled - score
  arrays |= dict(residual=residual, scaled_rewards=scaled, group_ids=groups, beta=jnp.array(beta))
  return 0.5 * jnp.square(residual - registry.call(center, arrays))


def gradient(score, center):
  return jax.grad(lambda s: jnp.sum(losses(s, center)))(score)


def test_the_descent_weight_is_the_residual():
  zeta = REWARDS / 0.5 - SCORES
  residual = zeta - log_partition.group_mean(zeta, GROUPS)
  np.testing.assert_allclose(-gradient(SCORES, log_partition.group_mean), residual, atol=1e-6)


def test_detaching_the_group_mean_changes_no_gradient():
  live, detached = (
    gradient(SCORES, c) for c in (log_partition.group_mean, log_partition.group_mean_detached)
  )
  np.testing.assert_allclose(live, detached, rtol=1e-5, atol=1e-6)


def test_leave_one_out_scales_the_residuals_by_g_over_g_minus_one():
  size = jnp.array([3, 2, 3, 2, 3])
  expected = losses(SCORES, log_partition.group_mean) * (size / (size - 1)) ** 2
  np.testing.assert_allclose(losses(SCORES, log_partition.leave_one_out), expected, rtol=1e-5)


@pytest.mark.parametrize('center', OF_RESIDUAL)
def test_a_row_alone_has_no_loss_and_no_gradient(center):
  alone = jnp.arange(5)
  value, slope = jax.value_and_grad(lambda s: jnp.sum(losses(s, center, groups=alone)))(SCORES)
  assert value == 0
  np.testing.assert_array_equal(slope, np.zeros(5))


@pytest.mark.parametrize('center', OF_RESIDUAL)
def test_loss_and_gradient_vanish_at_the_tilted_anchor_whoever_sampled(center, x64):
  """score = log pi/anchor with pi = anchor exp(R / beta) / Z: every row fits."""
  log_z = jnp.array([0.7, -1.1, 0.7, -1.1, 0.7])
  rewards = jnp.asarray(REWARDS, jnp.float64)
  loss = lambda s: jnp.sum(losses(s, center, rewards))
  value, slope = jax.value_and_grad(loss)(rewards / 0.5 - log_z)
  np.testing.assert_allclose(value, 0, atol=1e-28)
  np.testing.assert_allclose(slope, 0, atol=1e-14)


def test_beta_times_the_pair_regression_has_the_gradient_of_contrastive_policy_gradient(x64):
  """-((R - R') (D - D') - beta/2 (D - D')^2), up to a constant."""
  beta, rewards = 0.5, jnp.array([1.0, -0.5])

  def contrastive(score):
    gap, moved = rewards[0] - rewards[1], score[0] - score[1]
    return -(gap * moved - beta / 2 * moved**2)

  def regression(score):
    groups = jnp.zeros(2, jnp.int32)
    return beta * jnp.mean(losses(score, log_partition.leave_one_out, rewards, groups, beta))

  score = jnp.array([0.35, -0.3])
  np.testing.assert_allclose(jax.grad(regression)(score), jax.grad(contrastive)(score), rtol=1e-12)
  shift = lambda s: regression(s) - contrastive(s)
  np.testing.assert_allclose(shift(score), shift(jnp.zeros(2)), rtol=1e-12)


def descend(loss, params, rate, steps):
  step = lambda x, _: (jax.tree.map(lambda a, g: a - rate * g, x, jax.grad(loss)(x)), None)
  return jax.jit(lambda x: jax.lax.scan(step, x, length=steps)[0])(params)


TILTED = np.array([0.11924, 0.71938, 0.16138])
KIMI = np.array([0.10290, 0.69576, 0.20133])


@pytest.mark.parametrize(
  ('center', 'expected'),
  [(c, TILTED) for c in (*OF_RESIDUAL, log_partition.log_partition)]
  + [(log_partition.reward_mean, KIMI)],
)
def test_where_descent_on_samples_of_the_anchor_comes_to_rest(center, expected, x64):
  """Twenty samples in exactly the anchor's frequencies, so the group is the population."""
  anchor, rewards = jnp.array([0.05, 0.45, 0.5]), jnp.array([1.0, 0.8, 0.0])
  arms = jnp.repeat(jnp.arange(3), jnp.array([1, 9, 10]), total_repeat_length=20)

  def loss(logits):
    score = (jax.nn.log_softmax(logits) - jnp.log(anchor))[arms]
    return jnp.mean(losses(score, center, rewards[arms], jnp.zeros(20, jnp.int32), 0.5))

  rest = descend(loss, jnp.log(anchor), rate=1.0, steps=2000)
  np.testing.assert_allclose(jax.nn.softmax(rest), expected, atol=6e-6)


def test_a_learned_value_comes_to_rest_at_log_z_for_samples_of_another_policy(x64):
  reference, rewards = jnp.array([0.3, 0.3, 0.4]), jnp.array([1.0, 0.2, -0.5])
  arms = jnp.repeat(jnp.arange(3), jnp.array([7, 2, 1]), total_repeat_length=10)

  def loss(params):
    score = (jax.nn.log_softmax(params['logits']) - jnp.log(reference))[arms]
    first_value = jnp.broadcast_to(params['value'], 10)
    groups = jnp.zeros(10, jnp.int32)
    return jnp.mean(
      losses(score, log_partition.value, rewards[arms], groups, 0.5, first_value=first_value)
    )

  start = dict(logits=jnp.zeros(3), value=jnp.array(0.0))
  rest = descend(loss, start, rate=0.5, steps=4000)
  expected = [0.788470, 0.159189, 0.052341]
  np.testing.assert_allclose(jax.nn.softmax(rest['logits']), expected, atol=1e-6)
  np.testing.assert_allclose(0.5 * rest['value'], 0.516844, atol=1e-6)


def test_bellman_residuals_over_a_tree_come_to_rest_at_the_soft_optimum(x64):
  """Two steps of two tokens; logits are Q, and the first log-normaliser takes the place of log Z."""
  scaled = 2 * jnp.array([1.0, 0.0, 0.3, 0.7])
  first, second = jnp.array([0, 0, 1, 1]), jnp.array([0, 1, 0, 1])
  reference = jnp.log(
    jnp.stack([jnp.array([0.6, 0.4])[first], jnp.array([[0.5, 0.5], [0.2, 0.8]])[first, second]], 1)
  )
  mask = jnp.ones((4, 2), bool)

  def logp_of(params):
    start, then = jax.tree.map(jax.nn.log_softmax, params)
    return jnp.stack([start[first], then[first, second]], axis=1)

  def loss(params):
    normalizer = jnp.full((4, 2), jax.nn.logsumexp(params[0]))
    score = bellman_sum(logp_of(params), reference, normalizer, mask)
    return 2 * jnp.mean(
      losses(score, log_partition.zero, scaled, jnp.zeros(4, jnp.int32), beta=1.0)
    )

  rest = descend(loss, (jnp.zeros(2), jnp.zeros((2, 2))), rate=0.3, steps=4000)
  optimum = [0.559756, 0.075755, 0.036809, 0.327681]
  np.testing.assert_allclose(jnp.exp(jnp.sum(logp_of(rest), axis=1)), optimum, atol=1e-6)
  np.testing.assert_allclose(jax.nn.logsumexp(rest[0]), 1.376282, atol=1e-6)
  assert loss(rest) < 1e-20


def test_the_soft_baseline_lies_between_mean_and_maximum():
  rewards, beta = jnp.array([[0.0, 1.0, 0.0, 3.0], [2.0] * 4]), jnp.array(0.1)
  for temperature, expected in ((1e4, [10, 20]), (1e-3, [30, 20])):
    got = log_partition.soft_baseline(rewards, beta, baseline_temperature=temperature)
    np.testing.assert_allclose(got, expected, rtol=2e-3)


def test_log_partition_does_not_overflow():
  got = log_partition.log_partition(jnp.array([1e4, 0.0, -1e4]), jnp.array([0, 0, 1]))
  np.testing.assert_allclose(got, [1e4 - np.log(2), 1e4 - np.log(2), -1e4], rtol=1e-6)
