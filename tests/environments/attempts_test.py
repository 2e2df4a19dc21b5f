"""Several attempts at one problem."""

import pytest

from polgrad.data import sources
from polgrad.environments.attempts import Attempts
from polgrad.registry import bind, part
from polgrad.rewards import verifiers

EXACT = bind(part(verifiers.exact_match), verifiers.TABLE)
RECORD = {'prompt': '1+1=', 'answer': '2'}


def answered(environment, texts, record=RECORD):
  state, steps = environment.reset(record, 0), []
  for text in texts:
    steps.append(environment.step(state, text))
    state = steps[-1].state
  return steps


def test_a_right_attempt_ends_the_episode_and_is_worth_less_the_later_it_comes():
  environment = Attempts(verifier=EXACT, max_turns=3, discount=0.5)
  steps = answered(environment, ['3', '4', '2'])
  assert [(s.reward, s.done) for s in steps] == [(0, False), (0, False), (0.25, True)]
  assert steps[0].observation == 'That is not right. Try again.'
  (step,) = answered(environment, ['2'])
  assert step.done and step.reward == 1 and step.metrics == {'score': 1, 'first_score': 1}


def test_every_attempt_is_made_and_has_its_reward_as_score_needs_it():
  environment = Attempts(verifier=EXACT, until_right=False, rewarded='every', feedback='{score}?')
  steps = answered(environment, ['2', '3'])
  assert [(s.reward, s.done) for s in steps] == [(1, False), (0, True)]
  assert steps[0].observation == '1.00?'


def test_a_task_of_reasoning_gym_is_tried_until_it_is_right():
  record = sources.reasoning_gym(task='chain_sum', size=1, seed=1, options={})[0]
  score = bind(part(verifiers.reasoning_gym_score, pattern=r'-?\d+'), verifiers.TABLE)
  right = record['entry']['answer']
  steps = answered(Attempts(verifier=score), ['It is 1000000.', f'It is {right}.'], record)
  assert [s.done for s in steps] == [False, True] and steps[1].reward == 1
  assert 0 <= steps[0].metrics['score'] < 1


def test_verifiers_that_read_more_than_the_attempt_are_refused():
  overlong = bind(part(verifiers.soft_overlong), verifiers.TABLE)
  with pytest.raises(ValueError, match=r"soft_overlong: .* and it reads \['length'\]"):
    Attempts(verifier=overlong)
  with pytest.raises(ValueError, match="rewarded 'first'; valid"):
    Attempts(verifier=EXACT, rewarded='first')
