"""The loop: resume, phases, anchors, updates that are refused, and what a run leaves behind."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from ml_collections import ConfigDict

from polgrad import (
  build,
  checkpoint,
  cli,
  collect,
  credit,
  curricula,
  evaluate,
  identity,
  learner,
  methods,
  metrics,
  mirrors,
  objectives,
  optim,
  phases,
  preemption,
  progress,
  sample,
  sharding,
  train,
  verify,
  workdirs,
)
from polgrad.data import tokenizers
from polgrad.losses import aggregation, penalties, surrogates
from polgrad.methods import Method
from polgrad.objectives.base import off_policy_metrics
from polgrad.options import from_text
from polgrad.registry import part, weighted
from polgrad.rewards import verifiers
from polgrad.types import Batch
from tests import buckets, examples
from tests.data import folders
from tests.runs import addition, dpo

pytestmark = pytest.mark.usefixtures('compiled_once', 'undrawn')


def config():
  """Supervised, then policy gradient with everything that carries state."""
  rewards = {  # random weights never add up; lengths give them something to learn
    'exact': weighted(1.0, part(verifiers.exact_match)),
    'short': weighted(1.0, part(verifiers.soft_overlong, max_length=5, cache=4)),
  }
  method = Method(
    credit=part(credit.moving_baseline),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped),
      aggregation=part(aggregation.token_mean),
      penalties={'kl': weighted(0.1, part(penalties.k2))},
    ),
    anchors={'reference': part(optim.ema, decay=0.9)},
    epochs=2,
    minibatches=2,
    learning_rate=10.0,
  )
  made = addition(method, rewards=rewards, warm_start=180)
  made.phases.warm_start.steps = 3
  made.phases.train.steps = 4
  made.phases.train.curriculum = part(curricula.spo, term='short', slow_decay=0.96)
  made.checkpoint_every = 2
  made.keep_checkpoints = 10
  return made


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """(workdir, state) of an uninterrupted run."""
  workdir = str(tmp_path_factory.mktemp('whole'))
  return workdir, train.run(config(), workdir)


def rows(workdir):
  """Metrics without the clock."""
  return [
    {k: v for k, v in row.items() if 'second' not in k}
    for row in metrics.read(os.path.join(workdir, 'metrics.jsonl'))
  ]


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_resumed_run_equals_one_that_went_on(finished, tmp_path):
  """Updates: 3 in the warm start, then 4 a step. Killed inside the second phase; the run in a bucket
  below resumes at its border too."""
  workdir, state = finished
  last_checkpoint = 11
  shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
  kept = tmp_path / 'checkpoints'
  for folder in kept.iterdir():
    if folder.name.isdigit() and int(folder.name) > last_checkpoint:
      shutil.rmtree(folder)
  with open(tmp_path / 'metrics.jsonl', 'a') as f:
    f.write('{"step": 99, "cut off')  # what a crash leaves
  assert max(int(f.name) for f in kept.iterdir() if f.name.isdigit()) == last_checkpoint
  equal(train.run(config(), str(tmp_path)), state)
  assert rows(tmp_path) == rows(workdir)


def test_a_curriculum_is_part_of_the_run_and_of_its_checkpoints(finished, tmp_path):
  workdir, state = finished
  counts = jax.device_get(state.curriculum_state)
  tried = counts.alpha + counts.beta > 1.001
  assert 8 <= tried.sum() <= 16 and len(tried) == 7290  # four prompts in each of four steps
  np.testing.assert_array_equal(state.responses.mask.any(axis=1), tried)  # each has its response
  assert rows(workdir)[-1]['curriculum/success_rate'] == pytest.approx(
    float(np.mean(curricula.trackers.value(counts)))
  )
  # Other data cannot be resumed.
  shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
  other = config()
  other.phases.train.steps = 5
  other.phases.train.source.holdout = 0.2
  said = 'alpha: (7290,), not (6480,).*config.phases.train.curriculum remembers the rows'
  with pytest.raises(ValueError, match=re.escape(said).replace(r'\.\*', '.*')):
    train.run(other, str(tmp_path), on_mismatch='continue')


def test_a_run_that_is_asked_to_stop_saves_after_its_step_and_resumes_later(
  finished, tmp_path, monkeypatch
):
  summary = phases.summary

  def terminated(*args):  # in the first step, which is in sft and leaves no checkpoint otherwise
    os.kill(os.getpid(), signal.SIGTERM)
    return summary(*args)

  before = signal.getsignal(signal.SIGTERM)
  with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
    patch.setattr(phases, 'summary', terminated)
    train.run(config(), str(tmp_path))
  assert stopped.value.code == 75 and last(tmp_path) == 1
  assert signal.getsignal(signal.SIGTERM) == before
  equal(train.run(config(), str(tmp_path)), finished[1])
  assert rows(tmp_path) == rows(finished[0])


def test_the_main_notes_a_request_to_stop_while_it_trains(monkeypatch, tmp_path):
  asked = []

  def trains(session):
    signal.raise_signal(signal.SIGTERM)
    asked.append(preemption.asked())

  monkeypatch.setattr(cli, 'start', lambda argv: None)
  monkeypatch.setattr(cli, 'config', lambda choices: ConfigDict())
  monkeypatch.setattr(train, 'prepare', lambda *args, **kwargs: contextlib.nullcontext())
  monkeypatch.setattr(train, 'run_phases', trains)
  before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # so that a failure does not end the tests
  flags.FLAGS.mark_as_parsed()
  try:
    with flagsaver.flagsaver(workdir=str(tmp_path)):
      train.main(['train'])
  finally:
    signal.signal(signal.SIGTERM, before)
  assert asked == [True]


def test_a_run_leaves_metrics_checkpoints_config_and_a_report(finished):
  workdir, _ = finished
  names = set(os.listdir(workdir))
  assert {'metrics.jsonl', 'checkpoints', 'config.json', 'report.png'} <= names
  found = rows(workdir)
  assert [r['step'] for r in found] == [0, 1, 2, 3, 3, 7, 11, 15, 19]
  assert {'reward', 'length', 'sampler_kl', 'sampler_max_gap', 'kl', 'loss'} <= found[-1].keys()
  with open(os.path.join(workdir, 'config.json')) as f:
    assert json.load(f) == json.loads(config().to_json())
  with open(os.path.join(workdir, 'report.png'), 'rb') as f:
    assert f.read(8) == b'\x89PNG\r\n\x1a\n'


def test_08_on_policy_ratio_is_one(finished):
  """The first update of a rollout sees the sampler's own log-probs."""
  found = [r for r in rows(finished[0]) if r['phase'] == 'train' and 'sampler_kl' in r]
  assert len(found) == 4
  hot = config()
  hot.phases.train.collect.temperature = 0.7
  hot.phases.train.minibatches = hot.phases.train.epochs = 1
  for row in _first_rows(hot):
    assert row['sampler_max_gap'] < 1e-5


