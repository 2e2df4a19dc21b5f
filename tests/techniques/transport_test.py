"""Sparse transport, the Monge gap, decoupled mixup and the noise mask give their known values."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from polgrad.techniques import decoupled_mixup, monge_gap, noise_mask, sparse_transport
from polgrad.techniques.noise_mask import Shape

pytestmark = pytest.mark.usefixtures('x64')

X = np.array([0.0, 1.0, 2.0, 3.0])
Y = np.array([0.2, 1.1, 2.3, 2.9])
COST = (X[:, None] - Y[None]) ** 2
UNIFORM = np.full(4, 0.25)
CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])


@jax.jit
def solved(cost, k):
  """The plan and its value, and the gradient of the value."""
  solve = lambda c: sparse_transport.solve(c, UNIFORM, UNIFORM, k=k, gamma=20.0, tolerance=1e-9)
  (_, made), slope = jax.value_and_grad(lambda c: ((t := solve(c)).value, t), has_aux=True)(cost)
  return made, slope


@pytest.mark.parametrize('k, value', [(1, 0.0625), (2, 0.085), (4, 0.0875)])
def test_the_conjugate_has_its_values(k, value):
  x = jnp.array([0.5, -0.2, 0.3, 0.1])
  assert np.isclose(sparse_transport.conjugate(x, k=k, gamma=2.0), value)
  # The maximum of <x, y> - gamma |y|^2 / 2 over all supports of k entries.
  best = max(sum(max(v, 0) ** 2 / 4 for v in s) for s in itertools.combinations(np.array(x), k))
  assert np.isclose(best, value)


def test_sparse_plans_have_their_values():
  one, two, three, four = (solved(COST, k)[0] for k in (1, 2, 3, 4))
  costs = [np.sum(COST * t.plan) for t in (one, two, three, four)]
  np.testing.assert_allclose(one.plan, np.diag(UNIFORM), atol=1e-7)
  np.testing.assert_allclose(costs, [0.0375, 0.354, 0.432964, 0.432964], atol=1e-5)
  values = [t.value for t in (one, two, three, four)]
  np.testing.assert_allclose(values, [2.5375, 1.63325, 1.553089, 1.553089], atol=1e-5)
  assert np.isclose(two.plan[0, 0], 0.1475, atol=1e-5) and np.isclose(
    two.plan[1, 0], 0.1025, atol=1e-5
  )
  assert np.all(np.count_nonzero(np.asarray(two.plan) > 1e-9, axis=0) == 2)
  for t in (one, two, three, four):
    assert t.error < 1e-6
    np.testing.assert_allclose(jnp.sum(t.plan, axis=0), UNIFORM, atol=1e-9)


def test_without_sparsity_it_is_the_quadratic_program():
  """SciPy's solution of the same problem, which has no restriction to k entries."""
  sums = {
    'type': 'eq',
    'fun': lambda p: np.r_[p.reshape(4, 4).sum(0), p.reshape(4, 4).sum(1)[1:]] - 0.25,
  }
  goal = lambda p: np.sum(COST.ravel() * p) + 10 * np.sum(p**2)
  start = np.full(16, 1 / 16)
  found = scipy.optimize.minimize(
    goal, start, bounds=[(0, None)] * 16, constraints=[sums], options={'ftol': 1e-14}
  )
  four, _ = solved(COST, 4)
  assert np.isclose(found.fun, four.value, atol=1e-6)
  np.testing.assert_allclose(found.x.reshape(4, 4), four.plan, atol=1e-4)


def test_the_gradient_of_the_value_is_the_plan():
  two, slope = solved(COST, 2)
  np.testing.assert_allclose(slope, two.plan, atol=1e-12)
  higher = np.array(COST)
  higher[0, 0] += 1e-3
  assert np.isclose(solved(higher, 2)[0].value - two.value, 1e-3 * slope[0, 0], atol=1e-7)


def test_tokens_get_k_experts_with_equal_loads():
  scores = np.random.RandomState(0).normal(size=(4, 12))
  rows, columns = np.full(4, 1 / 4), np.full(12, 1 / 12)
  made = sparse_transport.solve(-scores, rows, columns, k=2, gamma=5.0, max_steps=200)
  assert np.all(np.count_nonzero(np.asarray(made.plan) > 0, axis=0) <= 2)
  assert made.error < 0.03  # of 0.25; the k largest choices of a token without it differ by more
  greedy = np.bincount(np.argsort(-scores, axis=0)[:2].ravel(), minlength=4) / 24
  assert np.max(np.abs(greedy - 0.25)) > 0.05


