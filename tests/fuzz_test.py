"""Broken inputs of every kind give a right result or a refusal by name; `benchmarks.fuzz` draws more."""

import json

import pytest
from hypothesis import HealthCheck, given, settings

from benchmarks import fuzz, kills, robustness
from polgrad import jsons

# Numbers of inputs of kinds that take longer.
FEW = {'metrics': 20, 'checkpoints': 15, 'model folders': 20}
# Not run here, because making the problems takes seconds; tests/rewards has tests of these scorers.
APART = 'reasoning-gym scorers'


# Orbax leaves tasks that failed on damaged checkpoints; Python warns of their exceptions.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('name', [name for name in fuzz.KINDS if name != APART])
def test_an_input_is_read_or_refused_by_name(name):
  kind = fuzz.KINDS[name]

  @settings(
    max_examples=FEW.get(name, 40), derandomize=True, database=None, deadline=None,
    suppress_health_check=list(HealthCheck),
  )  # fmt: skip
  @given(kind.strategy())
  def read(given):
    fuzz.outcome(kind, given)

  read()


def test_the_page_has_the_recorded_results_and_none_is_a_fault():
  known, text = json.loads(robustness.RESULTS.read_text()), robustness.PAGE.read_text()
  assert robustness.with_tables(text, known) == text
  assert known['fuzz'].keys() == fuzz.KINDS.keys()
  assert not any(row.get('fault') for row in known['fuzz'].values())
  assert known['kills'].keys() == kills.RUNS.keys()
  assert not any(row['arrays'] or row['rows'] for row in known['kills'].values())


def test_an_error_that_is_not_a_deliberate_refusal_is_a_fault(tmp_path):
  def fails(make):
    return fuzz.Kind(lambda: None, lambda given, folder: make(given), lambda *_: ('x',), 0.2)

  def refuse(where):
    jsons.check(where, {'size': '3'}, {'size': 'a number'})

  def hang(_):
    while True:
      pass

  assert fuzz.outcome(fails(lambda given: None), 'x') == 'right'
  assert fuzz.outcome(fails(refuse), 'x.json') == 'refused'
  for make, error in ((refuse, fuzz.NotNamed), (int, ValueError), (hang, fuzz.Hang)):
    with pytest.raises(error):
      fuzz.outcome(fails(make), 'y')
