"""The tables of sampling beside training."""

from benchmarks import staleness

RESULTS = [
  {'method': 'topr', 'lag': 0, 'seed': 0, 'before': 0.2, 'after': 0.5},
  {'method': 'topr', 'lag': 0, 'seed': 1, 'before': 0.4, 'after': 0.7},
  {'method': 'topr', 'lag': 8, 'seed': 0, 'before': 0.2, 'after': 0.3},
  {'speed': [[0.0, 9.0, 9.0]]},
  {'speed': [[0.0, 0.5, 0.4], [1.0, 1.0, 0.5]]},
]


def test_accuracy_is_the_mean_over_seeds_and_speed_that_of_the_last_measurement():
  lines = staleness.tables(RESULTS).splitlines()
  assert lines[2] == '| `topr` | 0.300 | 0.600 |  |  | 0.300 |'
  assert lines[-2:] == ['| 0 | 0.50 | 0.40 | 1.25 x |', '| 1 | 1.00 | 0.50 | 2.00 x |']


def test_the_page_has_the_tables_of_the_results():
  page = staleness.PAGE.read_text()
  assert staleness.with_tables(page, staleness.read()) == page


def test_a_run_has_the_lag_that_is_asked_for():
  config = staleness.load('m2po', 3, 5, lag=8)
  assert (config.phases.train.collect.lag, config.seed) == (8, 3)
