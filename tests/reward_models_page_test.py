"""What docs/reward_models.md shows works as written."""

import importlib.util
import json
import pathlib
import re
import shlex
import shutil

import pytest

from polgrad import build, cli, methods, overrides, reward_models
from polgrad.objectives import RewardModel, heads
from polgrad.options import from_text
from polgrad.registry import knobs_of, part
from tests import hub

PAGE = (pathlib.Path(__file__).parents[1] / 'docs' / 'reward_models.md').read_text()
BLOCKS = re.findall(r'^```\w*\n(.*?)^```', PAGE, re.DOTALL | re.MULTILINE)
LINES = [line for block in BLOCKS for line in block.replace('\\\n', ' ').splitlines()]
COMMANDS = [line for line in LINES if line.startswith('python -m ')]


@pytest.fixture(scope='module')
def here(tmp_path_factory):
  """The files that the page names, with a small model."""
  folder = tmp_path_factory.mktemp('page')
  pair = json.loads(re.search(r'```json\n(.*?)\n```', PAGE)[1])
  (folder / 'pairs.jsonl').write_text((json.dumps(pair) + '\n') * 20)
  (folder / 'problems.jsonl').write_text((json.dumps({'prompt': pair['prompt']}) + '\n') * 20)
  records = {
    'user_pairs.jsonl': [pair | {'user': 'Ann'}],
    'sampled_pairs.jsonl': [pair | {'samples': ['Paris.', 'Rome.']}],
    'mixed.jsonl': [pair, dict(prompt='?', completions=['a', 'a', 'b'], rewards=[1.0, 0.5, 2.0])],
  }
  for name, lines in records.items():
    (folder / name).write_text(''.join(json.dumps(one) + '\n' for one in lines) * 20)
  for name, seed in (('reward_folder', 0), ('second_folder', 1)):
    pathlib.Path(hub.reward_model(folder, seed)).rename(folder / name)
  shutil.copytree(folder / 'second_folder', folder / 'pairwise_folder')
  shutil.copytree(folder / 'source0' / 'first', folder / 'user_folder')
  layers = part(heads.LatentUser).to_dict()
  (folder / 'user_folder' / 'head.json').write_text(json.dumps(layers))
  return folder


def built(text, changes, here):
  text = text.replace('~/smollm2', str(here / 'source0' / 'first'))
  return build.build(overrides.apply(from_text(text), changes, build.TABLE))


@pytest.mark.parametrize('command', COMMANDS)
def test_commands_are_accepted(command, here, monkeypatch):
  monkeypatch.chdir(here)
  _, _, main, *arguments = shlex.split(command)
  rest, changes = cli.split_changes(arguments)
  given = dict(word.removeprefix('--').split('=', 1) for word in rest if '=' in word)
  assert given.keys() - {'config'} <= {'workdir', 'out'}
  usual = 'polgrad.train' if 'workdir' in given else 'polgrad.evaluate'
  assert main == ('polgrad.convert' if '--reward_model' in rest else usual)
  file, _, text = given['config'].partition(':')
  if file != 'experiments/run.py':
    assert file == 'experiments/tastes.py'
    return
  phase = built(text, changes, here).phases['train']
  uses = {'reward_model', 'user_reward_model'} & phase.reward.keys() or getattr(
    phase.comparison, '__qualname__', ''
  ) == 'preference_model'
  assert isinstance(phase.objective, RewardModel) or uses


@pytest.mark.parametrize('method', ['vpl', 'bradley_terry'])
def test_the_experiment_of_the_page_builds(method):
  path = pathlib.Path(__file__).parents[1] / 'experiments' / 'tastes.py'
  spec = importlib.util.spec_from_file_location('tastes', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(f'method={method}')
  config.mesh.data = 1
  phase = build.build(config).phases['train']
  assert phase.collect.pairs == 32 and list(phase.held_out) == ['pairs']
  with pytest.raises(ValueError, match='option method'):
    module.get_config('method=dpo')


def test_the_page_names_every_method_and_knob():
  for name in methods.FAMILIES['reward_model']:
    assert f'| `{name}` |' in PAGE
  said = set(re.findall(r'`(\w+)(?:=[^`]*)?`', PAGE))
  assert knobs_of(reward_models.reward_model).keys() - said <= {'path'}
  assert knobs_of(reward_models.user_reward_model).keys() - said <= {'path'}
  assert knobs_of(methods.bradley_terry).keys() <= said
