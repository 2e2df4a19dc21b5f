"""What docs/online_preferences.md shows works as written."""

import pathlib
import re
import shlex

import pyarrow
import pyarrow.parquet as pq
import pytest

from polgrad import build, cli, collect
from polgrad.options import from_text
from polgrad.overrides import apply

PAGE = (pathlib.Path(__file__).parent.parent / 'docs/online_preferences.md').read_text()
COMMANDS = re.findall(r'^python -m polgrad.train (.*)$', PAGE.replace('\\\n', ''), re.MULTILINE)
JUDGE, GAME, COUNT, PHASES = re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL)


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


def test_the_phases_of_the_page_build():
  names = {}
  exec(compile(PHASES, 'phases', 'exec'), names)
  names['config'].mesh.data = 1
  run = build.build(names['config'])
  assert run.order == ('warm_start', 'easy', 'train')


def test_every_way_to_pick_rows_is_on_the_page():
  for name in collect.picks.TABLE:
    assert f'`{name.partition(".")[2]}`' in PAGE, name
