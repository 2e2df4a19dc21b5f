"""The description of a tool for a chat template, and whether arguments fit the tool.

A tool is a function with arguments by position, or a frozen dataclass that is called in this way. Its
schema is made from the signature and the docstring: the first paragraph says what it does, and the lines
under `Args:` what each argument is.
"""

import functools
import inspect
import json
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from polgrad.registry import unbound

# Types that an argument may have, and how JSON calls them.
TYPES = {
  str: 'string', int: 'integer', float: 'number', bool: 'boolean', list: 'array', dict: 'object',
}  # fmt: skip


def function_of(tool: Callable) -> Callable:
  """The function whose signature and docstring a tool has."""
  fn = unbound(tool)
  return fn if inspect.isfunction(fn) else type(fn).__call__


def parameters(tool: Callable) -> dict[str, tuple[Any, bool]]:
  """By the name of an argument, its type and whether it must be given.

  Raises:
    ValueError: an argument without a type of `TYPES` or `Literal`.
  """
  return _parameters(function_of(tool))


@functools.cache
def _parameters(fn: Callable) -> dict[str, tuple[Any, bool]]:
  hints = typing.get_type_hints(fn)
  found = {}
  for name, one in inspect.signature(fn).parameters.items():
    if name == 'self' or one.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
      continue
    hint = hints.get(name)
    if typing.get_origin(hint) is not Literal and _plain(hint) not in TYPES:
      raise ValueError(
        f'{fn.__qualname__}: the argument {name!r} of a tool needs a type out of '
        f'{[kind.__name__ for kind in TYPES]}, or Literal'
      )
    found[name] = hint, one.default is inspect.Parameter.empty
  return found


def schema(name: str, tool: Callable) -> dict:
  """The description of a tool for a chat template: a JSON schema of the form that OpenAI introduced.

  >>> def add(x: int, y: int = 1) -> int:
  ...   '''Adds two numbers.
  ...
  ...   Args:
  ...     x: the first one.
  ...   '''
  >>> made = schema('plus', add)['function']
  >>> made['name'], made['description'], made['parameters']['required']
  ('plus', 'Adds two numbers.', ['x'])
  >>> made['parameters']['properties']['x']
  {'type': 'integer', 'description': 'the first one.'}
  """
  text = inspect.getdoc(function_of(tool)) or inspect.getdoc(tool) or ''
  told = _arguments(text)
  known = parameters(tool)
  properties = {}
  for key, (hint, _) in known.items():
    properties[key] = _type(hint) | ({'description': told[key]} if key in told else {})
  return {
    'type': 'function',
    'function': {
      'name': name,
      'description': ' '.join(text.partition('\n\n')[0].split()),
      'parameters': {
        'type': 'object',
        'properties': properties,
        'required': [key for key, (_, needed) in known.items() if needed],
      },
    },
  }


def fitted(tool: Callable, arguments: Mapping[str, Any] | str) -> dict[str, Any]:
  """The arguments of a call, with the types of the tool.

  Args:
    arguments: by name; a text is that of the only argument, or of the first.

  Raises:
    ValueError: one is missing, unknown, or of another type; it says so in words for the policy.
  """
  known = parameters(tool)
  if isinstance(arguments, str):
    arguments = {next(iter(known)): arguments} if known else {}
  missing = [name for name, (_, needed) in known.items() if needed and name not in arguments]
  unknown = [name for name in arguments if name not in known]
  for what, names in (('missing', missing), ('unknown', unknown)):
    if names:
      raise ValueError(f'{what} argument {names[0]!r:.80}; arguments are {[*known]}')
  return {name: _fitted(name, value, known[name][0]) for name, value in arguments.items()}


def _fitted(name: str, value: Any, hint: Any) -> Any:
  """The value with the type that an argument has; texts of numbers are numbers."""
  if typing.get_origin(hint) is Literal:
    if value not in typing.get_args(hint):
      raise ValueError(f'argument {name!r} must be one of {[*typing.get_args(hint)]}')
    return value
  kind = _plain(hint)
  if kind is not str and isinstance(value, str):  # the XML form has texts alone
    try:
      value = json.loads(value)
    except (ValueError, RecursionError):
      value = None
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value) if abs(value) < 1e300 else value
  if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
    value = str(value)
  if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
    raise ValueError(f'argument {name!r} must be of the type {TYPES[kind]}')
  return value


def _plain(hint: Any) -> Any:
  """The type of a hint such as `list[str]`."""
  return typing.get_origin(hint) or hint


def _type(hint: Any) -> dict:
  if typing.get_origin(hint) is Literal:
    return {'type': 'string', 'enum': [*typing.get_args(hint)]}
  return {'type': TYPES[_plain(hint)]}


def _arguments(text: str) -> dict[str, str]:
  """What a docstring says of each argument."""
  block = re.search(r'^Args:\n((?:[ \t]+.*\n?|\n)*)', text, re.MULTILINE)
  if not block:
    return {}
  lines = inspect.cleandoc(block[1]).splitlines()
  found, name = {}, ''
  for line in lines:
    begins = re.match(r'(\w+):\s*(.*)', line)
    if begins:
      name = begins[1]
    if name:
      found[name] = f'{found.get(name, "")} {begins[2] if begins else line.strip()}'.strip()
  return found
