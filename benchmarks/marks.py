"""Tables that commands write into pages of docs/."""

import re


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
