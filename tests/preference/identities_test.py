"""Pair methods: reductions to each other, optima that theory knows, and published numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import methods, objectives, optim
from polgrad.losses import (
  implicit_rewards,
  logit_stats,
  pair_offsets,
  pair_weights,
  preference_losses,
  score_shapes,
)
from polgrad.registry import bind, part
from tests.preference import harness

pytestmark = pytest.mark.usefixtures('x64')


def found(method, x=None):
  """The loss and its gradient by the log-probs."""
  x = harness.random_arrays(method) if x is None else x
  value, gradient = harness.value_and_gradient(method, x)
  return np.append(gradient['logp'].reshape(-1), value)


def one_token(**arrays):
  """Pairs of rows of one token, the first one chosen, from arrays of up to eight rows.

  They lie in the first column of arrays of the harness's shape, so all tests compile the same programs.
  """
  rows = max(len(a) for a in arrays.values())
  x = {name: first_column(a) for name, a in arrays.items()}
  mask = np.zeros((harness.ROWS, harness.LENGTH), bool)
  mask[:rows, 0] = True
  return x | {'label': np.tile([1.0, 0.0], harness.ROWS // 2), 'mask': mask}


def first_column(a):
  """Up to eight numbers as the first column of [8, 5]."""
  x = np.zeros((harness.ROWS, harness.LENGTH))
  x[: len(a), 0] = a
  return x


def by_token(method, x):
  """The gradient of the loss by the log-prob of every token, [8, 5]."""
  return harness.value_and_gradient(method, x)[1]['logp']


# Each row: a method, another one whose loss is the same, and a factor of the second.
DPO = methods.dpo
SAME = {
  'f-DPO of the reverse KL is DPO': (methods.f_dpo(divergence='reverse_kl', beta=0.1), DPO()),
  'an alpha of 0 is the reverse KL': (
    methods.f_dpo(divergence='alpha', alpha=0.0, beta=0.1),
    DPO(),
  ),
  'an alpha of 1 is the forward KL': (
    methods.f_dpo(divergence='alpha', alpha=1.0, beta=0.1),
    methods.f_dpo(divergence='forward_kl', beta=0.1),
  ),
  'chiPO far from its bound is f-DPO': (
    methods.chipo(reward_range=1e6, beta=0.2),
    methods.f_dpo(divergence='chi_square_kl', beta=0.2),
  ),
  'chiPO without the chi-square part is DPO': (methods.chipo(reward_range=1e6, chi=0.0), DPO()),
  'robust DPO without flips is DPO': (methods.robust_dpo(flips=0.0), DPO()),
  'robust DPO is a negative label smoothing': (
    methods.robust_dpo(flips=0.2),
    DPO(label_smoothing=-0.2 / 0.6),
  ),
  'GPO with the logistic link is DPO': (methods.gpo(link='logistic'), DPO()),
  'GPO with the square is IPO, scaled': (
    methods.gpo(link='squared', beta=0.6),
    methods.ipo(tau=0.3),
    0.6**2,
  ),
  'GPO with the hinge is RSO': (methods.gpo(link='hinge', beta=0.05), methods.rso()),
  'DPOP without a penalty is DPO': (methods.dpop(penalty=0.0, beta=0.1), DPO()),
  'R-DPO that ignores lengths is DPO': (methods.rdpo(alpha=0.0), DPO()),
  'ODPO that ignores margins is DPO': (methods.odpo(alpha=0.0), DPO()),
  'RPO without likelihood is DPO': (methods.rpo(nll_coefficient=0.0, beta=0.1), DPO()),
  'TR-DPO has the loss of DPO': (methods.tr_dpo(beta=0.1), DPO()),
  'Step-DPO has the loss of DPO': (methods.step_dpo(beta=0.1), DPO()),
  'AlphaPO with alpha 0 is SimPO': (
    methods.alphapo(alpha=0.0, beta=2.0, gamma=0.5),
    methods.simpo(),
  ),
  'contrastive preferences without damping are SimPO': (
    methods.contrastive_preference(damping=1.0),
    methods.simpo(beta=10.0, gamma=0.0),
  ),
}


@pytest.mark.parametrize('name', SAME)
def test_methods_that_are_the_same(name):
  first, second, *factor = SAME[name]
  x = harness.random_arrays(first) | harness.random_arrays(second)
  wanted = np.prod(factor) * found(second, x)
  np.testing.assert_allclose(found(first, x), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
  ('near', 'limit'),
  [
    (methods.f_dpo(divergence='alpha', alpha=1e-7, beta=0.1), DPO()),
    (methods.alphapo(alpha=1e-7, beta=2.0, gamma=0.5), methods.simpo()),
    (methods.chipo(reward_range=1e6, chi=1e-8), DPO()),
  ],
)
def test_methods_that_are_the_same_in_the_limit(near, limit):
  np.testing.assert_allclose(found(near), found(limit), atol=1e-6)


def test_rows_of_one_token_have_no_length_to_normalise():
  rng = np.random.default_rng(0)
  x = one_token(logp=-rng.random(8), reference_logp=-rng.random(8))
  same = lambda a, b: np.testing.assert_allclose(found(a, x), found(b, x), rtol=1e-12)
  same(methods.dpo_length_normalized(beta=0.1), DPO())
  same(methods.ipo(per_token=True), methods.ipo())
  same(methods.cpo(nll_coefficient=0.0), methods.simpo(beta=0.1, gamma=0.0))
  same(methods.rpo(per_token=True), methods.rpo(per_token=False))


PUBLISHED = [
  (methods.dpo(beta=0.1), 0.693147),
  (methods.dpop(beta=0.1, penalty=5.0), 0.974077),
  (methods.ipo(tau=0.1), 25.0),
  (methods.discopop(), 0.846574),
]


@pytest.mark.parametrize(('method', 'value'), PUBLISHED)
def test_numbers_of_one_pair(method, value):
  """log pi = -10, -12 and log reference = -9, -11: the margin is 0."""
  x = one_token(logp=[-10, -12], reference_logp=[-9, -11])
  assert method.loss(**x)[0] == pytest.approx(value, abs=1e-6)


# Links.

# -l'(0) and l''(0) of every link.
AT_ZERO = {
  preference_losses.logistic: (0.5, 0.25),
  preference_losses.hinge: (1.0, 0.0),
  preference_losses.squared: (2.0, 2.0),
  preference_losses.exponential: (1.0, 1.0),
  preference_losses.truncated_square: (2.0, 2.0),
  preference_losses.savage: (0.25, 0.125),
  preference_losses.sigmoid: (0.25, 0.0),
}


def slopes(link, z, p=1.0, **knobs):
  """l'(z) at up to sixteen z."""
  padded = np.zeros(16)
  padded[: len(z)] = z
  found = jax.grad(lambda z: jnp.sum(link(z, jnp.full(16, p), **knobs)))(jnp.asarray(padded))
  return np.asarray(found)[: len(z)]


