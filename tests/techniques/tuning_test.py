"""Self-tuning learns responses and hyperparameters; rewards of network compression have their values."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from polgrad.techniques import network_compression as compression
from polgrad.techniques import self_tuning

pytestmark = pytest.mark.usefixtures('x64')
DECAY = 0.5  # standard deviation of the hyperparameter in the toy
spread = lambda s: jnp.log(jnp.expm1(jnp.array([s])))


def test_a_layer_without_response_is_plain():
  params = self_tuning.init_linear(jax.random.key(0), 3, 2, 2)
  x, hyper = np.random.RandomState(0).normal(size=(2, 5, 3))[..., :3]
  hyper = hyper[:, :2]
  plain = {**params, 'response': jnp.zeros((2, 2, 2)), 'bias': jnp.ones(2)}
  np.testing.assert_allclose(self_tuning.linear(plain, x, hyper), x @ plain['weights'].T + 1)
  # With a response the layer of each example is affine in its hyperparameters.
  full = {**params, 'response_bias': jnp.array([1.0, -2.0])}
  u, v = full['response']
  matrix = full['weights'] + (u @ hyper[1])[:, None] * full['response_weights']
  bias = (v @ hyper[1]) * full['response_bias']
  np.testing.assert_allclose(self_tuning.linear(full, x, hyper)[1], matrix @ x[1] + bias)


# w = w0 + w1 xi; training loss (w - 1)^2 / 2 + e^h w^2 / 2, held-out loss (w - 0.3)^2 / 2.
@pytest.mark.parametrize(
  'scale, w0, w1', [(0.1, 0.5, -0.249375), (0.5, 0.499924, -0.234431), (1.0, 0.495986, -0.190286)]
)
def test_the_best_response_is_that_of_the_quadratic_toy(scale, w0, w1):
  """Quadrature over xi: the gradient of the layer's expected loss is 0 at the known response."""
  nodes, weights = np.polynomial.hermite_e.hermegauss(40)
  hyper, weights = scale * nodes[:, None], weights / weights.sum()

  def loss(params):
    w = self_tuning.linear({**empty, **params}, np.ones((40, 1)), hyper)[:, 0]
    return jnp.dot(weights, (w - 1) ** 2 / 2 + jnp.exp(hyper[:, 0]) * w**2 / 2)

  zero = jnp.zeros((1, 1))
  empty = {'bias': jnp.zeros(1), 'response_weights': zero, 'scale': jnp.ones(())}
  empty = {**empty, 'response_bias': jnp.ones(1)}
  found = {'weights': jnp.full((1, 1), w0), 'response': jnp.array([[[0.0]], [[w1]]])}
  slope = jax.grad(loss)(found)
  np.testing.assert_allclose([slope['weights'][0, 0], slope['response'][1, 0, 0]], 0, atol=3e-6)


def discrete_optimum(scale):
  """Where the best affine response to k = floor(4 sigmoid(h)) is 0.3, with penalty k w^2 / 2."""
  xi = np.linspace(-6, 6, 4001)
  chance = np.exp(-(xi**2) / 2) / np.exp(-(xi**2) / 2).sum()

  def response(mean):
    weight = chance * (1 + np.floor(4 / (1 + np.exp(-mean - scale * xi))))
    matrix = [[weight.sum(), weight @ xi], [weight @ xi, weight @ xi**2]]
    return np.linalg.solve(matrix, [1, 0])[0]

  low, high = -5.0, 5.0
  for _ in range(40):
    middle = (low + high) / 2
    low, high = (middle, high) if response(middle) > 0.3 else (low, middle)
  return middle


COUNT = self_tuning.Range(np.zeros(1), np.full(1, 4.0), np.array([True]))
EXPONENT = self_tuning.Range(np.full(1, -np.inf), np.full(1, np.inf), np.array([False]))


@pytest.mark.parametrize(
  'allowed, penalty, scale, expected',
  [(EXPONENT, jnp.exp, 0.25, 0.859408), (COUNT, lambda k: k, 1.0, discrete_optimum(1.0))],
  ids=['continuous', 'discrete'],
)
def test_hyperparameters_are_learned_through_the_response(allowed, penalty, scale, expected):
  """From 0 to where the best response is 0.3, up to the bias of the spread.

  Without it this is log(7 / 3), and between the penalties 2 and 3 of the discrete one.
  """
  respond = lambda params, hyper: params[0] + params[1] * (hyper[:, 0] - params[2])
  valid = lambda params, hyper: jnp.mean((respond(params, hyper) - 0.3) ** 2 / 2)

  def train(params, hyper):
    w, value = respond(params, hyper), self_tuning.values(hyper, allowed)[:, 0]
    return jnp.mean((w - 1) ** 2 / 2 + penalty(value) * w**2 / 2)

  optimizer, outer = optax.sgd(0.1), optax.adam(0.02)
  hyper = self_tuning.Hyper(jnp.zeros(1), spread(scale))
  state = self_tuning.init(jnp.array([0.5, 0.0, 0.0]), hyper, optimizer, outer)

  def step(state, key):
    keys = jax.random.split(key, 3)
    for k in keys[:2]:
      state, _ = self_tuning.train_step(k, state, train, optimizer, batch=64)
    state, _ = self_tuning.valid_step(keys[2], state, valid, outer, batch=64)
    return state, state.hyper.mean[0]

  state, means = jax.jit(
    lambda s: jax.lax.scan(step, s, jax.random.split(jax.random.key(0), 1500))
  )(state)
  assert abs(np.mean(means[-500:]) - expected) < 0.05
  np.testing.assert_array_equal(state.hyper.spread, hyper.spread)


