"""What a check found to be wrong."""

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Finding(NamedTuple):
  """One thing that is wrong, or looks wrong, with a run."""

  where: str  # path in the configuration, such as config.phases.train.source
  text: str  # what is wrong, with rows of the data where there are some
  mend: str = ''  # what to do about it
  fails: bool = False  # the run would stop, or could not learn; otherwise it is a warning

  def __str__(self) -> str:
    return f'{self.where}: {self.text}' + (f'; {self.mend}' if self.mend else '')


def some(rows: Sequence[int], place: Callable[[int], str], most: int = 3) -> str:
  """The first few of these rows: `data.jsonl:3, data.jsonl:17 and 20 more`."""
  shown = ', '.join(map(place, rows[:most]))
  return shown + (f' and {len(rows) - most} more' if len(rows) > most else '')


def source_field(path: str) -> str:
  """The field with the source of a section that reads records, such as `config.phases.train`."""
  return path if '.held_out.' in path else f'{path}.source'


def reader_field(path: str) -> str:
  """The field with the settings by which a section lays its records out, such as `overlong`."""
  return path if path == 'config.evaluation' else f'{path.partition(".held_out.")[0]}.collect'
