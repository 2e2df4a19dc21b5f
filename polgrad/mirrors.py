"""The folder of a run in a bucket: a copy on this machine, from which it is written.

The files of a run grow, and libraries write them by paths of this machine; the objects of a bucket can
do neither. So the run writes into a temporary folder, and whole files are copied: from the bucket when
the run begins, and to it at each save and at the end. A bucket shows an object only when its upload has
ended, so a file there is whole or absent.
"""

import concurrent.futures
import contextlib
import os
import pathlib
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator

from polgrad import paths

OWNER = '.owner'  # the object that names the run which may write into the folder
THREADS = 16  # that copy files at the same time, because each waits for the network


class Mirror:
  """A folder of a bucket and the folder of this machine from which it is written.

  Checkpoints are not copied, because they are written into the bucket directly.
  """

  def __init__(self, bucket: str, here: str):
    """
    Args:
      bucket: the folder, such as gs://bucket/run.
      here: a folder of this machine.
    """
    self.bucket, self.here = paths.path(bucket), pathlib.Path(here)
    self._known: dict[str, tuple[int, int]] = {}  # size and time of the files that the bucket has
    self._name = ''  # in the object `OWNER`; '': this process is not the owner

  def fetch(self) -> None:
    """Copies the files of the bucket to this machine.

    Raises:
      FileNotFoundError: there is no such folder in the bucket.
    """
    if not self.bucket.is_dir():
      raise FileNotFoundError(f'there is no folder {self.bucket}')
    found = [place for top in self.bucket.iterdir() if _copied(top.name) for place in _files(top)]
    self._each(self._fetch, [str(place.relative_to(self.bucket)) for place in found])
    self._known = self._listed()

  def take(self) -> str:
    """Makes this process the owner of the folder in the bucket.

    Returns:
      The process that was the owner and did not `finish`, '' if there is none.
    """
    before = self._owner()
    self._name = f'{socket.gethostname()}, process {os.getpid()} ({secrets.token_hex(4)})'
    self.bucket.mkdir(parents=True, exist_ok=True)
    (self.bucket / OWNER).write_text(self._name)
    return before

  def send(self) -> None:
    """Copies the files that have changed to the bucket, and deletes there those that are gone here.

    Raises:
      RuntimeError: another process has taken the folder.
    """
    if self._name and (owner := self._owner()) != self._name:
      raise RuntimeError(
        f'{self.bucket}: another run has taken this folder: {owner or "its .owner is gone"}; this one '
        'ends, and has written nothing since'
      )
    now = self._listed()
    gone = [name for name in self._known if name not in now]
    self._each(self._send, [name for name, seen in now.items() if self._known.get(name) != seen])
    self._each(lambda name: (self.bucket / name).unlink(missing_ok=True), gone)
    self._known = now

  def finish(self) -> None:
    """Copies what is left and gives the folder up, if this process is its owner.

    Raises:
      RuntimeError: another process has taken the folder.
    """
    if self._name:
      self.send()
      (self.bucket / OWNER).unlink(missing_ok=True)

  def _owner(self) -> str:
    try:
      return (self.bucket / OWNER).read_text()
    except FileNotFoundError:
      return ''

  def _listed(self) -> dict[str, tuple[int, int]]:
    """Size and time of each file here."""
    found = {}
    for folder, _, names in os.walk(self.here):
      for name in names:
        place = pathlib.Path(folder, name)
        inside = place.relative_to(self.here)
        if _copied(inside.parts[0]) and not place.is_symlink() and not name.endswith('.tmp'):
          stated = place.stat()
          found[str(inside)] = stated.st_size, stated.st_mtime_ns
    return found

  def _fetch(self, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # deleted by a run that writes there
      content = (self.bucket / name).read_bytes()
      place = self.here / name
      place.parent.mkdir(parents=True, exist_ok=True)
      place.write_bytes(content)

  def _send(self, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # deleted by the library that wrote it
      content = (self.here / name).read_bytes()
      place = self.bucket / name
      place.parent.mkdir(parents=True, exist_ok=True)
      place.write_bytes(content)

  def _each(self, call: Callable[[str], None], names: Iterable[str]) -> None:
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
      list(pool.map(call, names))


def _copied(name: str) -> bool:
  """Whether a file or folder of a run's folder is copied; folders of checkpoints begin with a digit."""
  return name not in ('checkpoints', OWNER, '.lock') and not name[:1].isdigit()


def _files(place: pathlib.Path) -> Iterator[pathlib.Path]:
  """The files of a place in a bucket: itself, or those of the folder."""
  return paths.files(place) if place.is_dir() else iter([place])


@contextlib.contextmanager
def temporary(bucket: str) -> Iterator[Mirror]:
  """A mirror in a temporary folder, which ends with the name of the folder in the bucket."""
  with tempfile.TemporaryDirectory(prefix='polgrad_') as place:
    here = os.path.join(place, bucket.partition(paths.REMOTE)[2].strip('/'))
    os.makedirs(here)
    yield Mirror(bucket, here)


@contextlib.contextmanager
def reading(folder: str) -> Iterator[str]:
  """The folder of a run for a program that reads it: itself, or a temporary copy if it is in a bucket.

  Files that the program writes there, such as report.png, are copied to the bucket at the end.

  Raises:
    FileNotFoundError: there is no such folder in the bucket.
  """
  if paths.REMOTE not in folder:
    yield os.path.expanduser(folder)
    return
  with temporary(folder) as mirror:
    mirror.fetch()
    yield str(mirror.here)
    mirror.send()
