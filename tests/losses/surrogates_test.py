"""Boundaries, limits and reductions of surrogates, ratios and weights."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad.losses import aggregation, ratios, selections, surrogates, weights
from polgrad.registry import call


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
  kept = surrogates.gradient_preserving(d, a, eps_low=np.inf, eps_high=np.inf)
  np.testing.assert_allclose(kept, expected, rtol=1e-6)


BOUNDED = [
  fn
  for fn in surrogates.TABLE.values()
  if {'eps_low', 'eps_high'} <= inspect.signature(fn).parameters.keys()
  and fn is not surrogates.two_level_clipped  # two times `dual_clipped`
]


@pytest.mark.parametrize('fn', BOUNDED, ids=lambda fn: fn.__name__)
def test_infinite_bounds_leave_value_and_gradient_finite(fn):
  log_ratio, advantages = np.random.default_rng(0).normal(size=(2, 8))

  def loss(log_ratio):
    logp = log_ratio - 1
    arrays = dict(log_ratio=log_ratio, logp=logp, behavior_logp=-np.ones(8), advantages=advantages)
    return call(functools.partial(fn, eps_low=np.inf, eps_high=np.inf), arrays).sum()

  value, gradient = jax.value_and_grad(loss)(jnp.asarray(log_ratio))
  assert np.isfinite(value) and np.isfinite(gradient).all()


def test_dual_clip_caps_the_loss_of_bad_tokens():
  d = jnp.log(jnp.array([0.5, 1.0, 2.0, 4.0]))
  loss = surrogates.dual_clipped(d, -jnp.ones(4), cap=3.0)
  np.testing.assert_allclose(loss, [0.8, 1, 2, 3], rtol=1e-6)


@pytest.mark.parametrize('fn', [surrogates.dual_clipped, surrogates.flipped])
@pytest.mark.parametrize('cap', [0.2, 1.0])
def test_a_cap_given_as_a_distance_from_one_is_refused(fn, cap):
  with pytest.raises(ValueError, match='absolute'):
    fn(jnp.zeros(1), jnp.ones(1), cap=cap)


@pytest.mark.parametrize(
  ('advantage', 'ratio', 'weight'),
  [
    *((1.0, 0.5, 2), (1.0, 0.1, 3), (1.0, 1.1, 1 / 1.1), (1.0, 1.3, 0)),
    *((-1.0, 1.1, -1.1), (-1.0, 9.0, -3), (-1.0, 0.7, 0)),
  ],
)
def test_aspo_teaches_neglected_good_tokens_most_and_a_cap_keeps_the_gradient(
  advantage, ratio, weight
):
  got = derivative(surrogates.flipped, np.log(ratio), advantage)
  np.testing.assert_allclose(got, weight, rtol=1e-6)


@pytest.mark.parametrize(
  ('advantage', 'ratio', 'weight'),
  [
    *((1.0, 0.1, 0.1), (1.0, 1.1, 1.1), (1.0, 1.3, 1.2), (1.0, 9.0, 1.2)),
    *((-1.0, 9.0, -9.0), (-1.0, 0.9, -0.9), (-1.0, 0.7, -0.6), (-1.0, 0.1, -0.6)),
  ],
)
def test_ce_gppo_keeps_a_bounded_gradient_of_tokens_that_ppo_clips(advantage, ratio, weight):
  got = derivative(surrogates.gradient_preserving, np.log(ratio), advantage)
  np.testing.assert_allclose(got, weight, rtol=1e-6)


def test_ce_gppo_without_its_betas_has_the_gradient_of_ppo():
  for d, a in np.random.default_rng(0).normal(size=(16, 2)):
    got = derivative(surrogates.gradient_preserving, d, a, beta_low=0.0, beta_high=0.0)
    np.testing.assert_allclose(got, derivative(surrogates.clipped, d, a), rtol=1e-6)


@pytest.mark.parametrize('beta', ['beta_low', 'beta_high'])
def test_a_scale_that_reverses_clipped_tokens_is_refused(beta):
  with pytest.raises(ValueError, match='negative'):
    surrogates.gradient_preserving(jnp.zeros(1), jnp.ones(1), **{beta: -0.5})


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
def test_gspo_token_has_value_and_gradient_of_the_sequence_form(eps, x64):
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


def test_the_sequence_ratio_has_gradient_through_the_own_token_only():
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


def test_a_row_of_one_turn_is_gspo_and_turns_of_one_token_are_ppo():
  d = jnp.array([[0.1, 0.6, -0.2, 0.0], [-0.5, 0.0, 0.0, 0.0]])
  at = jnp.broadcast_to(jnp.arange(4), d.shape)
  weight = jnp.arange(8.0).reshape(2, 4)

  def differentiate(level):
    return jax.value_and_grad(lambda d: jnp.sum(weight * jnp.exp(level(d))))(d)

  same = [
    (
      lambda d: ratios.turn_geometric(d, 0 * at, MASK),
      lambda d: ratios.sequence_geometric(d, MASK),
    ),
    (lambda d: ratios.turn_geometric(d, at, MASK), lambda d: ratios.token(d, MASK)),
  ]
  for turns, level in same:
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6),
      differentiate(turns),
      differentiate(level),
    )


def test_a_turn_that_goes_on_after_a_hole_is_one_turn():
  d = jnp.array([[0.1, 9.0, 0.5, -0.4]])
  mask = jnp.array([[True, False, True, True]])
  got = ratios.turn_geometric(d, jnp.array([[0, -1, 0, 3]]), mask)
  np.testing.assert_allclose(got, [[0.3, 0, 0.3, -0.4]], rtol=1e-6)


def test_a_product_counts_its_row_once_with_the_gradient_of_the_whole_sum(x64):
  """The row's loss is -A prod_t r_t, also when it is differentiated twice."""
  d = jnp.array([[0.1, 0.6, -0.2, 7.0], [-0.5, 3.0, 2.0, 1.0]])
  a = jnp.array([1.0, -0.5])

  def token_form(d):
    tiled = jnp.broadcast_to(a[:, None], d.shape)
    loss = surrogates.importance_weighted(ratios.sequence_product(d, MASK), tiled)
    return aggregation.sequence_mean(loss, MASK).value()

  def sequence_form(d):
    return -jnp.mean(a * jnp.exp(jnp.sum(jnp.where(MASK, d, 0), axis=-1)))

  for order in (lambda f: f, jax.grad, jax.hessian):
    np.testing.assert_allclose(order(token_form)(d), order(sequence_form)(d), rtol=1e-12)