@pytest.mark.parametrize(
  'settings', [{'k': 0, 'gamma': 1.0}, {'k': 5, 'gamma': 1.0}, {'k': 1, 'gamma': 0}]
)
def test_sparse_transport_refuses(settings):
  with pytest.raises(ValueError, match='must be'):
    sparse_transport.solve(jnp.asarray(COST), UNIFORM, UNIFORM, **settings)


def exact_gap(images):
  cost = np.sum((CORNERS[:, None] - images[None]) ** 2, axis=-1)
  rows, columns = scipy.optimize.linear_sum_assignment(cost)
  return np.mean(np.sum((CORNERS - images) ** 2, axis=-1)) - np.mean(cost[rows, columns])


def rotated(degrees, about):
  angle = np.deg2rad(degrees)
  matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
  return (CORNERS - about) @ matrix.T + about


SWAPPED = CORNERS[[1, 0, 2, 3]]
MAPS = {
  'scaled': (2 * CORNERS + 3, 0),
  'swapped': (SWAPPED, 0.5),
  **{
    f'rotated {d} {a}': (rotated(d, a), g)
    for d, g in ((30, 0), (90, 1), (180, 2))
    for a in (0, 0.5)
  },
}


@pytest.mark.parametrize('name', MAPS)
def test_the_gap_is_what_an_assignment_would_save(name):
  images, gap = MAPS[name]
  assert np.isclose(exact_gap(images), gap)
  epsilon = 0.02
  found = monge_gap.gap(CORNERS, images, epsilon=epsilon, max_steps=4000)
  # The entropy is at most log 16 and at least log 4 here.
  assert gap + epsilon * np.log(4) - 1e-5 <= found <= gap + epsilon * np.log(16) + 1e-5


@pytest.mark.parametrize('images, value', [(SWAPPED, 0.638639), (CORNERS, 0.138639)])
def test_the_entropic_gap_has_its_values(images, value):
  assert np.isclose(monge_gap.gap(CORNERS, images, epsilon=0.1), value, atol=1e-5)
  kl = value - 2 * 0.1 * np.log(4)
  assert np.isclose(kl, {0.638639: 0.361380, 0.138639: -0.138620}[value], atol=1e-5)


@pytest.mark.parametrize(
  'images, epsilon, value',
  [
    (SWAPPED, 0.5, 1.3200752),
    (np.random.default_rng(0).normal(size=(4, 2)), 0.1, 0.1393829),
    (np.random.default_rng(0).normal(size=(4, 2)), 0.5, 0.9086518),
  ],
)
def test_the_gap_is_that_of_ott_jax(images, epsilon, value):
  """`monge_gap_from_samples` of ott-jax 0.6.0 in float64, squared distances, its default tolerance."""
  assert np.isclose(monge_gap.gap(CORNERS, images, epsilon=epsilon), value, atol=1e-5)


def test_the_gap_has_the_gradient_of_its_differences():
  images = SWAPPED + 0.1 * np.arange(8).reshape(4, 2)
  gap = jax.jit(lambda y: monge_gap.gap(CORNERS, y, epsilon=1.0, tolerance=1e-12))
  slope = jax.grad(gap)(jnp.asarray(images))
  for place in ((0, 0), (2, 1)):
    step = np.zeros((4, 2))
    step[place] = 1e-4
    difference = (gap(images + step) - gap(images - step)) / 2e-4
    assert np.isclose(difference, slope[place], atol=1e-6)


def test_a_sinkhorn_divergence_compares_sets():
  same = monge_gap.sinkhorn_divergence(CORNERS, CORNERS[::-1], epsilon=0.1)
  moved = monge_gap.sinkhorn_divergence(CORNERS, CORNERS + 3.0, epsilon=0.1)
  twice = monge_gap.sinkhorn_divergence(CORNERS, np.concatenate([CORNERS] * 2), epsilon=0.1)
  np.testing.assert_allclose([same, moved, twice], [0, 18, 0], atol=1e-4)


LOGITS = np.array([[2.0, 1.0, 0.5, -1.0]])
A, B = np.array([0]), np.array([1])


def mixup(z, lam=0.7, eta=0.1, first=A, second=B):
  return decoupled_mixup.loss(jnp.asarray(z), first, second, jnp.asarray(lam), eta=eta)[0]


