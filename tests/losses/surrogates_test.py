"""Boundaries, limits and reductions of surrogates, ratios and weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad.losses import aggregation, ratios, surrogates, weights


def derivative(fn, log_ratio, advantage, **knobs):
  """-d loss / d log_ratio of one token."""
  loss = lambda d: fn(d, jnp.asarray([advantage]), **knobs)[0]
  return -jax.grad(loss)(jnp.asarray([log_ratio]))[0]


@pytest.mark.parametrize(('advantage', 'bound'), [(1.0, 1.25), (-1.0, 0.75)])
def test_a_token_on_the_clip_bound_keeps_its_gradient(advantage, bound):
  kept = derivative(surrogates.clipped, np.log(bound), advantage, eps_low=0.25, eps_high=0.25)
  beyond = np.log(bound) + 1e-4 * np.sign(advantage)
  np.testing.assert_allclose(kept, advantage * bound, rtol=1e-6)
  assert derivative(surrogates.clipped, beyond, advantage, eps_low=0.25, eps_high=0.25) == 0


def test_clipping_is_pessimistic_only_on_one_side():
  """A good token that became unlikely, or a bad one that became likely, still has its gradient."""
  assert derivative(surrogates.clipped, np.log(0.1), 1.0) == pytest.approx(0.1)
  assert derivative(surrogates.clipped, np.log(4.0), -1.0) == pytest.approx(-4.0)


def test_infinite_bounds_undo_clipping():
  rng = np.random.default_rng(0)
  d, a = rng.normal(size=(2, 8))
  expected = surrogates.importance_weighted(d, a)
  wide = surrogates.clipped(d, a, eps_low=np.inf, eps_high=np.inf)
  np.testing.assert_array_equal(wide, expected)
  far = surrogates.dual_clipped(d, a, eps_low=np.inf, eps_high=np.inf, cap=np.inf)
  np.testing.assert_array_equal(far, expected)


def test_dual_clip_caps_the_loss_of_bad_tokens():
  d = jnp.log(jnp.array([0.5, 1.0, 2.0, 4.0]))
  loss = surrogates.dual_clipped(d, -jnp.ones(4), cap=3.0)
  np.testing.assert_allclose(loss, [0.8, 1, 2, 3], rtol=1e-6)


@pytest.mark.parametrize('cap', [0.2, 1.0])
def test_a_cap_given_as_a_distance_from_one_is_refused(cap):
  with pytest.raises(ValueError, match='absolute ratio'):
    surrogates.dual_clipped(jnp.zeros(1), jnp.ones(1), cap=cap)


def test_a_cap_that_silences_every_token_is_refused():
  with pytest.raises(ValueError, match='must be positive'):
    surrogates.truncated(jnp.zeros(1), jnp.zeros(1), jnp.ones(1), cap=0.0)


def test_cispo_without_a_cap_has_the_importance_weighted_gradient():
  old = jnp.array([-1.0, -2.0, -0.5])
  logp = old + jnp.array([0.3, -0.8, 1.2])
  a = jnp.array([1.0, -2.0, 0.5])
  cispo = lambda lp: jnp.sum(surrogates.truncated(lp, lp - old, a, cap=np.inf))
  weighted = lambda lp: jnp.sum(surrogates.importance_weighted(lp - old, a))
  np.testing.assert_allclose(jax.grad(cispo)(logp), jax.grad(weighted)(logp), rtol=1e-6)


def test_cispo_drops_no_token_where_ppo_drops_one():
  d = jnp.log(jnp.array([4.0]))
  cispo = lambda lp: surrogates.truncated(lp, d, jnp.ones(1), cap=1.28)[0]
  np.testing.assert_allclose(-jax.grad(cispo)(jnp.array([-1.0])), [1.28], rtol=1e-6)
  assert derivative(surrogates.clipped, d[0], 1.0) == 0


MASK = jnp.array([[True, True, True, False], [True, False, False, False]])


@pytest.mark.parametrize('eps', [0.05, 0.3, 10.0])
def test_trap_11_gspo_token_has_value_and_gradient_of_the_sequence_form(eps, x64):
  """The straight-through form against -mean_i min(s_i A_i, clip(s_i) A_i), differentiated whole."""
  rng = np.random.default_rng(0)
  d = jnp.where(MASK, jnp.asarray(rng.normal(scale=0.3, size=(2, 4))), 0)
  a = jnp.array([1.0, -0.5])

  def token_form(d):
    tiled = jnp.broadcast_to(a[:, None], d.shape)
    loss = surrogates.clipped(ratios.sequence_geometric(d, MASK), tiled, eps_low=eps, eps_high=eps)
    return aggregation.sequence_mean(loss, MASK).value()

  def sequence_form(d):
    s = jnp.exp(jnp.sum(jnp.where(MASK, d, 0), axis=-1) / jnp.sum(MASK, axis=-1))
    return -jnp.mean(jnp.minimum(s * a, jnp.clip(s, 1 - eps, 1 + eps) * a))

  got, expected = (jax.jit(jax.value_and_grad(f))(d) for f in (token_form, sequence_form))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), got, expected)


def test_trap_10_the_sequence_ratio_has_gradient_through_the_own_token_only():
  """With token advantages the weight of token t is s A_t, not the mean of the A of its row."""
  d = jnp.array([[0.2, -0.4, 0.5, 0.0]])
  a = jnp.array([[1.0, -2.0, 0.5, 3.0]])
  level = lambda d: ratios.sequence_geometric(d, MASK[:1])
  weight = -jax.grad(lambda d: jnp.sum(surrogates.importance_weighted(level(d), a)))(d)
  np.testing.assert_allclose(weight, np.exp(0.1) * np.array([[1.0, -2.0, 0.5, 0.0]]), rtol=1e-6)


def test_rows_of_one_token_make_sequence_and_token_ratios_equal():
  d = jnp.array([[0.3, 0.0], [0.0, -2.0]])
  mask = d != 0
  np.testing.assert_array_equal(ratios.sequence_geometric(d, mask), ratios.token(d, mask))


def test_token_weights_on_a_row_of_ratios():
  rho = np.array([0.3, 0.7, 1.0, 3.0, 6.0])
  zeros = jnp.zeros(5)
  got = weights.truncated_importance(jnp.log(rho), zeros, cap=2.0)
  np.testing.assert_allclose(got, [0.3, 0.7, 1, 2, 2], rtol=1e-6)
  got = weights.masked_importance(jnp.log(rho), zeros, low=0.5, high=5.0)
  np.testing.assert_allclose(got, [0, 0.7, 1, 3, 0], rtol=1e-6)
  got = weights.masked_importance(jnp.log(rho), zeros, low=0.0, high=np.inf)
  np.testing.assert_allclose(got, rho, rtol=1e-6)


def test_equal_policies_have_weight_exactly_one():
  logp = jnp.array([[-0.1, -3.0, -7.0]])
  mask = jnp.ones((1, 3), bool)
  for got in (
    weights.truncated_importance(logp, logp),
    weights.masked_importance(logp, logp),
    weights.truncated_sequence_importance(logp, logp, mask),
  ):
    np.testing.assert_array_equal(got, jnp.ones((1, 3)))


def test_truncated_weights_have_a_mean_of_at_most_one():
  rng = np.random.default_rng(0)
  for _ in range(20):
    behavior, proximal = jax.nn.log_softmax(rng.normal(size=(2, 6)))
    for cap in (0.5, 1.0, 2.0, np.inf):
      weight = weights.truncated_importance(proximal, behavior, cap=cap)
      assert jnp.sum(jnp.exp(behavior) * weight) <= 1 + 1e-5


@pytest.mark.parametrize('alpha', [0.0, 0.2, 0.5, 1.0])
def test_decoupled_ratios_multiply_to_the_whole_ratio(alpha, x64):
  """(pi / proximal) (proximal / behaviour) = pi / behaviour, wherever the proximal policy stands."""
  behavior, logp = jnp.array([[-1.2]]), jnp.array([[-0.7]])
  proximal = alpha * behavior + (1 - alpha) * logp
  weight = weights.truncated_importance(proximal, behavior, cap=np.inf)
  ratio = jnp.exp(ratios.token(logp - proximal, jnp.ones((1, 1), bool)))
  np.testing.assert_allclose(weight * ratio, np.exp(0.5), rtol=1e-12)
