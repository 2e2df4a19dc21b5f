"""The tables of benchmarks/second_attempts.py, and that its runs differ in the method alone."""

import pytest

from benchmarks import second_attempts


def result(setting, seed, after, before=(0.4, 0.0, 0.0, 0.0), **groups):
  return {'setting': setting, 'seed': seed, 'before': before, 'after': after, **groups}


FOUND = [
  result('grpo', 1, [0.5, 0.1, 0.1, 0.1]),
  result('igpo', 1, [0.5, 0.0, 0.0, 0.0], hopeless=0.2, rescued=0.1),
  result('grpo', 0, [0.3, 0.3, 0.1, 0.1]),
  result('igpo', 0, [0.4, 0.0, 0.0, 0.0], hopeless=0.4, rescued=0.3),
]


def test_the_tables_have_means_and_the_numbers_of_every_seed():
  _, _, igpo = second_attempts.hints_table(FOUND).splitlines()
  assert igpo == (
    '| `igpo` | 0.300 (0.400, 0.200) | 0.100 (0.100, 0.100) | 62% (75%, 50%) | 0.450 (0.400, 0.500) |'
  )
  _, _, checkpoint, grpo = second_attempts.revisions_table(FOUND).splitlines()
  assert checkpoint.startswith('| checkpoint | 0.400 (0.400, 0.400) | 0.000 (0.000, 0.000) |')
  assert grpo.startswith('| `grpo` | 0.400 (0.300, 0.500) | 0.200 (0.300, 0.100) |')


def test_the_page_has_the_tables_of_the_results():
  text = second_attempts.PAGE.read_text()
  assert second_attempts.with_tables(text, second_attempts.read()) == text


@pytest.mark.parametrize(('name', 'base'), [('igpo', 'without_hints'), ('exit_iteration', 'grpo')])
def test_a_claim_is_measured_against_the_same_run_without_it(name, base):
  one, other = (second_attempts.load(n, 1, 30).to_dict()['phases']['train'] for n in (name, base))
  own = {'replaced'} if name == 'igpo' else {'new'}
  assert {k for k in one if one[k] != other[k]} == {'collect'}
  assert {k for k in one['collect'] if one['collect'][k] != other['collect'][k]} == own
