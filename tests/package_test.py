"""What `pip install` gets: one top-level name, one version, and a licence; benchmarks fit it."""

import importlib
import pathlib
import runpy

import pytest
import setuptools

import polgrad

ROOT = pathlib.Path(__file__).parents[1]
BENCHMARKS = sorted(f.stem for f in (ROOT / 'benchmarks').glob('*.py'))


def test_setup_has_the_version_of_the_package_and_one_top_level_name(monkeypatch):
  found = {}
  monkeypatch.setattr(setuptools, 'setup', lambda **settings: found.update(settings))
  monkeypatch.chdir(ROOT)
  runpy.run_path('setup.py')
  assert found['version'] == polgrad.__version__
  assert {name.split('.')[0] for name in found['packages']} == {'polgrad'}
  folders = {path.parent.relative_to(ROOT) for path in ROOT.glob('polgrad/**/*.py')}
  assert {name.replace('.', '/') for name in found['packages']} == set(map(str, folders))
  others = {path for path in ROOT.glob('polgrad/**/*') if path.suffix not in ('.py', '.pyc', '')}
  kept = {
    path
    for package, patterns in found['package_data'].items()
    for pattern in patterns
    for path in (ROOT / package.replace('.', '/')).glob(pattern)
  }
  assert others == kept
  assert found['license'] == 'Apache-2.0'
  assert 'Apache License' in (ROOT / found['license_files'][0]).read_text()


@pytest.mark.parametrize('name', [*BENCHMARKS, 'peers.polgrad_worker'])
def test_benchmarks_import_what_there_is(name):
  """Their runs are too long for a test; the workers of peers need the peers."""
  assert importlib.import_module(f'benchmarks.{name}').__doc__