@pytest.mark.parametrize(('advantage', 'log_ratio'), [(1.0, 0.105171), (-1.0, 0.181360)])
def test_gmpo_clips_the_tokens_before_their_mean(advantage, log_ratio):
  d = jnp.array([[0.1, 0.6, -0.2]])
  level = lambda d: ratios.sequence_geometric_clipped(
    d, jnp.full((1, 3), advantage), jnp.ones((1, 3), bool)
  )
  np.testing.assert_allclose(jnp.exp(level(d)), np.full((1, 3), 1 + log_ratio), rtol=1e-5)
  own = jax.grad(lambda d: jnp.sum(level(d)))(d)
  np.testing.assert_array_equal(own, [[1, 0 if advantage > 0 else 1, 1]])


def test_gmpo_without_a_bound_is_gspo_without_a_clip():
  d = jnp.array([[0.1, 0.6, -0.2, 0.0], [-0.5, 0.0, 0.0, 0.0]])
  a = jnp.broadcast_to(jnp.array([[1.0], [-1.0]]), d.shape)
  got = ratios.sequence_geometric_clipped(d, a, MASK, eps_low=np.inf, eps_high=np.inf)
  np.testing.assert_array_equal(got, ratios.sequence_geometric(d, MASK))


def test_humanline_silences_both_sides_and_keeps_the_bounds():
  d = jnp.array([-2.0, -1.0, -0.5, 0.0, 1.0, 1.5, 2.0])
  level = lambda d: ratios.clamped(d, jnp.ones(7, bool))
  np.testing.assert_array_equal(level(d), [-1, -1, -0.5, 0, 1, 1.5, 1.5])
  got = jax.grad(lambda d: jnp.sum(level(d)))(d)
  np.testing.assert_array_equal(got, [0, 1, 1, 1, 1, 1, 0])


