"""Which rows of a group are trained on, and which rows a group has besides its samples."""

import dataclasses

import jax
import numpy as np
import pytest

from polgrad import collect, optim, phases
from polgrad.collect import beginnings, picks
from polgrad.data import batching
from polgrad.registry import bind, part
from polgrad.rewards import comparisons
from polgrad.types import STREAMS
from tests import examples
from tests.collect_test import collected, experiment

pytestmark = pytest.mark.usefixtures('samplers_once')
REWARDS = np.array([[0.2, 0.9, 0.5, 0.1], [1.0, 1.0, 1.0, 1.0], [0.3, 0.1, 0.7, 0.5]])
VALID = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0]], bool)


def chosen(spec, *, rewards=REWARDS, valid=VALID, wins=None, seed=0):
  arrays = {'rewards': rewards, 'valid': valid, 'lengths': np.ones(rewards.shape), 'wins': wins}
  fn = bind(spec, picks.TABLE)
  assert picks.rows_of(fn, rewards.shape[1]) == len(
    picks.choose(fn, arrays, np.random.default_rng(seed)).rows[0]
  )
  return picks.choose(fn, arrays, np.random.default_rng(seed))


def usable(got):
  return [tuple(rows[ok]) for rows, ok in zip(got.rows, got.usable)]


def test_best_and_worst_are_of_the_valid_rows_and_the_better_one_comes_first():
  got = chosen(part(picks.best_worst))
  assert usable(got) == [(1, 0), (0, 3), ()]  # one valid row makes no pair
  assert usable(chosen(part(picks.best_second))) == [(1, 2), (0, 1), ()]
  assert usable(chosen(part(picks.best, rows=2))) == [(1, 2), (0, 1), (2,)]


def test_pairs_are_split_by_the_gap_of_their_rewards():
  easy = chosen(part(picks.best_worst, min_gap=0.5))
  hard = chosen(part(picks.best_worst, max_gap=0.5))
  assert usable(easy) == [(1, 0), (), ()] and usable(hard) == [(), (0, 3), ()]


def test_length_counts_in_the_choice_and_not_in_the_gap():
  lengths = np.array([[1, 9, 2, 1]])
  fn = bind(part(picks.best_worst, length_penalty=0.1, min_gap=0.25), picks.TABLE)
  arrays = dict(rewards=REWARDS[:1], valid=VALID[:1], lengths=lengths)
  assert usable(picks.choose(fn, arrays, np.random.default_rng(0))) == [(2, 1)]


def test_random_choices_differ_by_step_and_never_take_a_row_twice():
  for fn in (picks.random_pair, picks.best_random):
    found = [usable(chosen(part(fn), seed=seed)) for seed in range(40)]
    assert len({groups[1] for groups in found}) > 2
    assert all(len({*rows}) == len(rows) for groups in found for rows in groups)
    assert all({*groups[0]} <= {0, 1, 2} and groups[2] == () for groups in found)


def test_all_pairs_hold_every_two_rows_once():
  got = chosen(part(picks.all_pairs, min_gap=0.3))
  assert got.rows.shape == (3, 12)
  assert usable(got)[0] == (0, 1, 0, 2, 1, 2) and usable(got)[1] == ()


def test_a_tournament_leads_to_its_champion_unless_the_last_one_beats_it():
  order = np.array([2, 0, 3, 1])  # strengths
  wins = 0.5 + 0.4 * np.sign(order[:, None] - order[None])
  cycle = np.array([[0.5, 1, 0, 0], [0, 0.5, 0, 1], [1, 1, 0.5, 1], [1, 0, 0, 0.5]])
  valid = np.ones((3, 4), bool)
  valid[2, 1:] = False
  got = chosen(
    part(picks.tournament),
    rewards=np.zeros((3, 4)),
    valid=valid,
    wins=np.stack([wins, cycle, wins]),
  )
  # In the cycle 0 and 2 win, then 2; 1 and 3 lose, then 3: and 2 beats 3.
  assert usable(got) == [(2, 1), (2, 3), ()]
  cycle[2, 3], cycle[3, 2] = 0, 1
  got = chosen(part(picks.tournament), rewards=np.zeros((1, 4)), valid=valid[:1], wins=cycle[None])
  assert usable(got) in ([()], [(3, 1)])


