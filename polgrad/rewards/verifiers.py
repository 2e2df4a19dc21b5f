"""Verifiers: functions that judge one completion by a rule and return a float.

The names of the positional arguments say what a verifier reads: `completion` (text without the stop
token), `record` (the record of the prompt), `length` (number of completion tokens, including the stop
token), `prompt` (text that the model was given, with its chat template) and `tokens` (ids of the
completion, including the stop token). A verifier that cannot judge, because the record lacks a field for
example, raises an error instead of returning 0.

This module does not import JAX, because verifiers also run in worker processes, which should start
quickly.
"""

import fractions
import functools
import inspect
import json
import re
import zlib
from collections.abc import Callable
from typing import Annotated

from polgrad.registry import Count, NotNegative, table
from polgrad.rewards import expressions, judge

# A minus is a sign only if it does not subtract, that is, not after a digit or a closing bracket.
NUMBER = re.compile(
  r'((?<![\d)\]])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)'
  r'(?:[eE][+-]?\d+)?(?:/0*[1-9]\d*)?'
)
LONGEST = 1000  # characters of a number
FRACTION = re.compile(r'\\[dt]?frac\{(-?\d+)\}\{(\d+)\}')
# A number next to these is part of an expression: 2\\sqrt{3}, 10^3, x_1.
EXPRESSION_BEFORE = re.compile(r'(?:[\^_]\{?|\}\{|\\(?:sqrt|frac|pi|log|ln|sin|cos|tan)[\[{]?)$')
EXPRESSION_AFTER = re.compile(r'[\^_]|\\(?:sqrt|frac|pi|cdot|times|div)\b')
BRACES = re.compile(r'\\boxed\s*\{|\\.|[{}]', re.DOTALL)
# How LaTeX of one value is written: what is left out, and what is written in one way.
LATEX = (
  (
    re.compile(
      r'\\(?:left|right|displaystyle)(?![A-Za-z])|\\[!,;: ]|\^\{?\\circ\}?|\\?[$%]|~|\{,\}'
    ),
    '',
  ),
  (re.compile(r'(?<=\S)\\(?:text|mbox|mathrm)\{ [^{}]*\}$'), ''),  # a unit
  (re.compile(r'\\(?:text|textbf|mbox|mathrm|mathbf)\{([^{}]*)\}'), r'\1'),
  (re.compile(r'\\[dt]frac(?![A-Za-z])'), r'\\frac'),
  (re.compile(r'\\frac(\d)(\d)'), r'\\frac{\1}{\2}'),
  (re.compile(r'\\sqrt(\d)'), r'\\sqrt{\1}'),
  (re.compile(r'\s+|\.\s*$'), ''),
  (re.compile(r'^[A-Za-z]{1,2}=(?=[^=]*$)'), ''),  # x = 5
)
ANSWER = '<answer>(.*?)</answer>'
# Tasks of reasoning-gym whose scorers evaluate the answer -> which answers they may get.
EVALUATED = {
  **dict.fromkeys(('countdown', 'puzzle24'), expressions.is_arithmetic),
  **dict.fromkeys(
    ('simple_integration', 'intermediate_integration', 'polynomial_multiplication'),
    expressions.is_formula,
  ),
  **dict.fromkeys(
    ('string_insertion', 'spiral_matrix', 'binary_matrix', 'n_queens'), expressions.is_literal
  ),
}
# Its scorer evaluates the answer in the entry, and reads the model's answer as JSON.
TRUSTED = ('number_sorting',)
EVALUATORS = re.compile(r'\b(eval|exec|compile|parse_expr|sympify|literal_eval)\s*\(')
MARKED = re.compile(r'(?:answer(?:\s*is)?\s*:|####)\s*(.*)', re.IGNORECASE)


def exact_match(
  completion: str, record: dict, *, field: str = 'answer', strip: bool = True
) -> float:
  """1 if the completion equals the answer in `record[field]`, else 0.

  With `strip`, white space around both is ignored.
  """
  given, wanted = completion, record[field]
  if strip:
    given, wanted = given.strip(), wanted.strip()
  return float(given == wanted)


def numeric_answer(
  completion: str, record: dict, *, field: str = 'answer', tolerance: NotNegative = 1e-6
) -> float:
  """1 if |x - y| <= tolerance, else 0; x and y are the final numbers of completion and `record[field]`.

  The final number of a text is the last one in its last `\\boxed{}`, else the first one after its last
  `Answer:` or `####`, else its last one. `1,234.5`, `-3`, `2e-3`, `3/4` and `\\frac{3}{4}` are numbers,
  which are compared exactly. `2\\sqrt{3}` and `10^3` are none: a number that is part of an expression
  is not taken for the whole. A completion without a number gets 0.

  Raises:
    ValueError: the answer in the record has no number.
  """
  wanted = _final_number(record[field])
  if wanted is None:
    raise ValueError(f"no number in the record's {field}: {record[field]!r}")
  given = _final_number(completion)
  return float(given is not None and abs(given - wanted) <= tolerance)


