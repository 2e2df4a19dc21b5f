"""The tables of asynchronous training."""

import doctest

from benchmarks import marks, modes, staleness
from polgrad.build import build
from polgrad.collect import Stored

RESULTS = [
  {'method': 'topr', 'lag': 0, 'seed': 0, 'before': 0.2, 'after': 0.5},
  {'method': 'topr', 'lag': 0, 'seed': 1, 'before': 0.4, 'after': 0.7},
  {'method': 'topr', 'lag': 8, 'seed': 0, 'before': 0.2, 'after': 0.3},
]
SECONDS = {mode: [1.0, 3.0] for mode in modes.MODES} | {'mixed': [0.5, 1.0]}
OF_MODES = [
  {'waits': [0.01, 0.25], 'seconds': SECONDS, 'ages': dict.fromkeys(modes.MODES, 1.25)},
  {'mode': 'mixed', 'seed': 1, 'after': 0.5},
  {'mode': 'mixed', 'seed': 0, 'after': 0.25},
  {'lengths': {'synchronous': [3.0, 4.0], 'other': [2.0, 4.0]}},
  {'caches': [[4, 1e-7, 0.02, 0.003]]},
]


def test_accuracy_is_the_mean_over_seeds():
  lines = staleness.table(RESULTS).splitlines()
  assert lines[2] == '| `topr` | 0.300 | 0.600 |  |  | 0.300 |'


def test_speed_is_the_median_of_the_ratios_of_rounds():
  lines = modes.table(OF_MODES).splitlines()
  assert 'faster, a draw waits 10 ms and an update waits 250 ms' in lines[0]
  assert '| mixed | 2.50 x (2.00 to 3.00) | 1.2 | 0.375 | 0.250, 0.500 |' in lines
  assert modes.table_of_lengths(OF_MODES).splitlines()[-1] == '| other | 2.0 | 4.0 |'
  last = modes.table_of_caches(OF_MODES).splitlines()[-1]
  assert last == '| 4 | 1.0e-07 | 3.0e-03 | 2.0e-02 |'


def test_the_page_has_the_tables_of_the_results():
  page = staleness.PAGE.read_text()
  assert staleness.with_table(page, staleness.read()) == page
  assert modes.with_tables(page, modes.read()) == page


def test_a_run_has_the_lag_that_is_asked_for():
  config = staleness.load('m2po', 3, 5, lag=8)
  assert (config.phases.train.collect.lag, config.seed) == (8, 3)


def test_every_mode_is_a_run():
  made = {mode: build(modes.placed(mode, '/rows')) for mode in modes.MODES}
  collectors = {mode: run.phases['train'].collect for mode, run in made.items()}
  assert type(collectors['offline']) is Stored and collectors['offline'].folder == '/rows'
  assert collectors['fully asynchronous'].chunk and collectors['mixed'].replay
  assert {mode for mode, run in made.items() if run.sampled_on is not run.mesh} == {
    mode for mode, one in collectors.items() if getattr(one, 'overlap', False)
  }


def test_the_examples_are_true():
  assert not doctest.testmod(marks).failed
