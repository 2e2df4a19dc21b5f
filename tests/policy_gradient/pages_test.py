"""The pages that are made from the methods say what the methods say."""

import json

import numpy as np
import pytest

from benchmarks import estimators, estimators_page
from launch import method_table


def test_the_table_of_methods_is_current():
  assert method_table.PAGE.read_text() == method_table.page()


@pytest.fixture(scope='module')
def numbers() -> dict:
  return json.loads((estimators_page.DOCS / 'estimators.json').read_text())


def test_the_report_has_every_estimator(numbers):
  assert sorted(numbers) == estimators.all_names()
  page = (estimators_page.DOCS / 'estimators.md').read_text()
  assert all(f'| `{name}` |' in page for name in numbers)


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
