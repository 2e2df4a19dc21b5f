"""Statistics of the next-token distribution against vectors written out, and published numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad.losses import logit_stats, penalties

LOGITS = np.random.default_rng(0).normal(size=(3, 6))
TOKENS = np.array([4, 0, 2])


def score_vectors():
  probs = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
  return probs, np.eye(6)[TOKENS] - probs


def test_log_prob_and_entropy_of_a_known_distribution():
  logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]))
  got = logit_stats.logp(logits, jnp.array([1, 0]))
  np.testing.assert_allclose(got, [np.log(0.25), 0], atol=1e-6)
  np.testing.assert_allclose(logit_stats.entropy(logits), [1.5 * np.log(2), 0], atol=1e-6)


def test_the_score_norm_is_the_squared_gradient_of_the_log_probability(x64):
  summed = lambda logits: jnp.sum(logit_stats.logp(logits, TOKENS))
  gradient = jax.grad(summed)(jnp.asarray(LOGITS))
  got = logit_stats.score_norm(jnp.asarray(LOGITS), TOKENS)
  np.testing.assert_allclose(got, np.sum(gradient**2, axis=-1), rtol=1e-12)


def test_the_score_fisher_is_the_variance_of_the_score_along_itself(x64):
  probs, v = score_vectors()
  fisher = [np.diag(p) - np.outer(p, p) for p in probs]
  expected = [x @ f @ x for x, f in zip(v, fisher)]
  got = logit_stats.score_fisher(jnp.asarray(LOGITS), TOKENS)
  np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_squared_score_norm_minus_score_fisher_is_the_curvature_of_the_ratio(x64):
  _, v = score_vectors()
  for logits, token, direction in zip(jnp.asarray(LOGITS), TOKENS, v):
    old = jax.lax.stop_gradient(logit_stats.logp(logits, token))
    ratio = lambda z, a=token, b=old: jnp.exp(logit_stats.logp(z, a) - b)
    curvature = direction @ jax.hessian(ratio)(logits) @ direction
    norm = logit_stats.score_norm(logits, token)
    got = norm**2 - logit_stats.score_fisher(logits, token)
    np.testing.assert_allclose(got, curvature, rtol=1e-10)


@pytest.mark.parametrize('fn', [logit_stats.score_norm, logit_stats.score_fisher])
def test_a_certain_token_has_no_score(fn):
  got = fn(jnp.array([[100.0, 0, -jnp.inf]]), jnp.array([0]))
  np.testing.assert_allclose(got, [0], atol=1e-6)


PROXY_LOGITS = jnp.broadcast_to(jnp.array([5.0, 3, 1, -1]), (4, 4))
EACH = jnp.arange(4)


def test_the_proxy_leaves_out_the_tail_and_normalises_again():
  got = jnp.exp(logit_stats.proxy_logp(PROXY_LOGITS, EACH))
  np.testing.assert_allclose(got, [0.880797, 0.119203, 0, 0], atol=1e-6)


def test_the_pull_towards_the_proxy_raises_what_the_proxy_keeps():
  logp = logit_stats.logp(PROXY_LOGITS, EACH)
  proxy = logit_stats.proxy_logp(PROXY_LOGITS, EACH)
  kept = jnp.array([True, True, False, False])
  pull = jax.grad(lambda x: -jnp.sum(penalties.selected_k3(x, proxy, kept)))(logp)
  np.testing.assert_allclose(pull, [0.018316, 0.018316, 0, 0], atol=1e-6)


ONE_TOKEN = jnp.array([0.5, 0.0, -0.3, 0.8])


@pytest.mark.parametrize(
  ('temperature', 'expected'),
  [
    (1.0, [-0.042613, -0.025846, 0.125980, -0.057521]),
    (1.3, [-0.049516, -0.032164, 0.145925, -0.064245]),
  ],
)
def test_one_token_rollout_has_the_expected_step_in_closed_form(temperature, expected):
  loss = lambda z: logit_stats.one_token_rollout(z, 2, beta=-0.1, temperature=temperature)
  np.testing.assert_allclose(-jax.grad(loss)(ONE_TOKEN), expected, atol=1e-6)


def test_one_token_rollout_is_the_mean_over_sampled_tokens(x64):
  """REINFORCE with a token of softmax(z / 1.3), which earns 1 for the data's and beta otherwise."""

  def enumerated(z):
    sampler = jax.nn.softmax(ONE_TOKEN / 1.3)
    rewards = jnp.where(jnp.arange(4) == 2, 1.0, -0.1)
    return -jnp.sum(sampler * rewards * jax.nn.log_softmax(z))

  z = jnp.asarray(ONE_TOKEN, jnp.float64)
  got = jax.value_and_grad(lambda z: logit_stats.one_token_rollout(z, 2))(z)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7), got, jax.value_and_grad(enumerated)(z)
  )


def test_at_temperature_one_it_is_supervised_learning_weighted_by_the_probability():
  loss = lambda z: logit_stats.one_token_rollout(z, 2, beta=0.0, temperature=1.0)
  weighted = jax.nn.softmax(ONE_TOKEN)[2] * (jnp.eye(4)[2] - jax.nn.softmax(ONE_TOKEN))
  np.testing.assert_allclose(-jax.grad(loss)(ONE_TOKEN), weighted, atol=1e-6)


@pytest.mark.parametrize('fn', [logit_stats.entropy, logit_stats.one_token_rollout])
def test_logits_of_minus_infinity_leave_value_and_gradient_finite(fn):
  logits = jnp.array([[0.3, -jnp.inf, 1.0]])
  args = () if fn is logit_stats.entropy else (jnp.array([2]),)
  value, gradient = jax.value_and_grad(lambda z: jnp.sum(fn(z, *args)))(logits)
  assert np.isfinite(value)
  assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize(
  'fn', [logit_stats.score_norm, logit_stats.score_fisher, logit_stats.proxy_logp]
)
def test_what_weighs_or_anchors_is_data(fn):
  gradient = jax.grad(lambda z: jnp.sum(fn(z, TOKENS)))(jnp.asarray(LOGITS, jnp.float32))
  np.testing.assert_array_equal(gradient, np.zeros_like(LOGITS))
