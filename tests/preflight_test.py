"""The numbers that a preflight reports, without the compiler of TPUs."""

import dataclasses
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import tpu
from polgrad import aot, build, hlo, models, preflight, sharding
from polgrad.options import from_text
from polgrad.registry import part
from polgrad.sampling import engines, resumable

CHIP = aot.Chip(memory=100.0, bandwidth=10.0, links=2.0)
BASE = aot.Program(
  'train update', 50.0, 10.0, flops=40.0, compiled_flops=0.0, bytes=10.0, collectives=[],
  least_moved=0.0, seconds=0.0,
)  # fmt: skip


@pytest.mark.parametrize(
  ('change', 'seconds', 'limit', 'says'),
  [
    ({}, 2.0, 'products', 'fits'),
    ({'bytes': 80.0}, 8.0, 'memory', 'more rows a chip'),
    (
      {'collectives': [hlo.Collective('all-gather', 'fsdp', 1, 20.0)]},
      10.0,
      'links',
      'mesh.tensor',
    ),
    ({'memory': 101.0}, 2.0, 'products', 'raise config.mesh.fsdp'),
    ({'memory': 101.0, 'temporary': 90.0}, 2.0, 'products', 'more micro_batches'),
  ],
)
def test_the_longest_time_limits_and_the_verdict_names_a_knob(change, seconds, limit, says):
  program = BASE._replace(**change)
  found = aot.bound(program, CHIP, peak=20.0)
  assert found == (seconds, limit, 40.0 / 20.0 / seconds)
  assert says in preflight.verdict(program, CHIP, 20.0)


def test_the_least_that_moves_is_that_of_each_axis():
  least = lambda update=True, once=0.0, **mesh: aot.least_moved(
    80.0, dict(data=1, fsdp=1, tensor=1) | mesh, activations=10.0, update=update, once=once
  )
  assert least() == 0
  # Two gathers and a scatter of 80 bytes, 3/4 of them from other chips; a forward pass has one gather.
  assert least(fsdp=4) == 3 * 60
  assert least(fsdp=4, update=False) == 60
  assert least(fsdp=4, once=40.0) == 3 * 60 - 30 and least(fsdp=4, update=False, once=40.0) == 60
  # Activations are added up in both passes, each a ring of twice half their bytes.
  assert least(tensor=2) == 2 * 2 * 5
  assert least(data=2) == 2 * 80 / 2


def test_replicated_parameters_are_named():
  mesh = sharding.make_mesh(fsdp=4, tensor=2)
  place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
  shape = lambda where: jax.ShapeDtypeStruct((1024, 512), jnp.float32, sharding=where)
  tree = {'whole': shape(place()), 'cut': shape(place('fsdp'))}
  assert aot.replicated(mesh, tree) == ["['whole']"]


@pytest.mark.parametrize(
  ('name', 'billions'),
  [('qwen3_0_6b', 0.596), ('llama3_8b', 8.03), ('gemma3_27b', 27.0), ('qwen3_30b_a3b', 30.5)],
)
def test_shapes_have_the_published_number_of_parameters(name, billions):
  shapes = models.decoder(**preflight.SHAPES[name]).shapes()
  count = sum(x.size for x in jax.tree.leaves(shapes))
  assert count / 1e9 == pytest.approx(billions, rel=5e-3)


def test_without_libtpu_the_message_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'libtpu', None)
  with pytest.raises(ImportError, match=r'pip install .jax\[tpu\]'):
    aot.topology('v5e:4x4')


@pytest.mark.parametrize(
  ('name', 'rings'),
  [
    ('v5p:4x4x8', (True, True, True)),
    ('v5p:2x2x4', None),
    ('v6e:8x16', (False, True, False)),
    ('v5e:4x4', None),
  ],
)
def test_a_topology_names_the_dimensions_that_are_rings(monkeypatch, name, rings):
  asked = []

  def describe(**options):
    asked.append(options)
    return types.SimpleNamespace(devices=[])

  monkeypatch.setitem(sys.modules, 'libtpu', types.ModuleType('libtpu'))
  monkeypatch.setattr(topologies, 'get_topology_desc', describe)
  assert aot.topology(name) == []
  assert asked == [dict(platform='tpu', topology_name=name, **({'wrap': rings} if rings else {}))]


def test_meshes_are_made_of_the_devices_that_are_compiled_for():
  with sharding.compiling_for(jax.devices()[4:8]):
    assert list(sharding.make_mesh(data=-1, fsdp=2).devices.flat) == jax.devices()[4:8]
  assert sharding.make_mesh(data=1).devices.flat[0] == jax.devices()[0]


def test_a_program_that_could_not_be_read_moves_at_least_the_least():
  unread = BASE._replace(compiled_flops=float('nan'), least_moved=20.0)
  assert aot.bound(unread, CHIP, peak=20.0).limit == 'links'


