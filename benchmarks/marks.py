"""Results that commands append to files, and tables that they write into pages of docs/."""

import json
import pathlib
import re
from collections.abc import Iterable, Sequence


def read(path: pathlib.Path) -> list[dict]:
  """The results in a file, a line of JSON each; none if there is no file."""
  lines = path.read_text().splitlines() if path.exists() else []
  return [json.loads(line) for line in lines]


def append(path: pathlib.Path, result: dict) -> None:
  """Appends a result to a file."""
  with path.open('a') as file:
    file.write(json.dumps(result) + '\n')


def table(titles: Sequence, rows: Iterable[Sequence]) -> str:
  """A table in Markdown.

  >>> print(table(['x', 'y'], [[1, 'a']]))
  | x | y |
  |---|---|
  | 1 | a |
  """
  line = lambda cells: f'| {" | ".join(map(str, cells))} |'
  return '\n'.join([line(titles), '|---' * len(titles) + '|', *map(line, rows)])


def with_table(text: str, mark: str, table: str) -> str:
  """The text of a page with a table between `<!-- mark -->` and the next `<!-- end -->`.

  Raises:
    ValueError: the page has no such place, or several.
  """
  block = f'<!-- {mark} -->\n{table}\n<!-- end -->'
  pattern = f'<!-- {re.escape(mark)} -->.*?<!-- end -->'
  text, count = re.subn(pattern, lambda _: block, text, flags=re.DOTALL)
  if count != 1:
    raise ValueError(f'the page has {count} places <!-- {mark} --> ... <!-- end -->, and not one')
  return text
