"""Tools for `tools.Tools`: a calculator, a search in texts, and Python in a sandbox.

A tool of your own is a function with typed arguments by position and a docstring, `part(mine)`. What it
returns is text, or becomes JSON. It raises ValueError, ArithmeticError or LookupError for what the
policy did wrong: the policy reads the message. Any other exception is a failure of the tool, and its row
is invalid.
"""

import ast
import dataclasses
import functools
import json
import math
import operator
import re
import sys
import types
from collections.abc import Callable
from fractions import Fraction
from typing import Annotated, Literal

from polgrad import paths
from polgrad.environments import sandbox
from polgrad.registry import AtLeastOne, Positive, table
from polgrad.rewards import expressions

MISTAKES = (ValueError, ArithmeticError, LookupError)  # of the policy; it reads their messages

# How people write what Python writes otherwise.
SIGNS = str.maketrans({'×': '*', '·': '*', '÷': '/', '−': '-', '–': '-', '^': '**', '$': ''})  # noqa: RUF001
_OPERATORS = {
  ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
  ast.UAdd: operator.pos, ast.USub: operator.neg,
}  # fmt: skip


def calculate(expression: str) -> str:
  """Computes an arithmetic expression of numbers with + - * / ** and parentheses.

  Args:
    expression: for example (12 + 7) * 3.

  The result is exact if it is an integer, and has 10 digits otherwise. Nothing is evaluated as Python.

  >>> calculate('(12 + 7) * 3'), calculate('1/3'), calculate('0.1+0.2'), calculate('2^10')
  ('57', '0.3333333333', '0.3', '1024')
  """
  text = re.sub(r'(?<=\d),(?=\d{3}\b)', '', expression.translate(SIGNS)).strip().rstrip('=')
  if not expressions.is_arithmetic(text):
    raise ValueError('no arithmetic: numbers with + - * / ** and parentheses are')
  try:
    return _written(_value(expressions.parsed(text).body))
  except ZeroDivisionError as error:
    raise ValueError('division by zero') from error


def _value(node: ast.AST) -> Fraction | float:
  """The value of a tree that `is_arithmetic` allows; exact where no root is taken."""
  match node:
    case ast.Constant(value=value):
      return Fraction(repr(value))
    case ast.UnaryOp(op=op, operand=operand):
      return _OPERATORS[type(op)](_value(operand))
    case ast.BinOp(op=ast.Pow(), left=left, right=right):
      return _power(_value(left), _value(right))
  return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))


def _power(base: Fraction | float, exponent: Fraction | float) -> Fraction | float:
  exact = (
    isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1
  )
  value = base ** int(exponent) if exact else float(base) ** float(exponent)
  if isinstance(value, complex):
    raise ValueError('the root of a negative number')
  return value


def _written(value: Fraction | float) -> str:
  if isinstance(value, Fraction) and value.denominator == 1 and abs(value) < 10**30:
    return str(value.numerator)
  number = float(value)
  if not math.isfinite(number):
    raise ValueError('the result is no finite number')
  return f'{number:.10g}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
  """Searches a corpus of texts by their words (BM25, by the library bm25s).

  The corpus is read and indexed once in each process. Needs `pip install "polgrad[search]"`.

  Raises:
    FileNotFoundError: there is no such file; from `prepare`.
    ValueError: the file has no texts, or a line is no JSON with the field; from `prepare`.
  """

  corpus: str  # a file of JSON lines, or of text, in which a blank line ends a paragraph
  field: str = 'text'  # of a JSON line
  results: AtLeastOne = 3  # texts that a search finds
  characters: AtLeastOne = 500  # of each text; a longer one is cut
  stopwords: str = 'en'  # language whose frequent words are ignored; '' ignores none

  def prepare(self) -> None:
    _index(self.corpus, self.field, self.stopwords)

  def __call__(self, query: str) -> str:
    """Searches texts for words, and returns the best ones.

    Args:
      query: words that the texts should have.
    """
    texts, model, tokenize = _index(self.corpus, self.field, self.stopwords)
    asked = tokenize([query])
    number = min(self.results, len(texts))
    found, scores = model.retrieve(asked, k=number, show_progress=False, backend_selection='numpy')
    best = [texts[i] for i, score in zip(found[0], scores[0]) if score > 0]
    if not best:
      return 'nothing found'
    return '\n'.join(f'[{n}] {_shortened(t, self.characters)}' for n, t in enumerate(best, 1))


