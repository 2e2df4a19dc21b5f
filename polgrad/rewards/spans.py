r"""Scores of parts of a completion, for credit of steps, sentences and words.

A function of `TABLE` fills the setting `spans` of a phase. Its positional arguments are named after what
it reads: `completion` (text), `record`, `length`, `prompt` and `tokens`, as those of a verifier, and
`reward`, the sum of the phase's verifiers for the row. It returns a list of (start, end, score): the
characters `completion[start:end]` have this score. Parts must not overlap; characters between them have
no score. What a score means is said by the estimator that reads it: `credit.process_min` wants numbers
in [-1, 1].

A function with the attribute `batched = True` judges all rows in one call, as a reward model does: its
arguments are lists over the rows, called `completions`, `records`, `lengths`, `rewards`, `prompt` and
`tokens`, and it returns a list of such lists. `scoring.make_marker` says what is done with errors, and
`collect/parts.py` how characters become tokens. This module does not import JAX.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Annotated

from polgrad.registry import table

Span = tuple[int, int, float]


def whole(completion: str, reward: float) -> list[Span]:
  """The whole completion is one part, and its score is the reward of the row.

  >>> whole('x = 3', 1.0)
  [(0, 5, 1.0)]
  """
  return [(0, len(completion), reward)] if completion else []


def matches(
  completion: str, *, pattern: str, score: float = 1.0, other: float | None = None
) -> list[Span]:
  r"""The matches of a regular expression have one score; what is between them another one, or none.

  Args:
    completion: the text.
    pattern: of Python's `re`; empty matches are left out.
    score: of a match.
    other: of the text between two matches; None: it has no score.

  >>> matches('a=1, b=2', pattern=r'\d')
  [(2, 3, 1.0), (7, 8, 1.0)]
  """
  found = [(*one.span(), score) for one in re.finditer(pattern, completion) if one.group()]
  if other is None:
    return found
  edges = [0, *(edge for start, end, _ in found for edge in (start, end)), len(completion)]
  between = [(a, b, other) for a, b in zip(edges[::2], edges[1::2]) if a < b]
  return sorted(found + between)


def agreeing_characters(completion: str, record: dict, *, field: str = 'answer') -> list[Span]:
  """Each character is a part: 1 if the answer in `record[field]` has it at the same place, else -1.

  >>> agreeing_characters('132', {'answer': '142'})
  [(0, 1, 1.0), (1, 2, -1.0), (2, 3, 1.0)]
  """
  answer = str(record[field])
  right = lambda i: completion[i : i + 1] == answer[i : i + 1]
  return [(i, i + 1, 1.0 if right(i) else -1.0) for i in range(len(completion))]


def steps(text: str, pattern: str = r'\n\s*') -> list[tuple[int, int]]:
  r"""The steps of a text: each ends with a match of a regular expression, the last one with the text.

  >>> steps('a b\n\nc\n')
  [(0, 5), (5, 7)]
  """
  ends = [one.end() for one in re.finditer(pattern, text) if one.group()]
  edges = sorted({0, *ends, len(text)})
  return list(itertools.pairwise(edges))


def places(text: str, quote: str, score: float) -> list[Span]:
  """Where a quote is in a text; white space around the quote is ignored.

  >>> places('no, no', 'no', -1.0)
  [(0, 2, -1.0), (4, 6, -1.0)]
  """
  quote = quote.strip()
  found = re.finditer(re.escape(quote), text) if quote else ()
  return [(*one.span(), score) for one in found]


def least(found: Sequence[Span]) -> list[Span]:
  """Parts that may overlap as parts that do not: a character has the least of its scores.

  >>> least([(0, 6, 1.0), (4, 8, -1.0)])
  [(0, 4, 1.0), (4, 8, -1.0)]
  """
  edges = sorted({edge for start, end, _ in found for edge in (start, end)})
  made = []
  for start, end in itertools.pairwise(edges):
    scores = [score for a, b, score in found if a <= start and end <= b]
    if not scores:
      continue
    if made and made[-1][1:] == (start, min(scores)):
      start = made.pop()[0]
    made.append((start, end, min(scores)))
  return made


TABLE = table('spans', whole, matches, agreeing_characters)
Part = Annotated[Callable, TABLE]
