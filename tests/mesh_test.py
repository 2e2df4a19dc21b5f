"""Where arrays lie must not show: eight fake devices, and several processes, give one result."""

import dataclasses
import itertools
import json
import multiprocessing
import multiprocessing.util
import os
import re
import signal
import socket
import time

import absl.flags
import jax
import numpy as np
import pytest

from polgrad import (
  build,
  checkpoint,
  cli,
  environments,
  evaluate,
  methods,
  metrics,
  models,
  optim,
  packing,
  phases,
  presets,
  report,
  sharding,
  tasks,
  train,
)
from polgrad.collect import row_sampler
from polgrad.compose import compose
from polgrad.models import hf
from polgrad.registry import bind, part, weighted
from polgrad.rewards import verifiers
from polgrad.sharding import to_host
from polgrad.types import Layout
from tests import runs
from tests.environments.runs_test import Echo
from tests.runs import dpo, on_policy_distillation
from tests.train_test import config

pytestmark = pytest.mark.usefixtures('undrawn')
# Slots and packed rows are on a third one.
MESHES = [dict(data=2, fsdp=2, tensor=2), dict(data=2, context=2, tensor=2)]
SMALL = dict(expert=2, context=2, tensor=2)


def cut(made, mesh: dict) -> None:
  """Puts a run on a mesh, whose axes divide its heads and the positions of its rows."""
  made.mesh.update({'data': 1, **mesh})
  made.model.num_heads = 4
  if 'max_new_tokens' in made.phases.train.collect:
    made.phases.train.collect.max_new_tokens = 6  # behind prompts of 6


def step(mesh: dict, batch=None, *, slots: int = 0, share: bool = False):
  """One rollout of eight prompts (unless a batch is given) and one large SGD step on it."""
  made = config()
  made.phases.train.collect.slots = slots
  made.phases.train.share_prompts = share
  cut(made, mesh)
  made.phases.train.collect.prompts = 8
  made.phases.train.optimizer = part(optim.sgd, learning_rate=1.0)
  made.phases.train.epochs = made.phases.train.minibatches = 1
  made.phases.train.micro_batches = 2
  made.phases.warm_start.collect.rows = 8
  experiment = build.build(made)
  phase = experiment.phases['train']
  with jax.set_mesh(experiment.mesh):
    state = phases.begin(experiment, 1, None)
    if batch is None:
      collect = phase.collect.make(phases.context(experiment, phase, 1))
      counts = to_host(state.curriculum_state)
      batch = collect(state, phases.Drawer(phase, 0, 0, None, counts), 0).batch
    update = phases.jit_update(experiment, phase, state)
    data_parallel_size = sharding.data_parallel_size(experiment.mesh)
    batch = packing.pack(
      batch, parts=2, rows_per_prompt=phase.rows_per_prompt, data_parallel_size=data_parallel_size
    )
    after, report = update(state, sharding.place_batch(experiment.mesh, batch))
    return batch, to_host(after.params), to_host(report)


@pytest.fixture(scope='module')
def one_device():
  return step({})


@pytest.mark.parametrize('shape', MESHES, ids=str)
def test_every_mesh_gives_the_one_device_result(one_device, shape):
  batch, params, report = one_device
  same, moved, told = step(shape)
  np.testing.assert_array_equal(same.tokens, batch.tokens)
  np.testing.assert_array_equal(same.mask, batch.mask)
  np.testing.assert_allclose(same.behavior_logp, batch.behavior_logp, atol=1e-5)
  np.testing.assert_allclose(same.advantages, batch.advantages, atol=1e-5)
  assert report['grad_norm'] > 0.01
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), moved, params)
  for name in report:
    np.testing.assert_allclose(told[name], report[name], rtol=1e-4, atol=1e-5)


