"""Verifiers that compare two completions: what they say, their failures, and the array `wins`."""

import types

import numpy as np
import pytest

from polgrad import build, collect, credit
from polgrad.collect import scored
from polgrad.data import tokenizers
from polgrad.registry import bind, part
from polgrad.rewards import comparisons, scoring
from polgrad.types import Batch
from tests.collect_test import experiment
from tests.policy_gradient import harness
from tests.runs import addition, method_of

TOKENIZER = tokenizers.characters(alphabet='0123456789+=')
GAME = {'r': {'r': 0.5, 'p': 0.0, 's': 1.0}, 'p': {'r': 1.0, 's': 0.0}, 's': {'r': 0.0, 'p': 1.0}}


def pair(first, second, **more):
  return {'first': first, 'second': second, 'record': {}, 'first_reward': 0.0} | (
    {'second_reward': 0.0} | more
  )


def compared(spec, *pairs, **limits):
  return scoring.make_comparer(bind(spec, comparisons.TABLE), **limits)(list(pairs))


def test_the_larger_reward_wins_with_the_probability_of_bradley_and_terry():
  got = compared(part(comparisons.by_reward), pair('a', 'b', first_reward=1.0)).wins
  np.testing.assert_allclose(got, 1 / (1 + np.exp(-1)))
  sharp = part(comparisons.by_reward, temperature=1e-3)
  ends = [pair('a', 'b', first_reward=900.0), pair('a', 'b', second_reward=900.0), pair('a', 'b')]
  np.testing.assert_array_equal(compared(sharp, *ends).wins, [1, 0, 0.5])


def test_a_game_is_read_off_the_record_and_a_pair_that_it_lacks_fails():
  record = {'wins': GAME}
  pairs = [
    pair('r', ' s\n', record=record),
    pair('s', 'r', record=record),
    pair('p', 'x', record=record),
  ]
  got = compared(part(comparisons.by_table), *pairs)
  np.testing.assert_array_equal(got.wins, [1, 0, np.nan])
  assert got.errors == {'comparison/KeyError': 1}
  assert got.messages == ["pair 2: comparison: KeyError: 'x'"]


def test_a_preference_for_the_first_place_is_taken_out_by_both_orders():
  def first_is_better(first, second):
    return 0.9 if len(first) >= len(second) else 0.5

  both = comparisons.both_orders(comparison=first_is_better)
  assert both('aa', 'a') == pytest.approx((0.9 + 1 - 0.5) / 2)
  assert both('a', 'a') == 0.5
  shorter = bind(
    part(comparisons.both_orders, comparison=part(comparisons.by_reward)), comparisons.TABLE
  )
  got = scoring.make_comparer(shorter, isolate=False)([pair('a', 'b', first_reward=1.0)])
  np.testing.assert_allclose(got.wins, 1 / (1 + np.exp(-1)))


def test_a_comparison_of_whole_batches_is_called_once_with_lists():
  calls = []

  def judge(first, second, prompt):
    calls.append((first, second, prompt))
    return [0.25, 2.0, 'x']

  judge.batched = True
  compare = scoring.make_comparer(judge)
  got = compare([pair('a', 'b')] * 3, {'prompt': lambda: ['p'] * 3})
  assert calls == [(['a'] * 3, ['b'] * 3, ['p'] * 3)]
  np.testing.assert_array_equal(got.wins, [0.25, np.nan, np.nan])
  assert got.errors == {'comparison/ValueError': 1, 'comparison/NotAProbability': 1}


def test_an_argument_that_no_comparison_has_is_refused():
  def wrong(first, other):
    return 0.5

  with pytest.raises(ValueError, match=r"cannot read \['other'\]; valid: \['first', 'second'"):
    scoring.make_comparer(wrong)


def rows_of(*texts):
  """Sampled rows with these texts, their rewards 0, 1, 2, ...; the last one is not valid."""
  tokens = np.array([TOKENIZER.encode(text) for text in texts], np.int32)
  number = len(texts)
  return Batch(
    tokens=tokens,
    segment_ids=np.ones_like(tokens),
    mask=np.ones(tokens.shape, bool),
    finished=np.zeros(number, bool),
    rewards=np.arange(number, dtype=np.float32),
    valid=np.arange(number) < number - 1,
  )