def test_values_are_in_their_ranges():
  inf = np.inf
  allowed = self_tuning.Range(
    np.array([0, 1, -inf, -inf, 0]), np.array([0.9, inf, 2, inf, 24]), np.arange(5) == 4
  )
  h = np.array([[-1.0, 0.5, 2.0, -3.0, 0.3], [9, 9, 9, 9, 9], [-9, -9, -9, -9, -9]])
  sigmoid, softplus = lambda x: 1 / (1 + np.exp(-x)), lambda x: np.log1p(np.exp(x))
  expected = [0.9 * sigmoid(h[:, 0]), 1 + softplus(h[:, 1]), 2 - softplus(h[:, 2]), h[:, 3]]
  expected = np.stack([*expected, np.floor(24 * sigmoid(h[:, 4]))], axis=1)
  np.testing.assert_allclose(self_tuning.values(h, allowed), expected, rtol=1e-12)
  assert sorted(expected[:, 4]) == [0, 13, 23]
  # Only the floor has no gradient, and no unused case makes one infinite.
  slopes = jax.grad(lambda h: self_tuning.values(h, allowed).sum())(h)
  assert np.all(np.isfinite(slopes))
  assert np.all(slopes[:, :4] != 0) and np.all(slopes[:, 4] == 0)
  smooth = allowed._replace(discrete=np.zeros(5, bool))
  found = self_tuning.unconstrained(self_tuning.values(h, smooth)[0], smooth)
  np.testing.assert_allclose(found, h[0], rtol=1e-9)


def test_shared_hyperparameters_have_one_draw():
  hyper = self_tuning.Hyper(jnp.array([1.0, 2.0]), jnp.repeat(spread(0.5), 2))
  drawn = self_tuning.sample(jax.random.key(0), hyper, 6, np.array([True, False]))
  assert len(set(np.array(drawn[:, 0]))) == 1 and len(set(np.array(drawn[:, 1]))) == 6


def test_the_entropy_keeps_perturbations_as_wide_as_the_response_allows():
  """A fixed response 0.3 + h / 2 costs s^2 / 8, the entropy is worth tau log s: s = 2 sqrt(tau)."""
  valid = lambda slope, hyper: jnp.mean((slope * hyper[:, 0]) ** 2 / 2)
  optimizer, tau = optax.adam(0.02), 0.01
  hyper = self_tuning.Hyper(jnp.zeros(1), spread(0.5))
  state = self_tuning.init(jnp.array(0.5), hyper, optax.sgd(0.1), optimizer)

  def step(state, key):
    options = dict(batch=256, tau=tau, tune_spread=True)
    state, _ = self_tuning.valid_step(key, state, valid, optimizer, **options)
    return state, jax.nn.softplus(state.hyper.spread[0])

  _, scales = jax.lax.scan(step, state, jax.random.split(jax.random.key(0), 600))
  assert abs(np.mean(scales[-200:]) - 2 * tau**0.5) < 0.01


def test_the_entropy_is_that_of_a_normal_distribution():
  hyper = self_tuning.Hyper(jnp.zeros(1), spread(0.5))
  assert np.isclose(self_tuning.entropy(hyper), np.log(0.5) + 0.5 * np.log(2 * np.pi * np.e))


def test_rewards_of_compression_have_their_values():
  found = compression.reward(jnp.array([0.81, 0.9, 0.5]), 0.9, np.array([400, 1000, 10]), 1000)
  np.testing.assert_allclose(found[:2], [0.756, 0], atol=1e-12)
  assert compression.reward(0.9, 0.9, 100, 1000, valid=False) == -1
  assert np.isclose(compression.constrained(0.756, False, 3), -0.280742, atol=1e-6)
  assert compression.constrained(0.756, True, 3) == 0.756
  assert compression.constrained(0.756, False, 20) == -1


@pytest.mark.parametrize('released, baselines', [(False, (0, 0.2, 0.3)), (True, (0, 0.1, 0.2))])
def test_the_baseline_is_the_mean_of_earlier_epochs(released, baselines):
  total = jnp.zeros(())
  for epoch, (mean, baseline) in enumerate(zip((0.2, 0.4, 0.6), baselines)):
    rewards = mean + jnp.array([-0.1, 0.1])
    found, total = compression.credit(rewards, total, epoch, released=released)
    expected = (np.full(2, mean) if released else rewards) - baseline
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_reinforce_is_the_gradient_of_the_expected_reward():
  """All networks of three layers, the last of which must stay."""
  free, logits = jnp.array([True, True, False]), jnp.array([0.3, -1.0, 2.0])
  actions = jnp.array([(*a, 1) for a in itertools.product((0, 1), repeat=2)])
  rewards = compression.reward(0.3 + 0.2 * actions.sum(1), 0.9, 10 + 20 * actions.sum(1), 100)
  logp = lambda x: compression.keep_or_remove(x, actions, free)
  chance = jnp.exp(logp(logits))
  assert np.isclose(chance.sum(), 1)
  expected = jax.grad(lambda x: jnp.dot(jnp.exp(logp(x)), rewards))(logits)
  advantages, _ = compression.credit(rewards, jnp.array(0.4), 1)
  found = jax.grad(lambda x: jnp.dot(chance * advantages, logp(x)))(logits)
  np.testing.assert_allclose(found, expected, atol=1e-12)
  assert expected[2] == 0 and np.any(expected != 0)


def test_students_learn_logits():
  a, b = np.random.RandomState(0).normal(size=(2, 4, 3))
  assert np.isclose(compression.student_loss(a, b), np.mean((a - b) ** 2))
  assert len(compression.FACTORS) == 11 and np.mean(np.array(compression.FACTORS) == 0.5) == 5 / 11
