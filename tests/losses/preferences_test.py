"""Links, pointwise losses, scores and penalties: minimisers, published numbers, identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import registry
from polgrad.losses import implicit_rewards, penalties, pointwise, preference_losses

# Row log-probabilities: chosen and rejected, policy and reference.
PW, PL, RW, RL = (jnp.array([[x]]) for x in (-10.0, -12.0, -9.0, -11.0))
ONE = jnp.ones((1, 1), bool)
DW = implicit_rewards.log_ratio_sum(PW, RW, ONE)
DL = implicit_rewards.log_ratio_sum(PL, RL, ONE)
CHOSEN, REJECTED = jnp.ones(1), jnp.zeros(1)


def test_published_numbers_of_one_pair():
  dpo = preference_losses.logistic(0.1 * (DW - DL), CHOSEN)
  ipo = preference_losses.squared(DW - DL, CHOSEN, target=1 / (2 * 0.1))
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
  assert slope(preference_losses.logistic, minimum, p) == pytest.approx(0, abs=1e-6)
  assert (
    slope(preference_losses.logistic, minimum - 1, p)
    < 0
    < slope(preference_losses.logistic, minimum + 1, p)
  )


def test_conservative_dpo_has_a_finite_optimum():
  assert slope(preference_losses.logistic, 0.1 * 21.972, 0.9) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize('p', [0.0, 0.3, 1.0, 1.25])
def test_the_squared_link_is_minimal_at_the_labelled_target(p):
  assert slope(preference_losses.squared, (2 * p - 1) * 2.0, p, target=2.0) == pytest.approx(
    0, abs=1e-5
  )


def test_the_hinge_leaves_satisfied_pairs_alone():
  assert slope(preference_losses.hinge, 1.01, 1.0) == 0
  assert slope(preference_losses.hinge, 0.99, 1.0) == -1
  assert slope(preference_losses.hinge, -0.4, 0.0, threshold=0.5) == 1


@pytest.mark.parametrize('tau', [0.1, 0.7])
def test_ipo_scaling_identity(tau):
  """(h - 1/(2 tau))^2 = (1 - 2 tau h)^2 / (4 tau^2)."""
  h = jnp.linspace(-3, 3, 7)
  ones = jnp.ones(7)
  np.testing.assert_allclose(
    preference_losses.squared(h, ones, target=1 / (2 * tau)),
    preference_losses.squared(2 * tau * h, ones) / (4 * tau**2),
    rtol=1e-5,
  )


@pytest.mark.parametrize('link', preference_losses.TABLE.values())
def test_flipping_the_label_flips_the_margin(link):
  rng = np.random.default_rng(0)
  z, p = rng.normal(size=5), rng.uniform(size=5)
  np.testing.assert_allclose(link(z, p), link(-z, 1 - p), rtol=1e-6, atol=1e-7)


def test_robust_labels_are_unbiased_under_flips():
  """E over flips with rate eps of the loss at p = (1 - eps)/(1 - 2 eps) is the clean loss."""
  eps = 0.2
  p = (1 - eps) / (1 - 2 * eps)
  z = jnp.linspace(-2, 2, 5)
  noisy = (1 - eps) * preference_losses.logistic(
    z, jnp.full(5, p)
  ) + eps * preference_losses.logistic(-z, jnp.full(5, p))
  np.testing.assert_allclose(noisy, preference_losses.logistic(z, jnp.ones(5)), rtol=1e-5)


def test_masked_entries_stay_out_of_row_scores():
  mask = jnp.array([[True, False, True]])
  clean = jnp.array([[-1.0, 0.0, -3.0]])
  for junk in (jnp.nan, 1e9, -jnp.inf):
    dirty = clean.at[0, 1].set(junk)
    for score in implicit_rewards.TABLE.values():
      names = registry.inputs(score)
      if 'mask' not in names:
        continue  # the score of a row
      args, expected = (
        [mask if n == 'mask' else x - 0.5 * i for i, n in enumerate(names)] for x in (dirty, clean)
      )
      value, gradient = jax.value_and_grad(lambda x, s=score, a=args: s(x, *a[1:])[0])(args[0])
      assert value == score(*expected)[0]
      assert gradient[0, 1] == 0
      assert np.all(np.isfinite(gradient))


def test_a_row_without_tokens_scores_zero():
  empty = jnp.zeros((1, 2), bool)
  logp = jnp.full((1, 2), -1.0)
  for score in (implicit_rewards.logp_sum, implicit_rewards.logp_mean):
    np.testing.assert_array_equal(score(logp, empty), [0.0])


def test_an_undecided_label_pushes_nowhere_at_zero():
  half = jnp.array([0.5])
  for fn in (pointwise.logistic, pointwise.sigmoid, pointwise.squared):
    assert jax.grad(lambda z, f=fn: f(z, half)[0])(jnp.zeros(1))[0] == pytest.approx(0, abs=1e-7)


def test_the_clipped_value_error_stops_once_the_value_has_moved_enough():
  error = lambda v: penalties.clipped_value_error(v, jnp.zeros(1), jnp.ones(1), eps=0.2)[0]
  assert jax.grad(error)(jnp.array([0.1]))[0] == pytest.approx(-0.9)
  assert jax.grad(error)(jnp.array([0.3]))[0] == 0
  assert jax.grad(error)(jnp.array([-0.3]))[0] == pytest.approx(-1.3)


def test_the_first_row_of_logits_gives_the_value_of_a_bellman_residual():
  """The log-normaliser of later tokens, and of masked ones before the first, has no say."""
  mask = jnp.array([[False, True, True, True], [False] * 4])
  zeros = jnp.zeros((2, 4))
  value = lambda x: implicit_rewards.bellman_sum(zeros, zeros, x, mask)
  normalizer = jnp.array([[9.0, 2.0, 3.0, 4.0]] * 2)
  np.testing.assert_array_equal(value(normalizer), [2, 0])
  gradient = jax.grad(lambda x: jnp.sum(value(x)))(normalizer)
  np.testing.assert_array_equal(gradient, [[0, 1, 0, 0], [0] * 4])


PAIRED = [pointwise.paired_product_clip, pointwise.paired_joint_clip]
OLD_LOGP = jnp.array([[-1.0, -0.5], [-0.2, -1.5], [-2.0, -0.1]])
EVERY = jnp.ones((3, 2), bool)


def pair_loss(loss, logp, rewards, groups=(0, 0, 1), **knobs):
  return loss(logp, OLD_LOGP, jnp.asarray(rewards), jnp.array(groups), EVERY, **knobs)


@pytest.mark.parametrize('loss', PAIRED)
def test_on_policy_a_pair_has_the_pairwise_policy_gradient(loss):
  """The weight of a row is half its reward above the other's; a row alone has none."""
  gradient = jax.grad(lambda x: jnp.mean(pair_loss(loss, x, [1.0, -0.5, 7.0])[:2]))(OLD_LOGP)
  np.testing.assert_allclose(-gradient, [[0.75] * 2, [-0.75] * 2, [0] * 2], rtol=1e-6)


