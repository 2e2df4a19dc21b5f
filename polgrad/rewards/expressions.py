"""Which answers may reach a scorer that evaluates them as Python: literals and arithmetic.

Some scorers call `eval` or sympy's `parse_expr` on the answer, so an answer could run any code. These
checks look at the syntax tree alone and run nothing. They also bound the size of powers, because
`9**9**9**9` would never be finished.
"""

import ast
import warnings
from collections.abc import Collection

LONGEST = 5_000  # characters of an answer that is parsed at all
LARGEST_NUMBER = 1e30
LARGEST_POWER = 1_000  # product of nested exponents
FUNCTIONS = frozenset({
  *('sin', 'cos', 'tan', 'sec', 'csc', 'cot', 'asin', 'acos', 'atan', 'sinh', 'cosh', 'tanh'),
  *('exp', 'log', 'ln', 'sqrt', 'Abs'),
})  # fmt: skip


def is_literal(text: str) -> bool:
  """Whether the text is a Python literal of lists, tuples, strings and numbers."""
  tree = parsed(text)
  if tree is None:
    return False
  allowed = (ast.Expression, ast.List, ast.Tuple, ast.Constant, ast.Load, ast.UnaryOp, ast.USub)
  return all(isinstance(node, allowed) for node in ast.walk(tree))


def is_arithmetic(text: str, *, functions: Collection[str] = (), symbols: bool = False) -> bool:
  """Whether the text is an expression of numbers with + - * / ** and parentheses, of bounded size.

  Args:
    functions: names that may be called, with positional arguments.
    symbols: whether single letters and `pi` may occur as well.
  """
  tree = parsed(text)
  if tree is None:
    return False
  try:
    return _power(tree.body, functions, symbols) <= LARGEST_POWER
  except ValueError:
    return False


def is_formula(text: str) -> bool:
  """Whether the text is arithmetic with symbols of one letter and the usual functions."""
  return is_arithmetic(text, functions=FUNCTIONS, symbols=True)


def parsed(text: str) -> ast.Expression | None:
  """The syntax tree, or None if the text is too long or no expression."""
  if len(text) > LONGEST:
    return None
  try:
    with warnings.catch_warnings(action='ignore', category=SyntaxWarning):  # of 1if, for example
      return ast.parse(text.strip(), mode='eval')
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    return None


def _power(node: ast.AST, functions: Collection[str], symbols: bool) -> float:
  """A bound on the power to which a leaf of the tree is raised.

  Raises:
    ValueError: a node that is no arithmetic.
  """
  below = lambda *nodes: max(_power(n, functions, symbols) for n in nodes)
  match node:
    case ast.Constant(value=bool()) | ast.Constant(value=complex()):
      raise ValueError('no number')
    case ast.Constant(value=int() | float()) if abs(node.value) <= LARGEST_NUMBER:
      return 1
    case ast.Name(id=name) if symbols and (len(name) == 1 or name == 'pi'):
      return 1
    case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
      return below(operand)
    case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div(), left=left, right=right):
      return below(left, right)
    case ast.BinOp(op=ast.Pow(), left=base, right=exponent):
      return below(base) * _exponent(exponent, functions, symbols)
    case ast.Call(func=ast.Name(id=name), args=[_, *_] as args, keywords=[]) if name in functions:
      return below(*args)
  raise ValueError(f'{type(node).__name__} is no arithmetic')


def _exponent(node: ast.AST, functions: Collection[str], symbols: bool) -> float:
  """A bound on the size of an exponent: the product of its numbers, each at least 1."""
  _power(node, functions, symbols)  # refuses what is no arithmetic
  size = 1.0
  for part in ast.walk(node):
    if isinstance(part, ast.BinOp) and isinstance(part.op, ast.Pow):
      raise ValueError('a power in an exponent')
    if isinstance(part, ast.Constant):
      size *= max(abs(part.value), 1)
    elif isinstance(part, ast.BinOp) and isinstance(part.op, ast.Add | ast.Sub):
      size *= 2
    elif isinstance(part, ast.BinOp) and isinstance(part.op, ast.Div):
      divisor = part.right.value if isinstance(part.right, ast.Constant) else 0
      if divisor < 1:
        raise ValueError('an exponent is divided by something small or unknown')
  return size
