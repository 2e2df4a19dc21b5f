"""What docs/reward_models.md shows works as written."""

import json
import pathlib
import re
import shlex
import shutil

import pytest

from polgrad import build, cli, methods, overrides, reward_models
from polgrad.objectives import RewardModel
from polgrad.options import from_text
from polgrad.registry import knobs_of
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
  for name, seed in (('reward_folder', 0), ('second_folder', 1)):
    pathlib.Path(hub.reward_model(folder, seed)).rename(folder / name)
  shutil.copytree(folder / 'second_folder', folder / 'pairwise_folder')
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
  file, text = given['config'].split(':', 1)
  phase = built(text, changes, here).phases['train']
  assert file == 'experiments/run.py'
  uses = (
    'reward_model' in phase.reward
    or getattr(phase.comparison, '__qualname__', '') == 'preference_model'
  )
  assert isinstance(phase.objective, RewardModel) or uses


def test_the_page_names_every_method_and_knob():
  for name in methods.FAMILIES['reward_model']:
    assert f'| `{name}` |' in PAGE
  said = set(re.findall(r'`(\w+)(?:=[^`]*)?`', PAGE))
  assert knobs_of(reward_models.reward_model).keys() - said == {'path'}
  assert knobs_of(methods.bradley_terry).keys() <= said
