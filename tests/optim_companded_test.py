"""The weight compander: against gradient descent by hand, its bound, its limits and its inverses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from polgrad import optim
from polgrad.optim.companded import CURVES
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
  return params, state.inner


def arctan(v, a, b):
  """w and its derivatives by v, a and b."""
  return a * np.arctan(v / b), a * b / (b**2 + v**2), np.arctan(v / b), -a * v / (b**2 + v**2)


def mu_law(v, a, b):
  s, x, whole = np.where(v < 0, -1, 1), np.abs(v) / a, np.log(1 + b)
  w, inside = s * a * np.log(1 + b * x) / whole, 1 + b * x
  by_b = s * a * (x / inside / whole - np.log(inside) / whole**2 / (1 + b))
  return w, b / inside / whole, w / a - s * b * x / inside / whole, by_b


BEGUN = {  # a, b and v of the weights w at the start
  'arctan': lambda w, most: (
    most * 2 / np.pi,
    most / np.pi,
    most / np.pi * np.tan(w / most * np.pi / 2),
  ),
  # mu / log(1 + mu) = 2
  'mu_law': lambda w, most: (
    *(most, 2.512862417252),
    np.sign(w) * most / 2.512862417252 * ((1 + 2.512862417252) ** (np.abs(w) / most) - 1),
  ),
}


@pytest.mark.parametrize(('curve', 'by_hand'), [('arctan', arctan), ('mu_law', mu_law)])
@pytest.mark.parametrize('rate', [0.0, 0.01])
def test_training_is_gradient_descent_on_v_and_adam_on_the_logarithms_of_the_shape(
  curve, by_hand, rate
):
  with jax.enable_x64(True):
    optimizer = optim.sgd(learning_rate=0.1)
    made = optim.companded(optimizer=optimizer, curve=curve, limit=1.5, slope=2.0, shape_rate=rate)
    found, state = trained(made, 4)
  for name, w in FIRST.items():
    a, b, v = BEGUN[curve](w, 1.5 * (np.abs(w).max() or 1.0))
    np.testing.assert_allclose(by_hand(v, a, b)[0], w, atol=1e-12)
    shape, first, second = np.log([a, b]), np.zeros(2), np.zeros(2)
    for t in range(1, 5):
      now, by_v, by_a, by_b = by_hand(v, *np.exp(shape))
      g = now - AIM[name]
      v = v - 0.1 * g * by_v
      of_shape = np.array([(g * by_a).sum(), (g * by_b).sum()]) * np.exp(shape)
      first, second = 0.9 * first + 0.1 * of_shape, 0.999 * second + 0.001 * of_shape**2
      mean, root = first / (1 - 0.9**t), np.sqrt(second / (1 - 0.999**t))
      shape = shape - rate * mean / (root + 1e-8)
    np.testing.assert_allclose(state.v[name], v, rtol=1e-5)
    np.testing.assert_allclose(state.shape[name], shape, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[name], by_hand(v, *np.exp(shape))[0], rtol=1e-5, atol=1e-6)


def test_weights_stay_below_their_bound_and_without_one_nothing_changes():
  bounded, _ = trained(optim.companded(optimizer=optim.sgd(learning_rate=2.0), limit=1.5), 60)
  assert np.all(np.abs(bounded['w']) < 1.5 * 1.2 + 1e-5) and np.all(np.abs(bounded['zero']) < 1.5)
  assert bounded['w'][0, 0] > 1.6 and bounded['zero'][1] < -1.3
  plain = optim.sgd(learning_rate=0.1)
  with jax.enable_x64(True):
    for how in (dict(limit=1e5), dict(curve='mu_law', slope=1.00001)):
      free = optim.companded(optimizer=plain, **how)
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
        trained(free, 5)[0],
        trained(plain, 5)[0],
      )


@pytest.mark.parametrize('name', CURVES)
def test_the_functions_are_odd_and_have_inverses(name):
  v, a, b = np.array([-3.0, -0.4, 0.0, 0.4]), 2.0, 0.5
  forward, inverse, _ = CURVES[name]
  np.testing.assert_allclose(inverse(forward(v, a, b), a, b), v, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(forward(-v, a, b), -forward(v, a, b), rtol=1e-6)
  slope = jax.vmap(jax.grad(lambda v: forward(v, a, b)))(jnp.asarray(v, jnp.float32))
  expected = {'arctan': arctan, 'mu_law': mu_law}[name](v, a, b)[1]
  np.testing.assert_allclose(slope, expected, rtol=1e-5)  # also at 0


def test_bfloat16_runs_follow_float32_masters_and_a_bound_of_the_start_is_refused():
  made = bind(part(optim.companded, optimizer=part(optim.adamw, learning_rate=0.01)), optim.TABLE)
  params = {'w': jnp.asarray(FIRST['w'], jnp.bfloat16)}
  state = made.init(params)
  steps, state = made.update({'w': jnp.ones((2, 2), jnp.bfloat16)}, state, params)
  params = optax.apply_updates(params, steps)
  np.testing.assert_array_equal(params['w'], state.master['w'].astype(jnp.bfloat16))
  np.testing.assert_allclose(optim.learning_rate(made, state)['learning_rate'], 0.01)
  for knobs, words in (
    (dict(limit=1.0), 'limit: expected a number above 1'),
    (dict(curve='mu_law'), 'slope=1 must be above 1 for the curve mu_law'),
    (dict(curve='cubic'), "curve.*'arctan', 'mu_law'"),
  ):
    with pytest.raises(ValueError, match=words):
      bind(part(optim.companded, optimizer=part(optim.sgd), **knobs), optim.TABLE)
