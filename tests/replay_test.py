"""The ring of past batches: which rows are trained on."""

import numpy as np
import pytest

from polgrad.collect import replay
from polgrad.types import Batch

GROUPS, GROUP = 4, 2
ROWS = GROUPS * GROUP


def batch(number):
  """Rows 100 * number + 0, 1, 2, ..."""
  rows = 100 * number + np.arange(ROWS)
  return Batch(
    tokens=rows,
    segment_ids=np.ones(ROWS, np.int32),
    mask=np.ones(ROWS, bool),
    group_ids=np.repeat(np.arange(GROUPS), GROUP),
  )


def after(count, capacity):
  ring = replay.empty(batch(0), capacity=capacity)
  for number in range(count):
    ring = replay.stored(ring, batch(number))
  return ring


def recalled(ring, *, lag=0, share=0.0, seed=0):
  random = np.random.default_rng(seed)
  return replay.recalled(ring, lag=lag, fraction=share, rows_per_prompt=GROUP, random=random).tokens


@pytest.mark.parametrize('count', [1, 2, 3, 4, 9])
def test_the_batch_of_so_long_ago_or_the_oldest_there_is(count):
  got = recalled(after(count, capacity=3), lag=2)
  np.testing.assert_array_equal(got, batch(max(count - 3, 0)).tokens)


@pytest.mark.parametrize('lag', [0, 1])
def test_a_share_of_the_groups_is_older_whole_and_not_repeated(lag):
  ring = after(7, capacity=lag + 3)
  seen = set()
  for seed in range(20):
    got = recalled(ring, lag=lag, share=0.5, seed=seed)
    number, row = got.reshape(GROUPS, GROUP) // 100, got.reshape(GROUPS, GROUP) % 100
    np.testing.assert_array_equal(number[:, 0], number[:, 1])
    np.testing.assert_array_equal(row[:, 1], row[:, 0] + 1)
    assert sum(number[:, 0] != 6 - lag) == 2 and len(set(got.tolist())) == ROWS
    fresh = number[:, 0] == 6 - lag
    np.testing.assert_array_equal(row[fresh, 0] // GROUP, np.flatnonzero(fresh))
    seen |= set(number[:, 0].tolist())
  assert seen == {6 - lag, 5 - lag, 4 - lag}  # what is older has been overwritten


def test_everything_can_be_older_and_nothing_is_while_there_is_nothing():
  assert (recalled(after(5, capacity=2), share=1.0) // 100 == 3).all()
  np.testing.assert_array_equal(recalled(after(1, capacity=2), share=1.0), batch(0).tokens)
  np.testing.assert_array_equal(recalled(after(2, capacity=4), lag=1, share=1.0), batch(0).tokens)


def test_storing_leaves_the_old_ring_as_it_was():
  before = after(2, capacity=2)
  replay.stored(before, batch(9))
  np.testing.assert_array_equal(recalled(before), batch(1).tokens)


def test_the_same_random_numbers_take_the_same_rows():
  ring = after(6, capacity=4)
  first, same, other = (recalled(ring, share=0.5, seed=s) for s in (3, 3, 4))
  np.testing.assert_array_equal(first, same)
  assert not np.array_equal(first, other)
