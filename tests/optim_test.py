"""Schedules at their corners, optimizers against their equations and on fields that are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from polgrad import optim
from polgrad.registry import bind, part


def test_schedules():
  for shape, half in ((optim.linear, 0.55), (optim.cosine, 0.55)):
    schedule = functools.partial(shape, warmup=4, steps=14, end=0.1)
    found = [float(schedule(jnp.int32(s))) for s in (0, 2, 4, 9, 14, 20)]
    np.testing.assert_allclose(found, [0, 0.5, 1, half, 0.1, 0.1], atol=1e-6)
    assert float(shape(jnp.int32(0), steps=10)) == 1
  assert optim.constant(jnp.int32(7)) == 1


def test_adamw_follows_its_equations():
  made = bind(
    part(
      optim.adamw,
      learning_rate=0.1,
      b1=0.8,
      b2=0.9,
      eps=1e-3,
      weight_decay=0.5,
      max_grad_norm=1.0,
      schedule=part(optim.linear, steps=10),
    ),
    optim.TABLE,
  )
  x, m, v = np.array([1.0, -2.0]), np.zeros(2), np.zeros(2)
  params = jnp.asarray(x, jnp.float32)
  state = made.init(params)
  for t, gradient in enumerate(np.array([[3.0, 4.0], [0.3, -0.4], [0.0, 0.1]])):
    clipped = gradient / max(1.0, np.linalg.norm(gradient))
    m, v = 0.8 * m + 0.2 * clipped, 0.9 * v + 0.1 * clipped**2
    direction = m / (1 - 0.8 ** (t + 1)) / (np.sqrt(v / (1 - 0.9 ** (t + 1))) + 1e-3)
    x = x - 0.1 * (1 - t / 10) * (direction + 0.5 * x)
    updates, state = made.update(jnp.asarray(gradient, jnp.float32), state, params)
    params = params + updates
    np.testing.assert_allclose(params, x, rtol=1e-5)


def test_decay_leaves_out_norms_biases_heads_and_adapters_unless_all_decay():
  names = (
    'query',
    'embedding',
    'final_norm',
    'key_bias',
    'value_head',
    'out_lora_a',
    'router_bias',
  )
  params = {'layers': {name: jnp.ones(2) for name in names}}
  zero = jax.tree.map(jnp.zeros_like, params)
  for decay, decayed in (('matrices', {'query', 'embedding'}), ('all', {*names})):
    made = optim.adamw(learning_rate=0.5, weight_decay=0.1, decay=decay)
    steps, _ = made.update(zero, made.init(params), params)
    found = {name for name, step in steps['layers'].items() if step[0] != 0}
    assert found == decayed
    np.testing.assert_allclose(steps['layers']['query'], -0.05, rtol=1e-6)


@pytest.mark.parametrize('dtype', (jnp.float32, jnp.bfloat16))
def test_adamw_skips_gradients_above_a_norm_and_goes_on_as_if_they_had_not_been(dtype):
  made, plain = (optim.adamw(learning_rate=0.1, **k) for k in ({'skip_grad_norm': 5.0}, {}))
  params = jnp.array([1.0, -2.0], dtype)
  state, expected = made.init(params), (params, plain.init(params))
  for gradient in ([3.0, 4.0], [3.1, 4.0], [80.0, 0.0], [0.3, -0.4]):
    gradient = jnp.asarray(gradient, dtype)
    steps, state = made.update(gradient, state, params)
    before, params = params, optax.apply_updates(params, steps)
    if np.linalg.norm(np.asarray(gradient, float)) > 5:
      np.testing.assert_array_equal(params, before)
      continue
    steps, other = plain.update(gradient, expected[1], expected[0])
    expected = optax.apply_updates(expected[0], steps), other
  np.testing.assert_array_equal(params, expected[0])
  jax.tree.map(np.testing.assert_array_equal, state, expected[1])


def test_sgd_is_the_gradient():
  made = bind(part(optim.sgd, learning_rate=0.5), optim.TABLE)
  updates, _ = made.update(jnp.array([2.0]), made.init(jnp.zeros(1)), jnp.zeros(1))
  assert updates == -1.0


def oracle_of(loss, params, bias=None):
  """All answers for a loss without noise: both halves of the batch give the whole gradient."""
  grad = jax.grad(loss)
  return optim.Oracle(
    gradient=lambda at, probe='': {'': grad(at), 'probe/clipping_bias': bias}[probe],
    halves=lambda: (grad(params), grad(params)),
    product=lambda vector: jax.jvp(grad, (params,), (vector,))[1],
    value=lambda: loss(params),
    value_and_gradient=jax.value_and_grad(loss),
  )


CURVATURE = np.array([1.0, 0.3, 2.0])


def quadratic(params):
  return jnp.sum(jnp.asarray(CURVATURE, params['x'].dtype) * params['x'] ** 2) / 2


@pytest.mark.parametrize('normalize', (True, False))
def test_transported_momentum_is_the_gradient_of_a_linear_field(normalize):
  with jax.enable_x64(True):
    made = optim.normalized_igt(learning_rate=0.05, normalize=normalize)
    params = {'x': jnp.array([1.0, -2.0, 0.5])}
    state = made.init(params)
    lagging, worst = np.zeros(3), 0.0
    for t in range(60):
      before = np.asarray(optim.iterate(state)['x'])
      steps, state = made.update(jax.grad(quadratic)(params), state, params)
      params = optax.apply_updates(params, steps)
      d = np.asarray(state.inner.momentum['x'])
      np.testing.assert_allclose(d, CURVATURE * before, rtol=0, atol=1e-12)
      after = np.asarray(optim.iterate(state)['x'])
      length = np.linalg.norm(d) + 1e-8 if normalize else 1.0
      np.testing.assert_allclose(after, before - 0.05 * d / length, atol=1e-8)  # float32 schedule
      eta, following = (2 / (t + 2)) ** 0.8, (2 / (t + 3)) ** 0.8
      ahead = after + (1 - following) / following * (after - before)
      np.testing.assert_allclose(params['x'], ahead, rtol=0, atol=1e-12)
      lagging = (1 - eta) * lagging + eta * CURVATURE * before
      worst = max(worst, np.max(np.abs(lagging - CURVATURE * before)))
    assert worst > 0.1  # momentum without extrapolation, on the same path


@pytest.mark.parametrize('normalize', (True, False))
def test_momentum_carried_by_the_hessian_is_the_gradient_of_a_linear_field(normalize):
  with jax.enable_x64(True):
    made = optim.harpg(learning_rate=0.05, normalize=normalize)
    params = {'x': jnp.array([1.0, -2.0, 0.5])}
    state = made.init(params)
    shares = []
    for t in range(20):
      now, moved = params['x'], state.inner.moved['x']
      for _ in range(2):
        grads = jax.grad(quadratic)(params)
        steps, state = made.update(grads, state, params, oracle=oracle_of(quadratic, params))
        params = optax.apply_updates(params, steps)
        if state.inner.count % 2:
          behind = np.asarray(now - params['x'])
          np.testing.assert_array_equal(optim.iterate(state)['x'], now)
          if t:
            shares.append(float(behind[0] / moved[0]))
            np.testing.assert_allclose(behind, shares[-1] * np.asarray(moved), atol=1e-12)
      d = np.asarray(state.inner.momentum['x'])
      np.testing.assert_allclose(d, CURVATURE * np.asarray(now), rtol=0, atol=1e-12)
      length = np.linalg.norm(d) + 1e-8 if normalize else 1.0
      np.testing.assert_allclose(
        params['x'], now - 0.05 * d / length, atol=1e-7
      )  # float32 schedule
      np.testing.assert_allclose(params['x'], optim.iterate(state)['x'], rtol=0, atol=1e-15)
    assert 0 <= min(shares) < 0.3 and 0.7 < max(shares) <= 1  # points spread over the segment


def test_hessian_products_add_up_to_the_difference_of_gradients():
  """Over q in [0, 1] and all three arms, whose ratios stay live: E v = g(now) - g(before)."""
  now, before = np.array([0.3, -0.1, 0.2]), np.array([-0.2, 0.5, 0.1])
  rewards = np.array([1.0, 0.2, -0.5])

  def loss(params):
    logp = jax.nn.log_softmax(params['x'])
    sampler = jax.lax.stop_gradient(logp)
    return -jnp.sum(jnp.exp(sampler) * jnp.exp(logp - sampler) * rewards)

  with jax.enable_x64(True):
    made = optim.harpg()
    state = made.init({'x': jnp.asarray(now)})
    moved = {'x': jnp.asarray(now - before)}
    state = state._replace(inner=state.inner._replace(count=jnp.int32(3), moved=moved))
    nodes, weights = np.polynomial.legendre.leggauss(20)
    total = np.zeros(3)
    for q, weight in zip((nodes + 1) / 2, weights / 2):
      params = {'x': jnp.asarray(q * now + (1 - q) * before)}
      zero = jax.tree.map(jnp.zeros_like, params)
      _, after = made.update(zero, state, params, oracle=oracle_of(loss, params))
      total += weight * np.asarray(after.inner.momentum['x']) / (1 - 2 / 3)  # eta_1 = 2 / 3
    np.testing.assert_allclose(-total, [0.094591, -0.032166, -0.062425], atol=1e-6)
    gradient = lambda x: np.asarray(jax.grad(loss)({'x': jnp.asarray(x)})['x'])
    np.testing.assert_allclose(total, gradient(now) - gradient(before), atol=1e-12)


def test_hessian_product_is_computed_every_second_update_only():
  calls = []
  made = optim.harpg()

  @jax.jit
  def update(state, params):
    def product(vector):
      jax.debug.callback(lambda: calls.append(1))
      return vector

    oracle = oracle_of(quadratic, params)._replace(product=product)
    return made.update(jax.grad(quadratic)(params), state, params, oracle=oracle)

  params = {'x': jnp.ones(3)}
  state = made.init(params)
  found = []
  for _ in range(4):
    steps, state = update(state, params)
    params = optax.apply_updates(params, steps)
    jax.effects_barrier()
    found.append(len(calls))
  assert found == [0, 1, 1, 2]


def test_seed_moves_the_point_between():
  params = {'x': jnp.array([1.0, -2.0, 0.5])}

  def third_update(seed):
    made, at = optim.harpg(learning_rate=0.1, seed=seed), params
    state = made.init(at)
    for _ in range(3):
      steps, state = made.update(
        jax.grad(quadratic)(at), state, at, oracle=oracle_of(quadratic, at)
      )
      at = optax.apply_updates(at, steps)
    return np.asarray(at['x'])

  np.testing.assert_array_equal(third_update(0), third_update(0))
  assert np.abs(third_update(0) - third_update(1)).max() > 1e-3


def bandit_moments():
  """||grad J||^2 and the trace variance of one sample's gradient, baseline b*, by enumeration."""
  logits, rewards = np.array([1, 0.2, -0.5, -1]), np.array([1, 0.5, 0, 2])
  p = np.exp(logits) / np.exp(logits).sum()
  scores = np.eye(4) - p
  squares = (scores**2).sum(1)
  baseline = p @ (squares * rewards) / (p @ squares)
  samples = (rewards - baseline)[:, None] * scores
  mean = p @ samples
  return mean @ mean, p @ (samples**2).sum(1) - mean @ mean


