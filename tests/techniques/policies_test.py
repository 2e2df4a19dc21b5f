"""Policies of network compression: their probabilities, and both stages on students that are trained."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from polgrad.techniques import compression_policies as policies
from polgrad.techniques import network_compression as compression

WIDTH, HIDDEN = 16, 3  # of the teacher
KEEP = list(itertools.product((0, 1), repeat=HIDDEN))  # its students
SIZES = sorted({int(WIDTH * f) for f in compression.FACTORS})
PAIRS = list(itertools.product(SIZES, repeat=2))


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def recurrent(params, inputs):
  """An LSTM in numpy, from its equations."""
  params = jax.tree.map(np.array, params)
  h = c = np.zeros(params['bias'].shape[1])
  outputs = []
  for x in inputs:
    i, f, g, o = (
      params['inputs'][n] @ x + params['state'][n] @ h + params['bias'][n] for n in range(4)
    )
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    h = sigmoid(o) * np.tanh(c)
    outputs.append(h)
  return np.array(outputs)


@pytest.mark.usefixtures('x64')
def test_removal_reads_the_network_in_both_directions():
  network = np.random.RandomState(0).normal(size=(4, 3))
  params = policies.init_removal(jax.random.key(0), 3, hidden=5)
  state = network
  for ahead, back in params['cells']:
    state = np.concatenate([recurrent(ahead, state), recurrent(back, state[::-1])[::-1]], axis=1)
  expected = state @ np.array(params['head']['weights'])[0] + float(params['head']['bias'][0])
  np.testing.assert_allclose(policies.removal_logits(params, network), expected, atol=1e-12)


@pytest.mark.usefixtures('x64')
def test_factors_are_a_distribution_and_later_ones_see_earlier_ones():
  network = np.array([[2.0, 8.0], [1.0, 4.0]])
  free = np.array([[False, True], [True, False]])
  params = policies.init_shrinkage(jax.random.key(1), 2, hidden=4)
  pairs = np.array(list(itertools.product(range(11), repeat=2)))
  choices = np.zeros((121, 2, 2), int)
  choices[:, 0, 1], choices[:, 1, 0] = pairs.T
  logp = jax.jit(jax.vmap(lambda c: policies.log_prob(params, network, free, c)))(choices)
  chance = np.exp(logp).reshape(11, 11)
  assert np.isclose(chance.sum(), 1)
  # Decisions are made in turn, here in numpy; the next layer does not see a layer's last factor.
  state = network[[0, 0, 1, 1]]
  for one in params['cells']:
    state = recurrent(one, state)
  logits = state @ np.array(params['head']['weights']).T + np.array(params['head']['bias'])
  first, second = np.exp(logits[1:3]) / np.exp(logits[1:3]).sum(1, keepdims=True)
  np.testing.assert_allclose(chance, np.outer(first, second), atol=1e-12)
  # Within a layer, a decision sees that the number before it has shrunk.
  both = np.array([[True, True]])
  two = lambda a: policies.log_prob(params, network[:1], both, np.array([[a, 3]]))
  alone = lambda a: policies.log_prob(params, network[:1], both & [True, False], np.array([[a, 3]]))
  assert abs((two(0) - alone(0)) - (two(10) - alone(10))) > 1e-6


def draw_weights(key, each):
  keys = jax.random.split(key, 3)
  shapes = [(2, WIDTH), (HIDDEN, WIDTH, WIDTH), (WIDTH, 2)]
  return [jax.random.normal(k, (each, *s)) * (2 / s[-2]) ** 0.5 for k, s in zip(keys, shapes)]


def forward(weights, x, keep, sizes):
  """A linear layer, layers with a nonlinearity that are kept or removed, and a linear layer."""
  enter, hidden, leave = weights
  alive = jnp.arange(WIDTH)[None] < sizes[:, None]
  h = (x @ enter) * alive[:1]
  for weight, kept, mask in zip(hidden, keep, alive[1:]):
    h = jnp.where(kept, jax.nn.relu(h @ weight) * mask[None], h)
  return h @ leave


def parameters(keep, sizes):
  """Number of weights of a network."""
  before, total = sizes[0], 2 * sizes[0]
  for kept, size in zip(keep, sizes[1:]):
    total, before = total + kept * before * size, size if kept else before
  return total + 2 * before


@pytest.fixture(scope='module')
def rewards():
  """Rewards of networks, each trained on the logits of a teacher.

  The class of a point of the plane is the sign of x y. The teacher and all students are trained at once.
  First the networks that keep some of three layers, then those of one layer and two sizes.
  """
  x = np.random.RandomState(0).uniform(-1, 1, size=(256, 2)).astype(np.float32)
  labels = (x[:, 0] * x[:, 1] > 0).astype(int)
  optimizer = optax.adam(0.01)
  keep = np.array(KEEP + [(1, 0, 0)] * len(PAIRS))
  sizes = np.array([(WIDTH,) * (HIDDEN + 1)] * len(KEEP) + [(*p, 1, 1) for p in PAIRS])

  def train(target, weights, keep, sizes):
    def loss(weights):
      return compression.student_loss(forward(weights, x[:128], keep, sizes), target)

    def step(carry, _):
      weights, state = carry
      steps, state = optimizer.update(jax.grad(loss)(weights), state)
      return (optax.apply_updates(weights, steps), state), None

    weights = jax.lax.scan(step, (weights, optimizer.init(weights)), length=150)[0][0]
    found = forward(weights, x, keep, sizes)
    return found[:128], jnp.mean(jnp.argmax(found[128:], axis=1) == labels[128:])

  # One program trains the teacher, on its labels, and then the students.
  train = jax.jit(jax.vmap(train, in_axes=(None, 0, 0, 0)))
  weights = draw_weights(jax.random.key(0), len(keep))
  whole = len(KEEP) - 1
  logits, good = train(4 * jax.nn.one_hot(labels[:128], 2) - 2, weights, keep, sizes)
  assert good[whole] > 0.9
  _, accuracy = train(logits[whole], draw_weights(jax.random.key(1), len(keep)), keep, sizes)
  number = np.array([parameters(k, s) for k, s in zip(keep, sizes)])
  most = number[whole]
  return np.array(compression.reward(accuracy, good[whole], number, most, valid=number < most))


def learn(params, draw, logp, rewards, *, epochs, rate):
  """REINFORCE with 5 rollouts an epoch; the policy, and mean rewards of the epochs."""
  optimizer = optax.adam(rate)

  @jax.jit
  def epoch(params, state, total, key, number):
    actions = jax.vmap(lambda k: draw(k, params))(jax.random.split(key, 5))
    found = jax.vmap(rewards)(actions)
    advantages, total = compression.credit(found, total, number)
    loss = lambda p: policies.reinforce(jax.vmap(lambda a: logp(p, a))(actions), advantages)
    steps, state = optimizer.update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, steps), state, total, found.mean()

  state, total, means = optimizer.init(params), jnp.zeros(()), []
  for number, key in enumerate(jax.random.split(jax.random.key(2), epochs)):
    params, state, total, mean = epoch(params, state, total, key, number)
    means.append(mean)
  return params, np.array(means)


def test_removal_keeps_one_layer(rewards):
  """One nonlinear layer is enough for the classes, and without any there is no better than chance.

  Any of the three layers will do, so the policy first stays near equal chances, and then takes one.
  """
  table = rewards[: len(KEEP)]
  layers = np.array(KEEP).sum(1)
  assert table[-1] == -1  # as large as the teacher
  assert layers[np.argmax(table)] == 1 and table.max() > max(table[0], 0.6) + 0.1
  network, free = jnp.array([[1.0, 0], [1, 0.5], [1, 1]]), jnp.ones(HIDDEN, bool)
  logp = lambda p, a: compression.keep_or_remove(policies.removal_logits(p, network), a, free)
  draw = lambda k, p: (
    jax.random.bernoulli(k, jax.nn.sigmoid(policies.removal_logits(p, network))) * 1
  )
  value = lambda a: jnp.array(table)[a @ jnp.array([4, 2, 1])]
  params = policies.init_removal(jax.random.key(0), 2, hidden=8, layers=1)
  params, means = learn(params, draw, logp, value, epochs=500, rate=0.02)
  chance = np.exp(jax.vmap(lambda a: logp(params, a))(jnp.array(KEEP)))
  assert layers[np.argmax(chance)] == 1 and means[:10].mean() + 0.1 < chance @ table
  assert chance @ table > 0.9 * table.max()


def test_shrinking_makes_the_best_student_smaller(rewards):
  """The student with one layer has two sizes, each of which gets a factor."""
  table = rewards[len(KEEP) :].reshape(len(SIZES), len(SIZES))
  network, free = jnp.array([[1.0, 1.0]] * 2), jnp.array([[False, True]] * 2)
  place = jnp.array([SIZES.index(int(WIDTH * f)) for f in compression.FACTORS])
  logp = lambda p, a: policies.log_prob(p, network, free, a)
  draw = lambda k, p: policies.propose(k, p, network, free)
  value = lambda a: jnp.array(table)[place[a[0, 1]], place[a[1, 1]]]
  params = policies.init_shrinkage(jax.random.key(0), 2, hidden=8, layers=1)
  params, means = learn(params, draw, logp, value, epochs=100, rate=0.03)
  assert means[-20:].mean() > means[:10].mean() + 0.03 and means[-20:].mean() > table[-1, -1] + 0.05
