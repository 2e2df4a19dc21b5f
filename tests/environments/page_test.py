"""What docs/environments.md shows works as it says."""

import dataclasses
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from absl import flags

from polgrad import build, cli, collect, environments, overrides, train, view
from polgrad.environments import episodes, workers
from polgrad.options import from_text
from polgrad.rewards import worker

PAGE = (pathlib.Path(__file__).parents[2] / 'docs' / 'environments.md').read_text()
PROGRAMS = re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL)
COMMANDS = [line for line in PAGE.splitlines() if line.startswith('python ')]


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """The folder of a reader who has followed the page."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.delitem(sys.modules, 'count_up', raising=False)
  pathlib.Path('count_up.py').write_text(PROGRAMS[0])
  [made] = [c for c in COMMANDS if 'numbers.jsonl' in c and c.startswith('python -c')]
  subprocess.run(made.replace('python', sys.executable, 1), shell=True, check=True)
  return tmp_path


def test_the_environment_of_the_page_plays_a_turn(folder):
  import count_up

  played = count_up.CountUp().step(count_up.CountUp().reset({'answer': '8'}, 0), '8')
  assert f'`{played}`' in PAGE
  assert [c for c in COMMANDS if 'import CountUp' in c]
  assert len(pathlib.Path('numbers.jsonl').read_text().splitlines()) == 59


@pytest.mark.parametrize(
  'command', [c for c in COMMANDS if c.startswith('python -m polgrad.train')]
)
def test_commands_make_runs_whose_data_can_be_laid_out(folder, command):
  _, _, main, *arguments = shlex.split(command)
  rest, changes = cli.split_changes(arguments)
  given = dict((word.removeprefix('--') + '=').split('=', 1) for word in rest)
  assert main == train.__name__ and given.keys() <= set(flags.FLAGS)
  text = given['config'].removesuffix('=').partition(':')[2]
  config = overrides.apply(from_text(text), changes, build.TABLE)
  config.mesh.data = 1
  run = build.build(config)
  build.check_data(run)
  assert run.phases['train'].collect.has_environment and run.evaluation.has_environment


def test_the_config_file_of_the_page_builds(folder):
  names = {}
  exec(PROGRAMS[1], names)
  run = build.build(names['get_config']())
  own = run.phases['train'].collect.environment
  assert type(own).__name__ == 'CountUp' and own.max_turns == 4


def test_the_page_names_every_setting_metric_and_kind_of_failure():
  for field in dataclasses.fields(collect.Turns):
    assert f'`{field.name}' in PAGE or f'`{field.name}.' in PAGE, field.name
  modules = (episodes, workers, worker)
  source = ''.join(pathlib.Path(module.__file__).read_text() for module in modules)
  kinds = set(re.findall(r"Failure\(\s*'(\w+)'", source))
  kinds -= {'Overlap'}  # of scores of parts of a completion
  assert len(kinds) > 6 and all(f'`{kind}`' in PAGE for kind in kinds), kinds
  assert 'python -m polgrad.view' in PAGE and view.__doc__
  assert {'Guess', 'calculator'} <= {name.partition('.')[2] for name in environments.TABLE}
