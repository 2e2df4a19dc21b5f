"""Games of textarena as environments."""

import pickle
import random

import pytest

from polgrad.environments.adapters.textarena import TextArena, listed_move

RECORD = {'prompt': '', 'seed': 1}


def played(environment, texts, record=RECORD, seed=0):
  state, steps = environment.reset(record, seed), []
  for text in texts:
    steps.append(environment.step(state, text))
    state = steps[-1].state
  return steps


def test_a_game_of_one_player_ends_with_its_reward():
  environment = TextArena(game='GuessTheNumber-v0')
  opened = environment.opened({**RECORD, 'messages': [{'role': 'system', 'content': 'Be brief.'}]})
  assert [m['role'] for m in opened['messages']] == ['system', 'user']
  assert 'between 1 and 20' in opened['messages'][1]['content']
  steps = played(environment, ['[30]', '[1]', '[5]'])
  assert [s.done for s in steps] == [False, False, True] and steps[-1].reward == 1
  assert [s.metrics['invalid'] for s in steps] == [1, 0, 0]
  assert steps[1].observation == 'The target number is higher.'


def test_in_self_play_each_player_gets_its_result_and_reads_nothing_twice():
  environment = TextArena(game='TicTacToe-v0')
  steps = played(environment, ['[0]', '[3]', '[1]', '[4]', '[2]'])
  assert [s.player for s in steps] == [0, 1, 0, 1, 0]
  assert steps[-1].done and steps[-1].reward == 1 and steps[-1].others == {1: -1}
  assert 'You are Player 1' in steps[0].observation
  lines = steps[1].observation.splitlines()
  assert lines[0] == 'Player 1 placed their symbol (X) in cell 3.'
  assert lines[-1] == 'Player 0 is to move.' and lines.count('Current Board:') == 1


def test_an_opponent_moves_inside_and_the_policy_has_either_seat():
  environment = TextArena(game='TicTacToe-v0', opponent=listed_move)
  first, second = ({'prompt': '', 'seed': seed} for seed in (2, 3))
  begun = [environment.opened(r)['messages'][-1]['content'] for r in (first, second)]
  assert 'You are Player 0' in begun[0] and 'Player 0:' not in begun[0]
  assert 'You are Player 1' in begun[1] and 'Player 0: [' in begun[1]
  results = set()
  for seed in range(8):
    state, done = environment.reset(first, seed), False
    observation = begun[0]
    while not done:
      state, observation, reward, done, _, player, others = environment.step(
        state, listed_move(observation, seed)
      )
      assert player == 0 and not others
    results.add(reward)
  assert results >= {1.0, -1.0}


def test_what_a_game_draws_depends_on_the_seeds_alone():
  environment = TextArena(game='PigDice-v0')
  rolls = lambda seed: [s.observation for s in played(environment, ['[roll]'] * 4, seed=seed)]
  random.seed(5)
  before = random.getstate()
  assert rolls(1) == rolls(1) and rolls(1) != rolls(2)
  assert random.getstate() == before
  state = environment.reset(RECORD, 1)
  again = pickle.loads(pickle.dumps(state))
  assert (
    environment.step(state, '[roll]').observation == environment.step(again, '[roll]').observation
  )


def test_games_that_cannot_be_played_are_refused_by_name():
  with pytest.raises(
    ValueError, match=r"'TicTacTo-v0': textarena has no such game; near: \['TicTacToe"
  ):
    TextArena(game='TicTacTo-v0').opened(RECORD)
  with pytest.raises(ValueError, match='cannot be played by 3 players: AssertionError'):
    TextArena(game='TicTacToe-v0', players=3).opened(RECORD)
