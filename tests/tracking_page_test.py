"""The commands of docs/tracking.md are ones that the mains accept."""

import json
import pathlib
import re
import shlex

import pytest
from absl import flags

from polgrad import build, cli, convert, evaluate, overrides, report, sample, speed, trackers, train
from polgrad.options import from_text

PAGE = (pathlib.Path(__file__).parents[1] / 'docs' / 'tracking.md').read_text()
BLOCKS = re.findall(r'```\n(.*?)```', PAGE, re.DOTALL)
COMMANDS = [
  line
  for block in BLOCKS
  for line in block.replace('\\\n', ' ').splitlines()
  if line.startswith('python -m ')
]
MAINS = {m.__name__: m for m in (convert, evaluate, report, sample, train)}


@pytest.mark.parametrize('command', COMMANDS)
def test_commands_are_accepted(command, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  record = {'prompt': '1+1=', 'answer': '2', 'chosen': '2', 'rejected': '3'}
  (tmp_path / 'pairs.jsonl').write_text((json.dumps(record) + '\n') * 20)
  _, _, main, *arguments = shlex.split(command)
  assert main in MAINS
  rest, changes = cli.split_changes(arguments)
  given = dict(word.removeprefix('--').split('=', 1) for word in rest if word.startswith('--'))
  for name, value in given.items():
    flags.FLAGS[name]._parse(value) if name != 'config' else None
  if main == 'polgrad.report':
    return
  file, text = given['config'].split(':', 1)
  assert file == 'experiments/run.py'
  config = overrides.apply(from_text(text), changes, build.TABLE)
  config.mesh.data = 1
  experiment = build.build(config)
  speed.parse_steps(given.get('profile_steps', ''), 0, experiment.phases['train'].steps)


def test_the_page_names_every_tracker_with_its_settings():
  rows = re.findall(r'^\| `(\w+)` \| .*? \| (.*?) \|$', PAGE, re.MULTILINE)
  said = {name: re.findall('`(.*?)`', settings) for name, settings in rows}
  for name, kind in trackers.TABLE.items():
    assert said[name.partition('.')[2]] == [*kind.__dataclass_fields__]
