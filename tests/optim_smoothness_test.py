"""Descent by gradient-normalised smoothness, on logistic regression and where its step is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from polgrad.optim import Oracle
from polgrad.optim.smoothness import Descent, smooth_descent, smooth_step, start


def test_a_trial_is_the_equation_and_gamma_follows_the_test():
  a, b = np.diag([4.0, 0.5, 1.0]), np.array([1.0, -2.0, 0.3])
  quartic = lambda x: x @ a @ x / 2 - b @ x + (x**4).sum()
  with jax.enable_x64(True):
    state, taken = start(jnp.array([1.0, 2.0, -1.0]), gamma=0.3), []
    for _ in range(8):
      x, gamma = np.asarray(state.x), float(state.gamma)
      g = lambda x: a @ x - b + 4 * x**3
      h = a + 0.1 * np.eye(3)  # no curvature of the quartic term
      moved = x - np.linalg.inv(h + np.linalg.norm(g(x)) / gamma * np.eye(3)) @ g(x)
      gain = gamma * (g(moved) ** 2).sum() / (8 * np.linalg.norm(g(x)))
      good = quartic(x) - quartic(moved) >= gain
      state = smooth_step(state, quartic, lambda x, h=h: jnp.asarray(h))
      taken.append(bool(state.accepted))
      assert taken[-1] == good
      np.testing.assert_allclose(state.x, moved if good else x, rtol=1e-10)
      assert float(state.gamma) == gamma * (2 if good else 0.5)
    assert True in taken and False in taken


def test_without_curvature_it_is_normalised_descent_and_with_a_large_radius_newton():
  a, b = jnp.diag(jnp.array([4.0, 0.5])), jnp.array([1.0, -2.0])
  loss = lambda x: x @ a @ x / 2 - b @ x
  with jax.enable_x64(True):
    x = jnp.array([1.0, 2.0])
    moved = smooth_step(start(x, gamma=0.1), loss, lambda x: jnp.zeros((2, 2)))
    g = np.asarray(a @ x - b)
    np.testing.assert_allclose(moved.x, x - 0.1 * g / np.linalg.norm(g), rtol=1e-6)
    newton = smooth_step(start(x, gamma=1e9), loss, lambda x: a)
    np.testing.assert_allclose(newton.x, [0.25, -4.0], rtol=1e-6)
    best = jnp.array([0.25, -4.0])
    still = smooth_step(Descent(best, jnp.array(2.0), jnp.array(True)), loss, lambda x: a)
    np.testing.assert_array_equal(still.x, best)
    assert still.gamma == 2 and not still.accepted


def test_the_exact_hessian_solves_logistic_regression_in_twelve_steps():
  rng = np.random.default_rng(0)
  features = rng.normal(size=(200, 20))
  labels = np.sign(features @ rng.normal(size=20) + 0.5 * rng.normal(size=200))
  with jax.enable_x64(True):
    z = jnp.asarray(labels[:, None] * features)
    loss = lambda x: jnp.mean(jax.nn.softplus(-z @ x)) + 1e-4 / 2 * x @ x

    def exact(x):
      p = jax.nn.sigmoid(z @ x)
      return z.T @ ((p * (1 - p))[:, None] * z) / 200 + 1e-4 * jnp.eye(20)

    lengths, values, accepted = {}, {}, {}
    for name, hessian in (('exact', exact), ('none', lambda x: jnp.zeros((20, 20)))):
      step = jax.jit(lambda s, hessian=hessian: smooth_step(s, loss, hessian))
      state = start(jnp.zeros(20))
      lengths[name], accepted[name] = [], []
      for _ in range(20):
        state = step(state)
        accepted[name].append(bool(state.accepted))
        lengths[name].append(float(jnp.linalg.norm(jax.grad(loss)(state.x))))
      values[name] = float(loss(state.x))
    trials = next(n for n, x in enumerate(lengths['exact'], 1) if x < 1e-10)
    assert sum(accepted['exact'][:trials]) == 12
    np.testing.assert_allclose(values['exact'], 0.0547654, atol=5e-8)
    assert lengths['none'][-1] > 1e-4


def asking(loss, params):
  grad = jax.grad(loss)
  return Oracle(
    gradient=None,
    halves=None,
    product=lambda vector: jax.jvp(grad, (params,), (vector,))[1],
    value=lambda: loss(params),
    value_and_gradient=jax.value_and_grad(loss),
  )


def test_the_optimizer_makes_the_same_trials_with_and_without_the_hessian():
  """On the parts of a tree, in five iterations for five unknowns; some trials fail."""
  a, b = np.diag([4.0, 0.5, 1.0, 2.0, 7.0]), np.array([1.0, -2.0, 0.3, 0.0, 1.0])
  loss = lambda x: x @ a @ x / 2 - b @ x + (x**4).sum()
  with jax.enable_x64(True):
    for products, hessian in ((0, lambda x: jnp.zeros((5, 5))), (5, jax.hessian(loss))):
      made, state = (
        smooth_descent(radius=3.0, products=products),
        start(jnp.full(5, 2.0), gamma=3.0),
      )
      params = {'x': jnp.full(2, 2.0), 'y': jnp.full(3, 2.0)}
      whole = lambda p: loss(jnp.concatenate([p['x'], p['y']]))
      memory, taken = made.init(params), set()
      for _ in range(8):
        oracle = asking(whole, params)
        steps, memory = made.update(jax.grad(whole)(params), memory, params, oracle=oracle)
        params = optax.apply_updates(params, steps)
        state = smooth_step(state, loss, hessian)
        np.testing.assert_allclose([*params['x'], *params['y']], state.x, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(made.rate(memory), state.gamma, rtol=1e-6)
        taken.add(bool(state.accepted))
      assert taken == {True, False}


def test_negative_curvature_gives_the_step_along_the_gradient_and_no_gradient_gives_none():
  made = smooth_descent(radius=0.5, products=3)
  saddle = lambda p: jnp.sum(-(p**2)) + jnp.sum(p**4)
  params = jnp.array([0.1, 0.2])
  grads = jax.grad(saddle)(params)
  steps, state = made.update(grads, made.init(params), params, oracle=asking(saddle, params))
  np.testing.assert_allclose(steps, -0.5 * grads / jnp.linalg.norm(grads), rtol=1e-5)
  assert state.inner.accepted
  still = jnp.zeros(2)
  steps, state = made.update(still, made.init(still), still, oracle=asking(saddle, still))
  np.testing.assert_array_equal(steps, 0)
  assert state.inner.gamma == 0.5 and not state.inner.accepted
