"""Writes a file whole or not at all, whenever the process or the machine stops."""

import contextlib
import os
from collections.abc import Iterator
from typing import IO, Any


@contextlib.contextmanager
def writing(path: str, mode: str = 'w', **settings: Any) -> Iterator[IO]:
  """A file that appears at `path` when the block ends; what was there before stays until then.

  It is written as `path`.tmp, which is removed after an error; a crash leaves it behind.

  Args:
    mode, settings: as those of `open`.
  """
  with naming(path) as temporary, open(temporary, mode, **settings) as file:
    yield file


@contextlib.contextmanager
def naming(path: str) -> Iterator[str]:
  """The same for a library that opens its file by itself: gives the name that it writes to.

  The file must be closed, and then is on the disk, before it appears at `path`.
  """
  temporary = f'{path}.tmp'
  try:
    yield temporary
    with open(temporary, 'rb') as file:
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.remove(temporary)
    raise