def scale_of(made, halves):
  """By what the step of plain gradient descent is multiplied."""
  params = {'x': jnp.zeros(2)}
  oracle = optim.Oracle(None, lambda: tuple({'x': jnp.asarray(h)} for h in halves), None)
  steps, state = made.update({'x': jnp.ones(2)}, made.init(params), params, oracle=oracle)
  assert steps['x'][0] == steps['x'][1]
  return -float(steps['x'][0]), state


@pytest.mark.parametrize('samples, factor', ((1, 0.1368), (8, 0.5590), (64, 0.9102)))
def test_step_falls_with_the_noise(samples, factor):
  power, variance = bandit_moments()
  np.testing.assert_allclose((power, variance), (0.033885, 0.213844), atol=1e-6)
  noise = variance / samples
  half = np.array([np.sqrt(power + noise), np.sqrt(noise)])  # so the estimates are exact
  made = optim.signal_to_noise(optimizer=optim.sgd(learning_rate=1.0))
  found, _ = scale_of(made, (half, half * [1, -1]))
  np.testing.assert_allclose(found, factor, atol=1e-4)


def test_opposite_halves_stop_the_step_and_equal_ones_leave_it():
  made = optim.signal_to_noise(optimizer=optim.sgd(learning_rate=1.0))
  for halves, factor in (
    (([1.0, 2.0], [-1.0, -2.0]), 0.0),
    (([1.0, 2.0], [1.0, 2.0]), 1.0),
    (([0.0, 0.0], [0.0, 0.0]), 0.0),
  ):
    found, _ = scale_of(made, halves)
    np.testing.assert_allclose(found, factor, atol=1e-6)


