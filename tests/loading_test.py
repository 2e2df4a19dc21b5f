"""The model that a main works with: of a run, of a configuration before training, or a bare folder."""

import json

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from polgrad import build, cli, convert, evaluate, loading, models, sample
from polgrad.models import hf
from tests import hub
from tests.runs import grpo

flags.FLAGS.mark_as_parsed()
pytestmark = pytest.mark.usefixtures('quick_compiler')


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