def _shortened(text: str, characters: int) -> str:
  return text if len(text) <= characters else f'{text[:characters]} [...]'


@functools.lru_cache(maxsize=4)
def _index(corpus: str, field: str, stopwords: str) -> tuple[list[str], object, Callable]:
  """The texts of a corpus, their index, and the function that makes words of texts."""
  texts = read_corpus(corpus, field)
  bm25s = _bm25s()
  tokenize = functools.partial(bm25s.tokenize, stopwords=stopwords or None, show_progress=False)
  model = bm25s.BM25()
  model.index(tokenize(texts), show_progress=False)
  return texts, model, tokenize


def _bm25s() -> types.ModuleType:
  """The library, without JAX: it would start JAX at once, and so take the devices of the trainer."""
  hidden = 'jax' not in sys.modules
  if hidden:
    sys.modules['jax'] = None  # as if JAX were not installed
  try:
    import bm25s
  except ImportError as error:
    raise ImportError('toolbox.Search needs bm25s: pip install "polgrad[search]"') from error
  finally:
    if hidden:
      del sys.modules['jax']
  return bm25s


def read_corpus(corpus: str, field: str) -> list[str]:
  """The texts of a file: a field of each JSON line, or the paragraphs of a text.

  Raises:
    ValueError: names the line that is no JSON with the field, or the file without texts.
  """
  try:
    content = paths.path(corpus).read_text(encoding='utf-8')
  except UnicodeDecodeError as error:
    raise ValueError(f'{corpus} is no text in UTF-8: {error}') from error
  if not corpus.endswith(('.jsonl', '.json')):
    texts = [' '.join(part.split()) for part in re.split(r'\n\s*\n', content)]
  else:
    texts = [_text(corpus, n, line, field) for n, line in enumerate(content.splitlines(), 1)]
  texts = [text for text in texts if text]
  if not texts:
    raise ValueError(f'{corpus}: no texts')
  return texts


def _text(corpus: str, number: int, line: str, field: str) -> str:
  if not line.strip():
    return ''
  try:
    text = json.loads(line)[field]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f'{corpus}: line {number} is no JSON object with {field!r}') from error
  if not isinstance(text, str):
    raise ValueError(f'{corpus}: line {number}: {field!r} must be text')
  return text.strip()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Python:
  """Runs a program in a process without network, see `sandbox` for what that keeps out.

  Each call is a new process: nothing is remembered from one call to the next.
  """

  timeout_s: Positive = 5.0  # seconds that a program may take
  memory_gib: Positive = 1.0  # address space of its process
  characters: AtLeastOne = 2000  # of its output; the middle of a longer one is cut out
  isolation: Literal['namespaces', 'limits'] = 'namespaces'

  def prepare(self) -> None:
    sandbox.check(self.isolation)

  def __call__(self, code: str) -> str:
    """Runs a Python program and returns what it prints, and the value of its last line.

    Args:
      code: the program.
    """
    ran = sandbox.run(
      code, timeout_s=self.timeout_s, memory_gib=self.memory_gib, isolation=self.isolation
    )
    output = _middle_cut(ran.output.strip(), self.characters)
    if ran.error:
      raise ValueError(f'{ran.error}\n{output}'.strip())
    return output or 'no output'


def _middle_cut(text: str, characters: int) -> str:
  if len(text) <= characters:
    return text
  half = characters // 2
  return f'{text[:half]} [...] {text[len(text) - half :]}'


IN_PROCESS = (calculate,)  # tools that are quick, start nothing and evaluate nothing

TABLE = table('toolbox', calculate, Search, Python)
Part = Annotated[Callable, TABLE]
