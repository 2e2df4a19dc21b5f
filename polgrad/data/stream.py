"""An endless stream of records from a source; its only state is an integer, the cursor."""

from collections.abc import Mapping, Sequence


def records(
  source: Sequence[Mapping], *, seed: int, cursor: int, count: int, shuffle: bool = True
) -> list[dict]:
  """Records `cursor .. cursor + count - 1` of the endless stream.

  Every row of the source comes once in each epoch, in an order that depends only on (seed, epoch). So
  reading k records and then m gives the same records as reading k + m, and a resumed run reads what it
  would have read without the interruption.

  Args:
    source: a data set, see `sources`.
    seed: seed of the shuffle.
    cursor: number of records that were read before.
    count: number of records to read.
    shuffle: False reads the rows in their order.

  Returns:
    The records, each with its row in the source as `id`, which replaces a field of that name.

  Raises:
    ValueError: the source is empty.
  """
  import grain  # here, because it takes a quarter of a second

  if not len(source):
    raise ValueError('the source has no records')
  rows = grain.MapDataset.range(len(source))
  rows = (rows.shuffle(seed=seed) if shuffle else rows).repeat()
  ids = [int(rows[i]) for i in range(cursor, cursor + count)]
  return [{**source[i], 'id': i} for i in ids]
