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
