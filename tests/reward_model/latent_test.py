"""Variational preference learning and the representation loss of RLP: bounds, closed forms, a toy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from polgrad.data import synthetic_pairs
from polgrad.losses import latent_preferences, shared_information

USERS, CONTEXT, STEPS, LATENT = 64, 8, 500, 4


def draw(steps, random):
  """Pairs of two-dimensional items, [2, steps, users, pairs, 2], the better ones first.

  The users like x1 - x2 / 2, or hate it.
  """
  sign = random.choice([-1.0, 1.0], size=(steps, USERS, 1))
  items = random.normal(size=(2, steps, USERS, CONTEXT + 1, 2))
  taste = sign * (items[..., 0] - 0.5 * items[..., 1])
  return np.where((taste[0] < taste[1])[..., None], items[::-1], items).astype(np.float32)


@jax.jit
def accuracy(params, weight, spoiled, pairs, noise, unseen):
  """Held-out accuracy after training; the context is multiplied by 1 - spoiled."""

  def cut(pairs):
    known, query = pairs[:, :, 1:] * (1 - spoiled), pairs[:, :, 0]
    return (known[0], known[1]), (query[0], query[1])

  def loss(params, pairs, noise):
    bound = latent_preferences.negative_evidence_bound
    return bound(params, *cut(pairs), noise, weight=weight, normalize=False).mean()

  def step(carry, given):
    params, state = carry
    updates, state = optimizer.update(jax.grad(loss)(params, *given), state)
    return (optax.apply_updates(params, updates), state), ()

  optimizer = optax.adam(5e-3)
  given = jnp.moveaxis(pairs, 1, 0), noise
  (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), given)
  context, (chosen, rejected) = cut(unseen.reshape(2, -1, CONTEXT + 1, 2))
  posterior = latent_preferences.encode(params, *context)
  z = latent_preferences.sample(posterior, jnp.zeros(()), normalize=False)
  scores = [latent_preferences.reward(params, one, z) for one in (chosen, rejected)]
  return (scores[0] > scores[1]).mean()


def test_a_latent_finds_the_taste_of_a_user_unless_its_prior_is_too_strong():
  random = np.random.default_rng(0)
  sizes = dict(width=2, latent=LATENT, hidden=32, attention=False)
  params = jax.jit(lambda key: latent_preferences.init(key, **sizes))(jax.random.key(0))
  noise = random.normal(size=(STEPS, USERS, LATENT)).astype(np.float32)
  data = draw(STEPS, random), noise, draw(8, random)
  small, collapsed, blind = (
    float(accuracy(params, weight, spoiled, *data))
    for weight, spoiled in ((1e-3, 0.0), (1.0, 0.0), (1e-3, 1.0))
  )
  assert small > 0.95
  assert abs(collapsed - 0.5) < 0.1  # the posterior is the prior
  assert abs(blind - 0.5) < 0.1  # a context that says nothing: a Bradley-Terry model of all users


def test_the_encoder_does_not_see_the_order_of_the_pairs_and_the_bound_is_that_of_its_parts(x64):
  random = np.random.default_rng(0)
  init = jax.jit(lambda key: latent_preferences.init(key, width=2, latent=3, hidden=5))
  params = init(jax.random.key(0))
  context, query = random.normal(size=(2, 4, 6, 2)), random.normal(size=(2, 4, 2))
  noise = random.normal(size=(4, 3))

  @jax.jit
  def read(context):
    posterior = latent_preferences.encode(params, *context)
    z = latent_preferences.sample(posterior, noise)
    rewards = [latent_preferences.reward(params, one, z) for one in query]
    bound = latent_preferences.negative_evidence_bound(
      params, (context[0], context[1]), (query[0], query[1]), noise, weight=0.3
    )
    return posterior, z, rewards, bound, latent_preferences.win_rates(jnp.stack(rewards, axis=-1))

  (mean, log_variance), z, rewards, bound, wins = read(context)
  for a, b in zip(read(context[:, :, ::-1])[0], (mean, log_variance)):
    np.testing.assert_allclose(a, b, atol=1e-12)
  assert np.abs(mean).max() <= 1 and np.abs(log_variance).max() <= 1
  np.testing.assert_allclose(np.linalg.norm(z, axis=-1), np.sqrt(3))
  variance = np.exp(log_variance)
  kl = 0.5 * np.sum(variance + mean**2 - 1 - np.log(variance), axis=-1)
  gap = rewards[0] - rewards[1]
  np.testing.assert_allclose(bound, np.log(1 + np.exp(-gap)) + 0.3 * kl)
  np.testing.assert_allclose(wins[:, 0], (0.5 + 1 / (1 + np.exp(-gap))) / 2)


def test_the_divergence_of_two_views_is_that_of_gaussians_and_zero_only_if_they_coincide(x64):
  random = np.random.default_rng(0)
  (m1, m2), (s1, s2) = random.normal(size=(2, 5, 3)), random.uniform(0.5, 2, size=(2, 5, 3))
  kl = lambda m, s, n, t: np.sum(np.log(t / s) + (s**2 + (m - n) ** 2) / (2 * t**2) - 0.5, axis=-1)
  symmetric_kl = jax.jit(shared_information.symmetric_kl)
  divergence = symmetric_kl(m1, s1, m2, s2)
  np.testing.assert_allclose(divergence, 0.5 * (kl(m1, s1, m2, s2) + kl(m2, s2, m1, s1)))
  assert (divergence > 0.01).all()
  np.testing.assert_allclose(symmetric_kl(m1, s1, m1, s1), 0, atol=1e-12)


def test_the_bound_of_the_information_is_negative_and_a_perfect_critic_reaches_zero(x64):
  bound = jax.jit(shared_information.jensen_shannon)
  np.testing.assert_allclose(bound(np.zeros((3, 3))), np.full(3, -2 * np.log(2)))
  np.testing.assert_allclose(bound(100.0 * (2 * np.eye(3) - 1)), np.zeros(3), atol=1e-12)
  critic = np.random.default_rng(0).normal(size=(3, 3))
  softplus = lambda x: np.log(1 + np.exp(x))
  others = [np.mean([softplus(critic[i, j]) for j in range(3) if i != j]) for i in range(3)]
  wanted = -softplus(-np.diag(critic)) - others
  np.testing.assert_allclose(bound(critic), wanted)
  assert (wanted < 0).all()
  cut = jax.jit(shared_information.jensen_shannon)(critic, np.array([True, True, False]))
  two = -softplus(-np.diag(critic)[:2]) - softplus(np.array([critic[0, 1], critic[1, 0]]))
  np.testing.assert_allclose(cut[:2], two)  # a prompt that is not there is nobody's other prompt


def test_a_synthetic_pair_needs_a_large_cluster_and_another_one():
  scores = [0.3, 0.9, 0.1, 0.8, 0.2, 5.0, 6.0, 7.0, 8.0, 9.0]
  pair = synthetic_pairs.confident_pair
  five, four = [0] * 5 + [1] * 3 + [2] * 2, [0] * 4 + [1] * 3 + [2] * 3
  assert pair(five, scores, 0.0) == (1, 5) and pair(five, scores, 0.99) == (1, 9)
  assert pair(four, scores, 0.0) is None
  assert pair(four, scores, 0.0, confidence=0.4) == (1, 4)
  assert pair([3] * 10, scores, 0.0) is None  # all are equivalent: there is no other
  assert pair([], [], 0.0) is None