@pytest.mark.parametrize(('low', 'high'), [(0.1, 1.5), (-1.0, -0.5)])
def test_a_clamp_that_silences_on_policy_tokens_is_refused(low, high):
  with pytest.raises(ValueError, match='low <= 0 <= high'):
    ratios.clamped(jnp.zeros(1), jnp.ones(1, bool), low=low, high=high)


def test_centred_log_ratios_have_mean_zero_under_the_old_policy(x64):
  """E_old[d] = -KL(old, new), which the exact divergence of the position undoes."""
  new, old = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (2, 8)))
  kl = jnp.sum(jnp.exp(old) * (old - new))
  centred = ratios.centered(new - old, jnp.full(8, kl), jnp.ones(8, bool))
  assert jnp.sum(jnp.exp(old) * (new - old)) < -0.1
  np.testing.assert_allclose(jnp.sum(jnp.exp(old) * centred), 0, atol=1e-12)


def test_two_sided_delta_is_dual_clipping():
  """min(r, delta) before PPO's minimum (arXiv:2505.07291)."""
  rng = np.random.default_rng(0)
  d, a = jnp.asarray(rng.normal(size=(2, 50)))
  r = jnp.exp(d)
  expected = -jnp.minimum(jnp.minimum(r, 1.5) * a, jnp.clip(r, 0.8, 1.2) * a)
  np.testing.assert_allclose(surrogates.dual_clipped(d, a, cap=1.5), expected, rtol=1e-6)


def test_kept_and_clipped_away_gradients_are_the_whole_importance_weighted_gradient():
  rng = np.random.default_rng(0)
  d, a = jnp.asarray(rng.normal(size=(2, 50)))
  gradient = lambda fn: jax.grad(lambda d: jnp.sum(fn(d, a)))(d)
  kept, away = gradient(surrogates.clipped), gradient(surrogates.clipped_away)
  assert 0 < np.count_nonzero(away) < 50
  np.testing.assert_array_equal(kept * away, np.zeros(50))
  np.testing.assert_allclose(kept + away, gradient(surrogates.importance_weighted), rtol=1e-6)


def test_rec_one_side_with_importance_weights_has_the_gradient_of_ppo():
  rng = np.random.default_rng(0)
  old, logp, a = jnp.asarray(rng.normal(size=(3, 50)))

  def rec(lp):
    weight = weights.one_sided(lp - old, a, low=0.7, high=1.3)
    return jnp.sum(weight * surrogates.truncated(lp, lp - old, a, cap=np.inf))

  ppo = lambda lp: jnp.sum(surrogates.clipped(lp - old, a, eps_low=0.3, eps_high=0.3))
  np.testing.assert_allclose(jax.grad(rec)(logp), jax.grad(ppo)(logp), rtol=1e-6)


def test_keep_masks_without_bounds_keep_everything_and_always_what_has_no_advantage():
  d = jnp.log(jnp.array([0.1, 0.5, 1.0, 2.0, 9.0]))
  for a in (jnp.ones(5), -jnp.ones(5)):
    np.testing.assert_array_equal(weights.one_sided(d, a, low=0.0, high=np.inf), np.ones(5))
  np.testing.assert_array_equal(weights.two_sided(d, low=0.0, high=np.inf), np.ones(5))
  np.testing.assert_array_equal(weights.one_sided(d, jnp.zeros(5)), np.ones(5))


def test_a_ring_keeps_what_is_far_on_the_side_that_its_advantage_opposes():
  d = jnp.log(jnp.array([0.3, 0.6, 1.0, 2.0, 4.0]))
  np.testing.assert_array_equal(weights.ring(d, jnp.ones(5)), [1, 0, 1, 0, 0])
  np.testing.assert_array_equal(weights.ring(d, -jnp.ones(5)), [0, 0, 1, 0, 1])


@pytest.mark.parametrize('floor', [-0.1, 6.0])
def test_a_floor_outside_zero_and_the_cap_is_refused(floor):
  with pytest.raises(ValueError, match='floor'):
    surrogates.truncated(jnp.zeros(1), jnp.zeros(1), jnp.ones(1), floor=floor)


@pytest.mark.parametrize('floor', [-0.1, 3.0])
@pytest.mark.parametrize(
  'fn',
  [
    weights.truncated_importance,
    weights.truncated_sequence_importance,
    weights.truncated_geometric_importance,
    selections.self_normalized,
  ],
)
def test_importance_weights_refuse_a_floor_outside_zero_and_the_cap(fn, floor):
  arrays = dict(proximal_logp=MASK * 0.0, behavior_logp=MASK * 0.0, mask=MASK)
  with pytest.raises(ValueError, match='floor'):
    call(functools.partial(fn, cap=2.0, floor=floor), arrays)


