"""Completions cut into chunks."""

import numpy as np
import pytest

from polgrad.data import chunks


@pytest.mark.parametrize('length', [1, 4, 5, 6, 23])
def test_equal_chunks_cover_a_completion_once(length):
  found = chunks.equal(length, most=5)
  sizes = [one.stop - one.start for one in found]
  assert [i for one in found for i in range(length)[one]] == list(range(length))
  assert len(found) == min(5, length) and max(sizes) - min(sizes) <= 1
  assert sizes == sorted(sizes, reverse=True)


def test_random_chunks_cover_a_completion_once():
  generator = np.random.default_rng(0)
  seen = set()
  for _ in range(50):
    found = chunks.random(40, generator, shortest=5, longest=10)
    sizes = [one.stop - one.start for one in found]
    assert [i for one in found for i in range(40)[one]] == list(range(40))
    assert all(5 <= size <= 10 for size in sizes[:-1]) and 1 <= sizes[-1] <= 10
    seen |= {*sizes[:-1]}
  assert seen == set(range(5, 11))


def test_an_empty_completion_has_no_chunks():
  assert chunks.equal(0, most=5) == chunks.random(0, None, shortest=1, longest=2) == []


@pytest.mark.parametrize(
  'make',
  [
    lambda: chunks.equal(3, most=0),
    lambda: chunks.random(3, None, shortest=0, longest=2),
    lambda: chunks.random(3, None, shortest=3, longest=2),
  ],
)
def test_lengths_that_make_no_chunks_are_refused(make):
  with pytest.raises(ValueError, match='expected'):
    make()