@pytest.mark.parametrize('loss', PAIRED)
def test_a_constant_added_to_the_rewards_of_a_pair_changes_nothing(loss):
  moved = OLD_LOGP + jnp.array([[0.1, -0.3], [0.0, 0.2], [0.1, 0.1]])
  a, b = (pair_loss(loss, moved, [1.0 + c, -0.5 + c, 3.0]) for c in (0.0, 4.0))
  np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize('groups', [(0, 1, 2), (0, 0, 0)])
@pytest.mark.parametrize('loss', PAIRED)
def test_groups_that_are_no_pair_have_no_pairwise_loss(loss, groups):
  got = pair_loss(loss, OLD_LOGP + 0.3, [1.0, -0.5, 7.0], groups)
  np.testing.assert_array_equal(got, [0, 0, 0])


@pytest.mark.parametrize(('loss', 'knob'), [(PAIRED[0], 'eps'), (PAIRED[1], 'delta')])
def test_without_clipping_a_pair_is_weighted_by_the_product_of_both_ratios(loss, knob):
  shift = jnp.array([[0.4, 0.2], [-0.1, 0.3], [0, 0]])
  product = np.exp(0.8)
  gradient = jax.grad(
    lambda x: jnp.mean(pair_loss(loss, x, [1.0, -0.5, 0.0], **{knob: np.inf})[:2])
  )(OLD_LOGP + shift)
  np.testing.assert_allclose(-gradient[:2, 0], [0.75 * product, -0.75 * product], rtol=1e-5)


def test_a_selected_log_ratio_of_zero_has_no_gradient():
  """KL-Cov is silent in the first minibatch of an update."""
  penalty = lambda d: jnp.sum(penalties.selected_absolute(d, jnp.array([True, True, False])))
  np.testing.assert_array_equal(jax.grad(penalty)(jnp.array([0.0, -2.0, 3.0])), [0, -1, 0])


def test_the_entropy_band_pulls_back_from_outside_and_leaves_the_inside_alone():
  entropy = jnp.array([0.5, 1.0, 1.5])
  pull = jax.grad(lambda h, mean: jnp.sum(penalties.entropy_band(h, mean)))
  np.testing.assert_array_equal(pull(entropy, jnp.array(1.0)), [-1, 0, 1])
  np.testing.assert_array_equal(pull(entropy, jnp.array(0.0)), [0, 0, 0])


def test_the_published_entropy_band_is_a_constant_and_needs_a_history():
  entropy = jnp.array([0.5, 1.0, 1.5])
  band = penalties.entropy_band_published
  np.testing.assert_allclose(band(entropy, jnp.array(1.0), height=0.05), [0.05, 0, 0.05])
  np.testing.assert_array_equal(band(entropy, jnp.array(0.0)), [0, 0, 0])
  gradient = jax.grad(lambda h: jnp.sum(band(h, jnp.array(1.0))))(entropy)
  np.testing.assert_array_equal(gradient, [0, 0, 0])
