"""The commands of the README and on pages of docs/ have flags and options that exist."""

import importlib
import importlib.util
import pathlib
import re
import shlex
import sys

import pytest
from absl import flags

from polgrad import build, overrides
from polgrad.cli import split_changes
from polgrad.options import from_text

ROOT = pathlib.Path(__file__).parent.parent
sys.path.append(str(ROOT / 'launch'))
PAGES = (
  *('README.md', 'docs/data.md', 'docs/before_a_run.md', 'docs/looking_inside.md'),
  *(
    'docs/tracking.md',
    'docs/models.md',
    'docs/pods.md',
    'docs/asynchronous.md',
    'docs/online_preferences.md',
  ),
  *('docs/preflight.md', 'docs/distillation.md', 'docs/engines.md'),
)


def commands():
  """The commands in blocks without a language, of each page: lists of arguments."""
  for page in PAGES:
    fences = re.findall(r'^```(\w*)\n(.*?)^```', (ROOT / page).read_text(), re.M | re.S)
    lines = ''.join(text for language, text in fences if not language).replace('\\\n', '')
    for line in filter(str.strip, lines.splitlines()):
      found = shlex.split(line, comments=True)
      found = found[found.index('|') + 1 :] if '|' in found else found
      yield found[: found.index('<')] if '<' in found else found


MAINS = [c for c in commands() if c[:2] == ['python', '-m']]
LAUNCHES = [c for c in commands() if c[0] == 'launch/tpu_vm.py']


def main_of(command):
  """The module of a main. All are imported by one process, so no two may define the same flag."""
  package = importlib.util.find_spec(command[2]).submodule_search_locations
  return importlib.import_module(f'{command[2]}.__main__' if package else command[2])


def test_each_page_has_commands():
  assert len(MAINS) > 8 and len(LAUNCHES) > 8


@pytest.mark.parametrize('command', MAINS, ids=' '.join)
def test_a_main_has_the_flags_of_the_page(command):
  defined = flags.FLAGS.flags_by_module_dict()
  modules = (main_of(command).__name__, 'polgrad.cli', 'polgrad.loading')
  known = {flag.name for name in modules for flag in defined.get(name, ())}
  for argument in (a for a in command[3:] if a.startswith('--')):
    name = argument.removeprefix('--').partition('=')[0]
    assert name in known or name.startswith('config.'), argument


@pytest.mark.parametrize('command', LAUNCHES, ids=' '.join)
def test_the_launcher_takes_the_options_of_the_page(command):
  import tpu_vm

  cut = command.index('--') if '--' in command else len(command)
  options = tpu_vm.parser().parse_args(command[1:cut])
  if cut < len(command):
    tpu_vm.check(options, command[cut + 1 :], pytest.fail)


@pytest.mark.parametrize('command', MAINS + LAUNCHES, ids=' '.join)
def test_the_options_of_a_configuration_exist(command, tmp_path, smollm2):
  for argument in command:
    text = re.match(r'--config=experiments/run\.py:(.*)', argument)
    if not text or 'data=' in text[1]:  # the data are those of the reader
      continue
    if 'model=tiny' in text[1]:
      config, changes = from_text(text[1]), split_changes(command)[1]
      # Files of the reader, and rows of another model's length, are not here.
      if any('.py:' in value for value in changes.values()) or '--shape' in ' '.join(command):
        continue
      # Meshes need the devices of the reader. All else has to fit together.
      meshes = ('config.mesh.', 'config.sampler_mesh.')
      changes = {path: value for path, value in changes.items() if not path.startswith(meshes)}
      build.build(overrides.apply(config, changes, build.TABLE))
    else:
      from_text(re.sub('path=.*|$', f',path={smollm2}', text[1], count=1))


def test_runtime_versions_of_the_page_are_those_of_the_launcher():
  import tpu_vm

  rows = re.findall(r'^\| (v\d.*?) \| `(.*?)` \|$', (ROOT / 'docs/pods.md').read_text(), re.M)
  found = {f'{kind}-': v for kinds, v in rows for kind in re.findall(r'v\d\w*', kinds)}
  found.pop('v5e-')  # what people call v5litepod
  assert found == tpu_vm.VERSIONS
