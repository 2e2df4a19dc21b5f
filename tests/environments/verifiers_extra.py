"""Environments of the package verifiers. No part of `make test`, because the package is large:

pip install -e ".[verifiers]"
python -m pytest tests/environments/verifiers_extra.py
"""

import signal

import pytest

from polgrad.data import sources
from polgrad.environments.adapters.verifiers import Verifiers

FILE = f'{__file__}:'


def add(a: int, b: int) -> int:
  """Adds two numbers."""
  return a + b


def _data(questions):
  import datasets

  return datasets.Dataset.from_list([{'question': q, 'answer': a} for q, a in questions])


def tools(bonus: float = 0.5):
  """An environment with a tool, a reward of the answer, and one of having called the tool."""
  import verifiers as vf

  def right(completion, answer):
    return float(answer in completion[-1].content)

  def called(completion):
    return float(any(m.role == 'tool' for m in completion))

  return vf.ToolEnv(
    tools=[add],
    max_turns=3,
    dataset=_data([('17+25?', '42'), ('1+1?', '2')]),
    system_prompt='Use the tool.',
    rubric=vf.Rubric(funcs=[right, called], weights=[1.0, bonus]),
  )


def riddle(fault: str = ''):
  """An environment of several turns that hints until the word is said."""
  import verifiers as vf

  class Riddle(vf.MultiTurnEnv):
    @vf.stop
    async def found(self, state):
      trajectory = state['trajectory']
      return bool(trajectory) and state['answer'] in trajectory[-1]['completion'][-1].content

    async def env_response(self, messages, state, **kwargs):
      if fault == 'raises':
        raise vf.ToolError('broken')
      if fault == 'rewrites':
        messages[0].content = 'other words'
      return [vf.UserMessage(content=f'No. Turn {len(state["trajectory"])}.')]

    async def setup_state(self, state):
      if fault == 'setup':
        state['prompt'] = [vf.UserMessage(content='another prompt')]
      return state

  def turns(state):
    return 1.0 / len(state['trajectory'])

  return Riddle(max_turns=4, dataset=_data([('Say it.', 'word')]), rubric=vf.Rubric(funcs=[turns]))


def compared():
  """An environment whose reward compares rollouts."""
  import verifiers as vf

  def best(completions, **kwargs) -> list[float]:
    return [0.0 for _ in completions]

  return vf.SingleTurnEnv(dataset=_data([('?', '!')]), rubric=vf.Rubric(funcs=[best]))


def played(function, texts, row=0, **options):
  load = FILE + function
  environment = Verifiers(load=load, options=options, timeout_s=5)
  record = environment.opened(sources.verifiers(load=load, options=options)[row])
  state, steps = environment.reset(record, 0), []
  for text in texts:
    steps.append(environment.step(state, text))
    state = steps[-1].state
  return steps


def test_tools_are_called_and_the_rubric_judges_the_whole_conversation():
  call = '<tool_call>{"name": "add", "arguments": {"a": 17, "b": 25}}</tool_call>'
  first, second = played('tools', [f'I add. {call}', 'It is 42.'])
  assert not first.done and second.done and second.reward == 1.5
  assert [(m['role'], m['content']) for m in first.observation] == [('tool', '42')]
  assert second.metrics['right'] == 1 and second.metrics['add_calls'] == 1
  (direct,) = played('tools', ['It is 42.'], bonus=2.0)
  assert direct.done and direct.reward == 1.0 and direct.metrics['total_tool_calls'] == 0


def test_the_data_set_has_prompts_tools_and_answers():
  handler = signal.getsignal(signal.SIGTERM)
  record = sources.verifiers(load=FILE + 'tools')[1]
  assert signal.getsignal(signal.SIGTERM) == handler
  assert [m['role'] for m in record['messages']] == ['system', 'user']
  assert record['answer'] == '2' and record['tools'][0]['function']['name'] == 'add'


def test_a_call_that_is_no_json_or_has_no_tool_is_an_answer_of_the_tool():
  broken, missing, _ = played(
    'tools', ['<tool_call>{a: 1}</tool_call>', '<tool_call>{"name": "sub"}</tool_call>', '3'], row=1
  )
  assert [m['role'] for m in broken.observation + missing.observation] == ['tool', 'tool']
  assert 'sub' in missing.observation[0]['content']


def test_an_environment_of_several_turns_ends_itself():
  steps = played('riddle', ['a', 'b', 'the word'])
  assert [s.observation for s in steps[:2]] == [
    [{'role': 'user', 'content': f'No. Turn {n}.'}] for n in (1, 2)
  ]
  assert steps[-1].done and steps[-1].reward == pytest.approx(1 / 3)
  assert played('riddle', list('abcd'))[-1].done


@pytest.mark.parametrize(
  ('fault', 'why'),
  [
    ('raises', 'broken'),
    ('rewrites', 'changes what was said before'),
    ('setup', 'its setup changes the prompt'),
  ],
)
def test_what_cannot_be_played_token_by_token_is_an_error_and_never_a_reward(fault, why):
  with pytest.raises((ValueError, RuntimeError), match=why):
    played('riddle', ['a'], fault=fault)


def test_rewards_that_compare_rollouts_are_refused():
  with pytest.raises(ValueError, match='compare the rollouts of a group'):
    sources.verifiers(load=FILE + 'compared')
