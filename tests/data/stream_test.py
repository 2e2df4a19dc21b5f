"""The stream: each row once an epoch, another order each epoch, and one int as its state."""

import pytest

from polgrad.data import sources, stream

ROWS = 23
SOURCE = sources.Source(ROWS, lambda i: {'prompt': str(i), 'id': 'their own'})


def ids(cursor, count, seed=3, shuffle=True):
  records = stream.records(SOURCE, seed=seed, cursor=cursor, count=count, shuffle=shuffle)
  assert all(r['prompt'] == str(r['id']) for r in records)
  return [r['id'] for r in records]


def test_every_row_comes_once_an_epoch_in_a_new_order():
  epochs = [ids(e * ROWS, ROWS) for e in range(4)]
  assert all(sorted(e) == list(range(ROWS)) for e in epochs)
  assert len({tuple(e) for e in epochs}) == 4


@pytest.mark.parametrize('k', [0, 1, 10, ROWS, 40])
def test_reading_k_then_m_is_reading_both_at_once(k):
  assert ids(5, k) + ids(5 + k, 57 - k) == ids(5, 57)


def test_without_shuffling_rows_come_in_order():
  assert ids(20, 6, shuffle=False) == [20, 21, 22, 0, 1, 2]


def test_the_seed_decides_the_order():
  assert ids(0, ROWS) == ids(0, ROWS)
  assert ids(0, ROWS, seed=4) != ids(0, ROWS)


def test_an_empty_source_is_an_error():
  with pytest.raises(ValueError, match='no records'):
    stream.records([], seed=0, cursor=0, count=1)


def test_a_plain_list_is_a_source():
  assert stream.records([{'prompt': 'a'}], seed=0, cursor=7, count=1) == [{'prompt': 'a', 'id': 0}]
