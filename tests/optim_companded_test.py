"""The weight compander: against gradient descent on v by hand, its bound, and its limit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from polgrad import optim
from polgrad.optim.companded import compressed, expanded
from polgrad.registry import bind, part

FIRST = {'w': np.array([[0.3, -1.2], [0.05, 0.8]]), 'zero': np.zeros(2)}
AIM = {'w': np.array([[5.0, 5.0], [-0.2, 0.1]]), 'zero': np.array([0.4, -9.0])}


def trained(made, updates):
  """Descends to targets, of which some are beyond the bound; also gives the state."""
  params = jax.tree.map(jnp.asarray, FIRST)
  loss = lambda p: sum(jnp.sum((p[k] - AIM[k]) ** 2) / 2 for k in p)
  state = made.init(params)
  step = jax.jit(lambda p, s: made.update(jax.grad(loss)(p), s, p))
  for _ in range(updates):
    steps, state = step(params, state)
    params = optax.apply_updates(params, steps)
  return params, state


def test_training_is_gradient_descent_on_v():
  with jax.enable_x64(True):
    made = optim.companded(optimizer=optim.sgd(learning_rate=0.1), limit=1.5, slope=2.0)
    found, state = trained(made, 4)
  for name, w in FIRST.items():
    a = 1.5 * (np.abs(w).max() or 1.0) * 2 / np.pi
    b = a / 2
    v = b * np.tan(w / a)
    np.testing.assert_allclose(a * np.arctan(v / b), w, atol=1e-15)
    for _ in range(4):
      v = v - 0.1 * (a * np.arctan(v / b) - AIM[name]) * a * b / (b**2 + v**2)
    np.testing.assert_allclose(state.inner.v[name], v, rtol=1e-5)
    np.testing.assert_allclose(found[name], a * np.arctan(v / b), rtol=1e-5, atol=1e-6)


def test_weights_stay_below_their_bound_and_without_one_nothing_changes():
  bounded, _ = trained(optim.companded(optimizer=optim.sgd(learning_rate=2.0), limit=1.5), 60)
  assert np.all(np.abs(bounded['w']) < 1.5 * 1.2 + 1e-5) and np.all(np.abs(bounded['zero']) < 1.5)
  assert bounded['w'][0, 0] > 1.6 and bounded['zero'][1] < -1.3
  with jax.enable_x64(True):
    free = optim.companded(optimizer=optim.sgd(learning_rate=0.1), limit=1e5)
    plain = optim.sgd(learning_rate=0.1)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
      trained(free, 5)[0],
      trained(plain, 5)[0],
    )


def test_the_function_has_an_inverse_and_a_slope():
  v, a, b = np.array([-3.0, 0.0, 0.4]), 2.0, 0.5
  np.testing.assert_allclose(expanded(compressed(v, a, b), a, b), v, rtol=1e-5)
  slope = jax.vmap(jax.grad(lambda v: compressed(v, a, b)))(jnp.asarray(v, jnp.float32))
  np.testing.assert_allclose(slope, a * b / (b**2 + v**2), rtol=1e-5)


def test_bfloat16_runs_follow_float32_masters_and_a_bound_of_the_start_is_refused():
  made = bind(part(optim.companded, optimizer=part(optim.adamw, learning_rate=0.01)), optim.TABLE)
  params = {'w': jnp.asarray(FIRST['w'], jnp.bfloat16)}
  state = made.init(params)
  steps, state = made.update({'w': jnp.ones((2, 2), jnp.bfloat16)}, state, params)
  params = optax.apply_updates(params, steps)
  np.testing.assert_array_equal(params['w'], state.master['w'].astype(jnp.bfloat16))
  np.testing.assert_allclose(optim.learning_rate(made, state)['learning_rate'], 0.01)
  with pytest.raises(ValueError, match='limit: expected a number above 1'):
    bind(part(optim.companded, optimizer=part(optim.sgd), limit=1.0), optim.TABLE)
