"""Divergences: gradients by their generator, limits, bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad.losses import divergences

RNG = np.random.default_rng(0)
TEACHER, STUDENT = RNG.normal(size=(2, 5))
W = 0.3

# grad D = E_{a ~ student}[weight(u_a) grad log student(a)], u = teacher / student.
WEIGHTS = {
  divergences.forward_kl: ({}, lambda u: -u),
  divergences.reverse_kl: ({}, lambda u: -np.log(u)),
  divergences.jensen_shannon: (
    dict(teacher_weight=W),
    lambda u: -(1 - W) * np.log(1 - W + W * u),
  ),
  divergences.skew_forward_kl: (dict(skew=W), lambda u: -(1 - W) * u / (W * u + 1 - W)),
  divergences.skew_reverse_kl: (
    dict(skew=W),
    lambda u: -np.log((1 - W) * u + W) - W / (W + (1 - W) * u),
  ),
  divergences.symmetric_kl: (
    dict(reverse_weight=W),
    lambda u: -(1 - W) * u - W * np.log(u),
  ),
  divergences.alpha_divergence: (dict(alpha=0.7), lambda u: (1 - u**0.7) / 0.7),
  divergences.total_variation: ({}, lambda u: -0.5 * np.sign(u - 1)),
  divergences.entropy_aware: (dict(threshold=0.5, kept=W), lambda u: -u - W * np.log(u)),
}


@pytest.mark.parametrize('fn', WEIGHTS)
def test_gradient_is_the_expected_weighted_score(fn, x64):
  knobs, weight = WEIGHTS[fn]
  log_student = np.asarray(jax.nn.log_softmax(STUDENT))
  u = np.exp(np.asarray(jax.nn.log_softmax(TEACHER)) - log_student)
  s = np.exp(log_student)
  score = np.eye(5) - s  # row a: grad log student(a) by the logits
  expected = (s * weight(u)) @ score
  got = jax.grad(lambda z: fn(jnp.asarray(TEACHER), z, **knobs))(jnp.asarray(STUDENT))
  np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
  ('alpha', 'factor', 'weight'),
  [(2.0, 2.0, lambda u: 1 - u**2), (0.5, 0.5, lambda u: 1 - np.sqrt(u))],
  ids=['chi-square', 'hellinger'],
)
def test_chi_square_and_hellinger_are_alpha_divergences(alpha, factor, weight, x64):
  s, t = (np.asarray(jax.nn.softmax(jnp.asarray(x))) for x in (STUDENT, TEACHER))
  fn = lambda z: factor * divergences.alpha_divergence(jnp.asarray(TEACHER), z, alpha=alpha)
  expected = (s * weight(t / s)) @ (np.eye(5) - s)
  np.testing.assert_allclose(jax.grad(fn)(jnp.asarray(STUDENT)), expected, rtol=1e-10)
  squared = (t / s - 1) ** 2 if alpha == 2 else (np.sqrt(t / s) - 1) ** 2
  np.testing.assert_allclose(fn(jnp.asarray(STUDENT)), s @ squared, rtol=1e-10)


def test_closed_forms_of_the_kl_gradients(x64):
  t, s = np.asarray(jax.nn.softmax(TEACHER)), np.asarray(jax.nn.softmax(STUDENT))
  student = jnp.asarray(STUDENT)
  forward = jax.grad(lambda z: divergences.forward_kl(jnp.asarray(TEACHER), z))(student)
  np.testing.assert_allclose(forward, s - t, atol=1e-12)
  reverse = jax.grad(lambda z: divergences.reverse_kl(jnp.asarray(TEACHER), z))(student)
  np.testing.assert_allclose(reverse, s * (np.log(s / t) - (s * np.log(s / t)).sum()), atol=1e-12)


def test_jensen_shannon_tends_to_the_two_kls_at_its_ends(x64):
  js = lambda w: divergences.jensen_shannon(TEACHER, STUDENT, teacher_weight=w)
  np.testing.assert_allclose(js(1e-6) / 1e-6, divergences.forward_kl(TEACHER, STUDENT), rtol=1e-4)
  np.testing.assert_allclose(
    js(1 - 1e-6) / 1e-6, divergences.reverse_kl(TEACHER, STUDENT), rtol=1e-4
  )


def test_half_and_half_is_symmetric_and_at_most_log_two():
  far = jnp.array([50.0, 0, 0, 0, -50]), jnp.array([-50.0, 0, 0, 0, 50])
  np.testing.assert_allclose(divergences.jensen_shannon(*far), np.log(2), rtol=1e-6)
  pair = jnp.asarray(TEACHER), jnp.asarray(STUDENT)
  there, back = divergences.jensen_shannon(*pair), divergences.jensen_shannon(*pair[::-1])
  np.testing.assert_allclose(there, back, rtol=1e-5)


@pytest.mark.parametrize('fn', divergences.TABLE.values())
def test_zero_with_zero_gradient_exactly_at_the_teacher_up_to_a_constant(fn):
  value, gradient = jax.value_and_grad(lambda z: fn(jnp.asarray(TEACHER), z))(
    jnp.asarray(TEACHER + 3.0)
  )
  np.testing.assert_allclose(value, 0, atol=1e-6)
  np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize('weight', [0.0, 1.0, -0.1])
def test_a_degenerate_mixture_is_refused(weight):
  with pytest.raises(ValueError, match='weight'):
    divergences.jensen_shannon(jnp.zeros(3), jnp.zeros(3), teacher_weight=weight)


def test_half_precision_logits_are_normalised_in_float32():
  got = divergences.forward_kl(
    jnp.asarray(TEACHER, jnp.bfloat16), jnp.asarray(STUDENT, jnp.bfloat16)
  )
  assert got.dtype == jnp.float32


def test_tokens_that_are_ruled_out_give_no_nan():
  """-inf logits (a padded vocabulary) count as 0 log 0, in value and gradient."""
  teacher, student = (
    jnp.append(jnp.asarray(x), -jnp.inf) for x in ([0.2, -0.1, 0.5], [0.0, 0.3, 0.1])
  )
  for divergence in divergences.TABLE.values():
    value, grad = jax.value_and_grad(lambda x, d=divergence: d(teacher, x))(student)
    np.testing.assert_allclose(value, divergence(teacher[:3], student[:3]), rtol=1e-6)
    assert np.isfinite(grad).all() and grad[3] == 0


def value(name, teacher=TEACHER, student=STUDENT, **knobs):
  return float(divergences.TABLE[f'divergences.{name}'](teacher, student, **knobs))


def test_skewed_and_alpha_divergences_contain_the_two_kls(x64):
  forward, reverse = value('forward_kl'), value('reverse_kl')
  for name, limit, other in (('forward_kl', forward, 1), ('reverse_kl', reverse, 0)):
    np.testing.assert_allclose(value(f'skew_{name}', skew=1e-7), limit, rtol=1e-5)
    np.testing.assert_allclose(value('alpha_divergence', alpha=other + 1e-6), limit, rtol=1e-4)
    np.testing.assert_allclose(value('symmetric_kl', reverse_weight=1.0 - other), limit)
  # Chi-square, Hellinger, and Jensen-Shannon as a mean of two skewed ones.
  t, s = np.asarray(jax.nn.softmax(TEACHER)), np.asarray(jax.nn.softmax(STUDENT))
  np.testing.assert_allclose(2 * value('alpha_divergence', alpha=2.0), ((t - s) ** 2 / s).sum())
  hellinger = np.square(np.sqrt(t) - np.sqrt(s)).sum()
  np.testing.assert_allclose(value('alpha_divergence', alpha=0.5) / 2, hellinger)
  skewed = value('skew_forward_kl', skew=0.5) + value('skew_reverse_kl', skew=0.5)
  np.testing.assert_allclose(value('jensen_shannon'), skewed / 2)


def test_bounds_of_the_skewed_ones_and_pinsker():
  far = np.array([50.0, 0, 0, 0, -50]), np.array([-50.0, 0, 0, 0, 50])
  for name in ('skew_forward_kl', 'skew_reverse_kl'):
    np.testing.assert_allclose(value(name, *far), -np.log(0.1), rtol=1e-5)
  assert value('total_variation') <= np.sqrt(min(value('forward_kl'), value('reverse_kl')) / 2)
  # A random pair is far below the bound of 2.303.
  pair = np.random.default_rng(0).normal(size=(2, 6))
  np.testing.assert_allclose(value('skew_forward_kl', *pair), 0.395, atol=5e-4)
  # The weight of a token in the gradient is at most (1 - skew) / skew, so the gradient is at most that.
  gradient = jax.grad(lambda z: divergences.skew_forward_kl(far[0], z))(jnp.asarray(far[1]))
  assert np.abs(gradient).sum() <= 2 * 9


@pytest.mark.parametrize('inner', divergences.FULL)
@pytest.mark.parametrize('both', [False, True])
def test_a_bucket_loses_information_and_all_tokens_lose_none(inner, both, x64):
  inner = divergences.FULL[inner]
  full = inner(TEACHER, STUDENT)
  got = [
    divergences.top_k(TEACHER, STUDENT, divergence=inner, k=k, of_student=both) for k in range(1, 6)
  ]
  assert (np.diff(got) > -1e-7).all()
  np.testing.assert_allclose(got[-1], full, rtol=1e-4)


def test_without_a_bucket_the_rest_is_normalised_again(x64):
  top = np.argsort(-TEACHER)[:3]
  got = value('top_k', k=3, bucket=False)
  np.testing.assert_allclose(got, value('forward_kl', TEACHER[top], STUDENT[top]))
  top = np.union1d(top, np.argsort(-STUDENT)[:3])
  got = value('top_k', k=3, bucket=False, of_student=True, divergence=divergences.reverse_kl)
  np.testing.assert_allclose(got, value('reverse_kl', TEACHER[top], STUDENT[top]))


@pytest.mark.parametrize('inner', divergences.FULL)
@pytest.mark.parametrize('bucket', [False, True])
def test_what_a_teacher_lists_is_its_top_k(inner, bucket, x64):
  """A place that is no token, and a token that the student does not have, belong to the others."""
  teacher = np.append(TEACHER, 1.0)  # a row of padding that only the teacher's embedding has
  log_probs = np.asarray(jax.nn.log_softmax(teacher))
  ids = np.array([*np.argsort(-TEACHER)[:3], 5, -1])
  given = jnp.asarray(ids), jnp.asarray(np.append(log_probs[ids[:4]], 0.0))
  inner = divergences.FULL[inner]
  one = lambda z: divergences.listed(*given, z, divergence=inner, bucket=bucket)
  value, gradient = jax.value_and_grad(one)(jnp.asarray(STUDENT))
  s = np.asarray(jax.nn.log_softmax(STUDENT))
  pair = [log_probs[ids[:3]], s[ids[:3]]]
  if bucket:
    pair = [np.append(x, np.log1p(-np.exp(x).sum())) for x in pair]
    whole = jnp.asarray(np.append(STUDENT, -30.0))
    assert value <= inner(jnp.asarray(teacher), whole)  # it is a coarser view of both
  np.testing.assert_allclose(value, inner(*map(jnp.asarray, pair)), rtol=1e-6)
  assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-3
  same = divergences.listed(
    jnp.asarray(ids[:3]), s[ids[:3]], jnp.asarray(STUDENT), divergence=inner
  )
  np.testing.assert_allclose(same, 0, atol=1e-12)
  if bucket:
    top = divergences.top_k(jnp.asarray(TEACHER), jnp.asarray(STUDENT), divergence=inner, k=3)
    own = np.asarray(jax.nn.log_softmax(TEACHER))[ids[:3]]
    found = divergences.listed(
      jnp.asarray(ids[:3]), jnp.asarray(own), jnp.asarray(STUDENT), divergence=inner
    )
    np.testing.assert_allclose(found, top, rtol=1e-12)


def test_what_cannot_be_computed_is_refused():
  for name in ('skew_forward_kl', 'skew_reverse_kl'):
    with pytest.raises(ValueError, match='skew must lie in'):
      value(name, skew=1.0)
  with pytest.raises(ValueError, match='use forward_kl'):
    value('alpha_divergence', alpha=1)
  with pytest.raises(ValueError, match='no token is compared'):
    value('top_k', of_teacher=False)
