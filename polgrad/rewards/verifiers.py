"""Elementary verifiers: what a completion is worth, by rule.

The positional names say what a verifier reads: `completion` (text, without the stop token),
`record` (the data row) and `length` (completion tokens, the stop token included). Each returns a
float. A verifier raises when it cannot judge, for want of a field, say; it never guesses 0.

JAX is not imported here: verifiers also run in worker processes, which should start quickly.
"""

import functools
import re
from collections.abc import Callable
from typing import Annotated

from polgrad.registry import table

# A sign counts where it does not subtract: after a digit or a closing bracket it is an operator.
NUMBER = re.compile(
  r'((?<![\d)\]])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)'
  r'(?:[eE][+-]?\d+)?(?:/0*[1-9]\d*)?'
)
FRACTION = re.compile(r'\\[dt]?frac\{(-?\d+)\}\{(\d+)\}')
BOXED = re.compile(r'\\boxed\{([^{}]*)\}')
MARKED = re.compile(r'(?:answer(?:\s*is)?\s*:|####)\s*(.*)', re.IGNORECASE)


def exact_match(
  completion: str, record: dict, *, field: str = 'answer', strip: bool = True
) -> float:
  """1 if the completion is the record's answer, else 0; `strip` ignores space around both."""
  given, wanted = completion, record[field]
  if strip:
    given, wanted = given.strip(), wanted.strip()
  return float(given == wanted)


def numeric_answer(
  completion: str, record: dict, *, field: str = 'answer', tolerance: float = 1e-6
) -> float:
  """1 if the completion's final number x is the record's y: |x - y| <= tolerance.

  The final number is the last one in the last `\\boxed{}`, else the first after the last `Answer:`
  or `####`, else the last in the text; `1,234.5`, `-3`, `2e-3`, `3/4` and `\\frac{3}{4}` are
  numbers. A completion without one is wrong.

  Raises:
    ValueError: the record's own answer holds no number.
  """
  wanted = _final_number(record[field])
  if wanted is None:
    raise ValueError(f"no number in the record's {field}: {record[field]!r}")
  given = _final_number(completion)
  return float(given is not None and abs(given - wanted) <= tolerance)


def regex_format(completion: str, *, pattern: str) -> float:
  """1 if the whole completion matches the regular expression (`.` matches newlines), else 0."""
  return float(re.fullmatch(pattern, completion, re.DOTALL) is not None)


def reasoning_gym_score(
  completion: str, record: dict, *, pattern: str = '<answer>(.*?)</answer>'
) -> float:
  """The score that reasoning-gym gives, in [0, 1]; some tasks give part marks (arXiv 2505.24760).

  The answer is the last match of `pattern` (its first group), else the whole text, stripped.
  """
  found = re.findall(pattern, completion, re.DOTALL)
  answer = found[-1] if found else completion
  entry = record['entry']
  return float(_task_scorer(entry['metadata']['source_dataset'])(answer.strip(), entry))


def soft_overlong(length: int, *, max_length: int = 20480, cache: int = 4096) -> float:
  """Soft overlong punishment of DAPO (arXiv 2503.14476, eq. 13), in [-1, 0].

  0 up to `max_length - cache` tokens, then linearly down to -1 at `max_length`, and -1 beyond. The
  published numbers are the defaults.
  """
  if length > max_length:
    return -1.0
  return min(0.0, (max_length - cache - length) / cache)


def _final_number(text):
  text = FRACTION.sub(r'\1/\2', text.replace('\N{MINUS SIGN}', '-'))
  boxed, marked = BOXED.findall(text), MARKED.findall(text)
  for region, pick in [*((b, -1) for b in boxed[-1:]), *((m, 0) for m in marked[-1:]), (text, -1)]:
    numbers = [m.group().replace(',', '') for m in NUMBER.finditer(region)]
    if numbers:
      numerator, _, denominator = numbers[pick].partition('/')
      return float(numerator) / float(denominator or 1)
  return None


@functools.cache
def _task_scorer(task):
  from reasoning_gym import get_score_answer_fn  # an optional dependency

  return get_score_answer_fn(task)


TABLE = table(
  'verifiers', exact_match, numeric_answer, regex_format, reasoning_gym_score, soft_overlong
)
Part = Annotated[Callable, TABLE]
