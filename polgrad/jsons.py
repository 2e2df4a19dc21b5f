"""JSON files of downloaded models: reads them and checks types of values; errors name file and key."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from polgrad import paths

# Bytes of a file, at most. The largest tokenizer.json that we know has 35 million.
LARGEST = 256 * 2**20
LARGEST_NUMBER = 1e300  # its bound also refuses infinity and NaN, which Python reads from JSON
LARGEST_ID = 2**31 - 1  # of a token, because ids are 32-bit numbers
# Name of a type, as errors write it -> whether a value has the type.
KINDS = {
  'text': lambda x: isinstance(x, str),
  'true or false': lambda x: isinstance(x, bool),
  'a number': lambda x: (
    isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < LARGEST_NUMBER
  ),
  'a whole number': lambda x: isinstance(x, int) and not isinstance(x, bool),
  'an object': lambda x: isinstance(x, dict),
  'a list': lambda x: isinstance(x, list),
  'a list of whole numbers': lambda x: isinstance(x, list) and all(type(i) is int for i in x),
  'a list of texts': lambda x: isinstance(x, list) and all(isinstance(i, str) for i in x),
}


def read_object(path: str | pathlib.Path) -> dict:
  """The dictionary in a JSON file, whose text is UTF-8.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is larger than `LARGEST`, is no JSON, or holds another value than an object.
  """
  path = paths.path(path)
  if not path.is_file():
    raise FileNotFoundError(f'{path}: expected a JSON file')
  size = paths.size(path)
  if size > LARGEST:
    raise ValueError(f'{path}: {size} bytes are too many, at most {LARGEST} are read')
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path} is no JSON: {error}') from error
  if not isinstance(content, dict):
    raise ValueError(f'{path}: expected an object, got {type(content).__name__}')
  return content


def check(where: str, content: Mapping[str, Any], kinds: Mapping[str, str]) -> None:
  """Refuses values of another type; keys that are absent or null are allowed.

  Args:
    where: name of the file or section, for errors.
    content: values by key.
    kinds: name of the type, one of `KINDS`, by key.

  Raises:
    ValueError: names the key, its type and the value.
  """
  for key, kind in kinds.items():
    value = content.get(key)
    if value is not None and not KINDS[kind](value):
      raise ValueError(f'{where}: {key} must be {kind}, got {shown(value)}')


def check_id(where: str, i: Any, size: int = LARGEST_ID + 1) -> None:
  """Refuses what is no token id of a vocabulary of `size` tokens.

  Raises:
    ValueError: names `where`, the range and the value.
  """
  if not KINDS['a whole number'](i) or not 0 <= i < size:
    raise ValueError(f'{where} must be at least 0 and below {size}, got {shown(i)}')


def shown(value: Any) -> str:
  """A value in an error, cut to 80 characters."""
  try:
    text = repr(value)
  except (ValueError, RecursionError):  # a number of thousands of digits, or a deep list
    text = type(value).__name__
  return text if len(text) <= 80 else f'{text[:77]}...'
