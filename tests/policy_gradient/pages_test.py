"""The pages that are made from the methods say what the methods say."""

import json

import numpy as np
import pytest

from benchmarks import estimators, estimators_page, tiny_world
from launch import method_table


def test_the_table_of_methods_and_the_numbers_in_the_readme_are_current():
  assert method_table.PAGE.read_text() == method_table.page(), 'run `make pages`'
  assert method_table.README.read_text() == method_table.readme(), 'run `make pages`'


@pytest.fixture(scope='module')
def numbers() -> dict:
  return json.loads((estimators_page.DOCS / 'estimators.json').read_text())


def test_the_report_has_every_estimator(numbers):
  assert sorted(numbers) == estimators.all_names(), 'run `make pages`'
  page = (estimators_page.DOCS / 'estimators.md').read_text()
  assert all(f'| `{name}` |' in page for name in numbers)


@pytest.mark.parametrize('name', estimators.all_names())
def test_what_a_regularised_method_maximises_is_stated(name):
  """Otherwise the report would compare its gradient with that of E[R] alone."""
  known = tiny_world.STATED.keys() | tiny_world.NOT_STATED.keys()
  found = tiny_world.regularisers(estimators.load(name).phase)
  assert not found or name in known, (
    f'{name} regularises the policy by {found}: write what it maximises into STATED in '
    'benchmarks/tiny_world.py, or into NOT_STATED why that is E[R]'
  )


def test_the_statements_are_about_regularised_methods():
  assert not tiny_world.STATED.keys() & tiny_world.NOT_STATED.keys()
  for name in tiny_world.NOT_STATED:
    assert tiny_world.regularisers(estimators.load(name).phase)


def test_methods_that_are_measured_again_are_merged_into_the_report(monkeypatch, tmp_path):
  numbers = json.loads(estimators_page.NUMBERS.read_text())
  old = {'gone': numbers['grpo'], 'dapo': numbers['grpo'], 'gspo': numbers['gspo']}
  (tmp_path / 'estimators.json').write_text(json.dumps(old))
  monkeypatch.setattr(estimators_page, 'DOCS', tmp_path)
  monkeypatch.setattr(estimators_page, 'NUMBERS', tmp_path / 'estimators.json')
  points = {s: estimators.Point(**p) for s, p in numbers['dapo'].items()}
  monkeypatch.setattr(estimators, 'measure', lambda one: points)
  monkeypatch.setattr('sys.argv', ['estimators', 'dapo'])
  estimators.main()
  merged = json.loads((tmp_path / 'estimators.json').read_text())
  assert merged == {name: numbers[name] for name in ('dapo', 'gspo')}
  assert '| `dapo` |' in (tmp_path / 'estimators.md').read_text()
  assert (tmp_path / 'estimators.png').exists()


@pytest.mark.parametrize('name', ['reinforce', 'tis', 'copg'])
def test_the_report_is_what_the_estimators_do(name, numbers, x64):
  for staleness, point in estimators.measure(estimators.load(name)).items():
    for key, value in point._asdict().items():
      # An angle of zero is an arc cosine near 1.
      tolerance = 1e-4 if key == 'angle' else 1e-7
      np.testing.assert_allclose(value, numbers[name][staleness][key], rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize(
  'name', ['reinforce', 'rloo', 'remax', 'dr_grpo', 'harpg', 'n_pg_igt', 'tba']
)
def test_these_are_unbiased_on_policy(name, numbers):
  assert numbers[name]['0']['angle'] < 1e-4


def test_means_over_sampled_lengths_are_biased(numbers):
  assert all(numbers[name]['0']['angle'] > 1 for name in ('grpo', 'gspo', 'dapo'))
