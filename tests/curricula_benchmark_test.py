"""The table of benchmarks/curricula.py, and that its runs differ in the curriculum alone."""

import pytest

from benchmarks import curricula


def result(name, seed, reached, last=0.85):
  curve = [[0, 0.6], [1000, last]]
  return {'curriculum': name, 'seed': seed, 'reached': reached, 'curve': curve}


def cells(table, name):
  [row] = [line for line in table.splitlines() if line.startswith(f'| `{name}`')]
  return [cell.strip() for cell in row.strip('|').split('|')][1:]


def test_ratios_are_taken_within_a_seed():
  base = [result('uniform', 0, 100), result('uniform', 1, 1000), result('uniform', 2, 400)]
  made = curricula.table([*base, *(result('vade', s, n) for s, n in enumerate((200, 500, 1200)))])
  assert cells(made, 'uniform')[2] == '1.00 (1.00 to 1.00)'
  assert cells(made, 'vade') == [
    '200, 500, 1,200',
    '500',
    '2.00 (0.50 to 3.00)',
    '0.85 (0.85 to 0.85)',
  ]


def test_runs_that_do_not_reach_the_goal_are_said_to():
  base = [result('uniform', 0, 100), result('uniform', 1, None)]
  made = curricula.table([*base, result('sec', 0, None, 0.5), result('sec', 1, 100)])
  assert cells(made, 'uniform')[:2] == ['100, never', 'never']
  assert cells(made, 'sec')[2] == 'never (never to never)'  # of seed 0; seed 1 has no ratio
  assert cells(curricula.table([result('sec', 0, 100)]), 'sec')[2] == ''


def test_the_page_has_the_table_of_the_results():
  text = curricula.PAGE.read_text()
  assert curricula.with_table(text, curricula.read()) == text
  assert curricula.with_table(text, [result('uniform', 0, 7)]) != text


@pytest.mark.parametrize('name', sorted(curricula.SETTINGS.keys() - {'uniform'}))
def test_runs_differ_in_the_curriculum_alone(name):
  base, other = (curricula.load(n, 1, 3).to_dict() for n in ('uniform', name))
  for config in base, other:
    config['phases']['train'].pop('curriculum', None)
  resampled = other['phases']['train']['collect'].pop('max_resamples', 0)
  base['phases']['train']['collect'].pop('max_resamples', 0)
  assert (resampled > 0) == (name == 'dynamic_sampling')
  assert base == other
