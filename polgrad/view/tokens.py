"""What is shown of a row of tokens: the text of each token, its numbers, and a level for every quantity.

A quantity has levels, from which the style sheet makes colours: a signed one -4 to 4, another one 0 to
4. The page and the terminal share this.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from polgrad.view.charts import number

STEPS = 4  # levels on each side of 0


class Quantity(NamedTuple):
  """What a token can be coloured by."""

  key: str  # a letter, of the classes in the style sheet
  label: str
  signed: bool
  full: float  # value of the last level; 0: the largest of the row
  meaning: str


# By the names of the columns that hold them.
QUANTITIES = {
  'advantages': Quantity('a', 'advantage', True, 0.0, 'blue above 0, orange below'),
  'mask': Quantity('m', 'mask', False, 1.0, 'tokens in the loss'),
  'behavior_logp': Quantity(
    'b',
    'sampler log-prob',
    False,
    5.0,
    'the stronger the colour, the less likely when it was drawn',
  ),
  'logp': Quantity(
    'p', 'policy log-prob', False, 5.0, 'the stronger the colour, the less likely now'
  ),
  'entropy': Quantity('e', 'entropy', False, 3.0, 'of the next-token distribution, nats'),
  'log_ratio': Quantity(
    'r', 'ratio', True, 1.0, 'policy / sampler: blue more likely now, orange less; log scale'
  ),
  'clipped': Quantity('c', 'clipped', False, 1.0, 'tokens without a gradient of the surrogate'),
  'push': Quantity(
    'g', 'push', True, 0.0, '-d loss / d log-prob: blue is made more likely, orange less'
  ),
  'reference_logp': Quantity(
    'f',
    'reference log-prob',
    False,
    5.0,
    'the stronger the colour, the less likely for the reference',
  ),
}
KEYS = {quantity.key: quantity for quantity in QUANTITIES.values()}


class Token(NamedTuple):
  text: str
  classes: str  # for example 'm1 a-2 b3'
  numbers: str  # what the pointer shows


def quantities(rows: Sequence[Mapping[str, Any]]) -> list[Quantity]:
  """The quantities that some of these rows have."""
  return [q for name, q in QUANTITIES.items() if any(row.get(name) is not None for row in rows)]


def level(x: float | bool | None, quantity: Quantity, full: float) -> int:
  """The level of a value, -4 to 4 or 0 to 4; 0 for what is no number."""
  if x is None or not math.isfinite(x):
    return 0
  size = STEPS * abs(float(x)) / full if full else 0.0
  size = min(math.ceil(size - 1e-9), STEPS)
  return -size if quantity.signed and x < 0 else size


def largest(values: Sequence[float]) -> float:
  """The largest absolute value that is a number, 0 without one."""
  return max((abs(x) for x in values if x is not None and math.isfinite(x)), default=0.0)


def levels(row: Mapping[str, Any]) -> dict[str, list[int]]:
  """The level of every token in every quantity of a row, by the name of its column.

  Log-probs colour by how far they are below 0.
  """
  found = {}
  for name, quantity in QUANTITIES.items():
    if row.get(name) is not None:
      full = quantity.full or largest(row[name])
      found[name] = [level(x, quantity, full) for x in row[name]]
  return found


def tokens(
  row: Mapping[str, Any], most: int = 10**9, first: int = 0, last: int | None = None
) -> list[Token]:
  """The tokens of a row; of more than `most`, the middle is left out and counted.

  Args:
    row: lists by column: `pieces`, `tokens`, and those of `QUANTITIES`; `column` is that of the first.
    most: number of tokens to show.
    first: the token to begin with, for example the first of the completion.
    last: the token to end before; None: the row's end.
  """
  found, texts = levels(row), row['pieces']
  shown = list(range(first, len(texts) if last is None else last))
  left = len(shown) - most
  if left > 0:
    shown = [*shown[: most - most // 2], -1, *shown[len(shown) - most // 2 :]]
  made = []
  for i in shown:
    if i < 0:
      made.append(Token(f' … {left:,} tokens left out … ', 'gap', ''))
      continue
    classes = [f'{QUANTITIES[n].key}{x[i]}' for n, x in found.items() if x[i]]
    said = [(QUANTITIES[n].label, value(row, n, i)) for n in found if n != 'mask']
    where = f'column {row["column"] + i}, id {row["tokens"][i]}'
    inside = [] if row['mask'][i] else ['not in the loss']
    made.append(
      Token(
        visible(texts[i]),
        ' '.join(classes),
        ' · '.join([where, *inside, *(f'{label} {x}' for label, x in said if x)]),
      )
    )
  return made


def value(row: Mapping[str, Any], name: str, i: int) -> str:
  """The number of token `i` as text, '' where there is none; ratios are shown instead of logarithms.

  Outside the mask a 0 means that nothing was computed.
  """
  x = row[name][i]
  if isinstance(x, bool):
    return 'yes' if x else 'no'
  if x is None or math.isnan(x) or (x == 0 and not row['mask'][i]):
    return ''
  return number(math.exp(min(x, 700.0)) if name == 'log_ratio' else x)


_CONTROL = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]')


def clean(text: str) -> str:
  """The text with signs for control characters, which HTML cannot hold."""

  def sign(found):
    code = ord(found[0])
    return chr(0x2400 + code) if code < 0x20 else '\N{REPLACEMENT CHARACTER}'

  return _CONTROL.sub(sign, text)


def visible(text: str) -> str:
  """The text of a token, with signs for control characters and ends of lines."""
  return clean(text).replace('\n', '↵\n')


def cut(text: str, most: int) -> str:
  """The text, or its last characters."""
  return text if len(text) <= most else '…' + text[-most:]
