"""Records of users' files in one form: `prompt` or `messages`, `answer`, `chosen` and `rejected`.

Fields that only some methods read are looked at where these lay records out (`batching`): `label`,
`completions` with `rewards`, and whether there are both of `chosen` and `rejected`.

| a file has | it becomes |
|---|---|
| `question` | `prompt` |
| `completion` | `answer` |
| `conversations`: [{from, value}] | `messages`: [{role, content}] |
| `prompt` as messages | `messages` |
| `prompt` and `completion` as messages | `messages`, a whole conversation |
| `chosen` and `rejected` as messages | texts of their last turns; what both begin with is the prompt |
| a number as `answer` | its text |
| `content` as a list of texts | the texts, joined |
| `tools` as JSON text | the list that it is; the chat template gets it |
| `id` | `record_id`, because `id` is the row in the file |
| `system` beside messages | the first message, a system turn |
"""

import json
import types
from collections.abc import Mapping, Sequence
from typing import Any

from polgrad.registry import suggest

TEXTS = ('prompt', 'answer', 'chosen', 'rejected')
ROLES = ('system', 'developer', 'user', 'assistant', 'tool', 'function', 'ipython', 'observation')
NAMES = {'human': 'user', 'gpt': 'assistant', 'bot': 'assistant', 'model': 'assistant'}
OTHER_NAMES = {
  'question': 'prompt',
  'completion': 'answer',
  'conversations': 'messages',
  'id': 'record_id',
}


def normalized(record: Any, fields: Mapping[str, str] = types.MappingProxyType({})) -> dict:
  """The record in the form above; other fields are kept.

  Args:
    record: a row of a file.
    fields: names that the fields get before -> their names in the file, see `mapped`.

  Raises:
    ValueError: a field of another type, or fields that do not go together; the message names it.
  """
  if not isinstance(record, Mapping):
    raise ValueError(f'expected an object, got {type(record).__name__}')
  fields = _renamed(mapped(record, fields))
  for name in ('chosen', 'rejected'):  # null is no completion
    if fields.get(name, '') is None:
      del fields[name]

  # What is asked: a text, or messages. Pairs without either have it in the turns that both begin with.
  as_prompt = isinstance(fields.get('prompt'), list) and 'messages' not in fields
  if as_prompt:
    fields['messages'] = fields.pop('prompt')
  paired = isinstance(fields.get('chosen'), list) and isinstance(fields.get('rejected'), list)
  asked = ('prompt' in fields) + ('messages' in fields)
  if asked > 1 or not (asked or paired):
    raise ValueError(f'expected either prompt or messages, got {sorted(record)}')
  if 'messages' in fields:
    fields['messages'] = _turns(fields['messages'], 'prompt' if as_prompt else 'messages')

  # What is answered: texts, or turns that continue the messages.
  if isinstance(fields.get('answer'), list):
    before, own = _before(fields), 'completion' if 'completion' in record else 'answer'
    fields.pop('prompt', None)
    fields['messages'] = [*before, *_turns(fields.pop('answer'), own)]
  if paired:
    fields |= _pair(fields)
  if isinstance(fields.get('answer'), int | float) and not isinstance(fields['answer'], bool):
    fields['answer'] = str(fields['answer'])
  if fields.get('tools') is not None:
    fields['tools'] = tools_of(fields['tools'])
  _begin_with_system(fields)
  for name in TEXTS:
    if not isinstance(fields.get(name, ''), str):
      raise ValueError(f'{name} must be text, got {fields[name]!r}')
  # Halves of surrogate pairs are no text; no tokenizer takes them.
  json.dumps(fields, ensure_ascii=False, default=str, skipkeys=True).encode('utf-8')
  return fields


def mapped(record: Mapping, fields: Mapping[str, str]) -> dict:
  """The record with some fields under other names; the others keep theirs.

  Args:
    fields: new name -> name in the record. A name in the record may be given twice. '' leaves a field
      out. A field that has a new name already is replaced.

  Raises:
    ValueError: a name that the record does not have; the message lists those that it has.
  """
  for name, own in fields.items():
    if own and own not in record:
      raise ValueError(f'fields.{name}={own}: there is no {own!r} here{suggest(own, record)}')
  kept = {k: v for k, v in record.items() if k not in fields.values() and k not in fields}
  return kept | {name: record[own] for name, own in fields.items() if own}


