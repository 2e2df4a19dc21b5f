"""MAID against a separate transcription, and against what is known of its toy and of quadratics."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad.techniques import inexact_bilevel as maid

pytestmark = pytest.mark.usefixtures('x64')
OPTIMUM = math.log(7 / 3)


# h = (1 + e^theta) x^2 / 2 - x, so x* = 1 / (1 + e^theta); g = (x - 0.3)^2 / 2.
def lower(x, theta):
  return ((1 + jnp.exp(theta)) * x**2 / 2 - x)[0]


def upper(x):
  return (x[0] - 0.3) ** 2 / 2


def constants(x, theta):
  e = jnp.exp(theta[0])
  return maid.Constants(1.0, e * jnp.abs(x[0]), e, 0.0, 1.0)


def transcription(updates):
  """The toy in floats, from the algorithm's description: thetas, accuracy, number of gradients."""
  theta, x, eps, delta, beta, thetas, count = 0.0, 0.0, 0.1, 0.1, 0.1, [], 0

  def solve(theta, x, eps):
    nonlocal count
    while True:
      count += 1
      gradient = (1 + math.exp(theta)) * x - 1
      if abs(gradient) <= eps:  # mu = 1
        return x
      x -= gradient / (1 + math.exp(2))

  for _ in range(updates):
    for j in range(3):
      while True:
        x, e = solve(theta, x, eps), math.exp(theta)
        slope = x - 0.3
        q = slope / (1 + e) if abs(slope) > delta else 0.0
        p = -e * x * q
        omega = (e * x + e * abs(slope)) * eps + e * x * delta + e * eps**2
        if omega <= (1 - 1e-4) * abs(p):
          break
        eps, delta = eps / 2, delta / 2
      for i in range(10 + j):
        a = beta * 0.9**i
        new = solve(theta - a * p, x, eps)
        high = (new - 0.3) ** 2 / 2 + abs(new - 0.3) * eps + eps**2 / 2
        if high <= slope**2 / 2 - abs(slope) * eps - a * 1e-8 * p**2:
          break
      else:
        eps, delta = eps / 2, delta / 2
        continue
      theta, x, beta, eps, delta = theta - a * p, new, a * 10 / 9, eps * 1.05, delta * 1.05
      break
    thetas.append(theta)
  return np.array(thetas), eps, count


def test_the_toy_reaches_its_optimum_on_the_known_path():
  step = lambda s, _: (maid.update(s, upper, lower, constants, lower_step=1 / (1 + math.e**2)),) * 2
  start = maid.init(jnp.zeros(1), jnp.zeros(1))
  end, path = jax.jit(lambda s: jax.lax.scan(step, s, length=60))(start)
  thetas, epsilon, gradients = transcription(60)
  np.testing.assert_allclose(path.theta[:, 0], thetas, rtol=0, atol=1e-9)
  assert np.isclose(end.epsilon, epsilon) and end.gradients == gradients == 839
  # Half the way after 30 updates, there after 60.
  assert abs(path.theta[29, 0] - 0.516214) < 1e-6
  assert abs(end.theta[0] - OPTIMUM) < 1e-8 and end.epsilon < 1e-9


@pytest.mark.parametrize('x, expected', [(0.5, -0.05), (0.6, -0.09), (0.51, -0.05355)])
def test_an_inexact_solution_biases_the_hypergradient(x, expected):
  found = maid.hypergradient(upper, lower, jnp.array([x]), jnp.zeros(1), 0.0)
  np.testing.assert_allclose(found, expected, atol=1e-12)
  # The bound holds, and an unsolved linear system gives no direction.
  bound = maid.error_bound(constants(jnp.array([x]), jnp.zeros(1)), abs(x - 0.3), abs(x - 0.5), 0)
  assert abs(found[0] + 0.05) <= bound + 1e-12
  assert maid.hypergradient(upper, lower, jnp.array([x]), jnp.zeros(1), 1.0) == 0


def test_the_hypergradient_of_a_quadratic_is_that_of_its_solution():
  """h = |A x + C theta - b|^2 / 2, whose minimiser is known."""
  rng = np.random.RandomState(0)
  a, c, b, goal = rng.normal(size=(6, 4)), rng.normal(size=(6, 3)), rng.normal(size=6), np.ones(4)
  theta = rng.normal(size=3)
  solution = np.linalg.solve(a.T @ a, a.T @ (b - c @ theta))
  square = lambda x: jnp.sum((x - goal) ** 2) / 2
  loss = lambda x, theta: jnp.sum((a @ x + c @ theta - b) ** 2) / 2
  expected = -(np.linalg.solve(a.T @ a, a.T @ c).T @ (solution - goal))
  found = maid.hypergradient(square, loss, solution, theta, 1e-12)
  np.testing.assert_allclose(found, expected, rtol=1e-9)
  values = np.linalg.eigvalsh(a.T @ a)
  x, count = maid.solve_lower(
    loss, jnp.zeros(4), theta, 1e-6 * values[0], step=1 / values[-1], limit=5000
  )
  assert np.linalg.norm(x - solution) <= 1e-6 and 1 < count < 5000


def test_exact_solutions_give_gradient_descent():
  """The first step from an accurate x is that of the exact hypergradient, and it grows."""
  start = maid.init(jnp.zeros(1), jnp.array([0.5]), epsilon=1e-13, delta=1e-13)
  found = maid.update(start, upper, lower, constants, lower_step=0.1)
  np.testing.assert_allclose(found.theta, 0.1 * 0.05, atol=1e-12)
  assert np.isclose(found.step, 0.1 * 10 / 9) and np.isclose(found.epsilon, 1.05e-13)


def test_factors_that_do_not_shrink_are_refused():
  with pytest.raises(ValueError, match='tighten'):
    maid.update(
      maid.init(jnp.zeros(1), jnp.zeros(1)), upper, lower, constants, lower_step=0.1, tighten=1
    )
