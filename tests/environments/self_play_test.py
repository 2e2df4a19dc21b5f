"""Whose turn a reward belongs to, from the environment to the arrays that credit reads."""

import numpy as np

from polgrad import tasks
from polgrad.collect.drawn import with_turns
from polgrad.environments import nim
from polgrad.environments.base import Step
from polgrad.environments.episodes import Episode
from polgrad.environments.workers import checked
from polgrad.rewards.worker import Failure
from polgrad.types import Batch


def episode_of(steps):
  episode = Episode()
  for step in steps:
    episode.turns.append('')
    episode.answered(checked(step))
  return episode


def test_the_loss_of_the_player_who_moved_before_is_at_its_own_last_token():
  game, steps = nim.Nim(), []
  state = game.reset({'piles': (2, 1)}, 0)
  for move in ('a1', 'b1', 'a1'):
    steps.append(game.step(state, move))
    state = steps[-1].state
  episode = episode_of(steps)
  assert episode.rewards == [0, -1, 1] and episode.players == [0, 1, 0]
  mask = np.array([[0, 1, 1, 0, 1, 1, 0, 1, 1]], bool)
  tokens, segment_ids = np.arange(9)[None], np.ones((1, 9), np.int32)
  batch = Batch(tokens=tokens, segment_ids=segment_ids, mask=mask)
  batch = with_turns(batch, [episode])
  assert batch['turn_rewards'].tolist() == [[0, 0, 0, 0, 0, -1, 0, 0, 1]]
  assert batch['turn_players'].tolist() == [[0, 0, 0, 0, 1, 1, 0, 0, 0]]


def test_a_void_turn_is_marked_at_its_tokens():
  steps = [Step(0, observation='again', metrics={'void': 1.0}), Step(0, done=True)]
  mask = np.array([[0, 1, 1, 0, 1]], bool)
  batch = Batch(tokens=np.arange(5)[None], segment_ids=np.ones((1, 5), np.int32), mask=mask)
  assert with_turns(batch, [episode_of(steps)])['void_turns'].tolist() == [[0, 1, 1, 0, 0]]


def test_a_player_without_a_turn_has_no_reward():
  episode = episode_of([Step(None, done=True, reward=1.0, others={1: -1.0})])
  assert episode.rewards == [1.0]


def test_rewards_of_others_must_be_numbers():
  answer = checked(Step(None, done=True, others={1: float('nan')}))
  assert isinstance(answer, Failure) and answer.reason.startswith('others: ')


def test_the_task_is_evaluated_against_perfect_play():
  task = tasks.nim()
  assert task.environment.opponent == 'self'
  assert task.held_out_turns['environment'].opponent == 'perfect'
