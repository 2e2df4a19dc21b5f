"""Attention kernels: the same numbers and gradients as `attend`, in whole models and on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import sharding
from polgrad.models import attention, kernels
from tests.models import tiny

# On a CPU, cuDNN's place is taken by XLA's own, and splash attention is interpreted.
ON_CPU = {
  'cudnn': functools.partial(kernels.cudnn, implementation='xla'),
  'splash': functools.partial(kernels.splash, interpret=True),
}
SEGMENTS = np.array([[0, 1, 1, 1, 2, 2, 2, 2, 2, 0], [1] * 10], np.int32)


def arrays():
  random = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
  return draw(2, 10, 4, 8), draw(2, 2, 8, 10), draw(2, 2, 10, 8)


def reference(query, key, value, segment_ids, *, window, scale, cap):
  mask = attention.segment_mask(segment_ids)
  near = jnp.tril(jnp.ones((10, 10), bool), -window) if window else jnp.zeros((10, 10), bool)
  return attention.attend(query, (key, value, mask & ~near[None]), scale=scale, cap=cap)


@pytest.mark.parametrize('window', [0, 3])
@pytest.mark.parametrize('name, cap', [('cudnn', 0.0), ('splash', 0.0), ('splash', 2.0)])
def test_is_attend_and_so_are_its_derivatives(name, cap, window):
  valid = SEGMENTS[..., None, None] > 0

  def loss(attend, *arrays):
    out = attend(*arrays, SEGMENTS, window=window, scale=0.4, cap=cap)
    return jnp.sum(jnp.sin(jnp.where(valid, out, 0))), jnp.where(valid, out, 0)

  got, expected = (
    jax.value_and_grad(functools.partial(loss, attend), (0, 1, 2), has_aux=True)(*arrays())
    for attend in (ON_CPU[name], reference)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, expected)


def gradient(**settings):
  """The sum of a model's squared hidden states, and its gradient."""
  shape = dict(window=3, local_layers=(0,))
  hidden = tiny.policy(**shape, **settings).hidden
  tokens = jnp.asarray(tiny.rows(1, 2, 10))
  loss = lambda p: jnp.sum(jnp.where(SEGMENTS[..., None] > 0, hidden(p, tokens, SEGMENTS), 0) ** 2)
  return jax.value_and_grad(loss)(tiny.params(**shape))


plain_gradient = functools.cache(gradient)


@pytest.mark.parametrize('name', ON_CPU)
@pytest.mark.parametrize('remat', ['none', 'full'])
def test_a_model_with_it_is_the_model_without(monkeypatch, name, remat):
  # A config with 'cudnn' wants bfloat16, so it is the table's entry that is exchanged.
  monkeypatch.setitem(kernels.ATTENTION, 'splash', ON_CPU[name])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3),
    gradient(remat=remat, attention='splash'),
    plain_gradient(),
  )


# `context` of 5 does not divide the 4 heads: a device has some of the positions of all of them.
@pytest.mark.parametrize('axes', [dict(data=2, context=2, tensor=2), dict(context=5)], ids=str)
def test_splash_attends_for_the_rows_and_heads_or_positions_of_a_device(axes):
  settings = dict(window=3, scale=0.4, cap=0.0)
  with jax.set_mesh(sharding.make_mesh(**axes)):
    got = jax.jit(functools.partial(ON_CPU['splash'], **settings))(*arrays(), SEGMENTS)
  expected = reference(*arrays(), SEGMENTS, **settings)
  np.testing.assert_allclose(got[SEGMENTS > 0], expected[SEGMENTS > 0], atol=2e-5)


def test_a_kernel_that_cannot_be_is_refused():
  with pytest.raises(ValueError, match=r"unknown attention 'flash'; valid: .*'splash'"):
    tiny.policy(attention='flash')
  with pytest.raises(ValueError, match=r"'cudnn' needs dtype 'bfloat16' and no attention_softcap"):
    tiny.policy(attention='cudnn')
  with pytest.raises(ValueError, match=r'no soft cap, got 2\.0'):
    ON_CPU['cudnn'](*arrays(), SEGMENTS, window=0, scale=0.4, cap=2.0)