@pytest.mark.parametrize('link', AT_ZERO)
def test_slope_and_curvature_of_a_link_at_zero(link):
  h = 1e-4
  low, middle, high = slopes(link, [-h, 0.0, h])
  np.testing.assert_allclose([-middle, (high - low) / (2 * h)], AT_ZERO[link], atol=1e-7)


def test_gradient_weights_of_the_links():
  z = np.linspace(-3, 3, 13)
  s, t = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(z))
  eps = 0.01
  wanted = {
    preference_losses.exponential: np.exp(-z),
    preference_losses.truncated_square: 2 * np.maximum(0, 1 - z),
    preference_losses.savage: 2 * t**2 * s,
    preference_losses.sigmoid: s * t,
    functools.partial(preference_losses.clipped_logistic, bound=1.2): t * (np.abs(z) < 1.2),
  }
  for link, weight in wanted.items():
    np.testing.assert_allclose(-slopes(link, z), weight, atol=1e-12)
  exo = -slopes(preference_losses.reverse_kl, z, 1 - eps)
  np.testing.assert_allclose(exo, s * t * (np.log((1 - eps) / eps) - z), atol=1e-12)


def test_the_modulated_link_increases_in_an_interval_around_zero():
  """A local minimum on the wrong side of 0 is part of what DiscoPOP found."""
  z = np.array([-0.2, -0.12, -0.116, 0.0, 0.07, 0.074, 0.2])
  signs = np.sign(slopes(preference_losses.modulated, z))
  np.testing.assert_array_equal(signs, [-1, -1, 1, 1, 1, -1, -1])
  far = slopes(preference_losses.modulated, [-500.0, 500.0])
  np.testing.assert_allclose(far, [-1, 0], atol=1e-12)


