"""Tool calls are read in every form, and one that cannot be read is an error for the policy."""

import doctest
import re

import pytest

from polgrad.environments import calls
from polgrad.environments.calls import Call

ADD = Call('add', {'x': 1, 'y': [2, 'a']})
GET = Call('get', {'key': 'a b'})
HERMES = '<tool_call>\n{"name": "add", "arguments": {"x": 1, "y": [2, "a"]}}\n</tool_call>'
XML = '<tool_call>\n<function=get>\n<parameter=key>\na b\n</parameter>\n</function>\n</tool_call>'
LLAMA = '{"name": "add", "parameters": {"x": 1, "y": [2, "a"]}}'


def test_the_examples_of_the_docstrings_are_true():
  found = doctest.testmod(calls)
  assert found.attempted == 7 and not found.failed


@pytest.mark.parametrize(
  ('text', 'found'),
  [
    (HERMES, [ADD]),
    (f'First I add.\n{HERMES}\n{HERMES}', [ADD, ADD]),
    (HERMES.removesuffix('</tool_call>'), [ADD]),
    (HERMES.replace('{"x": 1, "y": [2, "a"]}', r'"{\"x\": 1, \"y\": [2, \"a\"]}"'), [ADD]),
    (f'<think>{HERMES}? no.</think>{XML}', [GET]),
    (XML, [GET]),
    (XML.replace('<tool_call>\n', '').replace('\n</tool_call>', ''), [GET]),
    (f'{XML}\n{HERMES}', [GET, ADD]),
    (LLAMA, [ADD]),
    (f' {LLAMA}; {LLAMA}\n', [ADD, ADD]),
    (f'<|python_tag|>{LLAMA}', [ADD]),
    ('<|python_tag|>get.call(key="a b")', [GET]),
    ('<|python_tag|>print(1)', [Call('python', {'code': 'print(1)'})]),
    (
      '[TOOL_CALLS] [{"name": "add", "arguments": {"x": 1, "y": [2, "a"]}}, '
      '{"name": "get", "arguments": {"key": "a b"}, "id": "123456789"}]',
      [ADD, GET],
    ),
    ('[TOOL_CALLS]add[ARGS]{"x": 1, "y": [2, "a"]}[TOOL_CALLS]get[ARGS]{"key": "a b"}', [ADD, GET]),
    ('{"name": "Ann", "age": 3}', []),
    ('A call is {"name": "f", "parameters": {}}.', []),
    ('<think>so', []),
    ('', []),
  ],
)
def test_calls_of_a_turn(text, found):
  assert calls.calls(text) == found


@pytest.mark.parametrize(
  ('text', 'why'),
  [
    (
      '<tool_call>{"name": "add", "arguments": {"x": 1}</tool_call>',
      'no JSON: Expecting .,. delim',
    ),
    ('<tool_call></tool_call>', 'no JSON: Expecting value'),
    ('<tool_call>[1]</tool_call>', 'an object with "name"'),
    ('<tool_call>{"arguments": {}}</tool_call>', 'an object with "name"'),
    ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', 'the arguments are an object'),
    ('<tool_call>{"name": "add", "arguments": "{"}</tool_call>', 'the arguments are an object'),
    ('<tool_call>' + '[' * 100_000 + '</tool_call>', 'cannot be read'),
    (
      '<tool_call>{"name": "f", "arguments": {"x": ' + '9' * 5000 + '}}</tool_call>',
      'cannot be read',
    ),
    ('{"name": "add", "parameters": {"x": 1}', 'no JSON'),
    ('<tool_call><function=></function></tool_call>', '<function=NAME>'),
    ('[TOOL_CALLS]add[ARGS]x=1', 'no JSON'),
    ('<|python_tag|>get.call("a b")', 'an argument without a name'),
    ('<|python_tag|>get.call(key=__import__("os"))', 'malformed node'),
  ],
)
def test_a_call_that_cannot_be_read_says_why(text, why):
  (found,) = calls.calls(text)
  assert re.search(why, found.error)


def test_too_many_calls_are_refused():
  found = calls.calls(HERMES * 100)
  assert found[: calls.MOST] == [ADD] * calls.MOST
  assert len(found) == calls.MOST + 1 and 'more than 16 calls' in found[-1].error


@pytest.mark.parametrize(
  ('text', 'found'),
  [
    ('<1+1>', [('calculate', '1+1')]),
    ('so <1+1> and <2*3>', [('calculate', '1+1'), ('calculate', '2*3')]),
    ('1<2 <1+1>', [('calculate', '1+1')]),
    ('1<2', []),
    ('1>2', []),
    ('<>', [('calculate', '')]),
  ],
)
def test_inline_calls_of_one_tool(text, found):
  assert [c[:2] for c in calls.inline_calls(text, ('<', '>'), ['calculate'])] == found
  doubled = text.replace('<', '<<').replace('>', '>>')
  assert [c[:2] for c in calls.inline_calls(doubled, ('<<', '>>'), ['calculate'])] == found
