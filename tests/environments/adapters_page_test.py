"""What docs/adapters.md shows works as it says."""

import importlib.util
import pathlib
import re
import shlex

import pytest

from polgrad import build, environments
from polgrad.environments.adapters.textarena import OPPONENTS, TextArena
from polgrad.options import from_text
from polgrad.registry import bind

PAGE = (pathlib.Path(__file__).parents[2] / 'docs' / 'adapters.md').read_text()
PROGRAMS = re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL)
CONFIGS = [
  shlex.split(line)[3].removeprefix('--config=experiments/')
  for line in PAGE.splitlines()
  if line.startswith('python -m polgrad.train')
]


@pytest.mark.parametrize(
  ('name', 'options', 'kind'),
  [
    ('nim_self_play', 'credit=spiral', 'Nim'),
    ('score_addition', '', 'Attempts'),
    ('calculator', 'credit=state', 'Tools'),
    ('calculator', 'calls=false', 'OneTurn'),
  ],
)
def test_the_named_runs_of_several_turns_build(name, options, kind):
  file = pathlib.Path(__file__).parents[2] / 'experiments' / f'{name}.py'
  spec = importlib.util.spec_from_file_location(name, file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(options)
  config.mesh.data = 1
  run = build.build(config)
  assert type(run.phases['train'].collect.environment).__name__ == kind
  assert run.order[0] == 'warm_start' and set(run.order) == set(run.phases)


def test_the_commands_make_runs(smollm2):
  assert len(CONFIGS) == 6
  found = []
  for config in CONFIGS:
    if config.startswith('run.py:') and 'task=verifiers' not in config:
      text = config.removeprefix('run.py:').replace(
        'model=smollm2', f'model=smollm2,path={smollm2}'
      )
      part = from_text(text).phases.train.collect.environment
      found.append(type(bind(part, environments.TABLE)).__name__)
  assert found == ['Attempts', 'TextArena', 'TextArena', 'TextArena']


def test_the_game_of_the_page_ends_as_it_says(capsys):
  exec(PROGRAMS[0], {})
  said = capsys.readouterr().out.strip()
  assert f'# {said}\n' in PROGRAMS[0]


def test_the_opponent_of_the_page_plays():
  scope = {}
  exec(PROGRAMS[1], scope)
  environment = TextArena(game='TicTacToe-v0', opponent=scope['centre'])
  state = environment.reset({'prompt': '', 'seed': 2}, 0)
  assert "'[4]'" not in environment.step(state, '[0]').observation
  assert scope['centre'] not in OPPONENTS.values()


def test_the_environment_of_the_page_is_a_program():
  scope = {}
  exec(PROGRAMS[2], scope)
  assert callable(scope['load_environment'])
