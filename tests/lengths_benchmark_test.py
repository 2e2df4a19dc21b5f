"""The table of benchmarks/lengths.py, and that its methods have what they need of the task."""

import doctest

import pytest

from benchmarks import lengths


def result(name, seed, accuracy, length, kinds=(1, 1, 2)):
  found = {
    'accuracy': accuracy,
    'length': length,
    'kinds': {kind: [n, 0.5] for kind, n in zip(lengths.KINDS, kinds, strict=True)},
  }
  start = {'accuracy': 0.2 + seed / 10, 'length': 9.0, 'kinds': found['kinds']}
  return {'method': name, 'seed': seed, 'before': start, 'after': found}


def test_lines_are_means_and_ranges_over_seeds():
  made = lengths.table(
    [
      result('gfpo', 0, 0.5, 4.0, (4, 0, 0)),
      result('gfpo', 1, 0.7, 6.0, (2, 2, 0)),
      result('grpo', 0, 0.9, 20.0, (0, 0, 4)),
    ]
  )
  assert made.splitlines()[2:] == [
    '| before | 0.25 (0.20 to 0.30) | 9.0 (9.0 to 9.0) | 50%, 25%, 25% |',
    '| `grpo` | 0.90 | 20.0 | 100%, 0%, 0% |',
    '| `gfpo` | 0.60 (0.50 to 0.70) | 5.0 (4.0 to 6.0) | 0%, 25%, 75% |',
  ]


def test_the_page_has_the_table_of_the_results():
  text = lengths.PAGE.read_text()
  assert lengths.with_table(text, lengths.read()) == text
  assert lengths.with_table(text, [result('grpo', 0, 0.5, 5.0)]) != text


def test_kinds_of_answers_are_told_apart():
  examples = {name: fn for name, fn in vars(lengths).items() if name == 'kind'}
  [found] = doctest.DocTestFinder().find(examples['kind'], 'kind', globs=examples)
  assert doctest.DocTestRunner().run(found).failed == 0 and found.examples


@pytest.mark.parametrize('name', lengths.METHODS)
def test_all_runs_make_the_same_steps_of_the_same_size(name):
  train = lengths.load(name, 1, 3, 5).phases.train
  assert (train.steps, train.optimizer.learning_rate) == (3, 2e-4)
  assert train.collect.prompts * train.collect.samples_per_prompt == 128
  assert train.collect.get('max_resamples', 0) == 0
