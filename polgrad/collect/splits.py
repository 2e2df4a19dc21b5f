r"""Where the steps of a completion begin: lines, sentences, or every n tokens.

A function of `TABLE` fills the setting `split` of `Vines`. It runs on the host. The names of its
positional arguments say what it reads of one completion of `n` tokens:

| name | what it is |
|---|---|
| `pieces` | list of n bytes objects: the text that each token adds |
| `number` | n |

It returns the numbers of the tokens that begin a step, in increasing order. The first token always
begins one, whether or not it is among them.
"""

import bisect
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Annotated

from polgrad.registry import AtLeastOne, call, table


def lines(pieces: Sequence[bytes]) -> list[int]:
  r"""A step is a line; white space after a line belongs to it, so there are no empty ones.

  >>> lines([b'a', b' b\n', b'\n', b'c', b'\nd', b'e'])
  [3, 5]
  """
  return _after(rb'\n\s*', pieces)


def sentences(pieces: Sequence[bytes]) -> list[int]:
  r"""A step is a line, or a sentence: it ends with a full stop, an exclamation or a question mark, and
  white space.

  >>> sentences([b'It', b' is', b' 1.5', b'.', b' So', b' we', b'!\n', b'Then'])
  [5, 7]
  """
  return _after(rb'(?:[.!?][\'")\]]*\s|\n)\s*', pieces)


def every(number: int, *, tokens: AtLeastOne = 16) -> list[int]:
  """A step is that number of tokens.

  >>> every(7, tokens=3)
  [0, 3, 6]
  """
  return list(range(0, number, tokens))


def _after(pattern: bytes, pieces: Sequence[bytes]) -> list[int]:
  """The tokens after those in which a match ends. A step ends with a token, never within one."""
  ends = list(itertools.accumulate(map(len, pieces)))
  matches = re.finditer(pattern, b''.join(pieces))
  found = {bisect.bisect_left(ends, match.end()) + 1 for match in matches}
  return sorted(i for i in found if i < len(pieces))


TABLE = table('splits', lines, sentences, every)
Part = Annotated[Callable[..., Sequence[int]], TABLE]


def starts(split: Callable, pieces: Sequence[bytes], most: int) -> list[int]:
  """The tokens that begin the steps of a completion, at most `most` of them; the first is 0.

  Of more steps some are joined with the one before, so that what is left is evenly spaced.

  >>> starts(every, [b'a'] * 64, 3)
  [0, 16, 32]
  """
  begins = call(split, {'pieces': pieces, 'number': len(pieces)})
  return joined([0, *(i for i in begins if 0 < i < len(pieces))], most)


def joined(places: list[int], most: int) -> list[int]:
  """At most `most` of the places, evenly spaced and with the first one."""
  return [places[i * len(places) // most] for i in range(most)] if len(places) > most else places
