"""Links, pointwise losses and scores: minimisers, published numbers, identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad.losses import implicit_rewards, links, penalties, pointwise

# Row log-probabilities: chosen and rejected, policy and reference.
PW, PL, RW, RL = (jnp.array([[x]]) for x in (-10.0, -12.0, -9.0, -11.0))
ONE = jnp.ones((1, 1), bool)
DW = implicit_rewards.log_ratio_sum(PW, RW, ONE)
DL = implicit_rewards.log_ratio_sum(PL, RL, ONE)
CHOSEN, REJECTED = jnp.ones(1), jnp.zeros(1)


def test_published_numbers_of_one_pair():
  dpo = links.logistic(0.1 * (DW - DL), CHOSEN)
  ipo = links.squared(DW - DL, CHOSEN, target=1 / (2 * 0.1))
  kto = [pointwise.sigmoid(0.1 * (d - 0.5), y) for d, y in ((DW, CHOSEN), (DL, REJECTED))]
  apo = pointwise.sigmoid(0.1 * DW, CHOSEN) + pointwise.sigmoid(0.1 * DL, REJECTED)
  sppo = [pointwise.squared(d, y, target=5.0) for d, y in ((DW, CHOSEN), (DL, REJECTED))]
  got = [dpo, ipo, *kto, apo, (sppo[0] + sppo[1]) / 2]
  np.testing.assert_allclose(
    jnp.concatenate(got), [0.693147, 25, 0.537430, 0.462570, 1.0, 26], atol=1e-5
  )


def slope(link, z, p, **knobs):
  return jax.grad(lambda z: link(z, jnp.array([p]), **knobs)[0])(jnp.array([z]))[0]


@pytest.mark.parametrize('p', [0.3, 0.5, 0.9])
def test_the_logistic_link_is_minimal_at_the_log_odds(p):
  minimum = np.log(p / (1 - p))
  assert slope(links.logistic, minimum, p) == pytest.approx(0, abs=1e-6)
  assert slope(links.logistic, minimum - 1, p) < 0 < slope(links.logistic, minimum + 1, p)


def test_conservative_dpo_has_a_finite_optimum():
  assert slope(links.logistic, 0.1 * 21.972, 0.9) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize('p', [0.0, 0.3, 1.0, 1.25])
def test_the_squared_link_is_minimal_at_the_labelled_target(p):
  assert slope(links.squared, (2 * p - 1) * 2.0, p, target=2.0) == pytest.approx(0, abs=1e-5)


def test_the_hinge_leaves_satisfied_pairs_alone():
  assert slope(links.hinge, 1.01, 1.0) == 0
  assert slope(links.hinge, 0.99, 1.0) == -1
  assert slope(links.hinge, -0.4, 0.0, threshold=0.5) == 1


@pytest.mark.parametrize('tau', [0.1, 0.7])
def test_ipo_scaling_identity(tau):
  """(h - 1/(2 tau))^2 = (1 - 2 tau h)^2 / (4 tau^2)."""
  h = jnp.linspace(-3, 3, 7)
  ones = jnp.ones(7)
  np.testing.assert_allclose(
    links.squared(h, ones, target=1 / (2 * tau)),
    links.squared(2 * tau * h, ones) / (4 * tau**2),
    rtol=1e-5,
  )


@pytest.mark.parametrize('link', links.TABLE.values())
def test_flipping_the_label_flips_the_margin(link):
  rng = np.random.default_rng(0)
  z, p = rng.normal(size=5), rng.uniform(size=5)
  np.testing.assert_allclose(link(z, p), link(-z, 1 - p), rtol=1e-6)


def test_robust_labels_are_unbiased_under_flips():
  """E over flips with rate eps of the loss at p = (1 - eps)/(1 - 2 eps) is the clean loss."""
  eps = 0.2
  p = (1 - eps) / (1 - 2 * eps)
  z = jnp.linspace(-2, 2, 5)
  noisy = (1 - eps) * links.logistic(z, jnp.full(5, p)) + eps * links.logistic(-z, jnp.full(5, p))
  np.testing.assert_allclose(noisy, links.logistic(z, jnp.ones(5)), rtol=1e-5)


def test_trap_18_masked_entries_stay_out_of_row_scores():
  mask = jnp.array([[True, False, True]])
  clean = jnp.array([[-1.0, 0.0, -3.0]])
  for junk in (jnp.nan, 1e9, -jnp.inf):
    dirty = clean.at[0, 1].set(junk)
    for score in implicit_rewards.TABLE.values():
      args = (dirty, dirty - 0.5, mask) if 'ratio' in score.__name__ else (dirty, mask)
      expected = (clean, clean - 0.5, mask) if 'ratio' in score.__name__ else (clean, mask)
      value, gradient = jax.value_and_grad(lambda x, s=score, a=args: s(x, *a[1:])[0])(args[0])
      assert value == score(*expected)[0]
      assert gradient[0, 1] == 0
      assert np.all(np.isfinite(gradient))


def test_a_row_without_tokens_scores_zero():
  empty = jnp.zeros((1, 2), bool)
  logp = jnp.full((1, 2), -1.0)
  for score in (implicit_rewards.logp_sum, implicit_rewards.logp_mean):
    np.testing.assert_array_equal(score(logp, empty), [0.0])


GROUPS = jnp.array([4, 1, 4, 1, 4])
REWARDS = jnp.array([1.0, 0.2, -0.5, 0.9, 0.0])
SCORES = jnp.array([0.3, -0.2, 0.1, 0.5, -0.7])


def consistency(score, center):
  return jnp.sum(pointwise.consistency(score, REWARDS, GROUPS, beta=0.5, center=center))


def test_the_descent_weight_of_consistency_is_the_residual():
  zeta = REWARDS / 0.5 - SCORES
  residual = zeta - pointwise.group_mean(zeta, GROUPS)
  gradient = jax.grad(consistency)(SCORES, pointwise.group_mean)
  np.testing.assert_allclose(-gradient, residual, rtol=1e-5, atol=1e-6)


def test_detaching_the_group_mean_changes_no_gradient():
  live = jax.grad(consistency)(SCORES, pointwise.group_mean)
  detached = jax.grad(consistency)(SCORES, pointwise.group_mean_detached)
  np.testing.assert_allclose(live, detached, rtol=1e-5, atol=1e-6)


def test_leave_one_out_scales_the_residuals_by_g_over_g_minus_one():
  got = pointwise.consistency(SCORES, REWARDS, GROUPS, beta=0.5, center=pointwise.leave_one_out)
  mean = pointwise.consistency(SCORES, REWARDS, GROUPS, beta=0.5)
  size = jnp.array([3, 2, 3, 2, 3])
  np.testing.assert_allclose(got, mean * (size / (size - 1)) ** 2, rtol=1e-5)


@pytest.mark.parametrize(
  'center', [c for c in pointwise.CENTERS.values() if c is not pointwise.zero]
)
def test_consistency_vanishes_at_the_tilted_anchor_whoever_sampled(center, x64):
  """score = log pi/anchor with pi = anchor exp(R / beta) / Z: every row fits, loss and gradient."""
  rewards = jnp.asarray(REWARDS, jnp.float64)
  log_z = jnp.array([0.7, -1.1, 0.7, -1.1, 0.7])
  score = rewards / 0.5 - log_z
  loss = lambda s: jnp.sum(pointwise.consistency(s, rewards, GROUPS, beta=0.5, center=center))
  value, gradient = jax.value_and_grad(loss)(score)
  np.testing.assert_allclose(value, 0, atol=1e-28)
  np.testing.assert_allclose(gradient, 0, atol=1e-14)


def test_an_undecided_label_pushes_nowhere_at_zero():
  half = jnp.array([0.5])
  for fn in (pointwise.logistic, pointwise.sigmoid, pointwise.squared):
    assert jax.grad(lambda z, f=fn: f(z, half)[0])(jnp.zeros(1))[0] == pytest.approx(0, abs=1e-7)


def test_the_clipped_value_error_stops_once_the_value_has_moved_enough():
  error = lambda v: penalties.clipped_value_error(v, jnp.zeros(1), jnp.ones(1), eps=0.2)[0]
  assert jax.grad(error)(jnp.array([0.1]))[0] == pytest.approx(-0.9)
  assert jax.grad(error)(jnp.array([0.3]))[0] == 0
  assert jax.grad(error)(jnp.array([-0.3]))[0] == pytest.approx(-1.3)