def test_decoupled_mixup_has_its_values():
  assert np.isclose(mixup(LOGITS), 0.828722, atol=1e-6)
  assert np.isclose(mixup(LOGITS, eta=0.0), 0.795182, atol=1e-6)
  decoupled = lambda z, lam: mixup(z, lam, eta=1.0) - mixup(z, lam, eta=0.0)
  found = [decoupled(LOGITS, lam) for lam in (1.0, 0.0)]
  np.testing.assert_allclose(found, [0.241311, 0.554957], atol=1e-6)
  slopes = (
    jax.grad(lambda z: mixup(z, eta=0.0))(LOGITS),
    jax.grad(lambda z: decoupled(z, 0.7))(LOGITS),
  )
  mce = [-0.090540, -0.075792, 0.135989, 0.030343]
  np.testing.assert_allclose(slopes[0][0], mce, atol=1e-6)
  np.testing.assert_allclose(slopes[1][0], [-0.150082, -0.127771, 0.227166, 0.050687], atol=1e-6)


def test_decoupled_mixup_reduces():
  plain = scipy.special.logsumexp(LOGITS) - LOGITS[0]
  assert np.isclose(mixup(LOGITS, second=A), plain[0])
  assert np.isclose(mixup(LOGITS, lam=1.0, eta=0.0), plain[0])
  first_only = jax.grad(lambda z: mixup(z, 1.0, eta=1.0) - mixup(z, 1.0, eta=0.0))(LOGITS)
  assert first_only[0, 1] == 0 and first_only[0, 0] < 0


def test_mixed_rows_are_sums():
  inputs = np.arange(12.0).reshape(6, 2)
  mixed, partner, lam = decoupled_mixup.mix(jax.random.key(0), inputs)
  assert 0 <= lam <= 1 and sorted(partner.tolist()) == list(range(6))
  np.testing.assert_allclose(mixed, lam * inputs + (1 - lam) * inputs[np.array(partner)])
  with pytest.raises(ValueError, match='alpha'):
    decoupled_mixup.mix(jax.random.key(0), inputs, alpha=0.0)


def test_masks_have_the_density_of_their_distribution():
  shape = Shape(*np.random.RandomState(0).uniform(0.5, 3, size=(2, 2, 3, 3)))
  mask = noise_mask.draw(jax.random.key(0), shape)
  np.testing.assert_allclose(
    noise_mask.log_prob(mask, shape), scipy.stats.beta.logpdf(mask, *shape)
  )
  uniform = Shape(np.ones((1, 2, 2)), np.ones((1, 2, 2)))
  assert np.allclose(noise_mask.log_prob(np.full((1, 2, 2), 0.3), uniform), 0)


def test_the_running_mean_follows_the_network():
  base = Shape(np.ones((2, 2)), np.full((2, 2), 2.0))
  outputs = Shape(*np.random.RandomState(0).normal(size=(2, 3, 2, 2)))
  made, moved = noise_mask.blend(base, outputs)
  np.testing.assert_allclose(made.beta, 1.8 + 0.1 * np.exp(outputs.beta))
  np.testing.assert_allclose(moved.alpha, 0.99 + 0.01 * np.mean(made.alpha, axis=0))


def test_masks_multiply_blurred():
  inputs = np.ones((2, 8, 6, 3))
  same = noise_mask.apply(inputs, np.full((2, 4, 3), 0.25))
  np.testing.assert_allclose(same, 0.25 * inputs)
  checks = np.indices((8, 6)).sum(0)[None] % 2.0 * np.ones((2, 1, 1))
  sharp, soft = (noise_mask.apply(inputs, checks, sigma=s) for s in (0, 1.0))
  np.testing.assert_allclose(sharp[..., 0], checks)
  assert np.std(soft) < 0.1 * np.std(sharp)


def test_the_policy_of_masks_finds_what_hurts():
  """REINFORCE raises the mask of the one cell that the loss needs; a baseline keeps the mean."""
  shape = Shape(np.full((4000, 1, 2), 1.5), np.full((4000, 1, 2), 1.2))
  mask = np.random.RandomState(1).beta(*shape)
  hurt = 1 - mask[:, 0, 0]

  def loss(shift, **settings):
    logp = noise_mask.log_prob(mask, Shape(shape.alpha + shift[None, None], shape.beta))
    return noise_mask.policy_loss(logp, hurt, **settings)

  slope = jax.grad(loss)(jnp.zeros(2))
  # d E[1 - mask] / d alpha = -beta / (alpha + beta)^2 for the first cell, and 0 for the other.
  np.testing.assert_allclose(slope, [-1.2 / 2.7**2, 0], atol=0.03)
  based = jax.grad(lambda s: loss(s, baseline=0.4))(jnp.zeros(2))
  np.testing.assert_allclose(based, [-1.2 / 2.7**2, 0], atol=0.015)
  released = loss(jnp.zeros(2), logsumexp=True)
  logp = noise_mask.log_prob(mask, shape)
  assert np.isclose(released, np.mean(scipy.special.logsumexp(logp, axis=(1, 2)) * hurt))
