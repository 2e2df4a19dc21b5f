"""Every mesh computes what one device computes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from polgrad import hlo, sharding
from polgrad.arrays import WIDE
from polgrad.losses import logit_stats
from polgrad.models import token_stats
from polgrad.models.attention import einsum
from polgrad.models.token_stats import Rows, Unembedding, unembedding
from polgrad.models.transformer import look_up
from polgrad.registry import inputs
from polgrad.sampling import make_sampler
from tests.models import tiny

OTHERS = {'teacher_logits', *WIDE}
STATS = {n: f for n, f in logit_stats.TABLE.items() if not OTHERS & {*inputs(f)}}
MESHES = [
  dict(data=2, tensor=4),
  dict(data=2, fsdp=2, tensor=2),
  dict(fsdp=2, context=2, tensor=2),
  # Positions are not exchanged for heads, as where the mesh does not divide the heads.
  dict(
    expert=2, context=4, rules=dict.fromkeys(['attention_heads', 'attention_kv_heads'], 'tensor')
  ),
]
OVERRIDES = dict(vocab_size=24, qk_norm='head', tie_embeddings=False, value_head=True)
POLICY = tiny.policy(**OVERRIDES)
PROMPTS = (
  np.asarray(tiny.rows(0, 8, 4)),
  np.arange(4)[None] >= np.array([0, 1, 2, 3, 0, 1, 2, 3])[:, None],
  np.arange(8),
)
LENGTH = 20  # no parameter has such an axis
TOKENS = np.asarray(tiny.rows(1, 8, LENGTH))
SEGMENTS = np.repeat(np.repeat([[1, 1, 2, 2], [1, 2, 2, 0]], LENGTH // 4, axis=1), 4, axis=0)


def host_params():
  return jax.tree.map(np.asarray, tiny.params(**OVERRIDES))


@functools.partial(jax.jit, static_argnums=0)
def evaluate(policy, params, tokens, segment_ids):
  """Statistics, and the gradient of a quarter of their sum, in which large ones have smaller weights."""

  def loss(params):
    hidden = policy.hidden(params, tokens, segment_ids)
    whole = Rows(tokens, segment_ids, segment_ids > 0)
    unembed = unembedding(policy, params)
    out = token_stats(hidden, tokens, unembed, stats=STATS, chunk=2, whole=whole)
    out['value'] = policy.value(params, hidden)
    size = lambda x: 1 + jnp.abs(jax.lax.stop_gradient(x))
    return sum(jnp.sum(jnp.sin(x) / size(x)) for x in out.values()) / 4, out

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
  mesh = sharding.make_mesh(**shape)
  params = host_params()
  shardings = sharding.param_shardings(mesh, POLICY.axes(params), params)
  params = sharding.place(params, shardings)
  rows = sharding.place_batch(mesh, (TOKENS, SEGMENTS))
  with jax.set_mesh(mesh):
    program = evaluate.lower(POLICY, params, *rows).compile()
  grads, out = program(params, *rows)
  if 'context' in shape:
    whole_rows_only_in_attention(program.as_text(), mesh)
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


def whole_rows_only_in_attention(text, mesh):
  """No device gathers the positions of a row: they are exchanged for heads by an all-to-all, or those of
  keys and values alone are gathered."""
  computations, _ = hlo.parse(text)
  ops = [op for one in computations.values() for op in one]
  shapes = [shape for op in ops if op.kind == 'all-gather' for shape in op.shapes]
  gathered = [size for kind, size in shapes if kind == 'f32' and len(size) > 1]
  tokens = TOKENS.size // sharding.data_parallel_size(mesh)  # of the rows of a device
  c, pieces = POLICY.config, mesh.shape['context']
  whole = [size for size in gathered if {LENGTH, tokens} & {*size}]
  if 'context' not in sharding.rules_of(mesh)['attention_heads']:
    own = tokens // LENGTH * c.num_kv_heads * c.head_dim * LENGTH
    assert whole and all(np.prod(size) == own for size in whole)
    return
  assert gathered and not whole
  # Queries, keys and values, and what they attend to, in both passes of a layer and recomputed.
  heads = 2 * c.num_heads + 2 * max(c.num_kv_heads, sharding.most_shards(mesh, 'attention_heads'))
  own = 4 * c.head_dim * heads * tokens / pieces / mesh.shape['tensor']
  layer = [op for op in ops if op.kind == 'all-to-all' and '/layers/' in op.rest]
  assert sum(hlo.size(shape) for op in layer for shape in op.shapes) == 3 * own


def test_sums_that_go_around_a_ring_are_scattered_as_those_of_the_collective():
  # Tests run on CPUs, for which `sharding.gather` takes the collective.
  mesh, axes = sharding.make_mesh(fsdp=4, expert=2), ('fsdp', 'expert')
  x = np.random.default_rng(0).normal(size=(8, 3, 16)).astype(np.float32)

  def local(x):
    for name in axes:
      x = sharding.ring_scatter(x, name=name, dimension=2, dtype=jnp.float32)
    return x[0]

  run = jax.shard_map(local, mesh=mesh, in_specs=P(axes), out_specs=P(None, axes), check_vma=False)
  np.testing.assert_allclose(jax.jit(run)(x), x.sum(axis=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('group', [sharding.Group(2), sharding.Group(2, stride=4)], ids=str)
def test_each_group_of_a_ring_adds_up_its_own(group):
  mesh, x = sharding.make_mesh(fsdp=8), np.random.default_rng(0).normal(size=(8, 4))
  ring = lambda x: sharding.ring_scatter(x, name='fsdp', dimension=1, dtype=x.dtype, group=group)
  run = jax.shard_map(ring, mesh=mesh, in_specs=P('fsdp'), out_specs=P('fsdp'), check_vma=False)
  expected = np.zeros((8, 2))
  for members in group.members(8):
    expected[members] = x[members].sum(axis=0).reshape(2, 2)
  np.testing.assert_allclose(jax.jit(run)(x), expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_gathered_bfloat16_is_added_up_on_cpus():
  """XLA for CPUs aborts where it adds up this type over devices."""
  mesh, x = sharding.make_mesh(fsdp=8), jnp.arange(8.0, dtype=jnp.bfloat16)
  gather = lambda x: sharding.gather(x, ('fsdp',), 0)
  own = dict(axis_names={'fsdp'}, check_vma=False)
  run = jax.shard_map(gather, mesh=mesh, in_specs=P('fsdp'), out_specs=P('fsdp'), **own)
  found = jax.jit(jax.grad(lambda x: jnp.sum(run(x) * jnp.arange(64.0))))(x)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_array_equal(found, np.arange(64.0).reshape(8, 8).sum(0))


def readout(table):
  return Unembedding(
    lambda params, x: einsum('nd,vd->nv', x, params['table'].astype(x.dtype)),
    {'table': table},
    lambda params: {'table': ('vocab', 'embed')},
  )


def head(table, hidden, tokens, **stats):
  """Statistics, a chunk at a time, and their weighted sum."""
  out = token_stats(hidden, tokens, readout(table), stats=stats, chunk=2)
  weight = jnp.sin(jnp.arange(tokens.size).reshape(tokens.shape))
  return sum((1 + i) * jnp.einsum('bt...,bt->', x, weight) for i, x in enumerate(out.values())), out


STATES = [
  np.random.default_rng(0).normal(size=s).astype(np.float32) for s in [(48, 16), (8, 9, 16)]
]
NEXT = np.random.default_rng(1).integers(48, size=(8, 9)).astype(np.int32)


def test_devices_that_share_the_vocabulary_compute_what_one_computes():
  """Where few tokens are evaluated, exchanging their hidden states moves less than all of the table."""
  stats = dict(logp=logit_stats.logp, entropy=logit_stats.entropy)
  run = jax.value_and_grad(functools.partial(head, **stats), argnums=(0, 1), has_aux=True)
  expected = jax.jit(run)(*STATES, NEXT)
  mesh = sharding.make_mesh(data=2, fsdp=4)
  table = jax.device_put(STATES[0], NamedSharding(mesh, P(None, 'fsdp')))
  rows = sharding.place_batch(mesh, (STATES[1], NEXT))
  with jax.set_mesh(mesh):
    program = jax.jit(run).lower(table, *rows).compile()
    found = program(table, *rows)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  jax.tree.map(close, found, expected)
  # Two devices share it: none gathers more of the table than half, and none gathers logits.
  computations, _ = hlo.parse(program.as_text())
  gathers = [op for ops in computations.values() for op in ops if op.kind == 'all-gather']
  assert max(np.prod(size) for op in gathers for _, size in op.shapes) == 48 * 16 / 2


def test_parameters_of_bfloat16_have_gradients_on_cpus():
  """Where several devices have the same part of one, its gradients are added up."""
  table = jnp.asarray(STATES[0], jnp.bfloat16)

  def run(table, tokens):
    stats = dict(logp=logit_stats.logp, likely=functools.partial(logit_stats.most_likely, k=2))
    return head(table, look_up(table, tokens), tokens, **stats)[0]

  expected = jax.jit(jax.grad(run))(table, NEXT)
  mesh = sharding.make_mesh(data=2, fsdp=4)
  table = jax.device_put(table, NamedSharding(mesh, P(None, 'fsdp')))
  with jax.set_mesh(mesh):
    found = jax.jit(jax.grad(run))(table, sharding.place_batch(mesh, NEXT))
  largest = float(jnp.max(jnp.abs(expected)))
  np.testing.assert_allclose(
    *(x.astype(jnp.float32) for x in (found, expected)), atol=0.02 * largest
  )


@pytest.mark.parametrize(
  'operation, stat',
  [
    ('all_to_all', logit_stats.logp),
    ('all_gather', functools.partial(logit_stats.most_likely, k=2)),  # the vocabulary is not shared
  ],
)
def test_the_weights_of_a_teacher_are_exchanged_in_its_own_type(operation, stat):
  states = STATES[1].astype(jnp.bfloat16), STATES[1]
  stats = dict(stat=stat, expected=logit_stats.expected_logit)

  def both(table, hidden, teacher_hidden):
    models = [readout(table), readout(table)]
    settings = dict(teacher_hidden=teacher_hidden, teacher_unembed=models[1], chunk=2)
    return token_stats(hidden, NEXT, models[0], stats=stats, **settings)

  with jax.set_mesh(sharding.make_mesh(fsdp=8)):
    traced = str(jax.make_jaxpr(both)(STATES[0], *states))
  found = re.findall(rf':(\w+)\[\d+,\d+\][^=]*= {operation}\[', traced)
  assert sorted(found) == ['bf16', 'f32'], found


@pytest.mark.parametrize(
  'shape, stat, shared',
  [
    (dict(fsdp=8), logit_stats.entropy, True),
    (dict(fsdp=8), functools.partial(logit_stats.most_likely, k=2), False),  # sorts
    (dict(fsdp=8), logit_stats.hidden_norm, False),  # of whole states
    (dict(fsdp=4, tensor=2), logit_stats.entropy, False),  # already cut
    (dict(data=8), logit_stats.entropy, False),  # nothing to gather
  ],
)
def test_the_vocabulary_is_shared_where_statistics_and_mesh_allow_it(shape, stat, shared):
  with jax.set_mesh(sharding.make_mesh(**shape)):
    traced = jax.make_jaxpr(functools.partial(head, stat=stat))(*STATES, NEXT)
  assert ('all_to_all' in str(traced)) == shared


def test_the_gradient_of_embeddings_that_every_device_has_is_added_up():
  # No axis of a size above 1 makes copies or cuts the width.
  mesh = sharding.make_mesh(fsdp=2, tensor=2, rules={'vocab': 'tensor,fsdp', 'embed': ''})
  table = np.asarray(host_params()['embedding'])
  loss = lambda table, tokens: jnp.sum(jnp.sin(look_up(table, tokens)))
  expected = jax.grad(loss)(table, TOKENS)
  place = sharding.param_shardings(mesh, {'table': ('vocab', 'embed')}, {'table': table})['table']
  with jax.set_mesh(mesh):
    program = jax.jit(jax.grad(loss), out_shardings=place)
    found = program(jax.device_put(table, place), *sharding.place_batch(mesh, [TOKENS]))
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_every_share_of_a_mesh_refills_its_own_slots():
  mesh = sharding.make_mesh(data=4, context=2)
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
  assert local(sharding.place_batch(mesh, TOKENS)) == (2, LENGTH)
  assert local(sharding.replicate(mesh, TOKENS)) == (8, LENGTH)
  np.testing.assert_array_equal(params['unembedding'], host_params()['unembedding'])


def test_an_axis_that_does_not_divide_is_replicated():
  mesh = sharding.make_mesh(data=2, tensor=4)
  spec = sharding.partition_spec(mesh, ('embed', 'kv_heads', 'head_dim'), (16, 2, 6))
  assert spec == P(('context', 'fsdp', 'expert'), None, None)
  assert sharding.partition_spec(mesh, ('batch', 'vocab'), (3, 5)) == P(None, None)
  mesh = sharding.make_mesh(data=2, fsdp=4)  # the first of the axes that divide
  assert sharding.partition_spec(mesh, ('batch',), (6,)) == P('data')
  with pytest.raises(ValueError, match='do not fit shape'):
    sharding.partition_spec(mesh, ('embed',), (16, 2))


def test_minus_one_takes_the_remaining_devices():
  shape = sharding.make_mesh(data=-1, tensor=2).shape
  assert shape == {'data': 4, 'fsdp': 1, 'expert': 1, 'context': 1, 'tensor': 2}
  assert sharding.data_parallel_size(sharding.make_mesh(data=-1, fsdp=2, tensor=2)) == 4


@pytest.mark.parametrize('sizes', [dict(data=9), dict(data=-1, tensor=3), dict(data=-1, fsdp=0)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes):
  with pytest.raises(ValueError, match='does not fit 8 devices'):
    sharding.make_mesh(**sizes)


def test_a_mesh_has_rules_that_replace_those_of_the_table():
  rules = {'vocab': 'tensor, fsdp', 'embed': '', 'heads': ('tensor',)}
  mesh = sharding.make_mesh(fsdp=2, tensor=2, rules=rules)
  spec = sharding.partition_spec(mesh, ('vocab', 'embed'), (24, 16))
  assert spec == P(('tensor', 'fsdp'), None)
  # A mesh axis is used once, for the first dimension that names it.
  assert sharding.partition_spec(mesh, ('vocab', 'heads'), (24, 4)) == P(('tensor', 'fsdp'), None)
  beside = sharding.beside(mesh, data=2)
  assert sharding.partition_spec(beside, ('embed',), (16,)) == P(None)
  # Rules are those of a mesh, and of the programs traced for it, not of all meshes with its sizes.
  plain = sharding.make_mesh(fsdp=2, tensor=2)
  assert sharding.partition_spec(mesh, ('embed',), (16,)) == P(None)
  assert sharding.sizes_of(plain) == sharding.sizes_of(mesh) and plain.size == mesh.size == 4
  assert plain.axis_names == sharding.AXES and sharding.rules_of(plain) == sharding.RULES
  pieces = jax.jit(lambda x: sharding.shards('embed', x.size) * jnp.ones(()))
  for one, expected in ((mesh, 1), (plain, 2), (mesh, 1)):
    with jax.set_mesh(one):
      assert pieces(np.ones(16)) == expected


@pytest.mark.parametrize(
  ('rules', 'says'),
  [
    ({'embd': 'fsdp'}, "unknown logical axis 'embd'; did you mean 'embed'"),
    ({'embed': 'fsd'}, r"rules\.embed: unknown mesh axis 'fsd'; did you mean 'fsdp'"),
    ({'embed': 'fsdp,fsdp'}, 'names a mesh axis twice'),
    ({'embed': 3}, 'rules.embed: expected names of mesh axes, got 3'),
  ],
)
def test_rules_that_name_unknown_axes_are_refused(rules, says):
  with pytest.raises(ValueError, match=says):
    sharding.make_mesh(rules=rules)


def test_slices_are_parts_of_an_axis_and_the_other_axes_stay_within_them():
  ids = lambda mesh: np.vectorize(lambda d: d.id)(mesh.devices)
  mesh = sharding.make_mesh(data=4, context=2, slices={'data': 2})
  np.testing.assert_array_equal(ids(mesh)[:, 0, 0, :, 0], np.arange(8).reshape(4, 2))
  across = ids(sharding.make_mesh(data=2, fsdp=4, slices={'fsdp': 2}))[:, :, 0, 0, 0]
  np.testing.assert_array_equal(across, [[0, 1, 4, 5], [2, 3, 6, 7]])


@pytest.mark.parametrize(
  ('slices', 'says'),
  [
    ({'dat': 2}, "slices: unknown mesh axis 'dat'; did you mean 'data'"),
    ({'data': 3}, 'slices.data: 3 does not divide data=4'),
    ({'fsdp': 2}, 'slices.fsdp: 2 does not divide fsdp=1'),
  ],
)
def test_slices_that_do_not_fit_an_axis_are_refused(slices, says):
  with pytest.raises(ValueError, match=says):
    sharding.make_mesh(data=4, context=2, slices=slices)


class Chip:
  """A device that says which slice it is on, as those of TPUs do."""

  platform, device_kind = 'cpu', 'fake'

  def __init__(self, id, slice_index, process_index=0):
    self.id, self.slice_index, self.process_index = id, slice_index, process_index


def test_devices_on_several_slices_need_an_axis_that_lies_across_them(monkeypatch):
  monkeypatch.setattr(sharding, 'Mesh', lambda devices, *_, **__: devices)
  chips = [Chip(i, i % 2) for i in range(8)]  # listed in turns
  sizes = dict.fromkeys(sharding.AXES, 1) | dict(data=2, fsdp=4)
  found = sharding._arranged(chips, sizes, {'data': 2})
  slices = np.vectorize(lambda d: d.slice_index)(found)[:, :, 0, 0, 0]
  np.testing.assert_array_equal(slices, [[0] * 4, [1] * 4])
  for slices in ({}, {'fsdp': 4}):
    with pytest.raises(ValueError, match=r'the devices are on 2 slices.*slices.data=2'):
      sharding._arranged(chips, sizes, slices)


def test_each_of_several_processes_gives_as_many_devices_to_a_mesh(monkeypatch):
  assert sharding.make_mesh(data=3).size == 3
  there = [Chip(i, 0, i // 4) for i in range(8)]
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(jax, 'devices', lambda: there)
  with pytest.raises(ValueError, match='has 3 devices, which do not divide by 2 processes'):
    sharding.make_mesh(data=3)
  training = sharding._first_of_each(there, 2)
  rest = [device for device in there if device not in training]
  assert [device.id for device in training] == [0, 1, 4, 5]
  assert [device.id for device in sharding._first_of_each(rest, 2)] == [2, 3, 6, 7]


def test_rows_that_do_not_divide_are_refused_before_anything_runs():
  mesh = sharding.make_mesh(data=4, fsdp=2)
  with pytest.raises(ValueError, match=r'6 rows do not divide over data=4 x fsdp=2 = 8'):
    sharding.place_batch(mesh, {'tokens': TOKENS[:6]})


def test_without_a_mesh_nothing_is_constrained():
  x = jnp.ones((3, 2))
  assert sharding.constrain(x, ('batch', 'length')) is x