def _first_rows(made):
  """Metrics of one policy-gradient step from fresh weights."""
  made.phases.train.steps = 1
  made.order = ('train',)
  del made.phases['warm_start']
  made.evaluation = part(build.Never)
  import tempfile

  with tempfile.TemporaryDirectory() as workdir:
    train.run(made, workdir)
    return rows(workdir)


def test_new_weights_reach_the_sampler(finished, collected):
  """After updates, what the sampler reports of its tokens is what the trainer's forward says."""
  _, state = finished
  experiment = build.build(config())
  with jax.set_mesh(experiment.mesh):
    fresh = experiment.policy.init(jax.random.key(0))
    logp = {
      name: learner.forward(experiment.policy, params, collected).logp
      for name, params in (('now', state.params), ('start', fresh))
    }
  gap = {
    k: np.abs(np.asarray(v) - collected.behavior_logp)[collected.mask].max()
    for k, v in logp.items()
  }
  assert gap['now'] < 1e-5 < 1e-2 < gap['start']


def test_micro_batches_give_the_gradient_of_the_whole_batch(finished, collected):
  _, state = finished
  experiment = build.build(config())
  phase = experiment.phases['train']
  batch = jax.tree.map(jnp.asarray, collected)
  results = []
  for micro in (1, 4):
    made = learner.Learner(
      experiment.policy,
      phase.objective,
      optim.sgd(learning_rate=1.0),
      micro_batches=micro,
      anchors=phase.anchors,
    )
    start = state.replace(opt_state=optim.sgd(learning_rate=1.0).init(state.params))
    with jax.set_mesh(experiment.mesh):
      results.append(jax.jit(made.update)(start, batch))
  for after, report in results[1:]:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
      after.params,
      results[0][0].params,
    )
    for name, value in report.items():
      np.testing.assert_allclose(value, results[0][1][name], rtol=1e-4, atol=1e-5)


def test_packed_rows_train_as_rows_alone(tmp_path):
  """A supervised phase and one of preferences; mesh_test.py has packed rows of a policy gradient."""
  found = []
  for pack in (0, 4):
    made = dpo.get_config('smoke')
    for phase in made.phases.values():
      phase.update(pack=pack, micro_batches=2)
      phase.collect.length = 32
    with made.unlocked():
      made.evaluation = part(build.Never)
    train.run(made, str(tmp_path / str(pack)))
    found.append(rows(tmp_path / str(pack)))
  for row in found[1]:
    assert 0 < row.pop('rows_forwarded') < 1
  for plain, packed in zip(*found, strict=True):
    for key, value in plain.items():
      if not isinstance(value, str) and key != 'accuracy':  # of the first batch, of ties
        np.testing.assert_allclose(packed[key], value, rtol=1e-4, atol=1e-5, err_msg=key)


@pytest.fixture(scope='module')
def collected(finished):
  """A batch that the finished run's policy has drawn, and its phase."""
  experiment = train.build(config())
  run = phases.start_phase(experiment, finished[1], phases.Logs())
  with jax.set_mesh(experiment.mesh):
    counts = sharding.to_host(finished[1].curriculum_state)
    return run.collect(finished[1], phases.Drawer(run.phase, 0, 0, None, counts), 0).batch


def test_an_empty_minibatch_has_the_arrays_of_a_real_one(collected):
  experiment = train.build(config())
  phase = experiment.phases['train']
  seed = dict(rows_per_prompt=phase.rows_per_prompt, seed=(0,))
  real = collect.minibatches(collected, epochs=1, parts=phase.minibatches, **seed)[0]
  empty = phases.empty_minibatch(phase, experiment.mesh)
  seen = lambda batch: jax.tree.map(lambda x: (x.shape, str(x.dtype), x.sharding), batch)
  assert seen(sharding.place_batch(experiment.mesh, real)) == seen(empty)


