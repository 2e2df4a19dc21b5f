"""Episodes: each row of a rollout talks to an environment, and a failure is never a reward of 0."""

import pytest

from polgrad.data import tokenizers
from polgrad.environments import Guess
from polgrad.environments.episodes import Episodes, failures
from polgrad.environments.workers import Pool

PROMPT = [{'id': 0, 'prompt': 'guess: '}]


def take(episodes, number):
  """The next replies by row."""
  replies = []
  while len(replies) < number:
    replies += episodes.take(wait=True)
  return dict(replies)


def test_rows_guess_until_they_are_right():
  t = tokenizers.byte().sampling('', ('.',))
  records = [{**PROMPT[0], 'answer': '7'}, {**PROMPT[0], 'answer': '2'}]
  episodes = Episodes(Pool(Guess()), t, records, samples_per_prompt=2, seeds=range(4))
  stop = t.stop_ids[0]
  episodes.ask(0, [*t.encode('5'), stop], True)
  episodes.ask(2, t.encode('5.'), True)
  assert take(episodes, 2) == {0: t.encode('>'), 2: t.encode('<')}
  episodes.ask(0, [*t.encode('7'), stop], True)
  episodes.ask(2, t.encode('2.'), True)
  assert take(episodes, 2) == {0: None, 2: None}
  first, _, third, _ = episodes.episodes
  assert (first.turns, first.observations, first.rewards) == (['5', '7'], ['>'], [0.0, 1.0])
  assert third.turns == ['5.', '2.'] and third.done and third.valid
  assert failures(episodes.episodes) == ({}, [])


def test_an_episode_ends_after_its_last_turn():
  t = tokenizers.byte()
  record = {**PROMPT[0], 'answer': '7'}
  episodes = Episodes(Pool(Guess(max_turns=2)), t, [record], samples_per_prompt=1, seeds=[0])
  for reply in (t.encode('>'), None):
    episodes.ask(0, t.encode('1'), False)
    assert take(episodes, 1) == {0: reply}
  assert episodes.episodes[0].rewards == [0.0, 0.0] and not episodes.episodes[0].done


def test_nobody_waits_for_a_row_that_has_not_asked():
  episodes = Episodes(Pool(Guess()), tokenizers.byte(), PROMPT, samples_per_prompt=1, seeds=[0])
  with pytest.raises(RuntimeError, match='no row has asked'):
    episodes.take(wait=True)
  assert episodes.take(wait=False) == []
