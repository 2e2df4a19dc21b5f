"""The ring of past batches: which rows are trained on."""

import numpy as np
import pytest

from polgrad import row_files
from polgrad.collect import old_runs, replay
from polgrad.data import tokenizers
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
  choice = replay.Choice(share)
  return replay.recalled(ring, lag=lag, choice=choice, rows_per_prompt=GROUP, random=random).tokens


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


# Priorities. Group g of batch n has the rewards (0, 2 g + n), except those of group 0, which are equal.


def scored(number):
  rewards = np.zeros((GROUPS, GROUP), np.float32)
  rewards[1:, 1] = 2.0 * np.arange(1, GROUPS) + number
  return batch(number).replace(
    rewards=rewards.reshape(-1), valid=np.ones(ROWS, bool), sampled_at=np.full(ROWS, number)
  )


def ring_of(count):
  ring = replay.empty(scored(0), capacity=count)
  for number in range(count):
    ring = replay.stored(ring, scored(number))
  return ring


def groups_of(tokens):
  """(batch, group) of every group."""
  first = tokens.reshape(GROUPS, GROUP)[:, 0]
  return [(int(x) // 100, int(x) % 100 // GROUP) for x in first]


def test_the_score_of_a_group_is_that_of_trl():
  rewards = np.array([[1.0, 0, 0, 0], [1, 1, 1, 1], [2, 0, 5, 1]])
  std = rewards.std(axis=1, ddof=1)
  normalized = (
    np.abs(rewards - rewards.mean(axis=1, keepdims=True)) / np.maximum(std, 1e-9)[:, None]
  )
  got = replay.contrast(rewards, np.ones(rewards.shape, bool))
  np.testing.assert_allclose(got, normalized.sum(axis=1) * std)
  assert replay.recency(np.array([1.0, 2, 3])).tolist() == [1, 0.5, 0.25]
  assert replay.mean_reward(rewards, rewards > 0).tolist() == [1, 1, 8 / 3]


def test_equal_rewards_have_no_contrast_whatever_the_rounding():
  rewards = np.full((2, 5), 0.01, np.float32)
  rewards[1, 4] = 0.02
  valid = np.array([[True] * 5, [True] * 4 + [False]])
  assert replay.contrast(rewards, valid).tolist() == [0, 0]
  assert replay.contrast(rewards, np.zeros((2, 5), bool)).tolist() == [0, 0]
  none = replay.deviation(np.array([[0.0, 2], [5, 7]]), np.array([[True, True], [False, False]]))
  np.testing.assert_allclose(none, [1.001, 0])  # a group of failures does not come again


@pytest.mark.parametrize(('exponent', 'want'), [(1.0, [0, 2, 4, 6]), (0.0, [0, 4, 4, 4])])
def test_groups_come_back_as_often_as_their_priorities_say(exponent, want):
  ring, found = ring_of(2), []
  choice = replay.Choice(0.25, replay.contrast, exponent)
  for seed in range(600):
    random = np.random.default_rng(seed)
    got = replay.recalled(ring, lag=0, choice=choice, rows_per_prompt=GROUP, random=random)
    found += [group for number, group in groups_of(got.tokens) if number == 0]
  np.testing.assert_allclose(np.bincount(found, minlength=4) / 600, np.array(want) / 12, atol=0.06)


def test_dull_groups_are_replaced_and_the_best_are_remembered():
  """The buffer keeps the largest priorities of all batches; each batch has one dull group."""
  choice = replay.Choice(1.0, replay.contrast, 1.0, 'dull')
  memory = replay.empty_best(scored(0), batches=1, rows_per_prompt=GROUP)
  random = np.random.default_rng(0)
  untouched = replay.recalled_best(memory, scored(0), choice=choice, random=random)
  np.testing.assert_array_equal(untouched.tokens, scored(0).tokens)  # nothing is remembered yet
  for number in range(5):
    memory = replay.stored_best(memory, scored(number), choice)
  assert memory.priorities.tolist() == [10, 9, 8, 8]  # a contrast is 2 g + n
  got = groups_of(replay.recalled_best(memory, scored(9), choice=choice, random=random).tokens)
  assert got[0][0] != 9 and got[1:] == [(9, 1), (9, 2), (9, 3)]
  one = memory._replace(priorities=np.where(np.arange(4) == 0, 10, 0))
  got = replay.recalled_best(one, scored(9), choice=choice._replace(into='random'), random=random)
  assert {*groups_of(got.tokens)} == {(4, 3)}  # with repetition, if there are too few


# Importance weights of what is drawn by priority.


def weights_by_hand(p, b, scaled):
  """(N P(i))^-b, divided by the largest, one group after the other."""
  chances = [x / sum(p) for x in p]
  count = sum(x > 0 for x in p)
  found = [(count * x) ** -b if x > 0 else 0.0 for x in chances]
  return np.array([x / max(found) if scaled else x for x in found]), np.array(chances)


def test_weights_make_up_for_priorities_exactly():
  """E[w f] over the draws is the mean of f if b = 1, and with the largest weight 1 a multiple of it."""
  rng = np.random.default_rng(0)
  for size in (2, 5, 9):
    p, f = rng.uniform(0.01, 3, size) ** 0.6, rng.normal(size=size)
    for b, scaled in ((1.0, False), (1.0, True), (0.4, False), (0.4, True), (0.0, True)):
      want, chances = weights_by_hand(p, b, scaled)
      got = replay.importance_weights(chances, b, scaled=scaled)
      np.testing.assert_allclose(got, want, rtol=1e-12)
      assert not scaled or got.max() == 1
      factor = size * chances.min() if scaled else 1.0
      gap = np.sum(chances * got * f) - factor * f.mean()
      assert abs(gap) < 1e-12 if b == 1 else abs(gap) > 1e-3
  np.testing.assert_array_equal(replay.importance_weights(np.full(4, 0.25), 0.4), np.ones(4))
  assert replay.importance_weights(np.zeros(2), 1.0).tolist() == [0, 0]


@pytest.mark.parametrize('exponent', [0.6, 0.0])
def test_rows_that_come_again_have_their_weights_and_others_one(exponent):
  """Over many draws the weighted mean of a group's number is that over all older groups."""
  ring = ring_of(2)
  choice = replay.Choice(0.5, replay.deviation, exponent, 'random', 1.0, scaled=False)
  spread = np.arange(GROUPS) * 1.0  # std of (0, 2 g) is g
  want, chances = weights_by_hand((spread + 1e-3) ** exponent, 1.0, scaled=False)
  total = np.zeros(4)
  for seed in range(1500):
    random = np.random.default_rng(seed)
    got = replay.recalled(ring, lag=0, choice=choice, rows_per_prompt=GROUP, random=random)
    weights = got.features['replay_weight'].reshape(GROUPS, GROUP)
    assert (weights[:, 0] == weights[:, 1]).all()
    for (number, group), weight in zip(groups_of(got.tokens), weights[:, 0].tolist()):
      assert weight == pytest.approx(1.0 if number else want[group], rel=1e-5)
      total[group] += 0 if number else weight
  if exponent == 0:
    np.testing.assert_allclose(want, 1)  # uniform with weight 1
  # Two of four groups are drawn 1500 times: every group has the expected weight 1 in a draw of N.
  deviation = np.sqrt(3000 * (want * want * chances - 1 / 16))
  np.testing.assert_array_less(np.abs(total - 3000 / 4), 4 * deviation + 1e-6)


def test_an_infinite_exponent_takes_the_newest_groups_with_signal_first():
  """Batches 0, 1, 2; group 0 of each is dull. Its place gets group 1 of the batch before."""
  ring = ring_of(3)
  choice = replay.Choice(1.0, replay.recovery, float('inf'), 'dull')
  take = lambda **more: groups_of(
    replay.recalled(
      ring,
      lag=0,
      choice=choice._replace(**more),
      rows_per_prompt=GROUP,
      random=np.random.default_rng(0),
    ).tokens
  )
  assert take() == [(1, 1), (2, 1), (2, 2), (2, 3)]
  # Four places, of which six groups are worth it: those of batch 1 come before those of batch 0.
  assert sorted(take(into='random')) == [(0, 1), (1, 1), (1, 2), (1, 3)]
  full = scored(2)
  full.rewards[1] = 1.0  # nothing is missing: nothing is replaced
  ring = replay.stored(ring, full)
  assert take() == [(2, g) for g in range(GROUPS)]


# Rows of earlier runs.


def old_batch(rows, first):
  """Prompts of two tokens in columns 1 and 2, completions of one or two from column 3 on."""
  seen = np.tile([0, 1, 1, 1, 1], (rows, 1)).astype(np.int32)
  seen[::2, 4] = 0
  return Batch(
    tokens=first + np.arange(5 * rows, dtype=np.int32).reshape(rows, 5) % 90,
    segment_ids=seen,
    mask=(seen > 0) & (np.arange(5) >= 3),
    behavior_logp=-np.ones((rows, 5), np.float32),
    rewards=np.arange(rows, dtype=np.float32),
    valid=np.ones(rows, bool),
    group_ids=np.repeat(np.arange(rows // GROUP), GROUP).astype(np.int32),
    sampled_at=np.full(rows, 3, np.int32),
  )


def test_rows_of_an_earlier_run_are_mixed_into_a_batch(tmp_path):
  store = row_files.Store(str(tmp_path), step=0, past=('train',), limit=2**20)
  tokenizer = tokenizers.characters(alphabet='0123456789')
  for step in (1, 2):
    store.write_rows('train', step, old_batch(6, first=step), 6, tokenizer=tokenizer)
  folder, sizes = str(tmp_path / 'rollouts'), dict(rows_per_prompt=GROUP, prompt_length=3)
  new = old_batch(ROWS, first=0).replace(sampled_at=np.full(ROWS, 9, np.int32))
  old = old_runs.load([folder], new, **sizes)
  assert old.tokens.shape == (12, 5) and old.behavior_logp[old.mask].tolist() == [-1.0] * 18
  for fraction, count in [(0.0, 0), (0.5, 2), (1.0, 4), (0.6, 2)]:
    random = np.random.default_rng(0)
    got = old_runs.mixed(new, old, fraction=fraction, rows_per_prompt=GROUP, random=random)
    groups = got.sampled_at.reshape(-1, GROUP)
    assert (groups[:, 0] == groups[:, 1]).all() and np.sum(groups[:, 0] == -1) == count
    np.testing.assert_array_equal(got.group_ids, new.group_ids)
  with pytest.raises(ValueError, match='not in whole groups of 4'):
    old_runs.load([folder], new, rows_per_prompt=4, prompt_length=3)
  with pytest.raises(ValueError, match=r'completions begin at columns \[3\], not at 2'):
    old_runs.load([folder], new, rows_per_prompt=GROUP, prompt_length=2)
  with pytest.raises(ValueError, match=r"its rows have no \['finished'\]"):
    old_runs.load([folder], new.replace(finished=new.valid), **sizes)
  with pytest.raises(FileNotFoundError, match='expected the folder WORKDIR/rollouts'):
    old_runs.load([str(tmp_path / 'none')], new, **sizes)