def test_sapo_weights_peak_above_one_and_are_the_advantage_on_policy():
  d = jnp.log(jnp.array([0.5, 1.0, 2.0]))
  gradient = lambda **knobs: (
    -jax.grad(lambda d: jnp.sum(surrogates.soft_gated(d, jnp.ones(3), **knobs)))(d)
  )
  np.testing.assert_allclose(gradient(), [0.4700, 1, 1.5729], atol=5e-5)
  np.testing.assert_allclose(gradient(tau_positive=1e-3), [0.5, 1, 2], rtol=1e-5)  # untamed
  with pytest.raises(ValueError, match='tau'):
    gradient(tau_positive=0.0)


@pytest.mark.parametrize(('rate', 'ratio'), [(0.25, 1 / 3), (0.5, 1.0), (0.75, 3.0)])
def test_nft_on_policy_is_dr_grpo(rate, ratio):
  signed = (1 - rate) * jnp.array([[1.0], [-1.0]])
  loss = lambda d: jnp.sum(surrogates.negative_aware(d, signed, jnp.array([rate, rate])))
  right, wrong = -jax.grad(loss)(jnp.zeros((2, 1)))[:, 0]
  np.testing.assert_allclose([right, wrong], [1 - rate, -rate], rtol=1e-6)
  np.testing.assert_allclose(-wrong / right, ratio, rtol=1e-6)


@pytest.mark.parametrize('rate', [0.0, 0.5, 1.0])
@pytest.mark.parametrize('log_ratio', [-20.0, 20.0])
def test_nft_is_finite_for_hopeless_and_solved_prompts(rate, log_ratio):
  d = jnp.full((2, 1), log_ratio)
  a = jnp.array([[1.0], [-1.0]])
  loss = lambda d: jnp.sum(surrogates.negative_aware(d, a, jnp.full(2, rate)))
  value, gradient = jax.value_and_grad(loss)(d)
  assert np.isfinite(value) and np.all(np.isfinite(gradient))
  assert gradient[1, 0] >= 0  # a wrong token never becomes more likely


@pytest.mark.parametrize(
  ('log_ratio', 'right', 'wrong'),
  [(0.0, 0.02, -0.98), (9.9, 0.02, -19531.763), (10.0, 0.02, -21585.94), (10.1, 0.0, 0.0)],
)
def test_nft_cuts_the_log_ratio_at_ten(log_ratio, right, wrong, x64):
  """c = 1 - q = .02: a right token weighs c, a wrong one -c q r / (1 - q) = -.98 r where r >= 1."""
  signed = 0.02 * jnp.array([[1.0], [-1.0]])
  loss = lambda d: jnp.sum(surrogates.negative_aware(d, signed, jnp.array([0.98, 0.98])))
  value, gradient = jax.value_and_grad(loss)(jnp.full((2, 1), log_ratio))
  np.testing.assert_allclose(-gradient[:, 0], [right, wrong], rtol=1e-6)
  np.testing.assert_allclose(value, -0.02 * min(log_ratio, 10.0), atol=1e-12)


def test_mix_ppg_stands_around_the_proximal_policy(x64):
  """One row of the last policy is PPO; one of an older policy is clipped at its centre +- eps."""
  logp, a = jnp.log(jnp.array([0.5, 0.5])), jnp.ones(2)
  fresh = jnp.log(jnp.array([0.45, 0.3]))
  got = surrogates.centered_clip(logp, fresh, fresh, a)
  np.testing.assert_allclose(got, surrogates.clipped(logp - fresh, a), rtol=1e-12)
  older = jnp.log(jnp.array([0.2, 0.2]))
  got = surrogates.centered_clip(logp, older, fresh, a)
  np.testing.assert_allclose(got, [-0.45 / 0.2 - 0.2, -0.3 / 0.2 - 0.2], rtol=1e-12)


