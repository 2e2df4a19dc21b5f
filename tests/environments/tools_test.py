"""Tools: what the policy reads of a call, by every form, and what an error is."""

import doctest
import json
import pathlib
import subprocess
import sys
from typing import Literal

import numpy as np
import pytest

from polgrad import environments
from polgrad.environments import Tools, schemas, toolbox
from polgrad.registry import bind, part

ROOT = pathlib.Path(__file__).parents[2]


def shout(text: str, times: int = 1, ends: Literal['!', '?'] = '!') -> str:
  """Repeats a text
  loudly.

  Longer explanation.

  Args:
    text: what is said;
      more of it.
    times: how often.
  """
  if times > 3:
    raise ValueError('too loud')
  if text == 'break':
    raise RuntimeError('broken')
  return text.upper() * times + ends


def scaled(x: float, *, by: float = 2.0) -> float:
  """Multiplies a number."""
  return x * by


def hermes(name, **arguments):
  return f'<tool_call>{json.dumps({"name": name, "arguments": arguments})}</tool_call>'


BOTH = Tools(tools={'shout': shout, 'calculate': toolbox.calculate})
ONE = Tools(tools={'calculate': toolbox.calculate}, form='inline')


def test_the_examples_of_the_docstrings_are_true():
  for module, number in ((schemas, 4), (toolbox, 1)):
    found = doctest.testmod(module)
    assert found.attempted == number and not found.failed


def test_a_template_gets_the_signature_and_the_docstring():
  made = schemas.schema('shout', shout)['function']
  assert made['description'] == 'Repeats a text loudly.'
  assert made['parameters'] == {
    'type': 'object',
    'properties': {
      'text': {'type': 'string', 'description': 'what is said; more of it.'},
      'times': {'type': 'integer', 'description': 'how often.'},
      'ends': {'type': 'string', 'enum': ['!', '?']},
    },
    'required': ['text'],
  }
  for tool, name in ((toolbox.Python(), 'code'), (toolbox.Search(corpus='x'), 'query')):
    made = schemas.schema('t', tool)['function']
    assert made['parameters']['required'] == [name] and made['description']


def test_a_record_gets_the_tools_in_the_place_of_its_form():
  record = {'id': 0, 'messages': [{'role': 'user', 'content': 'a'}]}
  assert [t['function']['name'] for t in BOTH.opened(record)['tools']] == ['shout', 'calculate']
  described = Tools(tools=BOTH.tools, form='described').opened(record)['messages']
  assert '"name": "shout"' in described[0]['content'] and described[1:] == record['messages']
  both = Tools(tools=BOTH.tools, form='inline', marks=('<<', '>>')).opened(
    {'id': 0, 'messages': [{'role': 'system', 'content': 'Be kind.'}, *record['messages']]}
  )
  assert both['messages'][0]['content'].startswith('Be kind.\n\nYou can')
  assert 'write <<NAME ...>>' in both['messages'][0]['content']
  own = Tools(tools=BOTH.tools, form='inline', description='Say <a>:\n{tools}').opened(record)
  assert own['messages'][0]['content'].startswith('Say <a>:\nshout: Repeats a text loudly.\n')
  assert ONE.opened({'id': 0, 'prompt': '1+1='}) == {'id': 0, 'prompt': '1+1='}
  with pytest.raises(ValueError, match='no place for tools'):
    BOTH.opened({'id': 0, 'prompt': '1+1='})


def test_results_of_several_calls_are_messages_in_their_order():
  step = BOTH.step(0, f'I ask. {hermes("shout", text="a")}{hermes("calculate", expression="2*3")}')
  assert [(m['role'], m['name'], m['content']) for m in step.observation] == [
    ('tool', 'shout', 'A!'),
    ('tool', 'calculate', '6'),
  ]
  assert {len(m['tool_call_id']) for m in step.observation} == {9}
  assert step.metrics == {'tool_calls': 2.0, 'tool_errors': 0.0, 'void': 0.0} and not step.done


