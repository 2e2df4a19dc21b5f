"""Tool calls in what a model says, in the forms that model families write.

* Hermes, Qwen 2.5 and Qwen 3: `<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>`
* Qwen3-Coder: `<tool_call><function=f><parameter=x>1</parameter></function></tool_call>`
* Llama 3: a turn that is `{"name": "f", "parameters": {"x": 1}}`, perhaps behind `<|python_tag|>`;
  behind that tag also `f.call(x=1)` or a program
* Mistral: `[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}]`, or `[TOOL_CALLS]f[ARGS]{"x": 1}`
* inline, for tiny models (see `tools.Tools`): `<1+1>`, or with several tools `<f 1+1>`

A turn may have several calls. One that cannot be read is a `Call` with an `error` for the model to read.
"""

import ast
import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

MOST = 16  # calls of a turn; of more, the rest is refused
PYTHON_TAG = '<|python_tag|>'
_HERMES = re.compile(r'<tool_call>(.*?)(?:</tool_call>|\Z)', re.DOTALL)
_FUNCTION = re.compile(r'<function=([^>\s]+)>(.*?)(?:</function>|\Z)', re.DOTALL)
_PARAMETER = re.compile(r'<parameter=([^>\s]+)>(.*?)(?:</parameter>|(?=<parameter=)|\Z)', re.DOTALL)
_MISTRAL = re.compile(r'\s*([\w.-]+)\s*\[ARGS\]')


class Call(NamedTuple):
  """A call that a turn asks for."""

  name: str  # of the tool; '' if it cannot be read
  arguments: Mapping[str, Any] | str  # by name; a text is the only argument of an inline call
  error: str = ''  # what is wrong with it


def spoken(text: str) -> str:
  """The text without its thoughts: what follows the last `</think>`; '' if a thought is not ended.

  >>> spoken('<think>12 * 7?</think>84'), spoken('<think>12 * 7?'), spoken('84')
  ('84', '', '84')
  """
  _, ended, after = text.rpartition('</think>')
  return '' if '<think>' in after else after if ended else text


def calls(text: str) -> list[Call]:
  """The calls of a turn in the forms of chat templates, in their order; [] if there are none.

  Calls within thoughts are not made.

  >>> calls('Let me see. <tool_call>{"name": "add", "arguments": {"x": 1}}</tool_call>')
  [Call(name='add', arguments={'x': 1}, error='')]
  >>> calls('{"name": "add", "parameters": {"x": 1}}')
  [Call(name='add', arguments={'x': 1}, error='')]
  >>> calls('<tool_call>add 1</tool_call>')[0].error
  'the call is no JSON: Expecting value at character 0'
  >>> calls('The answer is 4.')
  []
  """
  text = spoken(text)
  if '<tool_call>' in text:
    found = [call for part in _HERMES.findall(text) for call in _tagged(part)]
  elif '<function=' in text:
    found = _functions(text)
  elif '[TOOL_CALLS]' in text:
    found = [call for part in text.split('[TOOL_CALLS]')[1:] for call in _mistral(part)]
  elif PYTHON_TAG in text:
    found = _python(text.partition(PYTHON_TAG)[2].strip())
  elif _is_call(text.strip()):
    found = _objects(text.strip())
  else:
    found = []
  return _few(found)


def inline_calls(text: str, marks: tuple[str, str], names: list[str]) -> list[Call]:
  """The calls of a turn in the inline form.

  >>> inline_calls('12*7=<12*7>', ('<', '>'), ['calculate'])
  [Call(name='calculate', arguments='12*7', error='')]
  >>> inline_calls('<search who>', ('<', '>'), ['calculate', 'search'])
  [Call(name='search', arguments='who', error='')]

  Args:
    text: of the turn.
    marks: what begins and ends a call.
    names: the tools; if there is one, a call does not name it.
  """
  begin, end = map(re.escape, marks)
  found = []
  for said in re.findall(f'{begin}((?:(?!{begin}).)*?){end}', spoken(text), re.DOTALL):
    name, _, argument = said.strip().partition(' ')
    found.append(Call(names[0], said.strip()) if len(names) == 1 else Call(name, argument.strip()))
  return _few(found)