def test_slots_and_shared_prompts_give_the_plain_result(one_device):
  batch, params, report = one_device
  same, moved, told = step(SMALL, slots=4, share=True)
  np.testing.assert_array_equal(same.tokens, batch.tokens)
  np.testing.assert_allclose(same.behavior_logp, batch.behavior_logp, atol=1e-5)
  np.testing.assert_allclose(
    same.reference_logp[same.mask], batch.reference_logp[batch.mask], atol=1e-5
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), moved, params)
  for name in report:
    np.testing.assert_allclose(told[name], report[name], rtol=1e-4, atol=1e-5)


def test_packed_rows_give_the_plain_result(one_device):
  batch, params, report = one_device
  size = batch.tokens.shape[1]
  wide = lambda x: np.pad(x, ((0, 0), (0, size))) if x.shape[1:] == (size,) else x
  batch = jax.tree.map(wide, batch).replace(layout=Layout(pack=4))
  packed, moved, told = step(SMALL, batch)
  assert packed.layout.rows == 8  # of 16 in each of two pieces
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), moved, params)
  for name in report:
    np.testing.assert_allclose(told[name], report[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('experiment', [dpo, on_policy_distillation], ids=lambda run: run.name)
def test_every_family_gives_the_one_device_result(experiment, tmp_path):
  """Policy gradients are above; these are the other families, two smoke steps of each. A supervised
  phase comes before both."""
  found = []
  for shape in ({}, dict(data=2, context=2, tensor=2)):
    made = experiment.get_config('smoke')
    cut(made, shape)
    with made.unlocked():
      made.evaluation = part(build.Never)
    state = train.run(made, str(tmp_path / str(shape)))
    found.append(metrics.read(str(tmp_path / str(shape) / 'metrics.jsonl')))
  for one, eight in zip(*found, strict=True):
    for name in one:
      if 'second' not in name and not isinstance(one[name], str):
        np.testing.assert_allclose(eight[name], one[name], rtol=1e-4, atol=1e-5, err_msg=name)

  # The checkpoint of the second one is read on a third mesh; `restore` compares its bits.
  third = sharding.make_mesh(expert=4, context=2)
  like = jax.tree.map(lambda x: shape_on(third, x), state.replace(params=None, responses=()))
  checkpoints = checkpoint.manager(str(tmp_path / str(shape) / 'checkpoints'))
  step = checkpoints.latest_step()
  rest = checkpoint.restore(checkpoints, step, 'rest', like)
  params = jax.tree.map(lambda x: shape_on(third, x), state.params)
  params = checkpoint.restore(checkpoints, step, 'params', params)
  jax.tree.map(np.testing.assert_array_equal, to_host(params), to_host(state.params))
  jax.tree.map(np.testing.assert_array_equal, to_host(rest.opt_state), to_host(state.opt_state))
  assert (
    params['layers']['gate'].addressable_shards[0].data.size * 8 == params['layers']['gate'].size
  )


def shape_on(mesh, x):
  """The shape of an array on another mesh, sharded by the axes that it names."""
  spec = getattr(getattr(x, 'sharding', None), 'spec', jax.sharding.PartitionSpec())
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))


def test_state_lies_where_the_rules_say():
  made = config()
  made.mesh.update(data=2, fsdp=2, tensor=2)
  made.phases.train.collect.prompts = 8
  made.phases.warm_start.collect.rows = 8
  experiment = build.build(made)
  state = phases.begin(experiment, 1, None)
  gate = state.params['layers']['gate']
  assert gate.sharding.spec == jax.sharding.PartitionSpec(
    None, ('context', 'fsdp', 'expert'), 'tensor'
  )
  assert gate.addressable_shards[0].data.size * 4 == gate.size
  moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == gate.shape]
  assert len(moments) == 4 and all(  # two moments; gate and up have one shape
    m.sharding == gate.sharding for m in moments
  )
  assert state.anchors['reference']['layers']['gate'].sharding == gate.sharding


