"""Lion, Adafactor and the optimizers of whole matrices, against NumPy and by what they preserve."""

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from polgrad import optim
from polgrad.models import config as models
from polgrad.optim import matrix_steps
from polgrad.registry import bind, part

NAMES = {
  'lion': part(optim.lion, learning_rate=0.1),
  'adafactor': part(optim.adafactor, learning_rate=0.1, least_factored=3),
  'muon': part(optim.muon, learning_rate=0.1),
  'sinkgd': part(optim.sinkgd, learning_rate=0.1),
  'swan': part(optim.swan, learning_rate=0.1),
  'projected': part(optim.projected, optimizer=part(optim.adamw, learning_rate=0.1)),
}


def tree(dtype=jnp.float32, seed=0):
  """Two layers of a small model, stacked."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  layers = {'query': draw(2, 4, 3, 2), 'out': draw(2, 3, 2, 4), 'up': draw(2, 4, 5)}
  return {'embedding': draw(7, 4), 'layers': layers | {'mlp_norm': draw(2, 4)}}


def polar(g):
  u, _, v = np.linalg.svd(np.asarray(g, np.float64), full_matrices=False)
  return u @ v


def scaled_in_turn(g, rounds):
  for _ in range(rounds):
    g = g / np.sqrt((g**2).mean(axis=1, keepdims=True))
    g = g / np.sqrt((g**2).mean(axis=0, keepdims=True))
  return g


def one_step(made, grads, params):
  return made.update(grads, made.init(params), params)[0]


def test_doctests():
  assert not doctest.testmod(matrix_steps).failed


def test_kernels_are_those_of_the_models():
  for base in (*models.ATTENTION, *models.MLP):
    inputs, outputs = matrix_steps.kernel_axes(base)
    assert inputs == models.num_inputs(base) and inputs + outputs == len(models.AXES[base])
    assert matrix_steps.kernel_axes(f'{base}_lora_a') == (inputs, 1)
    assert matrix_steps.kernel_axes(f'{base}_lora_b') == (1, outputs)
  others = models.AXES.keys() - {*models.ATTENTION, *models.MLP}
  assert not any(map(matrix_steps.kernel_axes, others))


def test_sinkhorn_is_the_scaling_of_the_squares():
  g = np.random.default_rng(1).normal(size=(5, 8))
  found = matrix_steps.sinkhorn(jnp.asarray(g, jnp.float32), rounds=3)
  np.testing.assert_allclose(found, scaled_in_turn(g, 3), rtol=1e-5)
  end = np.asarray(matrix_steps.sinkhorn(jnp.asarray(g, jnp.float32), rounds=60))
  np.testing.assert_allclose((end**2).sum(1), 8, rtol=1e-5)
  np.testing.assert_allclose((end**2).sum(0), 5, rtol=1e-5)
  # The ratio of the squares to those of g has rank one: only rows and columns were scaled.
  ratio = np.log(end**2 / g**2)
  centred = ratio - ratio.mean(0) - ratio.mean(1, keepdims=True) + ratio.mean()
  np.testing.assert_allclose(centred, 0, atol=1e-4)
  np.testing.assert_allclose(
    matrix_steps.sinkhorn(jnp.asarray(3e4 * g)), matrix_steps.sinkhorn(g), rtol=1e-4
  )
  assert not matrix_steps.sinkhorn(jnp.zeros((2, 3))).any()
  np.testing.assert_array_equal(matrix_steps.sinkhorn(jnp.asarray(g), rounds=0), jnp.asarray(g))


def test_sinkhorn_sees_signs_of_rank_one_and_no_scales_of_rows_and_columns():
  random = np.random.default_rng(7)
  rows, columns, g = random.normal(size=5), random.normal(size=8), random.normal(size=(5, 8))
  with jax.enable_x64(True):
    for matrix in (np.outer(rows, columns), rows[:, None], columns[None]):
      found = matrix_steps.sinkhorn(jnp.asarray(matrix), rounds=1)
      np.testing.assert_allclose(found, np.sign(matrix), rtol=1e-5)
    far = matrix_steps.sinkhorn(jnp.asarray(np.exp(rows)[:, None] * g * np.exp(columns)), rounds=99)
    np.testing.assert_allclose(far, matrix_steps.sinkhorn(jnp.asarray(g), rounds=99), rtol=1e-5)


def test_sinkhorn_solves_what_is_scaled_badly():
  """|A W B - Y|^2 / 2 with scales of rows and columns over three decades, 500 steps with a linear decay,
  the best of some rates: published are 4e-3 of the loss at the start for gradient descent, 2e-3 with the
  norm of the gradient divided out, 2e-5 for its signs and 1e-6 for five rounds of scaling."""
  random = np.random.default_rng(0)
  spread = lambda n: np.logspace(-1.5, 1.5, n)
  a, b = (jnp.asarray(random.normal(size=(n, n)) / np.sqrt(n) * spread(n)) for n in (20, 30))
  b = b.T
  steps = {
    'plain': lambda g: g,
    'norm': lambda g: g / jnp.linalg.norm(g),
    'sign': jnp.sign,
    'sinkhorn': functools.partial(matrix_steps.sinkhorn, rounds=5),
  }
  y = a @ jnp.asarray(random.normal(size=(20, 30))) @ b
  loss = lambda w: jnp.mean((a @ w @ b - y) ** 2) / 2

  def run(step, rate):
    move = lambda w, t: (w - rate * (1 - t / 500) * step(jax.grad(loss)(w)), None)
    return loss(jax.lax.scan(move, jnp.zeros((20, 30)), jnp.arange(500))[0])

  rates = jnp.logspace(-4, 2, 13)
  best = lambda step: jnp.nanmin(jax.jit(jax.vmap(functools.partial(run, step)))(rates))
  found = {k: float(best(step) / loss(jnp.zeros((20, 30)))) for k, step in steps.items()}
  assert found['sinkhorn'] < found['sign'] / 5 and found['sign'] < found['norm'] / 5
  assert found['norm'] < found['plain']


@pytest.mark.parametrize('shape', [(4, 6), (6, 4)])
def test_orthogonal_is_the_polar_factor(shape):
  g = np.random.default_rng(2).normal(size=(2, *shape))
  found = matrix_steps.orthogonal(jnp.asarray(g, jnp.float32), polish=4)
  for x, one in zip(found, g, strict=True):
    np.testing.assert_allclose(x, polar(one), atol=2e-5)


def test_swan_whitens_rows_and_is_the_normalised_gradient_of_one_row():
  g = np.random.default_rng(3).normal(size=(3, 6))
  x = np.asarray(matrix_steps.whitened(jnp.asarray(g, jnp.float32), polish=4))
  np.testing.assert_allclose(x @ x.T, 6 * np.eye(3), atol=1e-4)
  np.testing.assert_allclose(np.linalg.norm(x), np.sqrt(18), rtol=1e-5)
  expected = np.sqrt(6) * polar(g / np.linalg.norm(g, axis=1, keepdims=True))
  np.testing.assert_allclose(x, expected, atol=1e-4)
  one = np.asarray(matrix_steps.whitened(jnp.asarray(g[:1], jnp.float32), polish=4))
  np.testing.assert_allclose(one, np.sqrt(6) * g[:1] / np.linalg.norm(g[:1]), rtol=1e-4)


def test_lion_follows_its_equations():
  made = optim.lion(learning_rate=0.1, b1=0.8, b2=0.5, weight_decay=0.5, max_grad_norm=1e9)
  x, m = np.array([1.0, -2.0, 0.5]), np.zeros(3)
  params = {'up': jnp.asarray(x, jnp.float32)}
  state = made.init(params)
  for g in np.array([[3.0, -4.0, 0.1], [-1.0, 0.4, 2.0], [0.2, 0.1, -9.0]]):
    x = x - 0.1 * (np.sign(0.8 * m + 0.2 * g) + 0.5 * x)
    m = 0.5 * m + 0.5 * g
    steps, state = made.update({'up': jnp.asarray(g, jnp.float32)}, state, params)
    params = optax.apply_updates(params, steps)
    np.testing.assert_allclose(params['up'], x, rtol=1e-5)


@pytest.mark.parametrize('relative', (False, True))
def test_adafactor_follows_its_equations_in_each_layer(relative):
  made = optim.adafactor(learning_rate=0.1, clip=0.9, least_factored=3, relative=relative)
  w, grads = (np.random.default_rng(s).normal(size=(2, 4, 5)) for s in (0, 1))
  row, column = np.zeros((2, 4)), np.zeros((2, 5))
  params = {'up': jnp.asarray(w, jnp.float32)}
  state = made.init(params)
  for t, g in enumerate((grads, grads[::-1] * 3)):
    decay = 1 - (t + 1.0) ** -0.8
    row = decay * row + (1 - decay) * (g**2).mean(2)
    column = decay * column + (1 - decay) * (g**2).mean(1)
    v = row[:, :, None] * column[:, None] / row.mean(1)[:, None, None]
    u = g / np.sqrt(v)
    u = u / max(1, np.sqrt((u**2).mean()) / 0.9)
    w = w - 0.1 * u * (max(np.sqrt((w**2).mean()), 1e-3) if relative else 1)
    steps, state = made.update({'up': jnp.asarray(g, jnp.float32)}, state, params)
    params = optax.apply_updates(params, steps)
    np.testing.assert_allclose(params['up'], w, rtol=1e-4, atol=1e-5)


def test_muon_orthogonalises_the_momentum_of_each_layer_and_leaves_the_rest_to_adam():
  grads, params = tree(seed=1), tree()
  made = optim.muon(
    learning_rate=0.5, momentum=0.9, nesterov=False, max_grad_norm=1e9, weight_decay=0.1
  )
  steps = one_step(made, grads, params)
  for name, rows in (('query', 4), ('out', 6), ('up', 4)):
    for layer in range(2):
      step = -np.asarray(steps['layers'][name][layer]).reshape(rows, -1) / 0.5
      step -= 0.1 * np.asarray(params['layers'][name][layer]).reshape(rows, -1)
      # Muon's five steps leave singular values between about 0.7 and 1.2, and singular vectors alone.
      x = step / (0.2 * np.sqrt(max(step.shape)))
      assert np.all(np.abs(np.linalg.svd(x, compute_uv=False) - 0.95) < 0.3)
      g = np.asarray(grads['layers'][name][layer]).reshape(rows, -1)
      np.testing.assert_allclose(polar(x), polar(g), atol=1e-3)
  adam = optim.adamw(learning_rate=0.5, b2=0.95, max_grad_norm=1e9, weight_decay=0.1)
  expected = one_step(adam, grads, params)
  np.testing.assert_allclose(steps['embedding'], expected['embedding'], rtol=1e-5)
  np.testing.assert_allclose(steps['layers']['mlp_norm'], expected['layers']['mlp_norm'], rtol=1e-5)


@pytest.mark.parametrize('name', ('sinkgd', 'swan'))
def test_stateless_steps_of_each_layer(name):
  grads, params = tree(seed=1), tree()
  made = bind(part(getattr(optim, name), learning_rate=0.5, max_grad_norm=1e9), optim.TABLE)
  steps = one_step(made, grads, params)
  for layer in range(2):
    g = np.asarray(grads['layers']['out'][layer], np.float64).reshape(6, 4).T
    if name == 'sinkgd':
      expected = scaled_in_turn(g, 5)
    else:
      expected = np.sqrt(6) * polar(g / np.linalg.norm(g, axis=1, keepdims=True))
    found = np.asarray(steps['layers']['out'][layer]).reshape(6, 4).T
    np.testing.assert_allclose(found, -0.5 * 0.05 * expected, atol=1e-4)
  kept = {leaf.shape for leaf in jax.tree.leaves(made.init(params))}
  assert (7, 4) in kept and params['layers']['out'].shape not in kept


def test_projected_keeps_the_norm_of_each_matrix_and_moves_the_rest_as_the_optimizer_does():
  params, state = tree(), None
  made = optim.projected(optimizer=optim.sgd(learning_rate=0.3))
  state = made.init(params)
  norms = lambda p: np.linalg.norm(np.asarray(p['layers']['query']).reshape(2, -1), axis=1)
  first = norms(params)
  w = np.asarray(params['layers']['query'], np.float64)
  for seed in range(3):
    grads = tree(seed=seed + 1)
    plain = one_step(optim.sgd(learning_rate=0.3), grads, params)
    steps, state = made.update(grads, state, params)
    np.testing.assert_allclose(steps['embedding'], plain['embedding'], rtol=1e-6)
    params = optax.apply_updates(params, steps)
    # Spherical gradient descent.
    w = w - 0.3 * np.asarray(grads['layers']['query'])
    w *= (first / np.linalg.norm(w.reshape(2, -1), axis=1))[:, None, None, None]
    np.testing.assert_allclose(params['layers']['query'], w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norms(params), first, rtol=1e-6)


def test_steps_of_normalised_layers_grow_their_weights_unless_these_are_projected():
  """The gradient is orthogonal to weights whose scale does not matter, so without the projection
  |W|^2 grows by rate^2 |g|^2 and the gradient falls as 1 / |W|."""
  x, y = (jnp.asarray(np.random.default_rng(s).normal(size=(6, n))) for s, n in ((0, 4), (1, 5)))

  def loss(params):
    z = x @ params['layers']['up'][0]
    return jnp.mean((z / jnp.sqrt(jnp.mean(z**2, axis=1, keepdims=True)) - y) ** 2)

  with jax.enable_x64(True):
    start = {'layers': {'up': jnp.asarray(np.random.default_rng(2).normal(size=(1, 4, 5)))}}
    gradient = jax.grad(loss)(start)['layers']['up']
    twice = jax.grad(loss)(jax.tree.map(lambda w: 2 * w, start))['layers']['up']
    np.testing.assert_allclose(twice, gradient / 2, rtol=1e-12)
    w = start['layers']['up']
    np.testing.assert_allclose(jnp.vdot(gradient, w), 0, atol=1e-14)
    for made, grows in (
      (optim.sgd(learning_rate=0.3), True),
      (optim.projected(optimizer=optim.sgd(learning_rate=0.3)), False),
    ):
      moved = w + one_step(made, {'layers': {'up': gradient}}, start)['layers']['up']
      expected = jnp.vdot(w, w) + grows * 0.09 * jnp.vdot(gradient, gradient)
      np.testing.assert_allclose(jnp.vdot(moved, moved), expected, rtol=1e-6)


def test_task_after_task_is_learned_worse_unless_weights_are_projected():
  """NaP (arXiv:2407.01800) on random labels: published losses at the end of a task rise from 0.058 to
  0.152 within 30 tasks, and stay at 0.165 with the projection."""
  random = np.random.default_rng(0)
  x = jnp.asarray(random.normal(size=(60, 32)), jnp.float32)
  labels = jnp.asarray(random.integers(10, size=(10, 60)))
  shapes = {'up': (32, 32), 'gate': (32, 32), 'down': (32, 10)}
  layers = {k: jnp.asarray(random.normal(size=(1, *s)) / np.sqrt(s[0]), jnp.float32)
            for k, s in shapes.items()}  # fmt: skip
  normal = lambda z: (z - z.mean(1, keepdims=True)) / jnp.sqrt(z.var(1, keepdims=True) + 1e-6)

  def loss(params, y):
    up, gate, down = (params['layers'][k][0] for k in shapes)
    z = jax.nn.relu(normal(jax.nn.relu(normal(normal(x) @ up)) @ gate))
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(normal(z) @ down), y[:, None], 1))

  def learned(made):
    def step(carry, y):
      params, state = carry
      steps, state = made.update(jax.grad(loss)(params, y), state, params)
      return (optax.apply_updates(params, steps), state), None

    def task(carry, y):
      carry, _ = jax.lax.scan(lambda c, _: step(c, y), carry, None, length=60)
      return carry, loss(carry[0], y)

    start = {'layers': layers}
    return np.asarray(
      jax.jit(lambda c: jax.lax.scan(task, c, labels)[1])((start, made.init(start)))
    )

  adam = optim.adamw(learning_rate=5e-3, max_grad_norm=1e9)
  plain, kept = learned(adam), learned(optim.projected(optimizer=adam))
  assert plain[-3:].mean() > 3 * plain[:3].mean()
  assert kept[-3:].mean() < 2.5 * kept[:3].mean() and kept[-3:].mean() < plain[-3:].mean()


@pytest.mark.parametrize('name', NAMES)
def test_compiled_bfloat16_runs_resume_and_follow_float32(name):
  made = bind(NAMES[name], optim.TABLE)
  quartic = lambda p: sum(jnp.sum((x.astype(jnp.float32) - 0.5) ** 2) for x in jax.tree.leaves(p))

  @jax.jit
  def step(params, state):
    steps, state = made.update(jax.grad(quartic)(params), state, params)
    return optax.apply_updates(params, steps), state

  low = tree(jnp.bfloat16)
  low = low, made.init(low)
  first = quartic(low[0])
  low = step(*step(*low))
  structure = jax.tree.structure(low)
  saved = [np.asarray(x) for x in jax.tree.leaves(low)]
  resumed = jax.tree.unflatten(structure, [jnp.asarray(x) for x in saved])
  low, resumed = step(*low), step(*resumed)
  jax.tree.map(np.testing.assert_array_equal, low, resumed)
  assert {x.dtype for x in jax.tree.leaves(low[0])} == {jnp.dtype(jnp.bfloat16)}
  masters = low[1].master
  jax.tree.map(lambda m, p: np.testing.assert_array_equal(m.astype(p.dtype), p), masters, low[0])
  assert quartic(low[0]) < first


@pytest.mark.parametrize('name', ('muon', 'sinkgd', 'swan'))
def test_factors_of_adapters_are_matrices_and_a_model_without_any_is_refused(name):
  made = bind(NAMES[name], optim.TABLE)
  rng = np.random.default_rng(0)
  factors = {
    'out_lora_a': jnp.asarray(rng.normal(size=(2, 3, 2, 2)), jnp.float32),
    'query_lora_b': jnp.zeros((2, 2, 3, 2)),
  }
  steps = one_step(made, factors, factors)
  assert np.all(np.abs(steps['out_lora_a']) > 0) and not steps['query_lora_b'].any()
  with pytest.raises(ValueError, match=f'{name} finds none of the matrices query, key'):
    made.init({'embedding': jnp.ones((3, 2))})


def test_projected_refuses_adapters_and_models_without_matrices():
  made = bind(NAMES['projected'], optim.TABLE)
  with pytest.raises(ValueError, match='adapters such as out_lora_a'):
    made.init({'out_lora_a': jnp.ones((2, 3, 2, 2))})
  with pytest.raises(ValueError, match='none of the matrices'):
    made.init({'embedding': jnp.ones((3, 2))})


@pytest.mark.parametrize('name', NAMES)
def test_the_learning_rate_is_told(name):
  schedule = functools.partial(optim.linear, steps=4)
  settings = dict(learning_rate=0.5, schedule=schedule)
  kind = getattr(optim, name)
  made = kind(optimizer=optim.adamw(**settings)) if name == 'projected' else kind(**settings)
  params = tree()
  _, state = made.update(tree(seed=1), made.init(params), params)
  np.testing.assert_allclose(optim.learning_rate(made, state)['learning_rate'], 0.375)