def test_running_signal_and_noise_are_means_without_bias():
  made = optim.signal_to_noise(optimizer=optim.sgd(learning_rate=1.0), decay=0.9)
  params = {'x': jnp.zeros(2)}
  state, seen = made.init(params), []
  for halves in (([1.0, 0.0], [0.5, 1.0]), ([2.0, 1.0], [1.0, 0.0]), ([0.0, 1.0], [1.0, -1.0])):
    first, second = map(np.array, halves)
    seen.append([first @ second, ((first - second) ** 2).sum()])
    answer = tuple({'x': jnp.asarray(h)} for h in halves)
    oracle = optim.Oracle(None, lambda answer=answer: answer, None)
    steps, state = made.update({'x': jnp.ones(2)}, state, params, oracle=oracle)
    signal, noise = np.average(seen, axis=0, weights=0.9 ** np.arange(len(seen))[::-1])
    ratio = max(0, 4 * signal / noise)
    np.testing.assert_allclose(-steps['x'][0], ratio / (1 + ratio), rtol=1e-6)


@pytest.mark.parametrize('norm, factor', ((0, 1), (0.5, 1), (3, 1 / 3), (10, 0.1), (100, 0.1)))
def test_step_is_divided_by_the_norm_of_the_bias(norm, factor):
  made = optim.bias_scaled(optimizer=optim.sgd(learning_rate=1.0))
  params = {'x': jnp.zeros(3)}
  bias = {'x': jnp.array([0.6, 0.0, -0.8]) * norm}
  oracle = oracle_of(quadratic, params, bias)
  steps, _ = made.update({'x': jnp.ones(3)}, made.init(params), params, oracle=oracle)
  np.testing.assert_allclose(steps['x'], -factor * np.ones(3), rtol=1e-6)