def test_best_by_wins_ignores_rows_that_are_not_valid():
  wins = np.array([[0.5, 0.6, 0.1], [0.4, 0.5, 0.9], [0.9, 0.1, 0.5]])[None]
  got = chosen(
    part(picks.best_worst_by_wins),
    rewards=np.zeros((1, 3)),
    valid=np.array([[True, True, False]]),
    wins=wins,
  )
  assert usable(got) == [(0, 1)]


def test_rows_above_a_threshold_and_the_top_of_a_batch():
  got = chosen(part(picks.above, threshold=0.5, rows=2))
  assert sorted(usable(got)[0]) == [1, 2] and usable(got)[2] == (2,)
  top = chosen(part(picks.top_of_batch, fraction=1 / 3))
  assert usable(top) == [(), (0, 1, 2, 3), ()]  # the first prompt starves


def test_a_batch_has_the_chosen_rows_of_every_group_and_masks_those_that_are_not_usable():
  """Rows 0 and 2 are samples, 1 and 3 those of the reference, and the last two a pair of the data."""
  source = [
    {'id': i, 'prompt': f'{i}+{i}=', 'answer': '1', 'chosen': str(2 * i), 'rejected': '77'}
    for i in range(8)
  ]
  run = experiment(
    anchors={'reference': part(optim.fixed)}, samples_per_prompt=2, opponents=2, compare=('wins',)
  )
  settings = dataclasses.replace(run.phases['train'].collect, preferences=1)
  phase = examples.changed(run.phases['train'], collect=settings, source=source)
  with jax.set_mesh(run.mesh):
    state = phases.begin(run, 0, None)
    steps = settings.make(phases.context(run, phase, 0)).__self__
    batch, records = steps.sample(state, lambda n: source[:n], 0)
    batch, report = steps.score(batch, records, state, None, 0)
  pairs = bind(part(picks.best_worst, min_gap=0.3), picks.TABLE)
  steps = dataclasses.replace(steps, settings=dataclasses.replace(settings, choose=pairs))
  few, report = steps._choose(batch, report, 0)
  assert batch.tokens.shape[0] == 4 * 6 and few.tokens.shape[0] == 4 * 2
  np.testing.assert_array_equal(batch['opponent'].reshape(4, 6), [[0, 0, 1, 1, 0, 0]] * 4)
  np.testing.assert_array_equal(batch.label.reshape(4, 6), [[0, 0, 0, 0, 1, 0]] * 4)
  np.testing.assert_array_equal(
    batch.stream.reshape(4, 6),
    [[STREAMS.index('sampled')] * 4 + [STREAMS.index('demonstration')] * 2] * 4,
  )
  assert (batch.tokens[0::6] != batch.tokens[2::6]).any()  # opponents draw other noise
  wins = comparisons.by_reward
  for b in range(24):
    for j in range(6):
      want = wins(batch.rewards[b], batch.rewards[b - b % 6 + j])
      assert batch['wins'][b, j] == pytest.approx(want, abs=1e-6)
  rewards = batch.rewards.reshape(4, 6)
  for group in range(4):
    best, worst = rewards[group].argmax(), 5 - rewards[group][::-1].argmin()
    rows = few.tokens[2 * group : 2 * group + 2]
    np.testing.assert_array_equal(rows, batch.tokens[[6 * group + best, 6 * group + worst]])
    apart = rewards[group, best] - rewards[group, worst] >= 0.3
    assert (few.valid[2 * group : 2 * group + 2] == apart).all()
    gap = few['wins'][2 * group, 1]
    assert gap == pytest.approx(wins(rewards[group, best], rewards[group, worst]), abs=1e-6)
  assert report.metrics['left_out'] == (~few.valid).sum()
  failed = batch.replace(valid=batch.valid & (np.arange(24) >= 6))  # the whole first group
  few, again = steps._choose(failed, report._replace(terms={}), 0)
  assert again.metrics['left_out'] == (~few.valid[2:]).sum() and not few.valid[:2].any()
  assert set(report.terms) == {'short'} and len(report.terms['short']) == 8


