"""Nim: its rules, its perfect strategy, and whose turn a reward belongs to."""

import itertools
import pickle

import pytest

from polgrad.data import sources
from polgrad.environments import nim


def record(position):
  return {'prompt': position, 'piles': [int(n) for n in position]}


def played(environment, position, texts, seed=0):
  """The steps of a game."""
  state, steps = environment.reset(record(position), seed), []
  for text in texts:
    steps.append(environment.step(state, text))
    state = steps[-1].state
  return steps


def test_the_rule_of_the_nim_sum_is_perfect_play_by_exhaustion():
  wins = {}
  for piles in itertools.product(range(4), repeat=3):  # every move leads to an earlier position
    winning = [m for m in nim.moves(piles) if not wins[nim.after(piles, m)]]
    wins[piles] = bool(winning)
    assert nim.best_moves(piles) == winning and wins[piles] == bool(nim.nim_sum(piles))


def test_in_self_play_the_winner_and_the_loser_have_their_rewards():
  steps = played(nim.Nim(), '210', ['b1', 'a1', 'a1'])
  assert [s.observation for s in steps] == ['200', '100', '']
  assert [s.player for s in steps] == [0, 1, 0]
  assert [s.done for s in steps] == [False, False, True]
  assert [s.reward for s in steps] == [0, 0, 1] and steps[-1].others == {1: -1}
  # 2 1 0 is won by a1 alone, 2 0 0 by a2, and 1 0 0 by the last stone.
  assert [s.metrics['best'] for s in steps] == [0, 0, 1]


@pytest.mark.parametrize('text', ['a4', 'd1', 'b0', '', 'no'])
def test_an_illegal_move_loses_and_the_other_player_has_not_won(text):
  (step,) = played(nim.Nim(), '320', [text])
  assert step.done and step.reward == -1 and step.others == {1: 0.0}
  assert step.metrics == {'illegal': 1.0}


def test_a_perfect_opponent_loses_only_to_perfect_play():
  environment = nim.Nim(opponent='perfect', loss=0.0)
  for seed in range(20):
    won = {'best': None, 'worst': None}
    for kind in won:
      state, done = environment.reset(record('323'), seed), False
      while not done:
        best = nim.best_moves(state.piles)
        others = [m for m in nim.moves(state.piles) if m not in best]
        pile, taken = (best if kind == 'best' else others or best)[0]
        state, _, reward, done, metrics = environment.step(state, f'{"abc"[pile]}{taken}')[:5]
      won[kind] = reward
      assert metrics['won'] == reward
    assert won == {'best': 1, 'worst': 0}


def test_a_random_opponent_repeats_with_the_seed_and_states_are_picklable():
  environment = nim.Nim(opponent='random')
  game = lambda seed: [s.observation for s in played(environment, '333', ['a1', 'b1'], seed)]
  assert game(1) == game(1) and len({tuple(game(seed)) for seed in range(9)}) > 3
  state = environment.reset(record('333'), 1)
  assert pickle.loads(pickle.dumps(state)) == state
  assert environment.step(state, 'a1') == environment.step(state, 'a1')


def test_wrong_settings_and_records_are_refused():
  with pytest.raises(ValueError, match=r"opponent 'selv'; valid: .*'self'"):
    nim.Nim(opponent='selv')
  with pytest.raises(ValueError, match=r'piles \(0, 0, 0\): expected numbers from 0 to 9'):
    nim.Nim().reset(record('000'), 0)


def test_the_positions_of_the_source_are_those_that_can_be_won():
  positions = sources.nim_positions(piles=3, most=3, winnable=True)
  assert len(positions) == 48 and positions[0] == record('001')
  assert all(nim.best_moves(row['piles']) for row in positions)
  assert len(sources.nim_positions(piles=2, most=5)) == 35