def joined(port, count, index, folder, devices=1, lost_after=100):
  """Joins this process to those of a run, whose configuration it returns with the folder of its metrics.

  What it says is in a file beside that folder: which of the records of a step it has laid out, too.
  """
  said = os.open(folder / f'said{index}', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
  os.dup2(said, 1)
  os.dup2(said, 2)
  flags = os.environ['XLA_FLAGS'].split()
  flags = [x for x in flags if 'device_count' not in x]
  number = f'--xla_force_host_platform_device_count={devices}'
  os.environ['XLA_FLAGS'] = ' '.join([*flags, number])
  address = [f'--coordinator=localhost:{port}', f'--num_processes={count}', f'--process_id={index}']
  absl.flags.FLAGS(['worker', *address, f'--lost_after={lost_after}'])
  cli.join()
  # A fork does not run what JAX leaves to `atexit`: to wait for the last one, for the first serves all.
  multiprocessing.util.Finalize(None, jax.distributed.shutdown, exitpriority=0)
  report.draw = str
  runs.share_programs()
  lay_out = row_sampler.laid_out

  def noted(lay, records):
    seen = []
    found = lay_out(lambda part: seen.extend(part) or lay(part), records)
    said = [[one['id'] for one in part] for part in (seen, records)]
    print('laid out', json.dumps(said), flush=True)
    return found

  row_sampler.laid_out = noted
  made = games()
  made.mesh.update(fsdp=2, data=count // 2)
  return made, str(folder / f'p{index}')


def stopped(port, count, index, folder):
  """One of the processes is asked to stop in the first step: all stop after the same one."""
  made, run = joined(port, count, index, folder)
  with made.unlocked():  # the two processes measure it
    made.evaluation = part(build.Never)
  summary = phases.summary

  def terminated(*args):
    if index == 2:
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(3)  # the request reaches the other processes in the background
    return summary(*args)

  phases.summary = terminated
  train.run(made, run, str(folder / 'c'))


def killed(port, count, index, folder):
  """Two processes resume what the others have left, and write a model; then one of them is killed.

  Each gives one device to training, and another one to sampling beside it.
  """
  made, run = joined(port, count, index, folder, devices=2, lost_after=10)
  made.sampler_mesh = part(sharding.beside, data=2)
  made.phases.train.collect.overlap = True
  params = train.run(made, run, str(folder / 'c'), on_mismatch='continue').params
  policy, mesh = bind(made.model, models.TABLE), sharding.make_mesh(fsdp=2)
  hf.save(str(folder / 'folder'), policy.config, params)
  again = evaluate.init_params(models.pretrained(path=str(folder / 'folder')), mesh, 0)
  local = lambda tree: [np.asarray(x.addressable_data(0)) for x in jax.tree.leaves(tree)]
  assert not params['layers']['gate'].is_fully_addressable
  for a, b in zip(local(params), local(again), strict=True):
    np.testing.assert_array_equal(a, b)

  # Process 1 is killed in the second step of a longer run; that ends process 0.
  made.phases.train.steps += 2
  steps, summary = [], phases.summary

  def ended(*args):
    steps.append(args)
    if len(steps) == 2 and index == 1:
      os.kill(os.getpid(), signal.SIGKILL)
    return summary(*args)

  phases.summary = ended
  with cli.ending_together():
    train.run(made, run, str(folder / 'c'), on_mismatch='continue')


def games():
  """GRPO on an environment that pays for length, which random weights can earn, and a verifier."""
  short = weighted(1.0, part(verifiers.soft_overlong, max_length=5, cache=4))
  task = tasks.guess(guesses=2)
  task = dataclasses.replace(
    task, environment=part(Echo), turn_tokens=3, rewards={**task.rewards, 'short': short}
  )
  model = presets.tiny(alphabet=task.alphabet)
  made = compose(methods.grpo, task, model, warm_start=0, smoke=True)
  made.model.num_layers = 1
  with made.unlocked():
    made.evaluation.environment = part(environments.OneTurn)
  made.evaluation.turn_tokens = 0
  made.phases.train.steps = 3
  made.phases.train.collect.lag = 1
  return made


def started(program, count, folder):
  """That number of processes of a program, when all have ended: their exit codes, and what they say.

  They are forks of one process, which imports the modules once and has started no backend.
  """
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  forks = multiprocessing.get_context('forkserver')
  # pyarrow imports pandas, if it is there, when it writes.
  forks.set_forkserver_preload(['tests.mesh_test', 'pandas'])
  processes = [forks.Process(target=program, args=(port, count, i, folder)) for i in range(count)]
  for process in processes:
    process.start()
  for process in processes:
    process.join(timeout=500)
    process.kill()
    process.join()
  return [p.exitcode for p in processes], [(folder / f'said{i}').read_text() for i in range(count)]


def test_four_processes_two_and_one_give_the_same_numbers_share_a_folder_and_end_together(
  tmp_path, compiled_once
):
  codes, said = started(stopped, 4, tmp_path)
  assert codes == [75] * 4, '\n'.join(text[-1500:] for text in said)
  saved = [int(path.name) for path in (tmp_path / 'c').iterdir() if path.name.isdecimal()]
  assert len(saved) == 1 and all('asked to stop' in text for text in said)
  # Each process has laid out its share of the prompts of the first step.
  laid = [json.loads(re.search('laid out (.*)', text)[1]) for text in said]
  assert [every for _, every in laid] == [laid[0][1]] * 4
  assert [*itertools.chain(*(own for own, _ in laid))] == laid[0][1]

  codes, said = started(killed, 2, tmp_path)
  assert codes[1] == -signal.SIGKILL, said[1][-3000:]
  assert codes[0] not in (0, 75), said[0][-3000:]
  assert 'process 0 of 2 ends' in said[0], said[0][-3000:]
  assert re.search('unhealthy.*:\n1\n|[Tt]ask 1 heartbeat timeout', said[0]), said[0][-3000:]

  # One process resumes what the two have left: their last whole checkpoint.
  longer = games()
  longer.phases.train.steps += 2
  folders = str(tmp_path / 'resumed'), str(tmp_path / 'c')
  resumed = train.run(longer, *folders, on_mismatch='continue')  # it samples in turns
  rows = metrics.read(str(tmp_path / 'resumed' / 'metrics.jsonl'))
  assert sum('loss' in row for row in rows) in (1, 2)  # of five steps

  state = train.run(games(), str(tmp_path / 'alone'))
  more = train.run(longer, str(tmp_path / 'alone'))
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  jax.tree.map(close, to_host(resumed.params), to_host(more.params))
  rows = lambda run: metrics.read(str(tmp_path / run / 'metrics.jsonl'))
  ours, alone = ([row for row in rows(run) if 'loss' in row] for run in ('p0', 'alone'))
  assert not any((tmp_path / f'p{i}' / 'metrics.jsonl').exists() for i in (1, 2, 3))
  assert [r['step'] for r in ours] == [r['step'] for r in alone][: len(ours)] and len(ours) > 2
  assert any(r['grad_norm'] > 0.01 for r in alone) and ours[2]['bytes/transfer'] > 0
  assert all(r['turns'] == 3 and r['environment_errors'] == 0 for r in alone)
  assert 'evaluation/reward' in ours[2].keys() & alone[2].keys()
  for a, b in zip(ours, alone):
    for name in b:
      if 'second' not in name and not isinstance(b[name], str):
        np.testing.assert_allclose(a[name], b[name], rtol=2e-4, atol=2e-5, err_msg=name)
  assert json.loads((tmp_path / 'p0' / 'config.json').read_text())['mesh']['fsdp'] == 2
  written = models.pretrained(path=str(tmp_path / 'folder')).init(jax.random.key(0))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), written, state.params)