def test_luffy_teaches_most_where_the_probability_is_gamma():
  p = jnp.array([0.01, 0.1, 0.9])
  loss = lambda lp: jnp.sum(surrogates.probability_shaped(lp, jnp.ones(3)))
  np.testing.assert_allclose(-jax.grad(loss)(jnp.log(p)), [0.0826, 0.25, 0.09], atol=5e-5)
  with pytest.raises(ValueError, match='gamma'):
    surrogates.probability_shaped(p, p, gamma=0.0)


def soft_tree(beta):
  """All paths of a binary tree of depth 3: (logp, reference_logp, values, rewards) at the optimum."""
  rng = np.random.default_rng(0)
  step = np.log(rng.dirichlet(np.ones(2), size=7))  # of the reference, by node in heap order
  paths = np.array([[i >> 2, (i >> 1) & 1, i & 1] for i in range(8)])
  nodes = np.stack([0 * paths[:, 0], 1 + paths[:, 0], 3 + 2 * paths[:, 0] + paths[:, 1]], axis=1)
  reference = step[nodes, paths]
  rewards = rng.normal(size=8)
  soft = [beta * reference.sum(1) + rewards]  # beta log of the mass below the root, by leaf
  value = lambda b, t: (
    beta
    * np.log(
      sum(np.exp(soft[0][i] / beta) for i in range(8) if np.all(paths[i, :t] == paths[b, :t]))
    )
    - beta * reference[b, :t].sum()
  )
  values = np.array([[value(b, t) for t in range(4)] for b in range(8)])
  values[:, 3] = rewards
  logp = reference + np.diff(values, axis=1) / beta
  return logp, reference, values[:, :3], rewards


@pytest.mark.parametrize('window', [1, 2, 3, 1000])
def test_every_sub_path_is_consistent_at_the_soft_optimum_only(window, x64):
  logp, reference, values, rewards = soft_tree(0.5)
  hole = lambda x: jnp.insert(jnp.asarray(x), 1, 7.0, axis=1)  # tool output between the tokens
  mask = jnp.broadcast_to(jnp.array([True, False, True, True]), (8, 4))
  np.testing.assert_allclose(np.exp(logp).reshape(4, 2, 3)[:, :, 2].sum(1), np.ones(4))
  loss = lambda logp, values: surrogates.path_consistency(
    hole(logp), hole(reference), hole(values), jnp.asarray(rewards), mask, beta=0.5, window=window
  )
  np.testing.assert_allclose(loss(logp, values), np.zeros((8, 4)), atol=1e-20)
  assert np.all(np.max(loss(reference, values), axis=1) > 1e-4)
  assert np.all(np.max(loss(logp, values + 0.1), axis=1) > 1e-4)


def test_a_window_without_tokens_is_refused():
  x = jnp.zeros((1, 1))
  with pytest.raises(ValueError, match='window'):
    surrogates.path_consistency(x, x, x, jnp.zeros(1), x == 0, window=0)


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
    weights.masked_sequence_importance(logp, logp, mask),
    weights.geometric_band(logp, logp, mask),
    weights.tapered(logp - logp, -jnp.ones(1)),
    weights.gamma_shaped(logp - logp, -mask.astype(float)),
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


def test_a_stale_row_is_compared_with_a_policy_nearer_to_the_live_one(x64):
  """Ratios of staleness 1, 2 and 5; times the weight they are the whole ratio (arXiv:2512.06547)."""
  behavior, logp = jnp.full((3, 1), -1.2), jnp.full((3, 1), -0.7)
  proximal = ratios.interpolated(logp, behavior, jnp.array([1.0, 2.0, 5.0]))
  ratio = jnp.exp(logp - proximal)
  np.testing.assert_allclose(ratio[:, 0], [1.648721, 1.284025, 1.105171], rtol=1e-6)
  whole = ratio * weights.truncated_importance(proximal, behavior, cap=np.inf)
  np.testing.assert_allclose(whole, np.full((3, 1), np.exp(0.5)), rtol=1e-12)


def test_row_weights_drop_rows_by_the_product_and_by_the_geometric_mean():
  rho = jnp.log(jnp.array([[2.0, 1.4], [2.0, 2.0], [0.5, 0.5], [1.0, 1.0005]]))
  zeros, mask = jnp.zeros((4, 2)), jnp.ones((4, 2), bool)
  got = weights.masked_sequence_importance(rho, zeros, mask)
  np.testing.assert_allclose(got[:, 0], [2.8, 0, 0.25, 1.0005], rtol=1e-6)
  got = weights.masked_sequence_importance(rho, zeros, mask, low=0.5)
  np.testing.assert_allclose(got[:, 0], [2.8, 0, 0, 1.0005], rtol=1e-6)
  np.testing.assert_array_equal(weights.geometric_band(rho, zeros, mask)[:, 0], [0, 0, 0, 1])


