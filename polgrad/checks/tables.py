"""Tables and histograms as text, for terminals and pipes of 100 columns."""

import textwrap
from collections.abc import Sequence

from polgrad.checks.reading import Spread

WIDTH = 100
BAR = 30  # characters of the longest bar


def table(head: Sequence[str], rows: Sequence[Sequence[object]], indent: int = 2) -> list[str]:
  """The lines of a table; numbers are set to the right."""
  texts = [[str(cell) for cell in row] for row in [head, *rows]]
  widths = [max(len(row[i]) for row in texts) for i in range(len(head))]
  number = [all(_number(row[i]) for row in texts[1:]) and bool(rows) for i in range(len(head))]
  lines = []
  for row in texts:
    cells = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, number)]
    lines.append(' ' * indent + '  '.join(cells).rstrip())
  return lines


def _number(text: str) -> bool:
  return text.replace(',', '').replace('.', '').removesuffix('%').isdigit() or text in ('', '-')


def histogram(spread: Spread) -> list[str]:
  """The lines of a histogram with bars; of consecutive empty parts one line is left."""
  most = max(spread.counts)
  ranges = [f'{a}-{b - 1}' if b - a > 1 else str(a) for a, b in zip(spread.edges, spread.edges[1:])]
  width = max(map(len, ranges))
  lines = []
  for name, count in zip(ranges, spread.counts):
    if count:
      lines.append(f'    {name:>{width}}  {"#" * -(-count * BAR // most):<{BAR}} {count:,}')
    elif lines[-1].strip() != '...':
      lines.append(f'    {"...":>{width}}')
  return lines


def wrapped(text: str, first: str = '  ', rest: str = '    ') -> list[str]:
  """A text in lines of `WIDTH` columns."""
  return textwrap.wrap(
    text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
  ) or [first]


def size(count: float) -> str:
  """A number of bytes, for people."""
  for unit in ('B', 'KiB', 'MiB', 'GiB'):
    if count < 1024:
      return f'{count:.0f} {unit}' if unit == 'B' else f'{count:.1f} {unit}'
    count /= 1024
  return f'{count:.1f} TiB'


def duration(seconds: float) -> str:
  """A time, for people."""
  unit, length = ('s', 1) if seconds < 90 else ('min', 60) if seconds < 5400 else ('h', 3600)
  return f'{seconds / length:.2g} {unit}'
