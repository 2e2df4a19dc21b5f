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
  temporary = f'{path}.tmp'
  try:
    with open(temporary, mode, **settings) as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.remove(temporary)
    raise
