"""Paths of this machine and of buckets, behind one interface."""

import os
import pathlib
from collections.abc import Iterator

REMOTE = '://'  # in paths that are not of this machine


def path(text: str | os.PathLike) -> pathlib.Path:
  """A path of this machine, with ~ expanded, or one such as gs://bucket/model, read by `etils.epath`."""
  if isinstance(text, pathlib.PurePath):
    return text
  if REMOTE not in str(text):
    return pathlib.Path(text).expanduser()
  from etils import epath  # slow to import, and rarely needed

  return epath.Path(text)


def local(text: str | os.PathLike) -> pathlib.Path:
  """A path of this machine, for what is written under a temporary name and then renamed.

  Raises:
    ValueError: a path of a bucket, where a folder cannot appear at once.
  """
  if REMOTE in str(text):
    raise ValueError(f'{text} must be a path of this machine; copy it to the bucket afterwards')
  return path(text)


def size(place: pathlib.Path) -> int:
  """Number of bytes of a file."""
  stated = place.stat()
  return stated.st_size if hasattr(stated, 'st_size') else stated.length


def files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """The files of a folder and of the folders in it; `rglob` does not work in buckets."""
  for place in folder.iterdir():
    if place == folder:  # some buckets list the folder itself
      continue
    if place.is_dir():
      yield from files(place)
    elif place.is_file():
      yield place


def read(place: pathlib.Path, start: int, count: int) -> bytes:
  """`count` bytes of a file from byte `start` on; fewer if the file ends before."""
  with place.open('rb') as file:
    file.seek(start)
    return file.read(count)