@pytest.mark.parametrize(
  ('text', 'why'),
  [
    ('<tool_call>shout</tool_call>', 'error: the call is no JSON'),
    (hermes('whisper', text='a'), "error: no tool 'whisper'; tools are"),
    (hermes('shout'), "error: missing argument 'text'; arguments are"),
    (hermes('shout', text='a', loud=1), "error: unknown argument 'loud'"),
    (hermes('shout', text=['a']), "error: argument 'text' must be of the type string"),
    (
      hermes('shout', text='a', times='many'),
      "error: argument 'times' must be of the type integer",
    ),
    (hermes('shout', text='a', times=True), "error: argument 'times' must be of the type integer"),
    (hermes('shout', text='a', ends='.'), "error: argument 'ends' must be one of"),
    (hermes('shout', text='a', times=9), 'error: too loud'),
    (hermes('calculate', expression='import os'), 'error: no arithmetic'),
    (hermes('calculate', expression='1/0'), 'error: division by zero'),
  ],
)
def test_an_error_of_the_policy_is_told(text, why):
  step = BOTH.step(0, text)
  assert step.observation[0]['content'].startswith(why)
  assert step.metrics['tool_errors'] == 1.0 and not step.done


def test_a_tool_that_fails_is_no_error_of_the_policy():
  with pytest.raises(RuntimeError, match='broken'):
    BOTH.step(0, hermes('shout', text='break'))


WRITTEN = (
  *(hermes('shout', text='a', times=2), '<|python_tag|>calculate.call(expression="1+1")'),
  '<tool_call><function=shout><parameter=text>a</parameter></function></tool_call>',
  '{"name": "calculate", "parameters": {"expression": "2**3"}}',
  *('[TOOL_CALLS]calculate[ARGS]{"expression": "1"}', '<think>a</think><12*7>'),
)
BITS = (
  *(
    '<',
    '>',
    '{',
    '}',
    '"',
    '[',
    ']',
    ':',
    ',',
    '**',
    '(',
    ')',
    '9' * 400,
    '\ud800',
    '\0',
    'é',
    'if',
  ),
  *(
    '<tool_call>',
    '</tool_call>',
    '<function=',
    '</function>',
    'times',
    'null',
    'true',
    '1e999',
    'NaN',
  ),
)


@pytest.mark.filterwarnings('error')
def test_no_turn_is_a_failure():
  random = np.random.default_rng(0)
  for _ in range(1500):
    text = list(random.choice(WRITTEN))
    for _ in range(random.integers(6)):
      place = random.integers(len(text) + 1)
      cut = random.integers(5) if random.random() < 0.4 else 0
      text[place : place + cut] = [] if cut else list(random.choice(BITS))
    for tools in (BOTH, ONE):
      tools.step(0, ''.join(text))


def test_texts_of_numbers_are_numbers():
  xml = '<tool_call><function=shout><parameter=text>7</parameter><parameter=times>2</parameter>'
  assert BOTH.step(0, xml).observation[0]['content'] == '77!'
  tools = Tools(tools={'scaled': bind(part(scaled, by=3.0), toolbox.TABLE)})
  assert tools.step(0, hermes('scaled', x=2)).observation[0]['content'] == '6.0'


@pytest.mark.parametrize(
  ('text', 'void'),
  [('It is 4.', False), ('', True), ('<think>4?</think> ', True), ('<think>4? ', True)],
)
def test_a_turn_without_a_call_is_the_answer(text, void):
  step = BOTH.step(0, text)
  assert step.done and step.metrics['void'] == float(void)


def test_an_answer_may_need_a_text_and_penalties_are_taken_from_the_turn():
  tools = Tools(tools=BOTH.tools, answer='<answer>', void_penalty=0.1, error_penalty=0.2)
  assert tools.step(0, 'It is 4.').reward == -0.1
  assert tools.step(0, '<answer>4</answer>').reward == 0.0
  assert tools.step(0, '<think><answer></think>4').reward == -0.1
  assert tools.step(0, hermes('whisper')).reward == -0.2


def test_a_short_call_is_answered_word_for_word():
  assert ONE.step(0, '12*7=<12*7>').observation == '84>'
  assert ONE.step(0, '<1/0>').observation == 'error>'
  assert Tools(tools=ONE.tools, form='inline', failed='?').step(0, '<1/0>').observation == '?>'
  assert ONE.step(0, '84').done
  several = Tools(tools=BOTH.tools, form='inline', marks=('<<', '>>'))
  assert several.step(0, '<<shout a>> <<calculate 1+1>>').observation == 'A!>>2>>'


def test_a_calculator_alone_needs_no_process():
  assert ONE.IN_PROCESS and not BOTH.IN_PROCESS


