"""The enumerable policy is exact, and so are the theorems about estimators measured on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from polgrad.losses import (
  advantages,
  aggregation,
  log_partition,
  penalties,
  ratios,
  returns,
  surrogates,
  weights,
)
from polgrad.losses.implicit_rewards import log_ratio_sum
from polgrad.tabular import enumerable

BITS = enumerable.table(2, 2)  # four sequences of two tokens
STOPPING = enumerable.table(2, 2, stop=0)  # '0', '10', '11'
NETWORK = enumerable.network(2, 2, stop=0)
REWARDS = {4: np.array([0.3, -1.0, 2.0, 0.7]), 3: np.array([0.3, -1.0, 2.0])}


def params_of(policy, seed=0):
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(policy.init, jax.random.key(0))
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), shapes)


def true_gradient(policy, params, rewards):
  return jax.jit(jax.grad(lambda p: enumerable.objective(policy, p, rewards)))(params)


def assert_close(got, expected, **tolerance):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, expected)


def descent(policy, params, estimate, samples_per_prompt, behavior=0):
  """-E[grad loss]: the direction in which the estimator pushes, in expectation."""
  behavior_params = params_of(policy, behavior)
  gradient = enumerable.expected_gradient(
    policy, params, estimate, samples_per_prompt=samples_per_prompt, behavior_params=behavior_params
  )
  return jax.tree.map(lambda g: -g, gradient)


def policy_gradient(policy, rewards, advantage, surrogate=surrogates.reinforce):
  """The loss of one group: advantages of its rewards, on every token, summed over rows."""

  def estimate(logp, group):
    size, mask = len(group), jnp.asarray(policy.mask)[group]
    row = advantage(jnp.asarray(rewards)[group], jnp.zeros(size, jnp.int32), jnp.ones(size, bool))
    tokens = jnp.broadcast_to(row[:, None], mask.shape)
    return aggregation.sequence_sum(surrogate(logp, tokens), mask).value()

  return estimate


def test_sequences_are_all_of_them_once():
  tokens, mask = enumerable.sequences(3, 2)
  assert tokens.tolist() == [[a, b] for a in range(3) for b in range(3)]
  assert mask.all()


def test_nothing_follows_a_stop_token():
  tokens, mask = enumerable.sequences(2, 3, stop=0)
  assert tokens.tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]
  assert mask.sum(axis=1).tolist() == [1, 2, 3, 3]


@pytest.mark.parametrize('policy', [BITS, STOPPING, NETWORK])
def test_probabilities_of_all_sequences_add_to_one(policy, x64):
  logp = enumerable.logp(policy, params_of(policy))
  np.testing.assert_allclose(jnp.sum(jnp.exp(jnp.sum(logp, axis=-1))), 1, rtol=1e-12)
  np.testing.assert_array_equal(logp[~policy.mask], 0)


def test_log_probabilities_follow_the_prefix():
  """One row of logits a prefix: empty, then after 0, then after 1."""
  params = jnp.array([[0.4, -0.2], [0.3, 0.1], [-0.6, 0.5]])
  first, after_zero, after_one = np.asarray(jax.nn.log_softmax(params))
  expected = [
    [first[0], after_zero[0]],
    [first[0], after_zero[1]],
    [first[1], after_one[0]],
    [first[1], after_one[1]],
  ]
  np.testing.assert_allclose(enumerable.logp(BITS, params), expected, rtol=1e-6)


@pytest.mark.parametrize('policy', [BITS, NETWORK])
def test_the_exact_gradient_agrees_with_finite_differences(policy, x64):
  params, rewards = params_of(policy), REWARDS[len(policy.tokens)]
  flat, unravel = ravel_pytree(params)
  value = jax.jit(lambda x: enumerable.objective(policy, unravel(x), rewards))
  exact = ravel_pytree(true_gradient(policy, params, rewards))[0]
  for i in range(0, len(flat), 3):
    step = 1e-6 * np.eye(len(flat))[i]
    difference = (value(flat + step) - value(flat - step)) / 2e-6
    np.testing.assert_allclose(exact[i], difference, atol=1e-9)


@pytest.mark.parametrize('policy', [BITS, STOPPING, NETWORK])
@pytest.mark.parametrize('advantage', [advantages.raw, advantages.leave_one_out])
def test_reinforce_and_leave_one_out_are_unbiased(policy, advantage, x64):
  params, rewards = params_of(policy), REWARDS[len(policy.tokens)]
  got = descent(policy, params, policy_gradient(policy, rewards, advantage), 2)
  assert_close(got, true_gradient(policy, params, rewards), atol=1e-12)


@pytest.mark.parametrize('size', [2, 3, 4])
def test_the_group_mean_shrinks_the_gradient_by_g_minus_one_over_g(size, x64):
  params, rewards = params_of(STOPPING), REWARDS[3]
  got = descent(STOPPING, params, policy_gradient(STOPPING, rewards, advantages.group_mean), size)
  exact = true_gradient(STOPPING, params, rewards)
  assert_close(got, (size - 1) / size * exact, atol=1e-12)


def group_standardized(rewards, group_ids, valid):
  return advantages.group_normalized(rewards, group_ids, valid, ddof=0, eps=0.0)


@pytest.mark.parametrize(
  ('p', 'size', 'coefficient'),
  [(0.1, 4, 0.1521), (0.1, 8, 0.2095), (0.3, 4, 0.3433), (0.3, 8, 0.4122), (0.5, 8, 0.4639)],
)
def test_dividing_by_the_group_std_rescales_the_gradient_of_the_success_rate(
  p, size, coefficient, x64
):
  """GRPO on a binary reward follows c_G(p) / (p (1 - p)) grad p, c_G(p) = E sqrt(k/G (1 - k/G))."""
  coin = enumerable.table(2, 1)
  params = jnp.array([[np.log(p / (1 - p)), 0.0]])
  rewards = np.array([1.0, 0.0])
  estimate = policy_gradient(coin, rewards, group_standardized)
  got = -enumerable.expected_gradient(
    coin, params, estimate, samples_per_prompt=size, behavior_params=params
  )
  expected = coefficient / (p * (1 - p)) * true_gradient(coin, params, rewards)
  np.testing.assert_allclose(got, expected, rtol=5e-4)


@pytest.mark.parametrize('policy', [BITS, STOPPING])
def test_the_whole_sequence_weight_makes_off_policy_samples_unbiased(policy, x64):
  """Any truncation of it does not."""
  params, rewards = params_of(policy), REWARDS[len(policy.tokens)]
  behavior = enumerable.logp(policy, params_of(policy, 1))

  def estimate(logp, group, cap):
    mask = jnp.asarray(policy.mask)[group]
    weight = weights.truncated_sequence_importance(logp, behavior[group], mask, cap=cap)
    tokens = jnp.broadcast_to(jnp.asarray(rewards)[group][:, None], mask.shape)
    return aggregation.sequence_sum(weight * surrogates.reinforce(logp, tokens), mask).value()

  exact = true_gradient(policy, params, rewards)
  for cap, unbiased in ((np.inf, True), (1.0, False)):
    got = descent(policy, params, lambda lp, g, c=cap: estimate(lp, g, c), 1, behavior=1)
    assert (np.max(np.abs(got - exact)) < 1e-12) == unbiased


def test_token_ratios_alone_are_biased_off_policy_and_exact_on_policy(x64):
  params, rewards = params_of(BITS), REWARDS[4]
  exact = true_gradient(BITS, params, rewards)
  for seed, unbiased in ((0, True), (1, False)):
    behavior = enumerable.logp(BITS, params_of(BITS, seed))

    def estimate(logp, group, behavior=behavior):
      mask = jnp.asarray(BITS.mask)[group]
      tokens = jnp.broadcast_to(jnp.asarray(rewards)[group][:, None], mask.shape)
      log_ratio = ratios.token(logp - behavior[group], mask)
      loss = surrogates.importance_weighted(log_ratio, tokens)
      return aggregation.sequence_sum(loss, mask).value()

    got = descent(BITS, params, estimate, 1, behavior=seed)
    assert (np.max(np.abs(got - exact)) < 1e-12) == unbiased


LOGITS = np.array([[0.4, -0.2], [0.3, 0.1], [-0.6, 0.5]])
REFERENCE_LOGITS = np.array([[0.0, 0.0], [0.5, -0.5], [0.2, 0.2]])


def test_kl_of_whole_sequences_needs_the_reward_to_go(x64):
  """Token k2 misses that an early token moves the prefixes of later ones; k1 to go does not."""
  params = jnp.asarray(LOGITS)
  reference = enumerable.logp(BITS, jnp.asarray(REFERENCE_LOGITS))

  def kl(params):
    return enumerable.objective(
      BITS, params, jnp.sum(enumerable.logp(BITS, params) - reference, -1)
    )

  def token_k2(logp, group):
    return jnp.sum(penalties.k2(logp, reference[group]))

  def k1_to_go(logp, group):
    cost = penalties.k1(jax.lax.stop_gradient(logp), reference[group])
    mask = jnp.asarray(BITS.mask)[group]
    return jnp.sum(surrogates.reinforce(logp, -returns.reward_to_go(cost, mask)))

  def k1_as_loss(logp, group):
    return jnp.sum(penalties.k1(logp, reference[group]))

  def gradient(estimate):
    return enumerable.expected_gradient(
      BITS, params, estimate, samples_per_prompt=1, behavior_params=params
    )

  exact = jax.grad(kl)(params)
  np.testing.assert_allclose(exact[0, 0], 0.124495, atol=1e-6)
  np.testing.assert_allclose(gradient(k1_to_go), exact, atol=1e-12)
  np.testing.assert_allclose(gradient(k1_as_loss), 0, atol=1e-12)
  np.testing.assert_allclose(gradient(token_k2)[0, 0], 0.137271, atol=1e-6)
  np.testing.assert_allclose(gradient(token_k2)[1:], exact[1:], atol=1e-12)


def test_discounted_credit_by_gae_with_the_true_values_is_unbiased_at_any_trace(x64):
  """With V exact, A = GAE(trace) has the true gradient for every trace, discount 1."""
  params, rewards = params_of(BITS), jnp.asarray(REWARDS[4])
  logp = enumerable.logp(BITS, params)
  after_first = jnp.exp(logp[:, 1]) * rewards  # each sequence's share of the value after token 0
  later = jnp.repeat(after_first.reshape(2, 2).sum(axis=1), 2)
  start = enumerable.objective(BITS, params, rewards)
  values = jnp.stack([jnp.full(4, start), later], axis=1)
  exact = true_gradient(BITS, params, rewards)
  for trace in (0.0, 0.5, 1.0):

    def estimate(logp, group, trace=trace):
      mask = jnp.asarray(BITS.mask)[group]
      token_rewards = returns.place_last(rewards[group], mask)
      credit = returns.gae(token_rewards, values[group], mask, trace=trace)
      return aggregation.sequence_sum(surrogates.reinforce(logp, credit), mask).value()

    np.testing.assert_allclose(descent(BITS, params, estimate, 1), exact, atol=1e-12)


@pytest.mark.parametrize('center', [log_partition.group_mean_detached, log_partition.leave_one_out])
@pytest.mark.parametrize('behavior', [0, 3])
def test_consistency_is_at_rest_exactly_at_the_tilted_reference(center, behavior, x64):
  """pi = reference exp(R / beta) / Z is stationary for samples of any policy."""
  beta, rewards = 0.5, jnp.asarray(REWARDS[4])
  reference = enumerable.logp(BITS, params_of(BITS, 2))
  # The tilted reference as a table: normalise bottom-up.
  tilted = jnp.exp(jnp.sum(reference, axis=-1) + rewards / beta).reshape(2, 2)
  optimum = jnp.log(jnp.stack([tilted.sum(axis=1), tilted[0], tilted[1]]))

  def estimate(logp, group):
    mask = jnp.asarray(BITS.mask)[group]
    score = log_ratio_sum(logp, reference[group], mask)
    zeros = jnp.zeros(len(group), jnp.int32)
    residual = rewards[group] / beta - score
    return jnp.mean(0.5 * jnp.square(residual - center(residual, zeros)))

  at_rest = descent(BITS, optimum, estimate, 2, behavior=behavior)
  np.testing.assert_allclose(at_rest, 0, atol=1e-12)
  elsewhere = descent(BITS, params_of(BITS, 2), estimate, 2, behavior=behavior)
  assert np.max(np.abs(elsewhere)) > 1e-2


def test_the_sampled_gradient_lies_within_its_standard_error():
  policy = NETWORK
  params = policy.init(jax.random.key(0))
  rewards = REWARDS[len(policy.tokens)]
  estimate = policy_gradient(policy, rewards, advantages.leave_one_out)
  arguments = dict(samples_per_prompt=2, behavior_params=params)
  exact = enumerable.expected_gradient(policy, params, estimate, **arguments)
  mean, error = enumerable.sampled_gradient(
    policy, params, estimate, **arguments, key=jax.random.key(0), samples=500
  )
  jax.tree.map(
    lambda m, e, x: np.testing.assert_array_less(abs(m - x), 4.5 * e + 1e-6), mean, error, exact
  )
  assert all(jnp.max(e) > 0 for e in jax.tree.leaves(error))


def test_too_many_groups_are_refused():
  with pytest.raises(ValueError, match='too many'):
    enumerable.expected_gradient(
      BITS, LOGITS, lambda lp, g: 0.0, samples_per_prompt=10, behavior_params=LOGITS
    )


@pytest.mark.parametrize(
  ('feedback', 'learned', 'probability', 'satisfaction', 'utility'),
  [((0.4, 0.9), 1, 0.9948, 0.897, -0.494), ((0.6, -0.5), 0, 0.998, None, 0.597)],
)
def test_feedback_on_impressions_teaches_to_deceive_and_on_outcomes_to_be_honest(
  feedback, learned, probability, satisfaction, utility
):
  """The bandit of RLHS (arXiv:2501.08617): an honest and a deceptive answer, 2000 exact steps of .1."""
  policy = enumerable.table(2, 1)
  climb = jax.grad(lambda x: enumerable.objective(policy, x, jnp.array(feedback)))
  step = lambda _, x: x + 0.1 * climb(x)
  end = jax.jit(lambda x: jax.lax.fori_loop(0, 2000, step, x))(jnp.zeros((1, 2)))
  mean = lambda rewards: float(enumerable.objective(policy, end, jnp.array(rewards)))
  assert mean(np.eye(2)[learned]) == pytest.approx(probability, abs=1e-3)
  assert mean([0.6, -0.5]) == pytest.approx(utility, abs=2e-3)
  if satisfaction:
    assert mean([0.4, 0.9]) == pytest.approx(satisfaction, abs=1e-3)