def _few(found: list[Call]) -> list[Call]:
  if len(found) <= MOST:
    return found
  return [
    *found[:MOST],
    Call('', {}, f'more than {MOST} calls in a turn: the others were not made'),
  ]


def _tagged(text: str) -> list[Call]:
  """The calls between a pair of <tool_call> tags."""
  return _functions(text) if '<function=' in text else _objects(text.strip())


def _is_call(text: str) -> bool:
  """Whether a turn is JSON of the form of a call."""
  keys = ('"name"', '"parameters"'), ('"name"', '"arguments"')
  return text.startswith('{') and any(all(key in text for key in both) for both in keys)


def _objects(text: str) -> list[Call]:
  """Calls that are JSON objects behind one another, with space, commas or semicolons between them."""
  found, at = [], 0
  while not found or at < len(text):
    try:
      value, at = json.JSONDecoder().raw_decode(text, at)
    except json.JSONDecodeError as error:
      return [*found, Call('', {}, f'the call is no JSON: {error.msg} at character {error.pos}')]
    except (ValueError, RecursionError) as error:  # a number of too many digits, or lists in lists
      return [*found, Call('', {}, f'the call cannot be read: {str(error)[:100]}')]
    found += [_call(one) for one in (value if isinstance(value, list) else [value])]
    at = re.compile(r'[\s,;]*').match(text, at).end()
  return found


def _call(value: Any) -> Call:
  """A call of what JSON says."""
  if not isinstance(value, dict) or not isinstance(value.get('name'), str):
    return Call('', {}, 'a call is an object with "name" and "arguments"')
  arguments = value.get('arguments', value.get('parameters', {}))
  if isinstance(arguments, str):  # JSON within JSON
    with contextlib.suppress(ValueError, RecursionError):
      arguments = json.loads(arguments)
  if not isinstance(arguments, dict):
    return Call(value['name'], {}, 'the arguments are an object, with a value for each name')
  return Call(value['name'], arguments)


def _functions(text: str) -> list[Call]:
  """Calls in the form of Qwen3-Coder. Values are texts, JSON where they are no texts."""
  found = []
  for name, body in _FUNCTION.findall(text):
    arguments = {key: value.strip('\n') for key, value in _PARAMETER.findall(body)}
    found.append(Call(name, arguments))
  return found or [
    Call('', {}, 'a call is <function=NAME> with <parameter=NAME> for each argument')
  ]


def _mistral(text: str) -> list[Call]:
  """What follows [TOOL_CALLS]: a list, or a name and its arguments."""
  named = _MISTRAL.match(text)
  if not named:
    return _objects(text.strip())
  read = _objects(f'{{"name": {json.dumps(named[1])}, "arguments": {text[named.end() :].strip()}}}')
  return read[:1]


def _python(text: str) -> list[Call]:
  """What follows Llama's python tag: JSON, `name.call(x="a")`, or a program."""
  if text.startswith(('{', '[')) and '"name"' in text:
    return _objects(text)
  written = re.fullmatch(r'(\w+)\.call\((.*)\)', text, re.DOTALL)
  if not written:
    return [Call('python', {'code': text})]
  try:
    call = ast.parse(f'f({written[2]})', mode='eval').body
    if call.args:
      raise ValueError('an argument without a name')
    return [Call(written[1], {k.arg: ast.literal_eval(k.value) for k in call.keywords})]
  except (ValueError, SyntaxError, TypeError, AttributeError, MemoryError, RecursionError) as error:
    return [Call(written[1], {}, f'the arguments cannot be read: {str(error)[:100]}')]