class TestBrokenUpdates:
  def test_are_skipped_counted_and_leave_everything_as_it_was(self, collected):
    experiment = train.build(config())
    state = phases.begin(experiment, 1, None)
    update = phases.start_phase(experiment, state, phases.Logs()).update
    before = jax.tree.map(np.asarray, state)
    placed = lambda batch: sharding.place_batch(experiment.mesh, batch)
    batch = jax.tree.map(lambda x: x[: len(x) // 2], collected)  # as large as a minibatch
    shape = batch.tokens.shape
    batch = batch.replace(advantages=np.full(shape, np.nan, np.float32))
    with jax.set_mesh(experiment.mesh):
      after, report = update(state, placed(batch))
    assert report['skipped'] == 1 and not np.isfinite(report['loss'])
    for name in ('params', 'opt_state', 'anchors', 'objective_state', 'credit_state'):
      equal(getattr(before, name), getattr(after, name))
    counters = ('step', 'update', 'skipped')
    equal(after, before.replace(**{name: getattr(before, name) + 1 for name in counters}))
    with jax.set_mesh(experiment.mesh):
      again, report = update(after, placed(batch))
      assert report['skipped'] == 2
      healed, report = update(again, placed(batch.replace(advantages=np.zeros(shape, np.float32))))
    assert report['skipped'] == 0 and healed.skipped == 0

  def test_end_the_run_after_some_in_a_row_and_keep_the_checkpoint(self, tmp_path, monkeypatch):
    real = credit.moving_baseline

    def poisoned(x, state):
      batch, state = real().apply(x, state)
      bad = jnp.where(jnp.any(x.mask), jnp.nan, 0.0)
      return batch.with_arrays(advantages=batch.advantages + bad), state

    made = config()
    made.max_skipped = 3
    experiment = build.build(made)
    spoiled = dataclasses.replace(
      experiment.phases['train'], credit=real()._replace(apply=poisoned)
    )
    broken = dataclasses.replace(experiment, phases={**experiment.phases, 'train': spoiled})
    monkeypatch.setattr(train, 'build', lambda _: broken)
    with pytest.raises(FloatingPointError, match='train, step 0: 3 updates in a row'):
      train.run(made, str(tmp_path))
    checkpoints = checkpoint.manager(str(tmp_path / 'checkpoints'))
    assert checkpoints.latest_step() == 3  # the end of the supervised phase
    checkpoints.close()
    params = evaluate.restore_params(experiment, str(tmp_path / 'checkpoints'))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


@pytest.fixture
def copied(finished, tmp_path):
  """A copy of the finished run, with its last checkpoint taken away so that something is left to do."""
  shutil.copytree(finished[0], tmp_path / 'copy')
  shutil.rmtree(tmp_path / 'copy' / 'checkpoints' / '19')
  return tmp_path / 'copy'


def last(workdir):
  return max(int(f.name) for f in (workdir / 'checkpoints').iterdir() if f.name.isdigit())


class TestADamagedCheckpoint:
  """Is named, costs nothing else, and an earlier one resumes to the same end."""

  def _refused(self, workdir):
    with pytest.raises(
      ValueError, match=rf'checkpoint 11 in .*{workdir.name}.* is damaged .*--step=3'
    ):
      train.run(config(), str(workdir))

  def test_with_a_flipped_bit(self, copied):
    """Written as a file system would return it: whole, readable, and with another bit."""
    path = copied / 'checkpoints' / '11' / 'meta' / 'metadata'
    meta = json.loads(path.read_text())
    name = next(iter(meta['digests']['params']))
    meta['digests']['params'][name] = f'{int(meta["digests"]["params"][name], 16) ^ 1:016x}'
    del meta['digest']
    path.write_text(json.dumps({**meta, 'digest': checkpoint.digest_of(meta)}))
    self._refused(copied)

  @pytest.mark.parametrize(
    ('before', 'after'), [('"order"', '"orfer"'), ('"digests"', '"digestr"')]
  )
  def test_with_a_flipped_bit_in_what_is_stored_beside_the_arrays(self, before, after, copied):
    path = copied / 'checkpoints' / '11' / 'meta' / 'metadata'
    path.write_text(path.read_text().replace(before, after))
    self._refused(copied)

  @pytest.mark.parametrize('part', ['params', 'meta'])
  def test_without_some_of_its_files(self, part, copied):
    for file in (copied / 'checkpoints' / '11' / part).rglob('*'):
      if file.is_file() and file.name != '_METADATA':
        file.unlink()
    self._refused(copied)

  def test_with_files_of_noise_and_an_earlier_one_resumes_to_the_same_end(self, copied, finished):
    for file in (copied / 'checkpoints' / '11' / 'rest').rglob('*'):
      if file.is_file():
        file.write_bytes(b'\xff' * file.stat().st_size)
    self._refused(copied)
    equal(train.run(config(), str(copied), step=3), finished[1])
    assert rows(copied) == rows(finished[0])


@pytest.mark.parametrize('text', [b'', b'[]', b'\xff', b'{"a.b": 1}'])
def test_a_malformed_config_of_a_run_is_refused_by_name(text, tmp_path):
  (tmp_path / 'config.json').write_bytes(text)
  with pytest.raises(ValueError, match=r'config\.json'):
    verify.read_config(str(tmp_path))
  workdirs.write_config(str(tmp_path), {'seed': 1}, 3)  # a run keeps it, and writes its own
  assert (tmp_path / 'config_until_3.json').read_bytes() == text
  assert verify.read_config(str(tmp_path)).seed == 1


def test_a_run_whose_metrics_cannot_be_written_ends_and_says_what_it_has_saved(copied, monkeypatch):
  def full(*_):
    raise metrics.NotWrittenError('metrics.jsonl: No space left on device')

  monkeypatch.setattr(train, 'run_phase', full)
  with pytest.raises(
    SystemExit, match=r'No space.*: the run ends\. .* resumes from checkpoint 11,'
  ):
    train.run(config(), str(copied))


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(copied):
  with pytest.raises(FileNotFoundError, match=r'no checkpoint 5 in .*; there are \[2, 3, 11\]'):
    train.run(config(), str(copied), step=5)


@pytest.mark.parametrize('part', ['params', 'opt_state', 'anchors'])
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_what_is_not_finite_is_never_saved(part, value, copied, finished):
  _, state = finished
  leaves, tree = jax.tree.flatten(getattr(state, part))
  spoiled = [x.at[(0,) * x.ndim].set(value) if x.dtype == jnp.float32 else x for x in leaves]
  state = state.replace(**{part: jax.tree.unflatten(tree, spoiled)})
  checkpoints = checkpoint.manager(str(copied / 'checkpoints'))
  with pytest.raises(FloatingPointError, match=r"such as \['\w+/.*the last whole one in .* is 11"):
    train.save(build.build(config()), checkpoints, {}, state)
  checkpoints.close()
  assert last(copied) == 11


class TestAnotherRunInTheSameFolder:
  def _other(self):
    made = config()
    made.seed = 1
    made.phases.train.optimizer.learning_rate = 1e-2
    return made

  def test_is_refused_with_all_that_differs_and_changes_nothing(self, copied):
    before = (copied / 'config.json').read_text()
    with pytest.raises(ValueError, match='of another run') as error:
      train.run(self._other(), str(copied))
    assert 'config.seed: 0 before, 1 now' in str(error.value)
    assert 'config.phases.train.optimizer.learning_rate: 0.001 before, 0.01 now' in str(error.value)
    with pytest.raises(ValueError, match='of another run'):
      train.run(self._other(), str(copied), step=3)
    assert (copied / 'config.json').read_text() == before and last(copied) == 11

  def test_continues_if_asked_and_keeps_both_configurations(self, copied):
    before = (copied / 'config.json').read_text()
    train.run(self._other(), str(copied), on_mismatch='continue')
    assert last(copied) == 19
    assert (copied / 'config_until_11.json').read_text() == before
    assert json.loads((copied / 'config.json').read_text())['seed'] == 1

  def test_is_refused_with_other_data_where_records_are_remembered_by_number(self, tmp_path):
    file = tmp_path / 'data.jsonl'
    source, other = {'name': 'mine', 'path': str(file), 'seed': 0}, {'name': 'other'}
    made = ConfigDict({'phases': {'train': {'source': source}, 'last': {'source': other}}})
    file.write_text('first')
    before = {'order': ['train', 'last'], 'phase': 0, 'identity': identity.describe(made)}

    def resumes(now, **meta):
      phase = types.SimpleNamespace(collect=collect.Rollouts(in_flight=8))
      run = types.SimpleNamespace(phases=dict.fromkeys(['train', 'last'], phase))
      train.check_records(run, before | meta, identity.describe(now))

    resumes(made)
    made.phases.train.source.seed = 1
    with pytest.raises(
      ValueError, match=r'by their numbers.*\n  config.phases.train.source.seed: 0'
    ):
      resumes(made)
    made.phases.train.source.seed = 0
    file.write_text('again')
    with pytest.raises(ValueError, match=r'other records now:\n  .*data.jsonl: other contents'):
      resumes(made)
    resumes(made, phase=1)  # a phase with other data

  def test_is_none_if_only_its_length_or_its_reports_differ(self, copied):
    made = config()
    made.phases.train.steps = 5
    made.log_every = made.samples_every = 2
    assert int(train.run(made, str(copied)).step) == 23

  @pytest.mark.parametrize(
    ('path', 'value', 'free'),
    [
      ('phases.train.steps', 9, True),
      ('phases.train.micro_batches', 9, True),
      ('phases.train.optimizer.schedule.steps', 9, False),
      ('phases.train.reward.verifier_x.weight', 0.5, False),
      ('phases.train.collect.temperature', 0.5, False),
      ('evaluation.batch', 3, True),
      ('checkpoint_every', 7, True),
      ('engine.layers', 'loop', True),
      ('engine.dtype', 'bfloat16', False),
    ],
  )
  def test_is_one_by_what_may_not_differ(self, path, value, free):
    def one(value):
      values = {}
      *folders, name = path.split('.')
      section = values
      for folder in folders:
        section = section.setdefault(folder, {})
      section[name] = value
      return {'config': values, 'files': {}, 'version': '1'}

    assert (identity.differences(one(1), one(value)) == []) == free

  @pytest.mark.parametrize(
    'name', ['tokenizer_config.json', 'tokenizer.json', 'chat_template.jinja']
  )
  def test_has_another_template_or_tokenizer_in_its_folder(self, tmp_path, name):
    folders.chatml(tmp_path)
    (tmp_path / 'chat_template.jinja').write_text(folders.CHATML)
    made = ConfigDict({'tokenizer': part(tokenizers.huggingface, path=str(tmp_path))})
    before = identity.describe(made)
    (tmp_path / name).write_text((tmp_path / name).read_text() + ' ')
    after = identity.describe(made)
    assert identity.differences(before, after) == [f'{tmp_path}: other contents than before']

  def test_has_another_date_in_its_prompts(self, tmp_path):
    made = ConfigDict({'tokenizer': part(tokenizers.huggingface, path=str(tmp_path))})
    before = identity.describe(made)
    made.tokenizer.date = '2025-01-01'
    [found] = identity.differences(before, identity.describe(made))
    assert found == "config.tokenizer.date: '2024-07-26' before, '2025-01-01' now"

  @pytest.mark.parametrize('name', ['path', 'table'])
  def test_has_data_that_differ_in_the_middle_of_a_large_file(self, tmp_path, monkeypatch, name):
    monkeypatch.setattr(identity, 'SMALL', 4)
    file = tmp_path / 'data.jsonl'
    made = ConfigDict({'phases': {'train': {'source': {'name': 'mine', name: str(file)}}}})
    file.write_text('a' * 50)
    before = identity.describe(made)
    file.write_text('a' * 25 + 'b' + 'a' * 24)
    [found] = identity.differences(before, identity.describe(made))
    assert found == f'{file}: other contents than before'

  def test_resumes_and_tells_which_libraries_have_other_versions(self, monkeypatch):
    told = []
    monkeypatch.setattr(workdirs.logging, 'warning', lambda text, *args: told.append(text % args))
    own = identity.describe(ConfigDict())
    workdirs.check_identity({'identity': own}, own, 'stop')
    assert not told and own['libraries']['jax'] == jax.__version__
    before = own | {'libraries': own['libraries'] | {'jax': '0.1', 'grain': '0.2'}}
    workdirs.check_identity({'identity': before}, own, 'stop')
    assert 'jax: 0.1 before' in told[0] and 'grain: 0.2 before' in told[0]
    del before['libraries']  # a checkpoint of an earlier polgrad
    workdirs.check_identity({'identity': before}, own, 'stop')
    assert len(told) == 1

  def test_has_other_functions_but_not_other_text_beside_them(self, tmp_path):
    file = tmp_path / 'own.py'
    described = lambda text: (
      file.write_text(text),
      identity.describe(ConfigDict({'reward': {'own': {'name': f'{file}:own'}}})),
    )[1]
    first = described('def own(completion):\n  return 1.0\n')
    beside = described('STEPS = 5\ndef own(completion):\n  return 1.0  # a remark\n')
    other = described('def own(completion):\n  return 2.0\n')
    assert identity.differences(first, beside) == []
    assert identity.differences(first, other) == [f'{file}:own: other contents than before']

  def test_has_other_data(self, tmp_path):
    data = tmp_path / 'data.jsonl'
    config = lambda: from_text(
      f'method=sft,task=jsonl,data={data},model=tiny,smoke,prompt_length=8,max_new_tokens=4,holdout=0'
    )
    line = '{"prompt": "1+1=", "answer": "2"}\n'
    data.write_text(line * 20)
    train.run(config(), str(tmp_path / 'run'))
    data.write_text(line * 19 + line.replace('2', '3'))
    with pytest.raises(ValueError, match=r'data\.jsonl: other contents than before'):
      train.run(config(), str(tmp_path / 'run'))

  def test_waits_until_the_first_has_ended(self, copied, finished, capsys):
    with (
      workdirs.locked(str(copied)),
      pytest.raises(RuntimeError, match='another process trains here'),
    ):
      train.run(config(), str(copied))
    shutil.rmtree(copied)
    shutil.copytree(finished[0], copied)
    train.run(config(), str(copied))
    assert 'finished: train has made its 4 steps' in capsys.readouterr().out


def test_a_run_in_a_bucket_that_is_killed_resumes_to_the_same_end(
  finished, tmp_path, monkeypatch, caplog, capsys
):
  place = tmp_path / 'run'
  shutil.copytree(finished[0], place)
  for step in ('11', '19'):
    shutil.rmtree(place / 'checkpoints' / step)
  buckets.use(monkeypatch, tmp_path)
  # Orbax writes arrays past epath, so they are where the bucket keeps its files.
  run = lambda: train.run(config(), 'gs://bucket/run', str(place / 'checkpoints'))
  summary, killed = phases.summary, []

  def kill(*args):
    killed.append(True)
    if len(killed) == 3:  # in the step after the save at update 11
      raise KeyboardInterrupt
    return summary(*args)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(phases, 'summary', kill)
    patch.setattr(mirrors.Mirror, 'finish', lambda mirror: None)  # as after kill -9
    run()
  assert last(place) == 11 and rows(place) == rows(finished[0])[:-2]
  names = lambda folder: sorted(file.name for file in (folder / 'rollouts').iterdir())
  assert names(place) == [
    'train-000007.parquet',
    'warm_start-000001.parquet',
    'warm_start-000003.parquet',
  ]
  equal(run(), finished[1])
  assert 'gs://bucket/run was left by' in caplog.text
  assert rows(place) == rows(finished[0]) and names(place) == names(pathlib.Path(finished[0]))
  assert (place / 'config.json').exists() and not (place / '.owner').exists()
  assert 'checkpoints and curves are in gs://bucket/run;' in capsys.readouterr().out


def test_a_replay_from_a_checkpoint_has_every_bit_of_the_next(finished, tmp_path, capsys):
  workdir, _ = finished
  before = {f: f.stat().st_mtime_ns for f in pathlib.Path(workdir).rglob('*') if f.is_file()}
  flags.FLAGS.mark_as_parsed()
  with flagsaver.flagsaver(workdir=workdir, step=3, compilation_cache=''):
    verify.main(['verify'])
  assert 'every bit is the same' in capsys.readouterr().out
  assert {
    f: f.stat().st_mtime_ns for f in pathlib.Path(workdir).rglob('*') if f.is_file()
  } == before
  with pytest.raises(FileNotFoundError, match='no checkpoint after 19'):
    verify.differences(workdir, -1)
  shutil.copytree(workdir, tmp_path / 'copy')
  path = tmp_path / 'copy' / 'checkpoints' / '11' / 'meta' / 'metadata'
  meta = json.loads(path.read_text())
  meta['digests']['params']['final_norm'] = '0' * 16
  del meta['digest']
  path.write_text(json.dumps({**meta, 'digest': checkpoint.digest_of(meta)}))
  assert verify.differences(str(tmp_path / 'copy'), 3) == ['params/final_norm']


def test_the_best_checkpoint_stays_and_a_run_that_gets_no_better_stops(copied, capsys):
  made = config()
  made.phases.train.steps, made.keep_checkpoints, made.evaluation.every = 9, 1, 1
  made.update(keep_best='evaluation/greedy', patience=2)  # greedy accuracy stays 0
  state = train.run(made, str(copied))
  assert int(state.step) == 23 and int(state.phase_step) == 5  # resumed at 11; 15 is best
  assert 'greedy was best, 0, after 15 updates, and 2 measurements' in capsys.readouterr().out
  folder = str(copied / 'checkpoints')
  checkpoints = checkpoint.manager(folder, keep=1, best=lambda: 15)
  assert sorted(checkpoints.all_steps()) == [15, 23]
  assert checkpoint.numbered(checkpoints, folder, progress.BEST) == 15
  assert checkpoint.read_meta(checkpoints, 23)['progress']['waited'] == 2
  checkpoints.close()
  equal(train.run(made, str(copied)), state)
  assert 'this run is finished: evaluation/greedy was best' in capsys.readouterr().out
  waited = progress.Progress(metric='evaluation/greedy', best=0.0, best_step=15, waited=2)
  for patience, ended in ((0, False), (2, True), (3, False)):
    made.patience = patience
    assert bool(phases.ran_out_of_patience(build.build(made), waited)) == ended


def test_a_best_metric_that_is_not_there_is_refused(finished):
  _, state = finished
  made = config()
  made.keep_best = 'evaluation/gredy'
  run = phases.start_phase(build.build(made), state, phases.Logs())
  with pytest.raises(ValueError, match=r"keep_best: unknown 'evaluation/gredy'; did you mean"):
    run.improved(state, {'evaluation/greedy': 0.0})
  for name, match in (('seconds', 'the clock'), ('', 'patience: name the metric')):
    made.update(keep_best=name, patience=1)
    with pytest.raises(ValueError, match=match):
      build.build(made)
  made = config()
  made.phases.train.update(plateau=3, plateau_metric='rewrd')
  run = phases.start_phase(build.build(made), state, phases.Logs())
  with pytest.raises(ValueError, match=r"plateau_metric: unknown 'rewrd'; did you mean 'reward'"):
    run.note_plateau({'reward': 0.0})
  for name, match in (('seconds', 'the clock'), ('evaluation/greedy', 'not measured in every')):
    made.phases.train.plateau_metric = name
    with pytest.raises(ValueError, match=f'train.plateau_metric: {name} .*{match}'):
      build.build(made)


def test_evaluations_may_be_due_at_different_steps(finished):
  _, state = finished
  made = config()
  made.keep_best, made.evaluation.every, made.phases.train.steps = 'evaluation/greedy', 3, 9
  run = phases.start_phase(build.build(made), state, phases.Logs())
  held_out = {'pairs': run.phase.source}
  phase = dataclasses.replace(run.phase, held_out=held_out, held_out_every=2)
  run = dataclasses.replace(run, phase=phase)
  pairs = {'loss': 1.0, 'evaluation/pairs/loss': 1.0}
  # The problems are measured after the next step.
  assert not run.improved(state.replace(phase_step=2), pairs)
  with pytest.raises(ValueError, match="keep_best: unknown 'evaluation/greedy'"):
    run.improved(state.replace(phase_step=6), pairs)


def test_an_anchor_is_read_from_a_checkpoint_in_the_place_of_the_policy(finished):
  workdir, state = finished
  experiment, folder = build.build(config()), os.path.join(workdir, 'checkpoints')
  equal(evaluate.restore_params(experiment, folder, name='reference'), state.anchors['reference'])
  with pytest.raises(ValueError, match=r"no anchor 'average'; it has \['reference'\]"):
    evaluate.restore_params(experiment, folder, name='average')


def test_an_average_is_measured_beside_the_policy(finished):
  _, state = finished
  made = config()
  made.evaluation.anchors = ('reference',)
  run = phases.start_phase(build.build(made), state, phases.Logs())
  measured = lambda params: ({'evaluation/norm': float(params['final_norm'].sum())}, [])
  run = dataclasses.replace(run, measure=measured)
  found = run.evaluate(state, run.phase.steps)
  assert found['evaluation/norm'] == float(state.params['final_norm'].sum())
  own = float(state.anchors['reference']['final_norm'].sum())
  assert found['evaluation_reference/norm'] == own != found['evaluation/norm']
  made.evaluation.anchors = ('averag',)
  with pytest.raises(ValueError, match=r"evaluation\.anchors: unknown 'averag'.*\['reference'\]"):
    build.build(made)


def test_checkpoint_that_does_not_fit_is_refused_with_the_arrays(finished, tmp_path):
  workdir, _ = finished
  other = config()
  other.model.width = 48
  experiment = build.build(other)
  with pytest.raises(ValueError, match=r'params of checkpoint 19 .* do not fit.*embedding.*14, 32'):
    evaluate.restore_params(experiment, os.path.join(workdir, 'checkpoints'))
  deeper = config()
  deeper.model.qk_norm = 'head'
  with pytest.raises(ValueError, match=r'lacks .*key_norm'):
    evaluate.restore_params(build.build(deeper), os.path.join(workdir, 'checkpoints'))
  with pytest.raises(FileNotFoundError, match='expected the checkpoints'):
    evaluate.restore_params(experiment, str(tmp_path / 'nowhere'))


def test_interrupted_save_leaves_the_last_whole_checkpoint(finished, tmp_path):
  workdir, state = finished
  shutil.copytree(os.path.join(workdir, 'checkpoints'), tmp_path / 'c')
  half = tmp_path / 'c' / '23.orbax-checkpoint-tmp'
  shutil.copytree(tmp_path / 'c' / '19', half)
  shutil.rmtree(half / 'params')
  params = evaluate.restore_params(build.build(config()), str(tmp_path / 'c'))
  equal(params, state.params)


def test_evaluation_and_chat_read_the_checkpoint(finished, capsys):
  workdir, state = finished
  experiment = build.build(config())
  with jax.set_mesh(experiment.mesh):
    params = evaluate.restore_params(experiment, os.path.join(workdir, 'checkpoints'))
    equal(params, state.params)
    found, samples = evaluate.make_evaluator(experiment)(params)
    last = [r for r in rows(workdir) if 'evaluation/greedy' in r][-1]
    assert found['evaluation/greedy'] == last['evaluation/greedy'] and len(samples) == 8
    completer = sample.Completer(experiment, params, temperature=0.0, max_new_tokens=999)
    sample.complete_lines(completer, ['12+34=\n', '50+49='])
    greedy = [''.join(completer({'prompt': p}, 0)) for p in ('12+34=', '50+49=')]
  assert capsys.readouterr().out.splitlines() == greedy


def test_phases_hand_over_parameters_and_restart_begins_again(finished):
  experiment = build.build(config())
  first = phases.begin(experiment, 0, None)
  trained = first.replace(params=jax.tree.map(lambda x: x + 1, first.params))
  second = phases.begin(experiment, 1, trained)
  equal(second.params, trained.params)
  equal(second.anchors['reference'], trained.params)
  restarting = dataclasses.replace(
    experiment,
    phases={
      **experiment.phases,
      'train': dataclasses.replace(experiment.phases['train'], restart=True),
    },
  )
  third = phases.begin(restarting, 1, trained)
  equal(third.params, first.params)
  equal(third.anchors['reference'], trained.params)


class TestAnchors:
  old, new = {'w': np.zeros(2)}, {'w': np.ones(2)}

  def test_rules(self):
    assert optim.fixed(self.old, self.new, 5)['w'][0] == 0
    np.testing.assert_allclose(optim.ema(self.old, self.new, 5, decay=0.75)['w'], 0.25)
    assert optim.sync(self.old, self.new, jnp.int32(4), every=2)['w'][0] == 1
    assert optim.sync(self.old, self.new, jnp.int32(5), every=2)['w'][0] == 0

  def test_move_in_the_update(self, finished):
    _, state = finished
    moved = jax.tree.map(
      lambda a, p: float(jnp.abs(a - p).max()), state.anchors['reference'], state.params
    )
    assert 0 < max(jax.tree.leaves(moved)) < 0.1


class TestMinibatches:
  def test_cover_the_batch_once_an_epoch_and_keep_groups(self):
    batch = examples.batch()
    cuts = collect.minibatches(batch, epochs=3, parts=2, rows_per_prompt=2, seed=(0, 1))
    assert len(cuts) == 6
    for epoch in range(3):
      ids = np.concatenate([c.rewards for c in cuts[2 * epoch : 2 * epoch + 2]])
      assert sorted(ids) == sorted(batch.rewards)
      for cut in cuts[2 * epoch : 2 * epoch + 2]:
        np.testing.assert_array_equal(cut.group_ids[::2], cut.group_ids[1::2])

  def test_are_drawn_anew_each_step_and_repeat_for_the_same(self):
    batch = examples.batch()
    first, same, other = (
      collect.minibatches(batch, epochs=1, parts=4, rows_per_prompt=1, seed=(0, s))[0].rewards
      for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)


def test_update_does_not_retrace():
  experiment = train.build(config())
  phase = experiment.phases['train']
  traced = []

  def apply(*arguments, **keywords):
    traced.append(True)
    return phase.objective.apply(*arguments, **keywords)

  counting = dataclasses.replace(phase, objective=examples.changed(phase.objective, apply=apply))
  state = phases.begin(experiment, 1, None)
  update = phases.jit_update(experiment, counting, state)
  collecting = phases.start_phase(experiment, state, phases.Logs()).collect
  first = None
  with jax.set_mesh(experiment.mesh):
    for step in range(3):
      counts = sharding.to_host(state.curriculum_state)
      got = collecting(state, phases.Drawer(phase, 0, 4 * step, None, counts), step)
      state, _ = update(state, sharding.place_batch(experiment.mesh, got.batch))
      state = phases.advance(experiment.mesh, state, got, 4 * step + 4)
      first = first or len(traced)
  assert len(traced) == first > 0


def test_batches_that_teach_nothing_are_reported_and_stop_the_run_if_asked(tmp_path, caplog):
  made = addition(methods.dr_grpo(max_new_tokens=5))  # without KL; random weights solve nothing
  made.phases.train.update(steps=7)
  made.max_silent = 6
  stopped = r'step 5: 6 batches in a row taught nothing.*max_silent'
  with caplog.at_level('WARNING'), pytest.raises(RuntimeError, match=stopped):
    train.run(made, str(tmp_path))
  assert [r['silent'] for r in rows(tmp_path) if 'silent' in r] == [1.0] * 5
  assert (
    'train, step 4: 5 batches in a row taught nothing: the rewards of each group are all equal'
    in caplog.text
  )


def test_a_run_all_of_whose_verifiers_fail_stops_by_itself():
  failed = {'verifier_errors': 8.0, 'reward': np.nan}
  uniform = {'reward': 1.0, 'reward/same_in_group': 1.0}
  for row in (failed, uniform):
    phases.warn_if_silent(row, 9, 0, 'rl', 4)
  phases.warn_if_silent(uniform, 10, 0, 'rl', 4)  # only warned of
  with pytest.raises(
    RuntimeError, match='10 batches in a row taught nothing: every verifier failed'
  ):
    phases.warn_if_silent(failed, 10, 0, 'rl', 4)
  unanswered = {'environment_errors': 8.0, 'verifier_errors': 0.0, 'reward': np.nan}
  with pytest.raises(RuntimeError, match='the environment failed in every row'):
    phases.warn_if_silent(unanswered, 10, 0, 'rl', 4)
  with pytest.raises(RuntimeError, match='stopped after 3 of them'):
    phases.warn_if_silent(failed, 3, 3, 'rl', 4)


def test_metrics_of_a_step_are_means_over_its_updates_and_maxima_of_largest_values():
  reports = [dict(loss=1.0, sampler_max_gap=0.1, grad_norm=0.0, skipped=0)]
  reports += [dict(loss=2.0, sampler_max_gap=0.9, grad_norm=1.0, skipped=2)]
  batch = Batch(tokens=np.zeros((1, 4)), segment_ids=np.ones((1, 4)), mask=np.ones((1, 4), bool))
  collected = collect.Collected(batch, (), (), {'reward': 0.5}, [], [])
  got = phases.summary(reports, collected, 2.0)
  assert got['loss'] == 1.5 and got['sampler_max_gap'] == 0.9 and got['skipped'] == 1
  assert got['reward'] == 0.5 and got['tokens_per_second'] == 2.0 and got['silent'] == 0
  # Where nothing was counted, such as the accuracy of ties, a metric is left out of the mean, or whole.
  for report, empty in zip(reports, (True, False)):
    report |= {'accuracy': 0.0 if empty else 0.7, 'empty/accuracy': empty}
    report |= {'margin': 0.0, 'empty/margin': True}
  got = phases.summary(reports, collected, 2.0)
  assert got['accuracy'] == 0.7 and 'margin' not in got and 'empty/accuracy' not in got


def test_metrics_of_an_anchor_are_means_too_and_have_its_name():
  one = dict(loss=1.0, skipped=0, score=0.5, **{'empty/score': False})
  made = {
    'of the policy': [one | dict(rows_forwarded=0.5)] * 2,
    'of the anchor': [one, one | {'loss': 3.0, 'skipped': 1, 'score': 0.0, 'empty/score': True}],
  }
  run = types.SimpleNamespace(
    phase=types.SimpleNamespace(
      epochs=1, minibatches=2, learned={'judge': types.SimpleNamespace(minibatches=2)}, networks={}
    ),
    update='of the policy',
    networks={},
    learn={'judge': 'of the anchor'},
    _updates=lambda update, state, batch, step, **sizes: (state, made[update]),
  )
  _, reports = phases.PhaseRun.update_all(run, None, None, 0)
  own = {'judge/loss': 2.0, 'judge/skipped': 1.0, 'judge/score': 0.5}
  assert reports == [one | dict(rows_forwarded=0.5) | own] * 2


def test_a_token_that_is_99_nats_off_leaves_the_metrics_finite():
  logp = jnp.full((1, 2), -1.0)
  x = dict(mask=jnp.ones((1, 2), bool), logp=logp, behavior_logp=logp - 99)
  found = {k: float(m.value()) for k, m in off_policy_metrics(x).items()}
  assert all(np.isfinite(list(found.values()))) and found['sampler_max_gap'] == 99


def test_a_row_whose_verifier_failed_is_shown_as_failed(capsys):
  metrics.show_samples('title', [('2+2=', '4', 1.0), ('2+3=', '5', float('nan'))])
  out = capsys.readouterr().out
  assert 'failed' in out and 'nan' not in out
