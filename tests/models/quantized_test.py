"""Weights and caches of 8 bits: what is lost by rounding, and that all else is exact."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad.models import attention, quantized
from polgrad.models import cache as caches
from polgrad.models.transformer import sampled
from polgrad.sampling import make_sampler
from tests.models import tiny

MIXTURE = dict(num_experts=4, experts_per_token=2, tie_embeddings=False)
NORMAL = np.random.default_rng(0).normal(size=(5, 64, 3)).astype(np.float32)
# A column that is large, one of zeros, and one with entries of all sizes.
NORMAL[:, :, 0] *= 1e4
NORMAL[2, :, 1] = 0
NORMAL[:, :, 2] *= 10.0 ** -np.arange(64)[None] / 8


def test_the_examples_are_true():
  assert not doctest.testmod(quantized).failed


@pytest.mark.parametrize('kind, most', [('int8', 127), ('float8', 448)])
def test_an_entry_is_off_by_half_a_step_of_its_own_channel(kind, most):
  found = quantized.quantize(jnp.asarray(NORMAL), quantized.KINDS[kind], (1,))
  assert found.values.dtype.itemsize == 1 and found.scale.shape == (5, 1, 3)
  top = np.abs(NORMAL).max(axis=1, keepdims=True)
  step = np.maximum(top / most, np.finfo(np.float32).tiny)
  np.testing.assert_allclose(found.scale, step, rtol=1e-6)
  off = np.abs(np.asarray(quantized.dequantize(found)) - NORMAL)
  # The steps of float8 grow with the size of an entry, from 1/512 on; it has three bits of it.
  half = step / 2 if kind == 'int8' else np.maximum(np.abs(NORMAL) / 16, step / 1024)
  assert (off <= half * (1 + 1e-4)).all() and (off > half / 2).any()
  np.testing.assert_array_equal(off[2, :, 1], 0)
  # The largest entry of a channel is exact.
  exact = np.take_along_axis(off, np.abs(NORMAL).argmax(axis=1)[:, None], axis=1)
  assert (exact <= 1e-6 * top).all()


@pytest.mark.parametrize('kind', quantized.KINDS)
def test_neither_nan_nor_infinity_becomes_a_number_and_tiny_entries_become_no_nan(kind):
  tiny = np.finfo(np.float32).tiny
  x = jnp.array([[np.nan, 1, 0], [np.inf, 1, 0], [tiny, -tiny, 0], [tiny / 256, 0, 0]])
  out = quantized.dequantize(quantized.quantize(x, quantized.KINDS[kind], (1,)))
  assert np.isnan(out[:2]).all()
  np.testing.assert_allclose(out[2:], x[2:], atol=tiny)


def test_what_has_eight_bits_and_which_entries_share_a_scale():
  rounded = {}
  for name, settings in (('dense', {}), ('mixture', MIXTURE)):
    policy = tiny.policy(**settings)
    params = jax.eval_shape(
      lambda x, c=policy.config: quantized.quantize_params(x, c, 'int8'), policy.shapes()
    )
    flat = {**params, **params['layers']}
    rounded[name] = {k: x.scale.shape for k, x in flat.items() if quantized.is_quantized(x)}
  shared = dict(query=(2, 1, 4, 6), key=(2, 1, 2, 6), value=(2, 1, 2, 6), out=(2, 1, 1, 16))
  dense = dict(gate=(2, 1, 24), up=(2, 1, 24), down=(2, 1, 16), embedding=(23, 1))
  mixture = dict(gate=(2, 4, 1, 24), up=(2, 4, 1, 24), down=(2, 4, 1, 16), unembedding=(23, 1))
  assert rounded == {'dense': shared | dense, 'mixture': shared | mixture}


@pytest.mark.parametrize(
  'kind, settings', [('int8', {}), ('float8', MIXTURE)], ids=['dense, int8', 'mixture, float8']
)
def test_log_probs_of_the_sampler_are_those_of_the_rounded_model(kind, settings):
  """The trainer's forward pass, by weights that are what the values of 8 bits stand for."""
  policy, params = tiny.policy(**settings), tiny.params(**settings)
  draw = make_sampler({}, default=sampled(policy, weights=kind), max_new_tokens=7, slots=2)
  tokens, mask = tiny.rows(1, 4, 6), jnp.arange(6)[None] >= jnp.array([[0], [2], [5], [1]])
  batch = draw({'policy': params}, tokens, mask, jnp.arange(4), seed=0, step=0)
  rounded = quantized.dequantize_params(quantized.quantize_params(params, policy.config, kind))
  gap = lambda x: np.abs(
    np.where(
      batch.mask, tiny.logp(policy, x, batch.tokens, batch.segment_ids) - batch.behavior_logp, 0
    )
  ).max()
  assert gap(rounded) < 1e-5 < 1e-3 < gap(params) < 0.5


def test_attention_to_a_cache_of_eight_bits_is_that_to_what_it_stands_for():
  config = tiny.policy().config
  random = np.random.default_rng(1)
  normal = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
  query, keys, values = normal(3, 2, 4, 6), normal(3, 2, 6, 5), normal(3, 2, 5, 6)
  span = caches.empty(config, 3, 8, (2,), 'int8').spans[0]
  found = []
  for axes, buffer, new, axis in (
    (caches.KEYS, span.keys[0], keys, 2),
    (caches.VALUES, span.values[0], values, 3),
  ):
    stack = caches.write(axes, buffer, new, 2, 1)
    stored = caches.layer_of(axes, stack, 1)
    assert not np.any(caches.layer_of(axes, stack, 0).values)
    plain = quantized.dequantize(stored.replace(scale=jnp.expand_dims(stored.scale, axis)))
    expected = quantized.dequantize(quantized.quantize(new, jnp.int8, (axis,)))
    columns = jax.lax.slice_in_dim(plain, 2, 7, axis=5 - axis)
    np.testing.assert_array_equal(columns, expected)
    assert float(jnp.abs(plain).sum()) == pytest.approx(float(jnp.abs(expected).sum()))
    found.append((stack, plain))
  mask = jnp.broadcast_to((jnp.arange(8) >= 2) & (jnp.arange(8) < 7), (3, 2, 8))
  source = (found[0][0], found[1][0], mask, 1)
  for several in (False, True):
    np.testing.assert_allclose(
      attention.attend_to_spans(query, source, several=several, scale=0.5),
      attention.attend(query, (found[0][1], found[1][1], mask), scale=0.5),
      atol=1e-5,
    )
