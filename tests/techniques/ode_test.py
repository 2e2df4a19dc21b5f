"""The solver of ODEs is of its order, and penalties of its steps have their known values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad.techniques import ode_penalties as ode

pytestmark = pytest.mark.usefixtures('x64')
ONE = jnp.ones(1)


@jax.jit
def decay(k):
  return ode.solve(
    lambda x, t: -k * x,
    ONE,
    first_step=0.25,
    max_steps=4,
    adaptive=False,
    tableau=ode.BOGACKI_SHAMPINE,
  )


@pytest.mark.parametrize(
  'k, end, total', [(1.0, 0.367587, 0.009985), (3.0, 0.045141, 0.059323), (6.0, None, 0.494788)]
)
def test_penalties_of_a_decay_have_their_values(k, end, total):
  found = decay(k)
  assert end is None or np.isclose(found.x[0], end, atol=1e-6)
  assert np.isclose(ode.error_penalty(found.steps, reduce='sum'), total, atol=1e-6)
  assert np.isclose(ode.error_penalty(found.steps), total / 4, atol=1e-6)
  np.testing.assert_allclose(found.steps.stiffness, k, rtol=1e-6)
  for reduce, times in (('max', 1), ('mean', 1), ('sum', 4)):
    penalty = ode.stiffness_penalty(found.steps, reduce=reduce, stability=2.0)
    assert np.isclose(penalty, times * k / 2)


@pytest.mark.parametrize('pair', [ode.BOGACKI_SHAMPINE, ode.TSITOURAS])
def test_pairs_satisfy_their_conditions(pair):
  times, weights = np.array(pair.times), np.array([*pair.stages[-1], 0.0])
  for row, time in zip(pair.stages, times):
    assert np.isclose(sum(row), time)
  powers = [weights @ times**p for p in range(pair.order)]
  np.testing.assert_allclose(powers, 1 / np.arange(1, pair.order + 1))
  # The embedded method has one order less, so the error is blind to polynomials of that order.
  blind = [np.dot(pair.error, times**p) for p in range(pair.order - 1)]
  np.testing.assert_allclose(blind, 0, atol=1e-12)


def test_an_adaptive_solve_arrives_and_has_gradients():
  def end(rate):
    found = ode.solve(lambda x, t: -rate * x * t, ONE, rtol=1e-6, atol=1e-6, first_step=1.0)
    return found.x[0], found

  (x, found), slope = jax.jit(jax.value_and_grad(end, has_aux=True))(2.0)
  assert found.finished and np.sum(found.steps.accepted) < 64
  assert not found.steps.accepted[0]  # a step of 1 is too long
  assert np.isclose(np.sum(found.steps.size * found.steps.accepted), 1)
  np.testing.assert_allclose([x, slope], [np.exp(-1), -np.exp(-1) / 2], rtol=1e-5)


def test_a_constant_field_costs_nothing():
  def penalty(speed):
    found = ode.solve(lambda x, t: speed + 0 * x, ONE, max_steps=3, tableau=ode.BOGACKI_SHAMPINE)
    return ode.error_penalty(found.steps) + ode.stiffness_penalty(found.steps)

  value, slope = jax.jit(jax.value_and_grad(penalty))(3.0)
  assert np.isclose(value, 0, atol=1e-12) and np.isfinite(slope)


def test_weights_are_annealed():
  found = ode.annealed(jnp.array([0.0, 30, 74, 75]), first=100.0, last=10.0, steps=75)
  np.testing.assert_allclose(found, [100, 39.810717, 10.311773, 10], atol=1e-6)


def test_a_solve_refuses_no_time():
  with pytest.raises(ValueError, match='must be after'):
    ode.solve(lambda x, t: x, ONE, start=1.0)