def judging(compare):
  return types.SimpleNamespace(tokenizer=TOKENIZER, compare=compare, opened=list)


def test_wins_of_a_group_are_a_game_of_which_failures_leave():
  asked = []

  def compare(pairs, others):
    asked.extend((p['first'], p['second'], p['second_reward']) for p in pairs)
    assert others['prompt']() == ['1+1='] * 3
    wins = np.array([np.nan, 0.9, 0.3])
    return scoring.Compared(wins, {'comparison/Timeout': 1}, ['pair 0: late'])

  records = [{'prompt': '1+1='}, {'prompt': '2+2='}]
  batch = rows_of('11', '22', '33', '44', '44', '55')
  got, errors, messages = scored.compare_groups(batch, records, judging(compare))
  # Neither equal texts nor the row that is not valid are asked.
  assert asked == [('11', '22', 1), ('11', '33', 2), ('22', '33', 2)]
  wins = got['wins'].reshape(2, 3, 3)
  np.testing.assert_allclose(
    wins[0], [[0.5, 0.5, 0.9], [0.5, 0.5, 0.3], [0.1, 0.7, 0.5]], rtol=1e-6
  )
  np.testing.assert_array_equal(wins[1], 0.5)
  np.testing.assert_array_equal(got.valid, [0, 0, 1, 1, 1, 0])
  assert errors == {'comparison/Timeout': 1} and messages == ['pair 0: late']


def test_wins_against_a_baseline_are_of_the_baseline_of_the_prompt():
  batch, others = rows_of('11', '22', '33', '44', '55'), rows_of('11', '55', '66', '77')
  records = [{'prompt': '1+1='}]
  got, _, _ = scored.compare_with(
    batch, others, records, judging(scoring.make_comparer(comparisons.by_reward, isolate=False))
  )
  gap = np.arange(5)[:, None] - np.arange(4)[None]
  want = 1 / (1 + np.exp(-gap.astype(float)))
  want[0, 0] = want[4] = want[:, 3] = 0.5  # equal texts, and rows that are not valid
  np.testing.assert_allclose(got['baseline_wins'], want, rtol=1e-6)


@pytest.mark.parametrize(
  ('settings', 'words'),
  [
    (dict(compare=('win',)), 'valid are'),
    (dict(compare=('baseline_wins',)), 'with baseline_samples'),
    (dict(choose=part(collect.picks.tournament)), "'wins' must be in compare"),
    (dict(choose=part(collect.picks.best, rows=9)), '9 rows, but a group has 8'),
  ],
)
def test_settings_of_comparisons_that_cannot_be_are_refused(settings, words):
  with pytest.raises(ValueError, match=words):
    bind(part(collect.Rollouts, **settings), collect.TABLE)


def test_groups_of_an_odd_number_of_rows_have_no_pairs_to_label():
  config = addition(method_of('online_ipo'))
  config.phases.train.collect.choose = part(collect.picks.best)
  with pytest.raises(ValueError, match='groups of 1 rows, but the objective compares 2'):
    build.build(config)
  # An objective of single rows can have such groups, but not with this credit.
  batch = harness.scored(rewards=np.zeros(3), wins=np.full((3, 3), 0.5))
  with pytest.raises(ValueError, match='a group has 3 rows, an odd number'):
    credit.compared().apply(batch, ())


def test_a_phase_compares_as_it_is_configured():
  run = experiment()
  config = part(build.Phase, **{**run_config(), 'comparison': part(comparisons.shorter)})
  phase = bind(config, {'build.Phase': build.Phase})
  assert phase.compare([pair('a', 'bb')]).wins == [1.0]
  assert run.phases['train'].compare([pair('a', 'bb')]).wins == [0.5]


def run_config():
  return {k: v for k, v in addition(method_of('grpo')).phases.train.items() if k != 'name'}