def test_a_program_is_compiled_for_chips_that_are_not_there():
  pytest.importorskip('libtpu')  # there is none for other machines than x86-64 with Linux
  devices = aot.topology('v5e:2x2')
  config = from_text('method=grpo,task=addition,model=tiny')
  config.model.num_layers = 1
  config.mesh.update(data=1, fsdp=4)
  with sharding.compiling_for(devices):
    run = build.build(config)
    planned = aot.plan('train', run.phases['train'], run)
  names = ['prefill', 'decode', 'rollout', 'anchor', 'update']
  assert [one.name for one in planned] == [f'train {name}' for name in names]
  found = preflight.report(run, aot.compiled(preflight.chosen(planned, ['anchor'])), 'TPU v5 lite')
  [program] = found['programs']
  assert program['chips'] == 4 and program['verdict'].startswith('fits')
  # The parameters are cut, and gathered once; rows are not.
  assert {c['axes'] for c in program['collectives']} == {'fsdp'}
  assert program['least_moved'] <= program['moved'] < 2 * program['least_moved']
  assert 0.8 < program['compiled_flops'] / program['flops'] < 1.1
  assert not found['replicated']
  with pytest.raises(ValueError, match="unknown 'ancor'; did you mean 'anchor'"):
    preflight.chosen(planned, ['ancor'])


def test_a_step_of_decoding_reads_weights_and_cache_once_and_copies_neither():
  pytest.importorskip('libtpu')
  with sharding.compiling_for(aot.topology('v5e:2x2')[:1]):
    mesh = sharding.make_mesh()
  sizes = dict(width=256, num_heads=4, num_kv_heads=2, head_dim=128, mlp_width=512)
  # With two layers, what both have in a later span would fit near the processor, and be read in a step.
  model = models.decoder(vocab_size=512, num_layers=4, max_length=4096, **sizes)
  policy = engines.Own(dtype='bfloat16', weights='int8', cache='int8').drawn_from(model)
  made = tpu.compile_decoding(policy, mesh, rows=128, prompt=3072, new=1024)
  found = hlo.main_memory(made.text, large=tpu.LARGE)
  least = made.weights + made.cache
  assert not found.copied and 0.95 * least < found.read < 1.2 * least
  assert found.written < 0.1 * least


def test_an_unknown_topology_is_refused_with_what_there_is():
  pytest.importorskip('libtpu')
  with pytest.raises(ValueError, match=r'libtpu knows no such topology .* v5p:4x4x4'):
    aot.topology('v5e:3x5000')


def test_a_file_that_could_not_be_written_in_the_end_is_refused(tmp_path):
  preflight.check_out('')
  preflight.check_out(str(tmp_path / 'numbers.json'))
  for wrong in (str(tmp_path), str(tmp_path / 'none' / 'numbers.json')):
    with pytest.raises(ValueError, match=f'--out={wrong}: expected a file'):
      preflight.check_out(wrong)


def planned_of(method: str, **sampler_mesh) -> dict[str, aot.Planned]:
  """The programs of the training phase of a small run on 4 devices, by name."""
  config = from_text(f'method={method},task=addition,model=tiny')
  config.model.num_layers = 1
  config.mesh.update(data=1, fsdp=4)
  if sampler_mesh:
    config.sampler_mesh = part(sharding.beside, **sampler_mesh)
  return named(build.build(config))


def named(run: build.Experiment) -> dict[str, aot.Planned]:
  return {
    one.name.removeprefix('train '): one for one in aot.plan('train', run.phases['train'], run)
  }


@pytest.mark.parametrize(
  ('method', 'other'),
  [
    ('rdd', 'update of bonus'),
    ('prime', 'update of reward_model'),
    ('relift', 'update of imitation'),
  ],
)
def test_networks_anchors_that_learn_and_further_updates_are_programs(method, other):
  planned = planned_of(method)
  assert {'rollout', 'update', other} <= planned.keys() and 'transfer' not in planned
  one = planned[other]
  with jax.set_mesh(one.mesh):
    state, _ = one.function.eval_shape(*one.arguments)
  jax.tree.map(lambda a, b: a.shape == b.shape or pytest.fail(f'{a} {b}'), state, one.arguments[0])


def test_parameters_are_copied_to_the_chips_that_sample():
  planned = planned_of('grpo', data=2)
  size = 4.0 * sum(x.size for x in jax.tree.leaves(planned['rollout'].arguments[0]))
  copied = aot.compile_one(planned['transfer'])
  # Every chip that samples holds all parameters, and none of the optimizer.
  assert copied.memory == copied.bytes == copied.least_moved == copied.moved == size
  assert planned['rollout'].mesh.size == copied.chips == 2 and planned['update'].mesh.size == 4
  assert planned['decode'].resident == 0 < planned['anchor'].resident


def test_rows_in_flight_are_read_again_and_drawn_as_often_as_a_batch_needs():
  config = from_text('method=grpo,task=addition,model=tiny')
  config.model.num_layers = 1
  config.mesh.update(data=1, fsdp=4)
  collect = config.phases.train.collect
  collect.in_flight = 2 * collect.prompts
  run = build.build(config)
  planned, rows = named(run), collect.in_flight * collect.samples_per_prompt
  draws = planned['rollout'].parts['train decode']
  assert draws == -(-collect.max_new_tokens // 2)
  with jax.set_mesh(run.mesh):
    for name in ('prefill', 'decode', 'rollout'):
      one = planned[name]
      *_, left, read = jax.tree.leaves(
        one.function.eval_shape(*one.arguments),
        is_leaf=lambda x: isinstance(x, resumable.Read | resumable.Rows),
      )
      assert left.tokens.shape == (rows, planned['update'].arguments[1].tokens.shape[1])
      assert {x.shape[0] for x in jax.tree.leaves(read)} == {rows}
  # An external engine has its own devices and programs.
  run = dataclasses.replace(run, engine=engines.Vllm(python='python'))
  assert named(run).keys() == {'anchor', 'update'}
