"""The commands and the code of docs/controlled_decoding.md work."""

import pathlib
import re
import shlex

from absl import flags

from polgrad import build, cli, sample, train
from polgrad.options import from_text
from polgrad.registry import inputs

PAGE = (pathlib.Path(__file__).parents[1] / 'docs' / 'controlled_decoding.md').read_text()
MAINS = {main.__name__: main for main in (sample, train)}


def test_commands_are_accepted():
  commands = re.findall(r'^python -m .*', PAGE, re.MULTILINE)
  assert len(commands) == 3
  for command in commands:
    _, _, main, *arguments = shlex.split(command)
    assert main in MAINS
    rest, _ = cli.split_changes(arguments)
    given = dict(word.removeprefix('--').split('=', 1) for word in rest)
    config = from_text(given.pop('config').split(':', 1)[1])
    config.mesh.data = 1
    assert build.build(config).phases['train'].anchors.keys() == {'teacher'}
    for name, value in given.items():
      flags.FLAGS[name].parser.parse(value)


def test_the_code_runs():
  (block,) = re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL)
  names = {}
  exec(compile(block, 'docs/controlled_decoding.md', 'exec'), names)
  assert inputs(names['steered']) == ('model', 'helpful', 'short')
