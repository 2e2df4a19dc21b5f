"""The commands of docs/judges.md are ones that the mains accept, and its tables name every knob."""

import inspect
import pathlib
import re
import shlex

import pytest
from absl import flags

from polgrad import build, cli, compare, overrides, train
from polgrad.options import from_text
from polgrad.rewards import judge

PAGE = (pathlib.Path(__file__).parents[1] / 'docs' / 'judges.md').read_text()
COMMANDS = [
  line.partition('  #')[0]
  for block in re.findall(r'```\n(.*?)```', PAGE, re.DOTALL)
  for line in block.replace('\\\n', ' ').splitlines()
  if line.startswith('python -m ')
]


@pytest.mark.parametrize('command', COMMANDS)
def test_commands_are_accepted(command):
  _, _, main, *arguments = shlex.split(command)
  assert main in (train.__name__, compare.__name__)
  rest, changes = cli.split_changes(arguments)
  given = dict((word.removeprefix('--') + '=').split('=', 1) for word in rest)
  assert given.keys() <= set(flags.FLAGS)
  if given['config'] != '...=':
    text = given['config'].removesuffix('=').partition(':')[2]
    config = overrides.apply(from_text(text), changes, build.TABLE)
    config.mesh.data = 1
    build.build(config)


def test_the_page_names_every_knob_of_the_judge():
  for fn in (judge.score, judge.compare):
    knobs = [p.name for p in inspect.signature(fn).parameters.values() if p.kind == p.KEYWORD_ONLY]
    assert all(f'`{knob}`' in PAGE for knob in knobs)


def test_the_page_names_every_number_of_a_comparison():
  for name in (*re.findall(r"'(\w+)':", inspect.getsource(compare.measure)), 'kl_k3_error'):
    assert f'`{name}`' in PAGE