def test_scaling_reaches_what_adam_would_undo():
  grads, params = {'x': jnp.array([1.0, -3.0, 0.2])}, {'x': jnp.zeros(3)}
  inner = optim.adamw(learning_rate=0.1)
  plain, _ = inner.update(grads, inner.init(params), params)
  made = optim.bias_scaled(optimizer=inner, max_scale=4.0)
  oracle = oracle_of(quadratic, params, {'x': jnp.full(3, 9.0)})
  steps, _ = made.update(grads, made.init(params), params, oracle=oracle)
  np.testing.assert_allclose(steps['x'], plain['x'] / 4, rtol=1e-6)


ASKING = {
  'normalized_igt': part(optim.normalized_igt, learning_rate=0.1),
  'harpg': part(optim.harpg, learning_rate=0.1),
  'signal_to_noise': part(optim.signal_to_noise, optimizer=part(optim.adamw, learning_rate=0.1)),
  'bias_scaled': part(
    optim.bias_scaled, optimizer=part(optim.sgd, learning_rate=0.1, momentum=0.5), max_scale=3.0
  ),
  'smooth_descent': part(optim.smooth_descent, radius=0.1, products=2),
}
ELSEWHERE = (
  'companded',
  'lion',
  'adafactor',
  'muon',
  'sinkgd',
  'swan',
  'projected',
  'masked',
)  # optim_matrix_steps_test.py, update_sparsity_test.py, optim_companded_test.py