def test_a_described_tool_answers_in_a_user_turn():
  tools = Tools(tools=BOTH.tools, form='described')
  assert tools.step(0, hermes('shout', text='a')).observation == (
    '<tool_response>\nA!\n</tool_response>'
  )


def test_tools_are_parts_of_a_configuration():
  spec = part(Tools, tools={'search': part(toolbox.Search, corpus='x.txt'), 'run': part(shout)})
  made = bind(spec, environments.TABLE)
  assert made.tools['search'] == toolbox.Search(corpus='x.txt')
  assert made.step(0, hermes('run', text='a')).observation[0]['content'] == 'A!'


def test_single_tools_have_names():
  find = lambda name, **knobs: bind({'name': f'environments.{name}', **knobs}, environments.TABLE)
  assert find('calculator', form='inline', marks=['<<', '>>']) == Tools(
    tools={'calculate': toolbox.calculate}, form='inline', marks=('<<', '>>')
  )
  assert find('search', corpus='x.txt').tools == {'search': toolbox.Search(corpus='x.txt')}
  assert find('python', timeout_s=1.0).tools == {'python': toolbox.Python(timeout_s=1.0)}


@pytest.mark.parametrize(
  ('settings', 'why'),
  [
    ({'tools': {}}, 'at least one'),
    ({'tools': {'f': shout}, 'marks': ('<',)}, 'two texts'),
    ({'tools': {'f': lambda: 1}, 'form': 'inline'}, 'this tool has none'),
    ({'tools': {'f': lambda x: 1}, 'form': 'inline'}, 'needs a type out of'),
  ],
)
def test_settings_that_make_no_sense_are_refused(settings, why):
  with pytest.raises(ValueError, match=why):
    Tools(**settings)


@pytest.mark.parametrize(
  ('expression', 'value'),
  [
    ('2 + 3 * 4', '14'),
    ('7/2', '3.5'),
    ('10 ÷ 4 × 2 − 1', '4'),  # noqa: RUF001
    ('1,200 + 1', '1201'),
    ('$5 * 3 =', '15'),
    ('2**0.5', '1.414213562'),
    ('9**99', '2.951266543e+94'),
    ('1e400-1e400', ValueError),
    ('(-8)**0.5', ValueError),
    ('9**9**9', ValueError),
    ('(1,2)', ValueError),
    ('', ValueError),
    ('()' * 10_000, ValueError),
    ('10**1000/3', ArithmeticError),
    ('x + 1', ValueError),
  ],
)
def test_the_calculator(expression, value):
  if isinstance(value, str):
    assert toolbox.calculate(expression) == value
  else:
    with pytest.raises(value):
      toolbox.calculate(expression)


def test_a_search_finds_texts_by_their_words(tmp_path):
  texts = ['The cat sat on the mat.', 'Dogs bark at night.', 'A dog and a cat. ' * 100]
  lines, plain = tmp_path / 'corpus.jsonl', tmp_path / 'corpus.txt'
  lines.write_text('\n'.join(json.dumps({'body': t}) for t in texts))
  plain.write_text('\n\n'.join(texts))
  for search in (
    toolbox.Search(corpus=str(lines), field='body', characters=30),
    toolbox.Search(corpus=str(plain), characters=30),
  ):
    found = search('cats and the cat').splitlines()
    assert sorted(line[4:11] for line in found) == ['A dog a', 'The cat']
    assert [len(line) for line in found if 'dog' in line] == [len('[1] ') + 30 + len(' [...]')]
    assert search('zebra') == search('') == 'nothing found'
  for content, why in (
    ('', 'no texts'),
    ('{"text": 1}', 'line 1: .* must be text'),
    ('[', 'line 1'),
  ):
    lines.write_text(content)
    with pytest.raises(ValueError, match=why):
      toolbox.read_corpus(str(lines), 'text')


def test_a_search_does_not_start_jax(tmp_path):
  """In a worker it would take the devices of the trainer."""
  (tmp_path / 'corpus.txt').write_text('The cat sat on the mat.')
  code = (
    'import sys; from polgrad.environments import toolbox; '
    f'print(toolbox.Search(corpus="{tmp_path}/corpus.txt")("cat"), "jax" in sys.modules)'
  )
  ran = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
  assert ran.stdout == '[1] The cat sat on the mat. False\n', ran.stderr
