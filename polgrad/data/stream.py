"""An endless stream of records from a source; its only state is an integer, the cursor."""

from collections.abc import Mapping, Sequence


def rows(size: int, *, seed: int, cursor: int, count: int, shuffle: bool = True) -> list[int]:
  """The rows of positions `cursor .. cursor + count - 1` of the endless stream of a source.

  Every row comes once in each epoch, in an order that depends only on (seed, epoch). So reading k rows
  and then m gives the same rows as reading k + m, and a resumed run reads what it would have read
  without the interruption.

  Args:
    size: number of rows of the source.
    seed: seed of the shuffle.
    cursor: number of rows that were read before.
    count: number of rows to read.
    shuffle: False reads the rows in their order.

  Raises:
    ValueError: the source is empty.
  """
  import grain  # here, because it takes a quarter of a second

  if not size:
    raise ValueError('the source has no records')
  order = grain.MapDataset.range(size)
  order = (order.shuffle(seed=seed) if shuffle else order).repeat()
  return [int(order[i]) for i in range(cursor, cursor + count)]


def records(
  source: Sequence[Mapping], *, seed: int, cursor: int, count: int, shuffle: bool = True
) -> list[dict]:
  """The records of `rows`, each with its row in the source as `id`, which replaces a field of that name.

  Args:
    source: a data set, see `sources`.
    seed, cursor, count, shuffle: as in `rows`.

  Raises:
    ValueError: the source is empty.
  """
  found = rows(len(source), seed=seed, cursor=cursor, count=count, shuffle=shuffle)
  return [{**source[i], 'id': i} for i in found]