def boxed_answer(completion: str, record: dict, *, field: str = 'answer') -> float:
  """1 if the last `\\boxed{}` of the completion holds the value of that in `record[field]`, else 0.

  Two numbers are compared exactly: `0.5`, `\\frac{1}{2}` and `1/2` are equal, as are `1{,}234` and
  `1234`. All else is compared as text, without spaces, `$`, `%`, degrees, `\\left` and `\\right`, a unit
  in `\\text{ }` at the end, a final point, and `x =` before the value; `\\dfrac` is `\\frac`. `x+1`
  and `1+x` differ. A completion without a box gets 0. A record without a box holds the value alone.

  Raises:
    ValueError: the record has no value.
  """
  box = _last_boxed(record[field])
  wanted = _latex(record[field] if box is None else box)
  if not wanted:
    raise ValueError(f"no answer in the record's {field}: {record[field]!r}")
  box = _last_boxed(completion)
  if box is None or len(box) > LONGEST:
    return 0.0
  given = _latex(box)
  numbers = [_whole_value(text) for text in (given, wanted)]
  return float(numbers[0] == numbers[1] if None not in numbers else given == wanted)


def choice_letter(
  completion: str, record: dict, *, field: str = 'answer', letters: str = 'ABCD'
) -> float:
  """1 if the chosen letter is the one in `record[field]`, else 0; for multiple-choice questions.

  The chosen letter is the last one of `letters` without letters or digits beside it, in the given
  case: `B`, `(B)`, `**B**`, `B.` and `\\boxed{B}` choose B; `Bob`, `B2` and `b` choose nothing. A
  completion that chooses nothing gets 0.

  Raises:
    ValueError: `record[field]` is not one of `letters`.
  """
  wanted = record[field].strip()
  if len(wanted) != 1 or wanted not in letters:
    raise ValueError(f"the record's {field} is none of the letters {letters}: {record[field]!r}")
  chosen = re.findall(rf'(?<![^\W_])[{re.escape(letters)}](?![^\W_])', completion)
  return float(chosen[-1:] == [wanted])


def regex_format(completion: str, *, pattern: str) -> float:
  """1 if the whole completion matches the regular expression (`.` matches newlines), else 0."""
  return float(re.fullmatch(pattern, completion, re.DOTALL) is not None)


def count_matches(completion: str, *, pattern: str, most: int = 0) -> float:
  """How many matches of a regular expression the completion has, and at most `most` (0: no bound).

  With weight 0 it says of what kind a row is, for functions that compare rows of one kind: how often the
  answer calls a tool, or whether it thinks.
  """
  found = sum(1 for _ in re.finditer(pattern, completion, re.DOTALL))
  return float(min(found, most) if most else found)


def answer_class(completion: str, *, pattern: str = '(.*)') -> float:
  """A number that is equal for equal answers: a digest below 2^24 of the answer's text, or -1.

  The answer is the first group of the last match of `pattern` (`.` matches newlines) that is not empty,
  without white space around it; without one the number is -1. With weight 0 it tells which rows of a
  group agree. Two answers have the same number by chance once in 16 million pairs.
  """
  found = [text.strip() for text in re.findall(pattern, completion, re.DOTALL)]
  found = [text for text in found if text]
  return float(zlib.crc32(found[-1].encode(errors='surrogatepass')) % 2**24) if found else -1.0


def json_fields(completion: str, *, fields: tuple = ()) -> float:
  """The share of the fields that the JSON object of a completion has; 0 if it is no JSON object.

  The object is the whole completion, or the last block between ```json and ```. Without `fields` any
  object gets 1.
  """
  found = re.findall(r'```(?:json)?\s*(.*?)```', completion, re.DOTALL)
  try:
    value = json.loads(found[-1] if found else completion)
  except (ValueError, RecursionError):
    return 0.0
  if not isinstance(value, dict):
    return 0.0
  return sum(name in value for name in fields) / len(fields) if fields else 1.0


def reasoning_gym_score(completion: str, record: dict, *, pattern: str = ANSWER) -> float:
  """The score of the package reasoning-gym, in [0, 1] (arXiv:2505.24760).

  Some tasks give partial credit. The answer is the first group of the last match of `pattern`, else
  the whole completion; white space around it is removed. The record must come from
  `sources.reasoning_gym`.

  The scorers of nine tasks evaluate the answer as Python. There, an answer that is not arithmetic (or
  a list, or a formula; see `EVALUATED`) is scored like an empty one, so no text of a model is run.

  Raises:
    ValueError: the scorer of the task evaluates answers, and `EVALUATED` does not say of which form.
  """
  entry = record['entry']
  task = entry['metadata']['source_dataset']
  answer = _extracted(completion, pattern).strip()
  if task in EVALUATED:
    stated = (entry['answer'], *entry['metadata'].get('valid_answers', ()))
    if answer not in stated and not EVALUATED[task](answer):
      answer = ''
  return float(_task_scorer(task)(answer, entry))


