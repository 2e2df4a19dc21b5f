"""JSON files of folders that others made, and the types of what they hold; errors name file and key."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

LARGEST = (
  256 * 2**20
)  # bytes of a file that is read; the tokenizer.json of large models has 35 million
LARGEST_NUMBER = 1e300  # also leaves out infinity and NaN, which Python's JSON reads
# What a value may be called in an error -> whether a value is one.
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
  """The object of a JSON file in UTF-8.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is too large, no JSON, or another value than an object.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'{path}: expected a JSON file')
  if path.stat().st_size > LARGEST:
    raise ValueError(
      f'{path}: {path.stat().st_size} bytes are too many, at most {LARGEST} are read'
    )
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path} is no JSON: {error}') from error
  if not isinstance(content, dict):
    raise ValueError(f'{path}: expected an object, got {type(content).__name__}')
  return content


def check(where: str, content: Mapping[str, Any], kinds: Mapping[str, str]) -> None:
  """Refuses values of another kind; keys that are absent or null are allowed.

  Args:
    where: of the content, in errors.
    kinds: what each key holds, of `KINDS`.

  Raises:
    ValueError: names the key, its kind and the value.
  """
  for key, kind in kinds.items():
    value = content.get(key)
    if value is not None and not KINDS[kind](value):
      raise ValueError(f'{where}: {key} must be {kind}, got {shown(value)}')


def shown(value: Any) -> str:
  """A value in an error, cut to 80 characters."""
  try:
    text = repr(value)
  except (ValueError, RecursionError):  # a number of thousands of digits, or a deep list
    text = type(value).__name__
  return text if len(text) <= 80 else f'{text[:77]}...'
