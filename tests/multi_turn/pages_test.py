"""What docs/turn_credit.md says, and the report of estimators over several turns."""

import json
import re

import numpy as np
import pytest

from benchmarks import estimators_page, turn_estimators
from polgrad import credit, methods

PAGE = (estimators_page.DOCS / 'turn_credit.md').read_text()
NUMBERS = json.loads(estimators_page.TURNS.read_text())


def test_the_example_of_the_page_runs():
  names = {}
  (code,) = re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL)
  exec(compile(code, 'docs/turn_credit.md', 'exec'), names)
  assert np.isfinite(names['loss'])


def test_the_page_names_estimators_and_methods_that_exist():
  rows = re.findall(r'^\| `(\w+)` \| [^|]* \| (`.*`) \|$', PAGE, re.MULTILINE)
  assert len(rows) == 9
  assert {f'credit.{name}' for name, _ in rows} <= credit.TABLE.keys()
  named = {name for _, cell in rows for name in re.findall('`(.*?)`', cell)}
  assert named == {*methods.FAMILIES['multi_turn']}


def test_the_page_has_the_numbers_of_the_report():
  rows = re.findall(r'^\| ([^|`]*) \| ([\d., ]+) \| ([\d., ]+) \|$', PAGE, re.MULTILINE)
  assert len(rows) == 7
  for name, *cells in rows:
    for cell, point in zip(cells, NUMBERS[name].values()):
      angle, noise = map(float, cell.split(','))
      assert abs(angle - point['angle']) < 0.06 and abs(noise - point['noise']) < 0.006


def test_the_report_has_every_row_and_the_page_shows_it():
  assert list(NUMBERS) == turn_estimators.all_names(), 'run `make pages`'
  text = (estimators_page.DOCS / 'estimators.md').read_text()
  assert all(table in text for table in estimators_page.turn_tables().values()), 'run `make pages`'


@pytest.mark.parametrize('name', ['turn returns, leave-one-out by state'])
def test_the_report_is_what_the_estimators_do(name, x64):
  for world, point in turn_estimators.measure(name, ['deterministic']).items():
    for key, value in point._asdict().items():
      np.testing.assert_allclose(value, NUMBERS[name][world][key], rtol=1e-5, atol=1e-7)


def test_what_is_unbiased_on_two_turns():
  exact = {name for name, points in NUMBERS.items() if points['deterministic']['angle'] < 1e-4}
  assert {'rloo', 'dr_grpo', 'turn_rloo', 'turn returns', 'GAE of turns, lambda .95'} <= exact
  assert not {'gigpo', 'turn_grpo', 'areal_retry', 'ragen', 'turn_ppo', 'grpo'} & exact
