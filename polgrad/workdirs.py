"""The folder of a run: one run at a time, resumed only as itself, with its configurations kept."""

import contextlib
import fcntl
import functools
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from absl import logging

from polgrad import checkpoint, identity, mirrors, paths
from polgrad.progress import NEWEST
from polgrad.whole_files import writing


class Folder(NamedTuple):
  """The folder that a run writes into.

  Attributes:
    name: as the user gave it, such as gs://bucket/run.
    path: the folder of this machine.
    take: must be called before anything is written or deleted, checkpoints included.
    send: copies the files to the bucket, if the folder is in one. The run calls it before each save, so
      the bucket has all files up to its checkpoint.
  """

  name: str
  path: str
  take: Callable[[], None] = lambda: None
  send: Callable[[], None] = lambda: None


@contextlib.contextmanager
def opened(workdir: str, *, chief: bool) -> Iterator[Folder]:
  """Opens the folder of a run: a folder of this machine with a lock, or one of a bucket with a mirror.

  Args:
    workdir: the folder, such as runs/a or gs://bucket/runs/a.
    chief: this is the process that writes; others of a pod get a folder that no one reads.

  Raises:
    RuntimeError: another process trains in the folder of this machine.
  """
  if paths.REMOTE not in workdir:
    os.makedirs(workdir, exist_ok=True)
    with locked(workdir) if chief else contextlib.nullcontext():
      yield Folder(workdir, workdir)
    return
  with mirrors.temporary(workdir) as mirror:
    if not chief:
      yield Folder(workdir, str(mirror.here))
      return
    with contextlib.suppress(FileNotFoundError):  # a new run
      mirror.fetch()
    try:
      yield Folder(workdir, str(mirror.here), functools.partial(_take, mirror), mirror.send)
    except BaseException:
      with contextlib.suppress(Exception):  # the first error is the one to tell
        mirror.finish()
      raise
    mirror.finish()


def _take(mirror: mirrors.Mirror) -> None:
  """Takes a folder of a bucket; whether the run that had it is still alive cannot be known."""
  before = mirror.take()
  if before:
    logging.warning(
      '%s was left by %s without its end; if that run is still alive, it ends at its next save',
      mirror.bucket, before,
    )  # fmt: skip


@contextlib.contextmanager
def locked(workdir: str) -> Iterator[None]:
  """Holds a lock on the folder, which the system releases when this process ends, however it ends.

  Raises:
    RuntimeError: another process holds it.
  """
  with open(os.path.join(workdir, '.lock'), 'a') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise RuntimeError(
        f'{workdir}: another process trains here; wait for it, or name another folder'
      ) from error
    yield


def select(checkpoints: Any, step: int, folder: str) -> int | None:
  """The number of the checkpoint to resume from: `step`, or the newest if it is -1, or None.

  Raises:
    FileNotFoundError: there is no checkpoint `step`.
  """
  newest = step == NEWEST
  return checkpoints.latest_step() if newest else checkpoint.numbered(checkpoints, folder, step)


def drop_later(checkpoints: Any, step: int) -> None:
  """Deletes the checkpoints after `step`, which a run that resumes there writes anew."""
  for later in sorted(checkpoints.all_steps()):
    if later > step:
      checkpoints.delete(later)


def check_identity(meta: dict, own: dict, on_mismatch: str) -> None:
  """Compares the run of a checkpoint with this one; other versions of libraries are only logged.

  Raises:
    ValueError: they differ, and `on_mismatch` is 'stop'; the message lists in what.
  """
  before = meta.get('identity', {'config': {}, 'files': {}, 'version': 'unknown'})
  libraries = identity.other_libraries(before, own)
  if libraries:
    logging.warning(
      'numbers may differ in their last bits, because libraries do:\n  %s', '\n  '.join(libraries)
    )
  found = identity.differences(before, own)
  if not found:
    return
  listed = '\n  '.join(found)
  if on_mismatch == 'stop':
    raise ValueError(
      f'the checkpoint is of another run:\n  {listed}\nuse another --workdir, or --on_mismatch=continue'
    )
  logging.warning('continuing a run that differs:\n  %s', listed)


def write_config(workdir: str, config: dict, step: int) -> None:
  """Writes config.json; one that differs is kept as config_until_STEP.json."""
  path = os.path.join(workdir, 'config.json')
  text = json.dumps(config, indent=2)
  if os.path.exists(path):
    with open(path, 'rb') as f:
      same = f.read() == text.encode()
    if same:
      return
    os.replace(path, os.path.join(workdir, f'config_until_{step}.json'))
  with writing(path) as f:
    f.write(text)
