"""The table of benchmarks/hybrids.py, and that its runs differ in the method alone."""

import pytest

from benchmarks import hybrids


def result(name, seed, *curves):
  return {'method': name, 'seed': seed, 'steps': 30, 'warm_start': 180, 'curves': list(curves)}


def test_the_table_has_what_each_method_read_and_where_it_ended():
  found = [
    result('sft_then_grpo', 1, [0.2, 0.3], [0.3, 0.4, 0.6]),
    result('grpo', 1, [0.2, 0.4, 0.5]),
    result('sft_then_grpo', 0, [0.1, 0.2], [0.2, 0.3, 0.4]),
    result('grpo', 0, [0.1, 0.2, 0.3]),
  ]
  lines = hybrids.table(found).splitlines()
  assert lines[2] == '| checkpoint | | | | 0.100, 0.200 | 0.150 |'
  assert lines[3] == '| `grpo` | 0 | 3,840 | 0.300 | 0.300, 0.500 | 0.400 |'
  assert lines[4] == '| `sft_then_grpo` | 480 | 3,840 | 0.350 | 0.400, 0.600 | 0.500 |'


def test_the_page_has_the_table_of_the_results():
  text = hybrids.PAGE.read_text()
  assert hybrids.with_table(text, hybrids.read()) == text


@pytest.mark.parametrize('name', sorted(hybrids.SETTINGS.keys() - {'grpo'}))
def test_runs_have_the_same_data_and_rates(name):
  base = hybrids.load(hybrids.grpo, 1, 30).to_dict()
  for method in hybrids.SETTINGS[name]:
    other = hybrids.load(method, 1, 30).to_dict()
    train = other['phases']['train']
    assert train['source'] == base['phases']['train']['source']
    assert train['optimizer']['learning_rate'] == hybrids.RATE
    assert train['steps'] == 30 and train['collect'].get('prompts', 16) == 16
    assert train['collect'].get('rows', 16) == 16
    assert other['evaluation'] == base['evaluation']
