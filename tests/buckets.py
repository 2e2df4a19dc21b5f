"""A bucket without a network: gs://bucket is a folder of this machine."""

from etils import epath


class Bucket:
  """A backend of gs:// for epath that keeps its files in a folder.

  What it says of a file is what a bucket says: a length, no `st_size`.
  """

  def __init__(self, folder):
    self._folder = folder

  def __getattr__(self, name):
    here = lambda path: str(path).replace('gs://bucket', str(self._folder))
    call = getattr(epath.backend.os_backend, name)
    return lambda path, *rest, **settings: call(here(path), *rest, **settings)


def use(monkeypatch, folder) -> None:
  """Makes gs://bucket the folder until the end of the test."""
  monkeypatch.setitem(epath.gpath._PREFIX_TO_BACKEND, 'gs', Bucket(folder))