def test_exo_and_smoothed_dpo_have_the_same_finite_optimum():
  """h = log((1 - eps) / eps) / beta: 21.972 for eps = 0.1 and beta = 0.1."""
  h = np.log(0.9 / 0.1) / 0.1
  assert h == pytest.approx(21.972, abs=1e-3)
  x = one_token(logp=[-1.0, -1.0 - h], reference_logp=[-1.0, -1.0])
  for method in (methods.dpo(label_smoothing=0.1), methods.exo_pref(beta=0.1, eps=0.1)):
    np.testing.assert_allclose(found(method, x)[:-1], 0, atol=1e-12)


def test_robust_dpo_is_dpo_on_the_right_labels_on_average():
  x = harness.random_arrays(DPO()) | {'label': np.tile([1.0, 0.0], 4)}
  flipped = x | {'label': np.tile([0.0, 1.0], 4)}
  robust = methods.robust_dpo(flips=0.3)
  mean = 0.7 * found(robust, x) + 0.3 * found(robust, flipped)
  np.testing.assert_allclose(mean, found(DPO(), x), rtol=1e-9)


# Divergences. Each row: f(u), f'(u) up to a constant as a shape of log u, f'(u) in NumPy, and u f''(u).
GENERATORS = {
  'reverse_kl': (lambda u: u * jnp.log(u), score_shapes.identity, np.log, np.ones_like),
  'forward_kl': (lambda u: -jnp.log(u), score_shapes.forward_kl, lambda u: -1 / u, lambda u: 1 / u),
  'jensen_shannon': (
    lambda u: u * jnp.log(u) - (u + 1) * jnp.log((u + 1) / 2),
    score_shapes.jensen_shannon,
    lambda u: np.log(2 * u / (1 + u)),
    lambda u: 1 / (1 + u),
  ),
  'alpha': (
    lambda u: (jnp.sqrt(u) - 0.5 * u - 0.5) / (0.5 * -0.5),
    score_shapes.alpha_divergence,
    lambda u: 2 - 2 / np.sqrt(u),
    lambda u: u**-0.5,
  ),
  'chi_square_kl': (
    lambda u: (u - 1) ** 2 / 2 + u * jnp.log(u),
    score_shapes.chi_square_kl,
    lambda u: u + np.log(u),
    lambda u: 1 + u,
  ),
}
# The best policy for the rewards (1, 0.3, -0.5, 0.1), the reference (0.4, 0.3, 0.2, 0.1), beta = 1.
OPTIMA = {
  'reverse_kl': [0.6307, 0.2349, 0.0704, 0.0641],
  'forward_kl': [0.6192, 0.2229, 0.0932, 0.0647],
  'jensen_shannon': [0.7818, 0.1468, 0.0346, 0.0368],
  'alpha': [0.6257, 0.2270, 0.0833, 0.0640],
  'chi_square_kl': [0.5193, 0.2793, 0.1178, 0.0837],
}
REWARD, REFERENCE = np.array([1.0, 0.3, -0.5, 0.1]), np.array([0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize('name', GENERATORS)
def test_a_shape_is_the_derivative_of_its_generator(name):
  f, shape, _, slope = GENERATORS[name]
  u = jnp.asarray([0.2, 0.7, 1.0, 3.0])
  derivative = jax.vmap(jax.grad(f))(u)
  constant = derivative - shape(jnp.log(u))
  np.testing.assert_allclose(constant, constant[0], atol=1e-12)
  by_score = jax.vmap(jax.grad(shape))(jnp.log(u))
  np.testing.assert_allclose(by_score, slope(np.asarray(u)), rtol=1e-12)


@pytest.mark.parametrize('name', GENERATORS)
def test_the_best_policy_has_the_reward_as_its_shaped_score(name):
  """r - f'(pi / reference) is the same for all arms, and f-DPO on all pairs with Bradley-Terry labels
  has no gradient there."""
  _, shape, derivative, _ = GENERATORS[name]
  low, high = -9.0, 9.0
  for _ in range(60):  # the multiplier of sum pi = 1
    level = (low + high) / 2
    pi = arms(derivative, REWARD - level)
    low, high = (level, high) if pi.sum() > 1 else (low, level)
  np.testing.assert_allclose(pi, OPTIMA[name], atol=1e-4)
  rest = REWARD - np.asarray(shape(jnp.log(pi / REFERENCE)))
  np.testing.assert_allclose(rest, rest[0], atol=1e-9)
  method = methods.f_dpo(divergence=name, beta=1.0)
  np.testing.assert_allclose(gradient_of_all_pairs(method, pi, bradley_terry()), 0, atol=1e-9)


def arms(derivative, wanted):
  """The policy (not normalised) with f'(pi / reference) = wanted, by bisection of log u."""
  low, high = np.full(4, -15.0), np.full(4, 15.0)
  for _ in range(60):
    middle = (low + high) / 2
    above = derivative(np.exp(middle)) > wanted
    low, high = np.where(above, low, middle), np.where(above, middle, high)
  return REFERENCE * np.exp(low)


def bradley_terry():
  return 1 / (1 + np.exp(REWARD[None, :] - REWARD[:, None]))


def gradient_of_all_pairs(method, pi, preference, mu=None):
  """The gradient, by the logits of the policy, of the loss over all pairs of different arms.

  A pair of soft labels counts the same in both orders.

  Args:
    pi: [4], the policy.
    preference: [4, 4], probability that the first arm is preferred.
    mu: [4], the pair (i, j) has the weight mu_i mu_j (None: all pairs count the same).
  """
  if mu is not None:
    method.objective.weights = {'data': part(pair_weights.given)}
  gradient = 0
  for first, second in (([0, 0, 0], [1, 2, 3]), ([1, 1, 2], [2, 3, 3])):
    both = np.stack([first, second], axis=1).reshape(-1)
    x = one_token(reference_logp=np.log(REFERENCE)[both])
    label = preference[first, second]
    x['label'] = np.append(np.stack([label, 1 - label], axis=1), [1, 0])
    if mu is not None:
      x['weights'] = np.append(np.repeat(mu[first] * mu[second], 2), [0, 0])

    x['logp'] = first_column(np.log(pi)[both])
    # The log-prob of arm i has the gradient e_i - pi by the logits.
    gradient += by_token(method, x)[:6, 0] @ (np.eye(4)[both] - pi)
  return gradient


@pytest.mark.parametrize('mu', [None, np.array([0.1, 0.2, 0.3, 0.4])])
def test_dpo_on_pairs_of_any_distribution_finds_the_optimum_of_the_reward(mu):
  """reference exp(r / beta) / Z: there the loss over all pairs with Bradley-Terry labels is minimal."""
  pi = REFERENCE * np.exp(REWARD / 0.5)
  pi /= pi.sum()
  at = lambda pi: gradient_of_all_pairs(methods.dpo(beta=0.5), pi, bradley_terry(), mu)
  np.testing.assert_allclose(at(pi), 0, atol=1e-9)
  assert np.abs(at(REFERENCE)).max() > 1e-3


def test_the_optimum_of_ipo_depends_on_who_made_the_pairs():
  """reference exp(P(. > mu) / tau) / Z for pairs of independent samples of mu; P is not transitive."""
  preference = np.array([[0.5, 0.9, 0.2, 0.6], [0.1, 0.5, 0.8, 0.3], [0.8, 0.2, 0.5, 0.7]])
  preference = np.vstack([preference, [0.4, 0.7, 0.3, 0.5]])
  mu, tau = np.array([0.1, 0.2, 0.3, 0.4]), 0.5

  def optimum(mu):
    pi = REFERENCE * np.exp(preference @ mu / tau)
    return pi / pi.sum()

  at = lambda pi: gradient_of_all_pairs(methods.ipo(tau=tau), pi, preference, mu)
  np.testing.assert_allclose(at(optimum(mu)), 0, atol=1e-9)
  assert np.abs(at(optimum(mu[::-1]))).max() > 1e-3


# Coverage: three answers with the logits theta (1, 0, 2), a uniform reference, and the data '1 beats 2'.
ANSWERS = np.array([1.0, 0.0, 2.0])


def slope_of_coverage(method, theta, kl=0.0):
  """The derivative by theta of the loss, plus kl times KL(pi || reference)."""
  pi = np.exp(theta * ANSWERS) / np.exp(theta * ANSWERS).sum()
  x = one_token(logp=np.log(pi[:2]), reference_logp=np.full(2, np.log(1 / 3)))
  direction = ANSWERS - pi @ ANSWERS  # of the log-probs
  return by_token(method, x)[:2, 0] @ direction[:2] + kl * (pi * direction) @ np.log(3 * pi)


@pytest.mark.parametrize(
  ('likelihood', 'kl', 'theta'),
  [(0.0, 0.1, 9.9986), (0.0, 0.5, 1.3218), (0.1, 0.0, 2.321), (0.5, 0.0, 0.955)],
)
def test_where_a_regulariser_stops_dpo_from_moving_mass_to_an_answer_without_data(
  likelihood, kl, theta
):
  """DPO alone increases theta without bound, and with it the answer 3, which no pair has."""
  slope = lambda t: slope_of_coverage(methods.rpo(beta=1.0, nll_coefficient=likelihood), t, kl)
  assert slope(theta - 2e-3) < 0 < slope(theta + 2e-3)
  assert slope_of_coverage(methods.dpo(beta=1.0), theta) < 0


def test_likelihood_pulls_up_what_both_rows_begin_with():
  """A token that both rows share is neither raised nor lowered by DPO."""
  x = one_token(logp=[-0.7, -0.7], reference_logp=[-0.7, -0.7])
  x['mask'][:2, 1] = True
  x['logp'][:2, 1] = x['reference_logp'][:2, 1] = [-0.7, -0.1]
  assert by_token(methods.dpo(), x)[:2, 0].sum() == pytest.approx(0, abs=1e-12)
  assert by_token(methods.rpo(), x)[:2, 0].sum() == pytest.approx(-0.2 / 2)


# Slots.


def test_a_reference_that_is_blended_is_copied_averaged_or_fixed():
  anchor, params = {'w': jnp.array([0.0, 2.0])}, {'w': jnp.array([1.0, 1.0])}
  blend = lambda step, **knobs: optim.blend(anchor, params, step, **knobs)['w']
  np.testing.assert_allclose(blend(4, alpha=0.6, every=4), [0.6, 1.4])
  np.testing.assert_array_equal(blend(3, alpha=0.6, every=4), anchor['w'])
  np.testing.assert_array_equal(blend(4, alpha=0.0, every=4), anchor['w'])
  np.testing.assert_array_equal(
    blend(4, alpha=1.0, every=4), optim.sync(anchor, params, 4, every=4)['w']
  )
  ema = optim.ema(anchor, params, 1, decay=0.4)['w']
  np.testing.assert_allclose(blend(1, alpha=0.6, every=1), ema)


def test_weights_of_pairs_multiply_their_losses_and_not_their_number():
  method = DPO()
  method.objective.weights = {'data': part(pair_weights.given)}
  x = harness.random_arrays(method)
  x['weights'] = np.repeat([2.0, 0.0, 1.0, 3.0], 2)
  value, _ = harness.value_and_gradient(method, x)
  h = harness.ratio(x)
  chosen, rejected = harness.pair(h, x)
  p = harness.confidence(x)
  z = 0.1 * (chosen - rejected)
  loss = p * harness.logistic(z) + (1 - p) * harness.logistic(-z)
  assert value == pytest.approx(harness.average(x['weights'][::2] * loss, x))


def test_weights_that_are_read_must_be_given():
  method = DPO()
  method.objective.weights = {'data': part(pair_weights.given)}
  x = harness.random_arrays(DPO())
  with pytest.raises(KeyError, match=r"'weights'.*missing: this method reads"):
    method.loss(**x)


@pytest.mark.parametrize(
  ('make', 'words'),
  [
    (lambda: methods.gpo(link='logistik'), "unknown 'logistik'; did you mean"),
    (lambda: methods.f_dpo(divergence='forward'), "did you mean 'forward_kl'"),
    (lambda: methods.robust_dpo(flips=0.5), r'flips is a probability in \[0, 1/2\), got 0.5'),
    (lambda: methods.exo_pref(eps=0.0), r'eps is a probability in \(0, 1/2\), got 0.0'),
  ],
)
def test_knobs_that_make_no_sense_are_refused(make, words):
  with pytest.raises(ValueError, match=words):
    make()


def test_offsets_have_coefficients_and_statistics_have_their_own_names():
  slots = dict(score=part(implicit_rewards.log_ratio_sum), link=part(preference_losses.logistic))
  refused = lambda **more: bind(part(objectives.Pairwise, **slots, **more), objectives.TABLE)
  with pytest.raises(TypeError, match='give it a coefficient'):
    refused(offsets={'length': part(pair_offsets.length_difference)})
  with pytest.raises(ValueError, match=r'stats.score: the name is taken by the batch'):
    refused(stats={'score': part(logit_stats.log_normalizer)})