def _begin_with_system(fields: dict) -> None:
  """Puts the text in the field `system` before the messages; before a prompt, `sources.as_chat` does."""
  system = fields.get('system')
  if not isinstance(system, str | None):
    raise ValueError(f'system must be text, got {system!r}')
  if not system:
    fields.pop('system', None)
  elif 'messages' in fields:
    if fields['messages'][0]['role'] == 'system':
      raise ValueError('both the field system and the messages have a system turn')
    turn = {'role': 'system', 'content': fields.pop('system')}
    fields['messages'] = [turn, *fields['messages']]


def tools_of(tools: Any) -> list:
  """The tools that the assistant may call, a list of their descriptions, of this list or its JSON.

  Raises:
    ValueError: it is neither.
  """
  try:
    found = json.loads(tools) if isinstance(tools, str) else tools
  except ValueError:  # no JSON
    found = None
  if not isinstance(found, list):
    raise ValueError(f'tools must be a list, got {tools!r}')
  return found


def _renamed(record: Mapping) -> dict:
  """The fields under our names; a field that has our name already keeps it."""
  fields = dict(record)
  asked = {'prompt', 'messages'}
  for other, name in OTHER_NAMES.items():
    same = asked if name in asked else {name}
    if other in fields and not same & fields.keys():
      fields[name] = fields.pop(other)
  return fields


def _before(fields: Mapping) -> list[dict]:
  """The messages that a completion follows."""
  if 'prompt' in fields:
    if not isinstance(fields['prompt'], str):
      raise ValueError(f'prompt must be text, got {fields["prompt"]!r}')
    return [{'role': 'user', 'content': fields['prompt']}]
  return fields.get('messages', [])


def _pair(fields: Mapping) -> dict:
  """The texts of a pair that is given as messages, and the messages that both begin with."""
  chosen, rejected = (_turns(fields[name], name) for name in ('chosen', 'rejected'))
  before = _before(fields) or _common(chosen, rejected)
  if not before:
    raise ValueError(
      'chosen and rejected have no prompt: no field of that name, and no turns in common'
    )
  found = {} if 'prompt' in fields else {'messages': before}
  for name, turns in (('chosen', chosen), ('rejected', rejected)):
    rest = turns[len(before) :] if turns[: len(before)] == before else turns
    if len(rest) != 1 or rest[0]['role'] != 'assistant':
      raise ValueError(
        f'{name}: expected one assistant turn after the prompt, got {len(rest)} turns'
      )
    found[name] = rest[0]['content']
  return found


def _common(a: Sequence, b: Sequence) -> list:
  """The turns that two conversations begin with."""
  count = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
  return list(a[:count])


def _turns(turns: Any, name: str) -> list[dict]:
  """Messages as [{role, content, ...}] with known roles and texts."""
  if not isinstance(turns, list) or not turns:
    raise ValueError(f'{name} must be a list of {{role, content}}')
  return [_turn(turn, f'{name}[{i}]') for i, turn in enumerate(turns)]


def _turn(turn: Any, where: str) -> dict:
  if not isinstance(turn, Mapping):
    raise ValueError(f'{where} needs role and content, got {turn!r}')
  turn = dict(turn)
  for other, name in (('from', 'role'), ('value', 'content')):
    if other in turn and name not in turn:
      turn[name] = turn.pop(other)
  if 'role' not in turn or ('content' not in turn and not turn.get('tool_calls')):
    raise ValueError(f'{where} needs role and content, got {turn!r}')
  role = NAMES.get(turn['role'], turn['role']) if isinstance(turn['role'], str) else turn['role']
  if role not in ROLES:
    raise ValueError(f'{where}.role: unknown {role!r}; valid: {list(ROLES)}')
  return {**turn, 'role': role, 'content': _text(turn, f'{where}.content')}


def _text(turn: Mapping, where: str) -> str:
  """The content of a turn as text."""
  content = turn.get('content')
  if content is None and turn.get('tool_calls'):
    return ''
  if isinstance(content, list):
    parts = [c.get('text') if isinstance(c, Mapping) else c for c in content]
    if all(isinstance(p, str) for p in parts):
      return ''.join(parts)
  if not isinstance(content, str):
    raise ValueError(f'{where}: expected text, got {content!r}')
  return content
