"""Texts cut at stop strings."""

from collections.abc import Sequence


def before(text: str, strings: Sequence[str]) -> str:
  """The text before the first of the strings; empty strings are ignored.

  >>> before('a. b', ['.', ' ']), before('a', ['.', ''])
  ('a', 'a')
  """
  return text[: min((text.index(s) for s in strings if s and s in text), default=len(text))]


def through(text: str, strings: Sequence[str]) -> str:
  """The text up to the earliest end of one of the strings.

  >>> through('a</b> c', ['</b>', 'c'])
  'a</b>'
  """
  return text[: min((text.index(s) + len(s) for s in strings if s in text), default=len(text))]
