"""The model that a main works with: of a run, of a configuration before training, or a bare folder."""

import json
import shutil

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from polgrad import build, cli, convert, evaluate, identity, loading, models, sample
from polgrad.models import hf
from polgrad.options import from_text
from tests import buckets, hub
from tests.runs import grpo

flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return hub.small('qwen3', tmp_path_factory.mktemp('hub'))


def read(folder):
  return jax.device_get(models.pretrained(path=folder).init(jax.random.key(0)))


def test_a_bare_folder_is_written_anew_in_the_dtype_asked_for(
  folder, tmp_path, monkeypatch, capsys
):
  out = str(tmp_path / 'out')
  monkeypatch.setattr(cli, 'CHANGES', {'config.model.param_dtype': 'bfloat16'})
  with flagsaver.flagsaver(model=folder, out=out, compilation_cache=''):
    convert.main(['convert'])
  assert f'wrote {out}' in capsys.readouterr().out
  assert json.loads((tmp_path / 'out/config.json').read_text())['torch_dtype'] == 'bfloat16'
  tensors = hf.open_folder(tmp_path / 'out')
  assert all(str(x.dtype) == 'bfloat16' for x in tensors.values())
  wanted = jax.tree.map(lambda x: x.astype('bfloat16').astype('float32'), read(folder))
  jax.tree.map(np.testing.assert_array_equal, read(out), wanted)
  assert (tmp_path / 'out/tokenizer.json').exists()


def test_without_a_run_the_parameters_are_those_before_training(capsys):
  config = grpo.get_config('smoke,seed=3')
  experiment = build.build(config)
  found = evaluate.chosen_params(experiment)
  wanted = evaluate.init_params(experiment.policy, experiment.mesh, 3)
  jax.tree.map(np.testing.assert_array_equal, found, wanted)
  assert 'no --workdir: this is the model before training' in capsys.readouterr().err


def test_a_folder_of_a_bucket_is_a_model_like_a_local_one(folder, tmp_path, monkeypatch):
  buckets.use(monkeypatch, tmp_path)
  shutil.copytree(folder, tmp_path / 'model')
  config = from_text('method=sft,task=chain_sum,model=hf,path=gs://bucket/model,smoke')
  experiment = build.build(config)
  with jax.set_mesh(experiment.mesh):
    params = evaluate.init_params(experiment.policy, experiment.mesh, 0)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), read(folder))
  assert experiment.tokenizer.encode('hello') == build.build(
    from_text(f'method=sft,task=chain_sum,model=hf,path={folder},smoke')
  ).tokenizer.encode('hello')
  # The contents are part of the identity of a run.
  before = identity.describe(config)
  weights = tmp_path / 'model/model.safetensors'
  weights.write_bytes(weights.read_bytes()[:-1] + b'x')
  changed = identity.differences(before, identity.describe(config))
  assert changed == ['gs://bucket/model: other contents than before']
  # A missing folder is named; nothing is written there, because a folder would not appear at once.
  with pytest.raises(FileNotFoundError, match='there is no folder gs://bucket/none'):
    from_text('method=sft,task=chain_sum,model=hf,path=gs://bucket/none,smoke')
  with pytest.raises(ValueError, match='gs://bucket/out must be a path of this machine'):
    hf.save('gs://bucket/out', experiment.policy.config, params)


def test_a_bare_folder_is_a_model_with_its_tokenizer(folder):
  with flagsaver.flagsaver(model=folder):
    experiment, params = loading.load(loading.config())
  assert experiment.policy.config.max_length == hub.SMALL['max_position_embeddings']
  assert experiment.tokenizer.encode('hello')
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), read(folder))


@pytest.mark.parametrize('main', [sample, convert])
@pytest.mark.parametrize(
  ('given', 'said'),
  [
    ({}, 'name a model: --model=FOLDER, or --config=...'),
    ({'model': 'x', 'workdir': 'y', 'step': 2}, "cannot have ['--workdir', '--step']"),
    ({'model': '/no/folder', 'out': 'x'}, '--model: there is no folder /no/folder'),
  ],
)
def test_other_choices_are_refused_in_one_line(main, given, said, capsys):
  with flagsaver.flagsaver(compilation_cache='', **given), pytest.raises(SystemExit) as ended:
    main.main(['main'])
  told = capsys.readouterr().err
  assert ended.value.code == 2 and said in told and told.count('\n') == 1


def test_a_step_without_a_run_is_refused():
  experiment = build.build(grpo.get_config('smoke'))
  with flagsaver.flagsaver(step=3), pytest.raises(ValueError, match='name the run by --workdir'):
    evaluate.chosen_params(experiment)