def test_every_optimizer_of_the_table_is_tested():
  assert optim.TABLE.keys() == {f'optim.{name}' for name in (*ASKING, *ELSEWHERE, 'adamw', 'sgd')}


def quartic(params):
  return sum(jnp.sum((x.astype(jnp.float32) - 0.5) ** 4) / 40 for x in jax.tree.leaves(params))


def make_step(made):
  def step(params, state):
    oracle = oracle_of(quartic, params, jax.tree.map(lambda p: 2 * p, params))
    steps, state = made.update(jax.grad(quartic)(params), state, params, oracle=oracle)
    return optax.apply_updates(params, steps), state

  return step


def start(dtype=jnp.float32):
  return {'a': jnp.array([1.0, -2.0], dtype), 'b': {'c': jnp.array([[0.25]], dtype)}}


@pytest.mark.parametrize('name', ASKING)
def test_compiled_updates_with_donated_arrays_are_the_same(name):
  made = bind(ASKING[name], optim.TABLE)
  one, compiled = make_step(made), jax.jit(make_step(made), donate_argnums=(0, 1))
  params, state = start(), jax.jit(made.init)(start())
  donated = jax.tree.map(jnp.copy, (params, state))
  for _ in range(5):
    params, state = one(params, state)
    donated = compiled(*donated)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), (params, state), donated)


@pytest.mark.parametrize('dtype', (jnp.float32, jnp.bfloat16))
@pytest.mark.parametrize('name', ASKING)
def test_a_resumed_run_is_the_run_that_went_on(name, dtype):
  made = bind(ASKING[name], optim.TABLE)
  step = jax.jit(make_step(made))
  begun = start(dtype), made.init(start(dtype))
  for _ in range(3):  # in the middle of a step of harpg
    begun = step(*begun)
  saved = [np.asarray(x) for x in jax.tree.leaves(begun)]
  fresh = jax.tree.structure(jax.eval_shape(lambda: (start(dtype), made.init(start(dtype)))))
  resumed = jax.tree.unflatten(fresh, [jnp.asarray(x) for x in saved])
  for _ in range(3):
    begun, resumed = step(*begun), step(*resumed)
  jax.tree.map(np.testing.assert_array_equal, begun, resumed)


@pytest.mark.parametrize('name', ASKING)
def test_bfloat16_parameters_follow_a_float32_run(name):
  """The rounded master copy is what the model gets: the extrapolated point, not the iterate."""
  made = bind(ASKING[name], optim.TABLE)
  low, exact = [(start(d), made.init(start(d))) for d in (jnp.bfloat16, jnp.float32)]
  for _ in range(6):
    low, exact = make_step(made)(*low), make_step(made)(*exact)
    master = jax.tree.map(lambda m: m.astype(jnp.bfloat16), low[1].master)
    jax.tree.map(np.testing.assert_array_equal, low[0], master)
  jax.tree.map(lambda m, p: np.testing.assert_allclose(m, p, atol=0.03), low[1].master, exact[0])
  moments = jax.tree.leaves(low[1].inner)
  assert all(x.dtype != jnp.bfloat16 for x in moments)


