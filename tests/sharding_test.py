"""Every mesh computes what one device computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from polgrad import sharding
from polgrad.losses import logit_stats
from polgrad.models import token_stats
from polgrad.models.token_stats import Rows
from polgrad.registry import inputs
from polgrad.sampling import make_sampler
from tests.models import tiny

OTHERS = {'teacher_logits', 'early_targets'}
STATS = {n: f for n, f in logit_stats.TABLE.items() if not OTHERS & {*inputs(f)}}
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (2, 1, 4)]
OVERRIDES = dict(vocab_size=24, qk_norm='head', tie_embeddings=False, value_head=True)
POLICY = tiny.policy(**OVERRIDES)
PROMPTS = (
  np.asarray(tiny.rows(0, 8, 4)),
  np.arange(4)[None] >= np.array([0, 1, 2, 3, 0, 1, 2, 3])[:, None],
  np.arange(8),
)
TOKENS = np.asarray(tiny.rows(1, 8, 7))
SEGMENTS = np.repeat([[1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]], 4, axis=0)


def host_params():
  return jax.tree.map(np.asarray, tiny.params(**OVERRIDES))


@functools.partial(jax.jit, static_argnums=0)
def evaluate(policy, params, tokens, segment_ids):
  """Statistics, and the gradient of a sum over all of them, in which large ones have smaller weights."""

  def loss(params):
    hidden = policy.hidden(params, tokens, segment_ids)
    whole = Rows(tokens, segment_ids, segment_ids > 0)
    unembed = functools.partial(policy.unembed, params)
    out = token_stats(hidden, tokens, unembed, stats=STATS, chunk=2, whole=whole)
    out['value'] = policy.value(params, hidden)
    size = lambda x: 1 + jnp.abs(jax.lax.stop_gradient(x))
    return sum(jnp.sum(jnp.sin(x) / size(x)) for x in out.values()), out

  return jax.grad(loss, has_aux=True)(params)


def sample(params, **settings):
  sampler = make_sampler(
    {'policy': POLICY}, max_new_tokens=5, samples_per_prompt=2, stop_ids=(3, 4, 5), **settings
  )
  return sampler({'policy': params}, *PROMPTS, seed=0, step=0)


@functools.cache
def one_device():
  params = host_params()
  return *evaluate(POLICY, params, TOKENS, SEGMENTS), sample(params)


@pytest.mark.parametrize('shape', MESHES, ids=str)
def test_statistics_gradients_and_samples_are_those_of_one_device(shape):
  mesh = sharding.make_mesh(**dict(zip(('data', 'fsdp', 'tensor'), shape)))
  params = host_params()
  shardings = sharding.param_shardings(mesh, POLICY.axes(params), params)
  params = sharding.place(params, shardings)
  with jax.set_mesh(mesh):
    grads, out = evaluate(POLICY, params, *sharding.place_batch(mesh, (TOKENS, SEGMENTS)))
  rollout = sample(params, mesh=mesh)
  expected_grads, expected, expected_rollout = one_device()
  for name, value in expected.items():
    np.testing.assert_allclose(out[name], value, atol=1e-5, err_msg=name)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), grads, expected_grads
  )
  np.testing.assert_array_equal(rollout.tokens, expected_rollout.tokens)
  np.testing.assert_array_equal(rollout.mask, expected_rollout.mask)
  np.testing.assert_allclose(rollout.behavior_logp, expected_rollout.behavior_logp, atol=1e-5)


@pytest.mark.parametrize('shape', [(2, 2, 2), (8, 1, 1)], ids=str)
def test_every_share_of_a_mesh_refills_its_own_slots(shape):
  mesh = sharding.make_mesh(**dict(zip(('data', 'fsdp', 'tensor'), shape)))
  params = host_params()
  params = sharding.place(params, sharding.param_shardings(mesh, POLICY.axes(params), params))
  rollout, (_, _, expected) = sample(params, mesh=mesh, slots=8), one_device()
  np.testing.assert_array_equal(rollout.tokens, expected.tokens)
  np.testing.assert_allclose(rollout.behavior_logp, expected.behavior_logp, atol=1e-5)
  with pytest.raises(ValueError, match='a multiple of the data-parallel size 4, got 6'):
    sample(params, mesh=sharding.make_mesh(data=4), slots=6)


def test_parameters_and_batches_are_really_cut():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  params = host_params()
  params = sharding.place(params, sharding.param_shardings(mesh, POLICY.axes(params), params))
  local = lambda x: x.addressable_shards[0].data.shape
  assert local(params['layers']['query']) == (2, 8, 2, 6)
  assert local(params['layers']['down']) == (2, 12, 8)
  assert local(params['unembedding']) == (12, 8)
  assert local(params['layers']['query_norm']) == (2, 6)
  assert local(sharding.place_batch(mesh, TOKENS)) == (2, 7)
  assert local(sharding.replicate(mesh, TOKENS)) == (8, 7)
  np.testing.assert_array_equal(params['unembedding'], host_params()['unembedding'])


def test_an_axis_that_does_not_divide_is_replicated():
  mesh = sharding.make_mesh(data=2, tensor=4)
  spec = sharding.partition_spec(mesh, ('embed', 'kv_heads', 'head_dim'), (16, 2, 6))
  assert spec == P(('fsdp',), None, None)
  assert sharding.partition_spec(mesh, ('batch', 'length'), (3, 5)) == P(None, None)
  with pytest.raises(ValueError, match='do not fit shape'):
    sharding.partition_spec(mesh, ('embed',), (16, 2))


def test_minus_one_takes_the_remaining_devices():
  assert sharding.make_mesh(data=-1, tensor=2).shape == {'data': 4, 'fsdp': 1, 'tensor': 2}
  assert sharding.data_parallel_size(sharding.make_mesh(data=-1, fsdp=2, tensor=2)) == 4


@pytest.mark.parametrize('sizes', [dict(data=9), dict(data=-1, tensor=3), dict(data=-1, fsdp=0)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes):
  with pytest.raises(ValueError, match='does not fit 8 devices'):
    sharding.make_mesh(**sizes)


def test_one_process_may_leave_devices_idle_but_several_may_not(monkeypatch):
  assert sharding.make_mesh(data=3).size == 3
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(ValueError, match='does not fit 8 devices'):
    sharding.make_mesh(data=3)


def test_rows_that_do_not_divide_are_refused_before_anything_runs():
  mesh = sharding.make_mesh(data=4, fsdp=2)
  with pytest.raises(ValueError, match=r'6 rows do not divide over data=4 x fsdp=2 = 8'):
    sharding.place_batch(mesh, {'tokens': TOKENS[:6]})


def test_without_a_mesh_nothing_is_constrained():
  x = jnp.ones((3, 2))
  assert sharding.constrain(x, ('batch', 'length')) is x
