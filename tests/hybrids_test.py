"""Methods that imitate and reinforce: numbers of their papers, fixed points, and cold starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import credit, objectives
from polgrad.losses import surrogates, weights
from polgrad.registry import bind
from tests.policy_gradient import harness
from tests.runs import method_of


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


def credited(name, rewards, samples):
  """The credit of a method on groups of samples and a demonstration, [groups, samples + 1]."""
  rewards = np.asarray(rewards, float)
  batch = harness.scored(
    length=2,
    rewards=jnp.asarray(rewards.ravel()),
    group_ids=jnp.repeat(jnp.arange(len(rewards)), samples + 1),
    stream=jnp.tile(jnp.array([1] * samples + [0]), len(rewards)),
  )
  estimator = bind(method_of(name).credit, credit.TABLE)
  found, _ = credit.assign(estimator, batch, estimator.init())
  shape = rewards.shape
  return (np.asarray(x)[:, 0].reshape(shape) for x in (found.advantages, found.mask))


def test_srft_centres_demonstrations_in_the_whole_group_and_signs_samples():
  rewards = np.array([[0, 1, 0, 1, 1.0], [0, 0, 0, 0, 1]])
  found, mask = credited('srft', rewards, 4)
  np.testing.assert_allclose(found[:, 4], (1 - rewards.mean(1)))
  np.testing.assert_array_equal(found[:, :4], np.where(rewards[:, :4] == 1, 1, -1))
  assert mask.all()


def test_the_two_credits_of_a_mixed_batch_must_make_advantages():
  with pytest.raises(ValueError, match=r"by_stream: sampled makes \['label'\]"):
    credit.by_stream(demonstration=credit.outcome(), sampled=credit.imitation())


@pytest.mark.parametrize(
  ('entropy', 'imitation', 'exploration'),
  [(0, 0.5, 0.1), (0.5, 0.3033, 0.1649), (1, 0.1839, 0.2718), (2, 0.0677, 0.7389)],
)
def test_the_weights_of_srft_are_those_of_its_entropy(entropy, imitation, exploration):
  mask = np.array([[True, True, False, True]])
  h = entropy + np.array([[0.3, -0.1, 99.0, -0.2]])  # masked tokens do not count
  a = np.array([[1.0, 1.0, 1.0, 1.0]])
  np.testing.assert_allclose(weights.row_entropy(h, mask)[0], imitation, atol=5e-5)
  np.testing.assert_allclose(weights.positive_row_entropy(h, a, mask), exploration, atol=5e-5)
  np.testing.assert_array_equal(weights.positive_row_entropy(h, -a, mask), 1)


def test_without_demonstrations_srft_is_signed_reinforce(x64):
  method = method_of('srft')
  objective = bind(method.objective, objectives.TABLE)
  x = harness.random_arrays(objective)
  x['stream'] = np.ones(8, int)
  x['advantages'] = np.sign(x['advantages'])
  x['entropy'] = np.zeros(x['mask'].shape)
  _, weight = harness.loss_and_weight(objective, x)
  a = np.where(x['advantages'] > 0, 0.1, -1.0)
  np.testing.assert_allclose(weight['logp'], np.where(x['mask'], a, 0) * 8 / (8 * 5), rtol=1e-6)


def rest(weight, steps=20000, rate=0.5):
  """Where the likelihood of q = (0.6, 0.3, 0.1) comes to rest, each token weighed by weight(log p)."""
  q = jnp.array([0.6, 0.3, 0.1])

  def step(z, _):
    gradient = weight(jax.nn.log_softmax(z)) * q
    return z + rate * (gradient - jnp.sum(gradient) * jax.nn.softmax(z)), None

  return jax.nn.softmax(jax.lax.scan(step, jnp.zeros(3), length=steps)[0])


def test_the_shaped_probability_of_luffy_flattens_to_square_roots(x64):
  """p_i + gamma is proportional to the square root of the frequency."""
  loss = lambda logp: jnp.sum(surrogates.probability_shaped(logp, jnp.ones(3)))
  found = rest(lambda logp: -jax.grad(loss)(logp))
  root = np.sqrt([0.6, 0.3, 0.1])
  np.testing.assert_allclose(found, 1.3 * root / root.sum() - 0.1, atol=1e-6)
  np.testing.assert_allclose(found, [0.51455, 0.33456, 0.15089], atol=1e-5)


def test_the_gradient_weight_of_luffy_at_its_published_places(x64):
  p = jnp.array([0.001, 0.01, 0.1, 0.5, 1.0])
  loss = lambda logp: jnp.sum(surrogates.probability_shaped(logp, jnp.ones(5)))
  found = -jax.grad(loss)(jnp.log(p))
  np.testing.assert_allclose(found, [0.0098, 0.0826, 0.25, 0.1389, 0.0826], atol=5e-5)