def test_wrapped_optimizers_ask_in_their_own_precision_and_of_their_own_parameters():
  """Balance steps outside, master copies inside: the oracle sees what the model has."""
  seen = {}

  def record(kind, tree):
    seen[kind] = tree
    return jax.tree.map(jnp.ones_like, tree)

  params = {'w': jnp.array([1.0, -2.0], jnp.bfloat16), 'bias': jnp.array([0.5, 0.5])}
  oracle = optim.Oracle(
    gradient=lambda at, probe='': record(f'gradient {probe}', at),
    halves=lambda: (params, params),
    product=lambda vector: record('product', vector),
    value=lambda: 3.0,
    value_and_gradient=lambda at: (2.0, record('value', at)),
  )

  def update(grads, state, params, oracle):
    first, second = oracle.halves()
    value, slope = oracle.value_and_gradient(params)
    assert (oracle.value(), value) == (3.0, 2.0)
    answers = (oracle.gradient(params, 'p'), oracle.product(grads), first, second, slope)
    for answer in answers:
      assert jax.tree.structure(answer) == jax.tree.structure(grads)
      assert answer['w'].dtype == jnp.float32
    return jax.tree.map(jnp.add, grads, answers[1]), state

  asks = optax.GradientTransformationExtraArgs(lambda params: (), update)
  labels = lambda tree: {'w': 'train', 'bias': 'balance'}
  made = optim.balanced(optim.in_float32(asks), labels, rate=0.125)
  grads = {'w': jnp.array([3.0, 4.0], jnp.bfloat16), 'bias': jnp.array([1.0, -7.0])}
  steps, _ = made.update(grads, made.init(params), params, oracle=oracle)
  np.testing.assert_array_equal(steps['w'], [4.0, 5.0])
  np.testing.assert_array_equal(steps['bias'], [-0.125, 0.125])
  for kind in ('gradient p', 'value'):
    jax.tree.map(np.testing.assert_array_equal, seen[kind], params)
  jax.tree.map(
    np.testing.assert_array_equal, seen['product'], grads | {'bias': np.zeros(2, np.float32)}
  )
  assert seen['product']['w'].dtype == jnp.bfloat16


@pytest.mark.parametrize('name', ('normalized_igt', 'harpg'))
def test_the_iterate_is_found_behind_all_wrappers(name):
  labels = lambda tree: {'a': 'train', 'b': {'c': 'balance'}}
  made = optim.balanced(bind(ASKING[name], optim.TABLE), labels, rate=0.1)
  found = optim.iterate(made.init(start(jnp.bfloat16)))
  np.testing.assert_array_equal(found['a'], [1.0, -2.0])
  assert found['a'].dtype == jnp.float32 and not jax.tree.leaves(found['b'])


def test_unusable_settings_are_refused():
  with pytest.raises(ValueError, match='its iterate'):
    optim.iterate(optim.adamw().init(start()))
  for name in ('harpg', 'signal_to_noise', 'bias_scaled', 'smooth_descent'):
    made = bind(ASKING[name], optim.TABLE)
    with pytest.raises(ValueError, match=f'{name} asks for more than a gradient'):
      made.update(start(), made.init(start()), start())
  with pytest.raises(ValueError, match='decay'):
    optim.signal_to_noise(optimizer=optim.sgd(), decay=1.0)
  with pytest.raises(ValueError, match='max_scale'):
    optim.bias_scaled(optimizer=optim.sgd(), max_scale=0.5)
  with pytest.raises(ValueError, match='exponent'):
    optim.normalized_igt(exponent=-0.1)
  with pytest.raises(ValueError, match='harpg'):
    bind(part(optim.bias_scaled, optimizer=part(optim.harpg)), optim.TABLE)


@pytest.mark.parametrize('name', ['adamw', 'sgd', 'normalized_igt', 'signal_to_noise'])
def test_the_learning_rate_is_that_of_the_next_step_behind_all_wrappers(name):
  schedule = functools.partial(optim.linear, steps=4)
  kind, settings = getattr(optim, name), dict(learning_rate=0.5, schedule=schedule)
  made = kind(optimizer=optim.adamw(**settings)) if name == 'signal_to_noise' else kind(**settings)
  made = optim.balanced(made, labels=lambda tree: {'w': 'train', 'b': 'balance'}, rate=0.1)
  params = {'w': jnp.ones(2), 'b': jnp.ones(2)}
  oracle = optim.Oracle(gradient=None, halves=lambda: (params, params), product=None)
  state = made.init(params)
  for rate in (0.5, 0.375, 0.25):
    np.testing.assert_allclose(optim.learning_rate(made, state)['learning_rate'], rate)
    _, state = made.update(params, state, params, oracle=oracle)


def test_an_optimizer_that_tells_no_rate_may_be_wrapped():
  plain = optax.sgd(0.1)
  for made in (plain, optim.signal_to_noise(optimizer=plain)):
    made = optim.balanced(made, labels=lambda tree: {'w': 'train'}, rate=0.1)
    assert optim.learning_rate(made, made.init({'w': jnp.ones(2)})) == {}