def test_beginnings_are_of_the_answer_which_verifiers_see_and_no_loss_does():
  given = part(beginnings.uniform)
  run = experiment(beginning=given, prompt_length=11, samples_per_prompt=2, unfinished_reward=-3.0)
  seen = []
  real = run.phases['train'].score

  def score(texts, records, lengths, others):
    seen.extend(zip(texts, records, lengths))
    return real(texts, records, lengths)

  got, _ = collected(run, score=score)
  tokenizer = run.tokenizer
  assert len(seen) == 8
  for row, (text, record, length) in enumerate(seen):
    begun = record['begun']
    answer = batching.completion({k: v for k, v in record.items() if k != 'begun'}, tokenizer)
    assert 1 <= len(begun) < len(answer) and answer[: len(begun)] == begun
    assert text.startswith(tokenizer.decode(begun))
    tokens = got.batch.tokens[row]
    assert tokens[11 - len(begun) : 11].tolist() == begun
    assert not got.batch.mask[row, :11].any() and got.batch.mask[row].sum() == length
  # A row without a stop token has the reward that is set for it.
  finished = got.batch.finished
  assert not finished.all() and (got.batch.rewards[~finished] == -3).all()
  assert (got.batch.rewards[finished] > -2).all()


@pytest.mark.parametrize(
  ('wrong', 'words'),
  [
    (dict(preferences=2), 'preferences, got 2'),
    (dict(beginning=part(beginnings.uniform), demonstrations=1), 'with a beginning'),
    (dict(hints=1), r"hints=1; beginnings are .*'beginnings.annealed_chunks'"),
    (dict(samples_per_prompt=1, choose=part(picks.best_worst)), 'at least 2 rows'),
    (dict(choose=part(picks.rejection, rows=9)), '9 rows, but a group has 8'),
    (dict(choose=part(picks.distinct, pattern='[')), r"'\[' is no regular expression"),
  ],
)
def test_choices_that_cannot_be_are_refused(wrong, words):
  with pytest.raises(ValueError, match=words):
    bind(part(collect.Rollouts, **wrong), collect.TABLE)


STRATEGIES = {'best': 1.0, 'best_half': 0.5, 'best_worst': 0.5, 'power': 0.81 / 1.2}


@pytest.mark.parametrize(('strategy', 'share'), STRATEGIES.items())
def test_filtered_rows_are_drawn_by_their_rewards(strategy, share):
  rewards, valid = np.array([[0.1, 0.9, 0.5, 0.3, 0.2]]), np.ones((1, 5), bool)
  weights = picks.filter_weights(rewards, valid, strategy=strategy)
  np.testing.assert_allclose(weights.sum(), 1)
  assert weights[0, 1] == pytest.approx(share)
  order = np.array([3, 1, 4, 0, 2])
  turned = picks.filter_weights(rewards[:, order], valid, strategy=strategy)
  np.testing.assert_allclose(turned, weights[:, order])
  # Equal rewards, rows that failed, and groups in which all failed.
  got = picks.filter_weights(REWARDS, VALID, strategy=strategy)
  np.testing.assert_allclose(got[1], 0.25)
  np.testing.assert_allclose(got[2], [0, 0, 1, 0])
  assert not picks.filter_weights(REWARDS, VALID & False, strategy=strategy).any()
  many = chosen(part(picks.filtered, strategy=strategy), rewards=np.tile(rewards, (2000, 1)),
                valid=np.tile(valid, (2000, 1)))  # fmt: skip
  assert np.mean(many.rows == 1) == pytest.approx(share, abs=0.02) and many.usable.all()


def test_best_and_worst_of_two_rows_are_both():
  got = picks.filter_weights(np.array([[0.3, 0.1]]), np.ones((1, 2), bool))
  np.testing.assert_allclose(got, 0.5)


def test_rewards_of_filtered_rows_explain_true_scores_as_the_theory_says():
  """True scores are uniform in [0, 1]; the reward has the error 0.5 (1 - |2 q - 1|), so it is largest
  in the middle. The best rows alone are wrong ones that the reward model overrates."""
  random = np.random.default_rng(0)
  true = random.uniform(size=(100_000, 5))
  rewards = true + random.normal(size=true.shape) * 0.5 * (1 - np.abs(2 * true - 1))
  valid = np.ones(true.shape, bool)
  for strategy, want in {'': 0.50, 'best': 0.003, 'best_worst': 0.486, 'best_half': 0.440}.items():
    weights = (
      picks.filter_weights(rewards, valid, strategy=strategy) if strategy else np.ones(true.shape)
    )
    corr = np.cov(rewards.reshape(-1), true.reshape(-1), aweights=weights.reshape(-1))
    assert corr[0, 1] ** 2 / (corr[0, 0] * corr[1, 1]) == pytest.approx(want, abs=0.01)
