"""Credit of single tokens: numbers of the papers, identities, and transcriptions in float64."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from polgrad import credit, optim
from polgrad.losses import returns
from tests.policy_gradient.harness import scored
from tests.runs import Run


def test_lambda_grows_with_the_length_so_that_its_powers_sum_to_a_fraction_of_it():
  lengths = np.array([10, 20, 100, 1000, 10000])
  mask = np.arange(10000) < lengths[:, None]
  found = np.asarray(returns.length_adaptive_trace(mask, scale=0.05))
  np.testing.assert_allclose(found, [0, 0, 0.8, 0.98, 0.998], atol=1e-6)
  np.testing.assert_allclose(1 / (1 - found[2:]), [5, 50, 500], rtol=1e-3)
  with pytest.raises(ValueError, match='scale must be positive'):
    returns.length_adaptive_trace(mask, scale=0.0)


def gae(rewards, values, trace):
  """A_t = sum_k trace^k delta_{t + k}, of one row without holes."""
  after = np.append(values[1:], 0)
  delta = rewards + after - values
  return np.array([
    sum(trace ** (k - t) * delta[k] for k in range(t, len(delta))) for t in range(len(delta))
  ])  # fmt: skip


def assigned(estimator, **arrays):
  batch, _ = credit.assign(estimator, scored(**arrays), estimator.init())
  return batch


def test_policy_and_critic_have_their_own_lambda(x64):
  random = np.random.default_rng(0)
  mask = np.arange(60) < np.array([[40], [60], [10]])
  values = np.where(mask, random.normal(size=mask.shape), 0)
  arrays = dict(rewards=np.array([1.0, 0.0, 1.0]), mask=mask, old_values=values)
  estimator = credit.decoupled(trace=0.9, normalizer=lambda a, mask: a)
  fixed = assigned(estimator, **arrays)
  adaptive = assigned(credit.decoupled(length_scale=0.05, normalizer=lambda a, mask: a), **arrays)
  for row, length in enumerate(mask.sum(axis=1)):
    reward = np.zeros(length)
    reward[-1] = arrays['rewards'][row]
    for batch, trace in ((fixed, 0.9), (adaptive, max(1 - 1 / (0.05 * length), 0))):
      expected = gae(reward, values[row, :length], trace)
      np.testing.assert_allclose(batch.advantages[row, :length], expected, atol=1e-12)
      np.testing.assert_allclose(batch.returns[row, :length], arrays['rewards'][row], atol=1e-12)


def test_a_critic_that_is_wrong_by_a_constant_errs_at_late_tokens_unless_lambda_is_one():
  """V = V* + .5: the last error alone changes, by -.5, and a token at distance d sees lambda^d of it."""
  mask = np.ones((1, 101), bool)
  rewards, values = np.zeros((1, 101)), np.full((1, 101), 0.5)
  found = np.asarray(returns.gae(rewards, values, mask, trace=0.95))
  np.testing.assert_allclose(found[0, [0, -1]], [-0.0030, -0.5], atol=1e-4)
  np.testing.assert_allclose(returns.gae(rewards, values, mask, trace=1.0), -0.5, atol=1e-6)
  # The reward of 1 at the end, seen from 100 tokens before it.
  decayed = returns.gae(returns.place_last(jnp.ones(1), mask), 0 * values, mask, trace=0.95)
  np.testing.assert_allclose(decayed[0, 0], 0.00592, atol=1e-5)


def test_before_ppo_a_phase_moves_the_value_head_alone():
  phases = Run('vapo').get_config('warm_start=5')
  assert phases.order == ('warm_start', 'value_pretraining', 'train')
  first = phases.phases.value_pretraining
  assert first.optimizer.only == 'value_head$' and first.steps == 50
  made = optim.adamw(learning_rate=0.1, only='value_head$', max_grad_norm=1.0)
  params = {'layer': {'query': jnp.ones(2)}, 'value_head': jnp.ones(2)}
  grads = {'layer': {'query': jnp.full(2, 1e9)}, 'value_head': jnp.full(2, 0.1)}
  state = made.init(params)
  steps, state = made.update(grads, state, params)
  moved = optax.apply_updates(params, steps)
  np.testing.assert_array_equal(moved['layer']['query'], 1)
  np.testing.assert_allclose(moved['value_head'], 0.9, rtol=1e-5)
  assert optim.learning_rate(made, state)['learning_rate'] == pytest.approx(0.1)
  with pytest.raises(ValueError, match='no parameter that is trained has a name'):
    optim.adamw(only='critic').init(params)
