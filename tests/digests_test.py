"""Digests see every bit, wherever an array lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from polgrad import digests


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int32', 'uint8', 'bool'])
@pytest.mark.parametrize('spec', [(), ('a',), ('a', 'b'), (None, ('a', 'b'))])
def test_the_digest_does_not_depend_on_the_sharding(dtype, spec):
  x = jnp.asarray(np.random.default_rng(0).integers(0, 2, (4, 8, 3)), dtype)
  mesh = jax.make_mesh((4, 2), ('a', 'b'))
  sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
  whole = digests.digests({'w': x})
  assert digests.digests({'w': sharded}) == digests.digests({'w': np.asarray(x)}) == whole


def test_every_bit_and_every_place_counts():
  x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
  seen = {digests.digests(x)['']}
  for place in np.ndindex(3, 5):
    for bit in range(32):
      y = x.copy()
      y.view(np.uint32)[place] ^= np.uint32(1) << np.uint32(bit)
      seen.add(digests.digests(y)[''])
  y = x.copy()
  y[0], y[1] = x[1], x[0]
  seen.add(digests.digests(y)[''])
  assert len(seen) == 1 + 3 * 5 * 32 + 1


def test_pieces_add_up_to_the_whole(monkeypatch):
  x = np.random.default_rng(0).normal(size=(40, 7))
  whole = digests.digests(x)
  monkeypatch.setattr(digests, 'CHUNK', 16)
  assert digests.digests(x) == whole


def test_arrays_that_are_not_finite_are_named():
  tree = {
    'a': jnp.array([1, jnp.nan]),
    'b': {'c': jnp.array([jnp.inf], jnp.bfloat16)},
    'd': jnp.arange(3),
  }
  assert digests.not_finite(tree) == ['a', 'b/c']