def soft_overlong(length: int, *, max_length: int = 20480, cache: int = 4096) -> float:
  """Soft overlong punishment of DAPO (arXiv:2503.14476, eq. 13), in [-1, 0].

  The result is 0 up to `max_length - cache` tokens, falls linearly to -1 at `max_length` tokens, and is
  -1 beyond. The defaults are those of the paper.
  """
  if length > max_length:
    return -1.0
  return min(0.0, (max_length - cache - length) / cache)


def length_gap(length: int, record: dict, *, field: str = '', target: Count = 100) -> float:
  """-|n - length|, tokens: how far an answer is from its target length n (L1, arXiv:2503.04697).

  n is the number in `record[field]`, or `target` if there is no field.
  """
  return -abs(float(record[field] if field else target) - length)


def length_budget(
  length: int,
  record: dict,
  *,
  field: str = '',
  target: Count = 100,
  slope: NotNegative = 3e-4,
) -> float:
  """slope (n - length) + 1/2, in [0, 1]: how well an answer keeps to at most n tokens (L1,
  arXiv:2503.04697).

  n is the number in `record[field]`, or `target` if there is no field.
  """
  wanted = float(record[field] if field else target)
  return min(max(slope * (wanted - length) + 0.5, 0.0), 1.0)


def _final_number(text: str) -> fractions.Fraction | None:
  """The final number of a text (see `numeric_answer`), or None."""
  text = FRACTION.sub(r'\1/\2', text.replace('\N{MINUS SIGN}', '-').replace('{,}', ','))
  # Search the last box, then the text after the last mark, then the whole text.
  box, marked = _last_boxed(text), MARKED.findall(text)
  boxed = [] if box is None else [(box, -1)]
  for region, pick in [*boxed, *((m, 0) for m in marked[-1:]), (text, -1)]:
    numbers = list(NUMBER.finditer(region))
    if numbers:
      return _value(region, numbers[pick])
  return None


def _last_boxed(text: str) -> str | None:
  """What the last closed `\\boxed{}` holds, or None; braces in it are balanced."""
  opened, found = [], None  # places after the open braces, -1 for those of no box
  for brace in BRACES.finditer(text):
    if brace.group().startswith('\\boxed'):
      opened.append(brace.end())
    elif brace.group() == '{':
      opened.append(-1)
    elif brace.group() == '}' and opened:
      start = opened.pop()
      found = (start, brace.start()) if start >= 0 else found
  return text[slice(*found)] if found else None


def _latex(text: str) -> str:
  """A value in LaTeX, written in one way, see `LATEX`."""
  text = text.strip()
  for pattern, written in LATEX:
    text = pattern.sub(written, text)
  return text


def _whole_value(text: str) -> fractions.Fraction | None:
  """The number that a text consists of, or None."""
  text = FRACTION.sub(r'\1/\2', text.replace('\N{MINUS SIGN}', '-'))
  found = NUMBER.fullmatch(text)
  return _value(text, found) if found else None


def _value(text: str, found: re.Match) -> fractions.Fraction | None:
  """The number at a place of a text, exactly; None if it is part of a larger expression."""
  before = text[max(found.start() - 16, 0) : found.start()].rstrip()
  after = text[found.end() : found.end() + 16].lstrip()
  if EXPRESSION_BEFORE.search(before) or EXPRESSION_AFTER.match(after):
    return None
  numerator, _, denominator = found.group().replace(',', '').partition('/')
  if len(found.group()) > LONGEST or len(numerator.lower().partition('e')[2].lstrip('+-')) > 3:
    return None  # 1e9999999 would fill the memory
  return fractions.Fraction(numerator) / fractions.Fraction(denominator or 1)


def _extracted(text, pattern):
  """The first group of the last match of a pattern, or the whole text."""
  if pattern == ANSWER:  # searched by hand: the regular expression takes time quadratic in the text
    end = text.rfind('</answer>')
    start = text.rfind('<answer>', 0, max(end, 0))
    return text[start + len('<answer>') : end] if start >= 0 else text
  found = re.findall(pattern, text, re.DOTALL)
  return found[-1] if found else text


reasoning_gym_score.imports = ('reasoning_gym',)  # by workers, before the time of a row counts


@functools.cache
def _task_scorer(task):
  from reasoning_gym import get_score_answer_fn  # an optional dependency
  from reasoning_gym.factory import DATASETS

  source = inspect.getsource(DATASETS[task][0].score_answer)
  if task not in (*EVALUATED, *TRUSTED) and EVALUATORS.search(source):
    raise ValueError(
      f'{task}: its scorer evaluates answers as Python, and polgrad does not know which answers are '
      f'harmless; known: {sorted(EVALUATED)}'
    )
  return get_score_answer_fn(task)


TABLE = (
  table(
    'verifiers',
    exact_match,
    numeric_answer,
    boxed_answer,
    choice_letter,
    regex_format,
    count_matches,
    answer_class,
    json_fields,
    reasoning_gym_score,
    soft_overlong,
    length_gap,
    length_budget,
  )
  | judge.SCORES
)
Part = Annotated[Callable, TABLE]
