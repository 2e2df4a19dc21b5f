"""An endless stream over a source whose whole state is one int, the cursor."""

from collections.abc import Mapping, Sequence

import grain


def records(
  source: Sequence[Mapping], *, seed: int, cursor: int, count: int, shuffle: bool = True
) -> list[dict]:
  """Records `cursor .. cursor + count - 1` of the endless stream, each with its row as `id`.

  Every row comes once an epoch. Each epoch has its own order, a function of (seed, epoch) alone, so
  reading k records and then m is reading k + m, and a resumed run sees what it would have seen.
  `id` replaces a field of that name in the record.

  Raises:
    ValueError: the source is empty.
  """
  if not len(source):
    raise ValueError('the source has no records')
  rows = grain.MapDataset.range(len(source))
  rows = (rows.shuffle(seed=seed) if shuffle else rows).repeat()
  ids = [int(rows[i]) for i in range(cursor, cursor + count)]
  return [{**source[i], 'id': i} for i in ids]
