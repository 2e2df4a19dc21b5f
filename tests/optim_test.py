"""Schedules at their corners, and AdamW against its equations."""

import functools

import jax.numpy as jnp
import numpy as np

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


def test_sgd_is_the_gradient():
  made = bind(part(optim.sgd, learning_rate=0.5), optim.TABLE)
  updates, _ = made.update(jnp.array([2.0]), made.init(jnp.zeros(1)), jnp.zeros(1))
  assert updates == -1.0
