"""What docs/online_preferences.md shows works as written."""

import importlib.util
import pathlib
import re
import shlex

import pyarrow
import pyarrow.parquet as pq
import pytest

from polgrad import build, cli, collect, tasks
from polgrad.data import sources
from polgrad.options import from_text
from polgrad.overrides import apply
from polgrad.registry import bind

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / 'docs/online_preferences.md').read_text()
FOUND = re.findall(r'^python -m polgrad.train (.*)$', PAGE.replace('\\\n', ''), re.MULTILINE)
COMMANDS = [command for command in FOUND if 'run.py:' in command]
PIPELINES = [command for command in FOUND if 'preference_pipelines.py:' in command]
JUDGE, GAME, COUNT = re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """The folder that the commands run in, with the files that they name."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'judge.py').write_text(JUDGE)
  exec(compile(GAME, 'game', 'exec'), {})
  return tmp_path


def test_the_commands_compose_and_compare(folder):
  assert len(COMMANDS) == 4
  found = {}
  for command in COMMANDS:
    [config, *_], changes = cli.split_changes(shlex.split(command))
    made = apply(from_text(config.partition('run.py:')[2]), changes, build.TABLE)
    made.mesh.data = 1
    phase = build.build(made).phases['train']
    found[command.partition('--workdir=runs/')[2].split()[0]] = phase
  pair = dict(first='11', second='9', record={'answer': '10'}, first_reward=0, second_reward=0)
  assert found['judged'].compare([pair]).wins == [0.5]
  assert found['judged'].compare([pair | {'first': '+'}]).errors == {'comparison/ValueError': 1}
  assert found['best_worst'].collect.rows_per_prompt == 2
  game = found['game']
  pair = dict(first='p', second='s', record=game.source[0], first_reward=0, second_reward=0)
  assert game.compare([pair]).wins[0] == pytest.approx(1 / 3)


def test_the_moves_of_the_game_are_counted(folder, capsys):
  (folder / 'runs/game/rollouts').mkdir(parents=True)
  table = pyarrow.table({'completion': ['r', 'p', 'p', 's', 'rr']})
  pq.write_table(table, folder / 'runs/game/rollouts/train-000061.parquet')
  exec(compile(COUNT, 'count', 'exec'), {})
  assert capsys.readouterr().out == "{'r': 0.25, 'p': 0.5, 's': 0.25}\n"


@pytest.fixture(scope='module')
def pipelines():
  spec = importlib.util.spec_from_file_location(
    'preference_pipelines', ROOT / 'experiments/preference_pipelines.py'
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_the_pipelines_of_the_page_build(pipelines):
  runs = {}
  for command in PIPELINES:
    [name, options] = re.search(r'pipelines.py:run=(\w+),(\S+)', command).groups()
    config = pipelines.get_config(f'run={name},{options},smoke')
    runs[name] = build.build(config)
  assert runs['mpo'].order == ('warm_start', 'easy', 'hard')
  assert runs['rlhs'].order == ('warm_start', 'train')
  # A pair is easy or hard, by the rewards of its completions.
  easy, hard = runs['mpo'].phases['easy'].source, runs['mpo'].phases['hard'].source
  whole = tasks.addition().pairs
  assert len(easy) + len(hard) == len(bind(whole, sources.TABLE))
  for row, split in ((easy[5], True), (hard[5], False)):
    gap = pipelines.closeness(row['chosen'], row) - pipelines.closeness(row['rejected'], row)
    assert (gap >= 1) == split and gap == pytest.approx(min(row['margin'], 100) / 10)
  assert 'reference' in runs['mpo'].phases['hard'].anchors
  with pytest.raises(ValueError, match=r"unknown 'rlsh'; valid: \['mpo', 'rlhs'\]"):
    pipelines.get_config('run=rlsh')


def test_hindsight_is_not_deceived(pipelines):
  pair = dict(record={'prompt': 'a2:', 'quality': 2}, first_reward=0, second_reward=0)
  for hindsight, wanted in ((False, 1.0), (True, 0.0)):
    config = pipelines.get_config(f'run=rlhs,hindsight={hindsight},smoke'.lower())
    phase = build.build(config).phases['train']
    assert phase.compare([pair | {'first': '9', 'second': '1'}]).wins == [wanted]
    assert phase.compare([pair | {'first': '3', 'second': '3'}]).wins == [0.5]


def test_every_way_to_pick_rows_is_on_the_page():
  for name in collect.picks.TABLE:
    assert f'`{name.partition(".")[2]}`' in PAGE, name
