"""Answers that reach an evaluator: only literals and arithmetic do, and no answer runs code."""

import pytest
import reasoning_gym

from polgrad.rewards import expressions, verifiers


@pytest.mark.parametrize(
  'text', ['12 + 3*(4 - 5)/2', '-7', '2**10', '(2**10)**10', '1.5e3', ' (1)\n', '2**(3/2)']
)
def test_arithmetic(text):
  assert expressions.is_arithmetic(text)


@pytest.mark.parametrize(
  'text', ['x**3/3 + C', 'sin(2*x)', '-exp(x)*cos(x)/2', 'pi*x', 'log(Abs(x))']
)
def test_formulas_have_symbols_and_functions(text):
  assert expressions.is_formula(text) and not expressions.is_arithmetic(text)


@pytest.mark.parametrize('text', ["['a', 'b']", '[[0, 1], [1, 0]]', '(1, -2)', "'abc'", '3'])
def test_literals(text):
  assert expressions.is_literal(text)


HOSTILE = [
  "__import__('os').system('touch {file}')",
  "[__import__('os').system('touch {file}')]",
  "S(\"__import__('os').system('touch {file}')\")",
  "open('{file}', 'w')",
  "(lambda: open('{file}', 'w'))()",
  "[open(f, 'w') for f in ['{file}']]",
  'x.__class__.__mro__[-1].__subclasses__()',
  'f\'{{open("{file}", "w")}}\'',
  '9**9**9**9',
  '2**(10**9)',
  '2**sqrt(10**18)',
  '2**(1/1e-9)',
  '((9**100)**100)**100',
  '9' * 4000 + '**1000',
  '[0] * 10**10',
  'factorial(10**9)',
  '(' * 4000,
  '1 if 1 else 2',
  'True',
  '2j',
  'exp(x, evaluate=open)',
  '',
]


@pytest.mark.parametrize('text', HOSTILE, ids=range(len(HOSTILE)))
def test_nothing_else_passes(text):
  text = text.format(file='f') if '{file}' in text else text
  assert not expressions.is_arithmetic(text) and not expressions.is_formula(text)
  assert not expressions.is_literal(text) or text == 'True' or text == '2j'


@pytest.mark.parametrize('task', verifiers.EVALUATED)
def test_no_answer_runs_code_or_takes_long(task, tmp_path):
  entry = reasoning_gym.create_dataset(task, size=1, seed=1)[0]
  file = tmp_path / 'touched'
  score = lambda text: verifiers.reasoning_gym_score(f'<answer>{text}</answer>', {'entry': entry})
  assert score(entry['answer']) == 1
  for text in HOSTILE:
    assert score(text.format(file=file) if '{file}' in text else text) < 0.1
    assert not file.exists()


def test_partial_credit_for_lists_is_kept():
  entry = reasoning_gym.create_dataset('spiral_matrix', size=1, seed=1)[0]
  numbers = entry['answer'].split()
  assert verifiers.reasoning_gym_score(f'[{", ".join(numbers)}]', {'entry': entry}) == 0.1


def test_a_scorer_that_evaluates_answers_of_unknown_form_is_refused(monkeypatch):
  monkeypatch.setattr(verifiers, 'EVALUATED', {})
  verifiers._task_scorer.cache_clear()
  entry = reasoning_gym.create_dataset('countdown', size=1, seed=1)[0]
  with pytest.raises(ValueError, match='countdown: its scorer evaluates answers as Python'):
    verifiers.reasoning_gym_score('1', {'entry': entry})


def test_the_last_answer_is_found_in_linear_time():
  entry = reasoning_gym.create_dataset('basic_arithmetic', size=1, seed=3)[0]
  for text in ('<answer>' * 300_000, '</answer>' * 300_000):  # the regular expression takes minutes
    assert verifiers.reasoning_gym_score(text, {'entry': entry}) < 1