def test_a_probability_trust_region_leaves_rare_tokens_free():
  """From 0.001 to 0.1 is a factor of 100 and 0.1 of probability; from 0.5 to 0.75 the reverse."""
  old, new = jnp.log(jnp.array([0.001, 0.5])), jnp.log(jnp.array([0.1, 0.75]))
  kept = lambda new, old, a: weights.probability_one_sided(new, old, jnp.full(2, a))
  np.testing.assert_array_equal(kept(new, old, 1.0), [1, 0])
  np.testing.assert_array_equal(kept(new, old, -1.0), [1, 1])
  np.testing.assert_array_equal(kept(old, new, -1.0), [1, 0])


def test_of_rows_that_the_policy_has_left_only_the_good_ones_teach():
  logp, old = jnp.array([[-2.0, -1.2]] * 2), jnp.array([[-1.0, -1.0]] * 2)
  a, mask = jnp.array([[1.0, 1.0], [-1.0, -1.0]]), jnp.ones((2, 2), bool)
  kept = lambda limit: weights.near_or_positive(logp, old, a, mask, limit=limit)[:, 0]
  np.testing.assert_array_equal(kept(0.59), [1, 0])
  np.testing.assert_array_equal(kept(0.61), [1, 1])


def test_vespo_weights_peak_at_power_over_rate():
  total = jnp.linspace(-3.0, 3.0, 601)[:, None]
  for sign, peak in ((1.0, 2 / 3), (-1.0, 1.5)):
    weight = weights.gamma_shaped(total, sign * jnp.ones_like(total))[:, 0]
    np.testing.assert_allclose(jnp.exp(total[jnp.argmax(weight), 0]), peak, rtol=0.01)
    assert weight[-1] < 1e-3 and weight[0] < 0.1


@pytest.mark.parametrize(('bounds', 'surrogate'), [((0, np.inf), 'importance'), ((1, 1), 'plain')])
def test_bounds_of_topr_reach_importance_sampling_and_plain_reinforce(bounds, surrogate):
  logp, old = jnp.array([[-1.0], [-0.3]]), jnp.array([[-0.4], [-2.0]])
  rewards, mask = jnp.array([1.0, -1.0]), jnp.ones((2, 1), bool)
  low, high = map(float, bounds)
  knobs = dict(positive_low=low, positive_high=high, negative_low=low, negative_high=high)
  ratio = jnp.exp(logp - old) if surrogate == 'importance' else jnp.ones((2, 1))
  for level in (ratios.sequence_product, ratios.token):
    weight = weights.tapered(level(logp - old, mask), rewards, **knobs)
    np.testing.assert_allclose(weight, ratio, rtol=1e-6)


@pytest.mark.parametrize(('negative_low', 'gaps'), [(1.0, (148.8, 1498.8)), (0.0, (5.67, 8.00))])
def test_bad_data_drives_the_policy_away_for_ever_unless_it_is_tapered(negative_low, gaps):
  """Two arms drawn evenly, rewards -1 and 0: without the taper the logit gap grows linearly."""
  rewards, mask = jnp.array([-1.0, 0.0]), jnp.ones((2, 1), bool)
  old = jnp.full((2, 1), np.log(0.5))

  def loss(logits):
    logp = jax.nn.log_softmax(logits)[:, None]
    log_ratio = ratios.sequence_product(logp - old, mask)
    weight = weights.tapered(log_ratio, rewards, negative_low=negative_low)
    return aggregation.sequence_sum(
      weight * surrogates.reinforce(logp, rewards[:, None]), mask
    ).value()

  step = lambda logits, _: (logits - 0.5 * jax.grad(loss)(logits),) * 2
  _, logits = jax.lax.scan(step, jnp.zeros(2), length=3000)
  gap = logits[:, 1] - logits[:, 0]
  np.testing.assert_allclose([gap[299], gap[2999]], gaps, rtol=2e-3)
