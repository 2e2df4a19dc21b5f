"""Verifiers: what counts as the answer, to the letter."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import reasoning_gym

from polgrad import registry
from polgrad.rewards import scoring, verifiers


@pytest.mark.parametrize(
  ('completion', 'strip', 'score'),
  [('46', True, 1), (' 46\n', True, 1), (' 46', False, 0), ('046', True, 0), ('', True, 0)],
)
def test_exact_match_compares_text(completion, strip, score):
  assert verifiers.exact_match(completion, {'answer': '46'}, strip=strip) == score


def test_exact_match_reads_the_named_field():
  assert verifiers.exact_match('a', {'answer': 'b', 'target': 'a'}, field='target') == 1


@pytest.mark.parametrize(
  ('completion', 'number'),
  [
    ('so it is 46.', 46),
    ('12 + 34 = 46', 46),
    ('1,234,567.5 dollars', 1234567.5),
    ('one of 1,2,3', 3),
    ('12,3456', 3456),
    ('x = -5', -5),
    ('x = \N{MINUS SIGN}5', -5),
    ('the difference 8-5', 5),
    ('(2)-3', 3),
    ('2.5e-3', 0.0025),
    ('.5', 0.5),
    ('3/4', 0.75),
    ('5/0', 0),
    (r'\boxed{7} is what I found in step 2', 7),
    (r'\boxed{1} no, \boxed{2}. 3', 2),
    (r'\boxed{\frac{3}{4}}', 0.75),
    (r'\boxed{-\dfrac{1}{2}} 9', -0.5),
    (r'\boxed{x = 8} 9', 8),
    (r'Answer: \boxed{6} or 5', 6),
    ('Answer: 12 apples, of 15', 12),
    ('**Answer:** 12\nchecked in 3 ways', 12),
    ('The answer is: 4. 5', 4),
    ('Answer:\n42 7', 42),
    ('Answer: 1\nAnswer: 2 3', 2),
    ('3 * 24 = 72\n#### 72', 72),
    ('Answer: none, 5', 5),
    ('Answer: unknown\n7', 7),
    (r'\boxed{} 3', 3),
    ('٣ 3', 3),
  ],
)
def test_numeric_answer_finds_the_final_number(completion, number):
  assert verifiers.numeric_answer(completion, {'answer': repr(number)}) == 1
  assert verifiers.numeric_answer(completion, {'answer': repr(number + 1)}) == 0


def test_numeric_answer_reads_the_records_answer_the_same_way():
  assert verifiers.numeric_answer('72', {'answer': '48/2 = 24, 48+24 = 72\n#### 72'}) == 1


def test_numeric_answer_without_a_number_is_wrong_but_a_record_without_one_is_an_error():
  assert verifiers.numeric_answer('I do not know', {'answer': '3'}) == 0
  with pytest.raises(ValueError, match="no number in the record's answer: 'three'"):
    verifiers.numeric_answer('3', {'answer': 'three'})


def test_numeric_tolerance_is_absolute_so_large_integers_must_be_exact():
  close = lambda given, wanted: verifiers.numeric_answer(given, {'answer': wanted}, tolerance=1e-2)
  assert (close('0.009', '0'), close('0.011', '0')) == (1, 0)
  assert verifiers.numeric_answer('123456789', {'answer': '123456788'}) == 0
  assert verifiers.numeric_answer('123456.3', {'answer': '123456.30'}) == 1


def test_a_number_too_long_for_a_float_is_wrong():
  assert verifiers.numeric_answer('9' * 400, {'answer': '1'}) == 0


def test_numeric_answer_is_linear_in_the_length_of_the_text():
  for text in (
    '1,' * 100_000,
    '-' * 200_000,
    '\\boxed{' * 30_000,
    '#' * 200_000,
    'answer' + ' ' * 200_000,
  ):
    assert verifiers.numeric_answer(text, {'answer': '123456789'}) == 0


@pytest.mark.parametrize(
  ('completion', 'letter'),
  [
    ('B', 'B'),
    (' (B)\n', 'B'),
    ('**B**', 'B'),
    ('_B_', 'B'),
    ('B. 46', 'B'),
    (r'\boxed{B}', 'B'),
    ('A or C? Answer: B', 'B'),
    ('Not A, but B, said Dan', 'B'),
    ('B, as in Bob', 'B'),
    ('B E', 'B'),
    ('Bob', None),
    ('B2', None),
    ('éB', None),
    ('b', None),
    ('', None),
  ],
)
def test_choice_letter_takes_the_last_letter_that_stands_alone(completion, letter):
  scores = {x: verifiers.choice_letter(completion, {'answer': x}) for x in 'ABCD'}
  assert scores == {x: x == letter for x in 'ABCD'}


def test_choice_letter_of_other_letters_and_of_a_record_without_one():
  assert verifiers.choice_letter('E ]', {'key': ' E\n'}, field='key', letters='EFG') == 1
  assert verifiers.choice_letter('x ] E', {'answer': ']'}, letters=']^-') == 1
  for answer in ('46', '', 'AB', 'E'):
    with pytest.raises(ValueError, match="the record's answer is none of the letters ABCD"):
      verifiers.choice_letter('A', {'answer': answer})


def test_format_is_of_the_whole_completion():
  score = lambda text: verifiers.regex_format(text, pattern='<think>.*</think>a')
  assert score('<think>\n\n</think>a') == 1
  assert score(' <think></think>a') == score('<think></think>ab') == 0


def test_matches_are_counted_up_to_a_bound():
  text = '<search>a</search> then <search>\nb</search>'
  assert verifiers.count_matches(text, pattern='<search>.*?</search>') == 2
  assert verifiers.count_matches(text, pattern='<search>', most=1) == 1
  assert verifiers.count_matches('', pattern='<search>') == 0


@pytest.mark.parametrize(
  ('completion', 'score'),
  [
    ('{"a": 1, "b": [2]}', 1),
    ('so:\n```json\n{"a": 1}\n```', 0.5),
    ('{"a": 1', 0),
    ('[1, 2]', 0),
    ('[' * 100_000, 0),
    ('', 0),
  ],
)
def test_a_json_object_is_judged_by_its_fields(completion, score):
  assert verifiers.json_fields(completion, fields=('a', 'b')) == score
  assert verifiers.json_fields(completion) == float(score > 0)


def test_lengths_are_compared_with_the_target_of_the_record_or_a_common_one():
  gap = lambda length: 3e-4 * verifiers.length_gap(length, {'n': 1000}, field='n')
  assert 1 + gap(3000) == pytest.approx(0.4) and gap(1000) == 0
  kept = [verifiers.length_budget(length, {}, target=1000) for length in (500, 1000, 2000, 3000)]
  assert kept == pytest.approx([0.65, 0.5, 0.2, 0])
  with pytest.raises(KeyError):
    verifiers.length_budget(5, {}, field='n')


def test_equal_answers_are_of_one_class_and_no_answer_is_of_another():
  of = lambda text: verifiers.answer_class(text, pattern=r'<a>(.*?)</a>')
  assert of('so <a>1</a> or <a> 2\n</a>') == of('<a>2</a>') != of('<a>1</a>')
  assert of('2') == of('<a> </a>') == -1
  assert 0 <= of('<a>2</a>') < 2**24
  assert verifiers.answer_class('\ud800') >= 0
  assert verifiers.answer_class(' 12\n') == verifiers.answer_class('12')


@pytest.mark.parametrize(
  ('completion', 'answer', 'score'),
  [
    (r'\boxed{2\sqrt{3}}', '3', 0),
    (r'\boxed{\sqrt{3}}', '3', 0),
    ('answer: 10^3', '10', 0),
    ('so x = 2^10', '10', 0),
    (r'\boxed{2\pi}', '2', 0),
    (r'\boxed{x_1 = 5}', '5', 1),
    (r'\boxed{1{,}234}', '1234', 1),
    (r'\boxed{1,234}', '1234', 1),
    (r'\boxed{\frac{3}{4}}', '0.75', 1),
    (r'\boxed{5\text{ cm}}', '5', 1),
    (str(2**53 + 1), str(2**53), 0),
    (str(2**53 + 1), str(2**53 + 1), 1),
    ('0.1', '1/10', 1),
    ('1e99999999', '1', 0),
    ('1' * 10_000, '1', 0),
    ('The answer is 7!', '7', 1),
  ],
)
def test_a_number_is_the_whole_answer_and_compared_exactly(completion, answer, score):
  assert verifiers.numeric_answer(completion, {'answer': answer}) == score


def test_numbers_are_found_in_linear_time():
  for text in ('^' + ' ' * 300_000 + 'x 5', 'x' + ' ' * 300_000 + '5', r'\sqrt' * 60_000 + ' 5'):
    started = time.perf_counter()
    verifiers.numeric_answer(text, {'answer': '5'})
    assert time.perf_counter() - started < 5  # it took minutes


def test_reasoning_gym_scores_the_last_extracted_answer():
  entry = reasoning_gym.create_dataset('basic_arithmetic', size=1, seed=3)[0]
  score = lambda text: verifiers.reasoning_gym_score(text, {'entry': entry})
  right = entry['answer']
  assert score(right) == score(f' {right}\n') == 1
  assert score(f'<answer>no</answer> <answer>\n{right}\n</answer>, done') == 1
  assert score(f'<answer>{right}</answer> <answer>no</answer>') < 1
  assert score(f'I think {right}') < 1
  braces = verifiers.reasoning_gym_score(f'{{{right}}} 0', {'entry': entry}, pattern=r'\{(.*?)\}')
  assert braces == 1


def test_soft_overlong_follows_the_published_equation():
  def published(length, longest, cache):  # arXiv 2503.14476, eq. 13
    if length <= longest - cache:
      return 0
    return ((longest - cache) - length) / cache if length <= longest else -1

  for length in range(0, 40):
    got = verifiers.soft_overlong(length, max_length=30, cache=10)
    np.testing.assert_allclose(got, published(length, 30, 10), rtol=1e-15)
  assert verifiers.soft_overlong(16384) == 0
  assert verifiers.soft_overlong(18432) == -0.5
  assert verifiers.soft_overlong(20480) == verifiers.soft_overlong(30000) == -1


def test_table_entries_bind_and_score():
  entry = reasoning_gym.create_dataset('basic_arithmetic', size=1, seed=3)[0]
  arrays = {'completion': '4', 'record': {'answer': '4', 'entry': entry}, 'length': 1}
  knobs = {
    verifiers.regex_format: {'pattern': '(.*)'},
    verifiers.count_matches: {'pattern': 'a'},
    verifiers.choice_letter: {'letters': '1234'},
  }
  for fn in verifiers.TABLE.values():
    if scoring.is_batched(fn):  # asks another model, see judge_test.py
      continue
    spec = registry.part(fn, **knobs.get(fn, {}))
    bound = registry.bind(json.loads(spec.to_json()), verifiers.TABLE)
    assert set(registry.inputs(bound)) <= set(arrays)
    assert isinstance(registry.call(bound, arrays), float)


def test_verifiers_and_scoring_do_not_load_jax():
  code = (
    'import polgrad.rewards.scoring, polgrad.rewards.verifiers, sys; sys.exit("jax" in sys.modules)'
  )
  subprocess.run([sys.executable, '-c', code], check=True, env={'PYTHONPATH': ':'.join(sys.path)})
