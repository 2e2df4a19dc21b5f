"""Early-learning regularisation and bag losses: against NumPy, their gradients and identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad.techniques.noisy_labels import bag_loss, best_instance, early_learning_penalty, follow

RNG = np.random.default_rng(0)


def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def test_targets_follow_and_the_gradient_of_the_penalty_is_known():
  with jax.enable_x64(True):
    targets, ids = np.zeros((5, 4)), np.array([3, 0, 4])
    for _ in range(3):
      z = 3 * RNG.normal(size=(3, 4))
      p = np.clip(softmax(z), 1e-4, 1 - 1e-4)
      moved = follow(jnp.asarray(targets), jnp.asarray(z), jnp.asarray(ids))
      targets[ids] = 0.7 * targets[ids] + 0.3 * p / p.sum(1, keepdims=True)
      np.testing.assert_allclose(moved, targets, rtol=1e-7)
    t, z = targets[ids], RNG.normal(size=(3, 4))
    p = softmax(z)
    value, found = jax.value_and_grad(early_learning_penalty)(jnp.asarray(z), jnp.asarray(t))
    inner = (t * p).sum(1, keepdims=True)
    np.testing.assert_allclose(value, np.log(1 - inner).mean(), rtol=1e-7)
    np.testing.assert_allclose(found, -p * (t - inner) / (1 - inner) / 3, rtol=1e-6)
    assert early_learning_penalty(jnp.asarray(z), jnp.zeros((3, 4))) == 0
    sure = early_learning_penalty(jnp.array([[99.0, 0.0]]), jnp.array([[1.0, 0.0]]))
    np.testing.assert_allclose(sure, np.log(1e-4), rtol=1e-6)


def test_the_penalty_keeps_a_linear_model_from_memorising_flipped_labels():
  """200 points in 200 dimensions, two Gaussians at +-v, 40% of the labels flipped."""
  n = 200
  v = np.eye(n)[0]
  truth = RNG.integers(0, 2, n)
  points = lambda y: jnp.asarray((2 * y - 1)[:, None] * v + 0.2 * RNG.normal(size=(n, n)), 'f4')
  x, fresh = points(truth), points(truth)
  flipped = RNG.random(n) < 0.4
  given = jnp.asarray(np.where(flipped, 1 - truth, truth))
  ids = jnp.arange(n)

  def run(lam):
    def loss(w, targets):
      logp = jax.nn.log_softmax(x @ w)
      return -jnp.mean(logp[ids, given]) + lam * early_learning_penalty(x @ w, targets)

    def step(carry, _):
      w, targets = carry
      targets = follow(targets, x @ w, ids)
      return (w - 0.05 * jax.grad(loss)(w, targets), targets), None

    begin = jnp.zeros((n, 2)), jnp.zeros((n, 2))
    w = jax.jit(lambda begin: jax.lax.scan(step, begin, length=3000)[0][0])(begin)
    right = lambda points: np.asarray(jnp.argmax(points @ w, -1)) == truth
    return 1 - right(x)[flipped].mean(), right(fresh).mean()

  memorised, accuracy = run(0.0)
  assert memorised > 0.8 and accuracy < 0.8
  memorised, accuracy = run(3.0)
  assert memorised == 0 and accuracy == 1


def test_bag_losses_differ_by_the_variance_within_bags():
  f, y = RNG.normal(size=(6, 4)), RNG.normal(size=6)
  with jax.enable_x64(True):
    whole, each, half = (
      float(bag_loss(jnp.asarray(f), jnp.asarray(y), instance=r)) for r in (0.0, 1.0, 0.5)
    )
    np.testing.assert_allclose(whole, ((y - f.mean(1)) ** 2).mean(), rtol=1e-12)
    np.testing.assert_allclose(each, whole + f.var(1).mean(), rtol=1e-12)
    np.testing.assert_allclose(half, (whole + each) / 2, rtol=1e-12)
    alone = jnp.asarray(f[:, :1])
    assert bag_loss(alone, jnp.asarray(y)) == bag_loss(alone, jnp.asarray(y), instance=1.0)
  for args, instance, words in (
    ((jnp.zeros((2, 3)), jnp.zeros(3)), 0.0, 'means'),
    ((jnp.zeros((2, 3)), jnp.zeros(2)), 1.5, 'instance is 1.5'),
  ):
    with pytest.raises(ValueError, match=words):
      bag_loss(*args, instance=instance)


def linear_bags(size, trials):
  """240 inputs of 8 dimensions, y = theta x + noise, |theta| = 1: theta, inputs, mean of each bag."""
  rng = np.random.default_rng(size)
  truth = rng.normal(size=(trials, 8, 1))
  truth /= np.linalg.norm(truth, axis=1, keepdims=True)
  x = rng.normal(size=(trials, 240 // size, size, 8))
  y = (x.reshape(trials, -1, 8) @ truth).reshape(x.shape[:3])
  return truth, x, (y + rng.normal(size=y.shape)).mean(2)


@pytest.mark.parametrize(
  ('size', 'of_bags', 'of_instances'),
  [
    (1, (0, 0.0347), (0, 0.0347)),
    (4, (0, 0.155), (0.561, 0.016)),
    (12, (0, 0.717), (0.839, 0.006)),
  ],
)
def test_bags_are_unbiased_and_noisy_and_instances_biased_and_sure(size, of_bags, of_instances):
  """Squared bias and variance of least squares: y = theta x + noise, 8 dimensions, 240 inputs."""
  trials = 400
  truth, x, means = linear_bags(size, trials)
  flat, each = x.reshape(trials, -1, 8), np.repeat(means, size, axis=1)
  solve = lambda a, b: np.linalg.solve(a.mT @ a, a.mT @ b[..., None])
  # The minimisers, which are those of the losses here.
  found = {0.0: solve(x.mean(2), means), 1.0: solve(flat, each)}
  loss = lambda w, r: bag_loss(jnp.asarray(x[0]) @ w, jnp.asarray(means[0]), instance=r)
  for r, (bias, variance) in {0.0: of_bags, 1.0: of_instances}.items():
    with jax.enable_x64(True):
      np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(found[r][0, :, 0]), r), 0, atol=1e-10)
    along = (found[r] * truth).sum((1, 2))  # of a vector of length 1
    shrunk = along.mean()
    risk = ((found[r] - truth) ** 2).sum((1, 2)).mean()
    np.testing.assert_allclose((1 - shrunk) ** 2, bias, atol=0.02)
    np.testing.assert_allclose(risk - (1 - shrunk) ** 2, variance, rtol=0.1, atol=0.003)


@pytest.mark.parametrize('size', [4, 12])
def test_the_best_weight_of_instances_has_less_risk_than_its_neighbours(size):
  """The bed of the test above; the minimiser is (S + r W)^-1 S theta and noise."""
  trials, bags = 400, 240 // size
  truth, x, labels = linear_bags(size, trials)
  mean = x.mean(2)
  between, within = (
    z.mT @ z / z.shape[1] for z in (mean, (x - mean[:, :, None]).reshape(trials, -1, 8))
  )
  solve = lambda r: np.linalg.solve(between + r * within, mean.mT @ labels[..., None] / bags)
  best = best_instance(inputs=240, size=size, parameters=8, noise=1.0)
  with jax.enable_x64(True):  # it is the minimiser of the loss
    loss = lambda w: bag_loss(jnp.asarray(x[0]) @ w, jnp.asarray(labels[0]), instance=best)
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(solve(best)[0, :, 0])), 0, atol=1e-10)
  risk = {k: ((solve(k * best) - truth) ** 2).sum((1, 2)).mean() for k in (0, 0.5, 1, 2, 1 / best)}
  assert all(risk[1] < risk[k] for k in risk if k != 1), risk
  for wrong, words in (({'size': 1}, 'size is 1'), ({'noise': 0.0}, 'noise is 0.0')):
    with pytest.raises(ValueError, match=words):
      best_instance(**{**dict(inputs=9, size=size, parameters=8, noise=1.0), **wrong})
