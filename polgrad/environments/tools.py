"""The policy calls tools before it answers."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from polgrad.environments import calls, schemas, toolbox
from polgrad.environments.base import Environment, Step
from polgrad.environments.calls import Call
from polgrad.registry import AtLeastOne, NotNegative, Positive, unbound

Form = Literal['template', 'described', 'inline']
DESCRIPTION = """You can call these tools:
{tools}
To call one, write <tool_call>{{"name": NAME, "arguments": {{...}}}}</tool_call> and end your turn. \
The result comes in the next message. When you know the answer, say it without a call."""
INLINE = """You can call these tools within your answer:
{tools}
To call one, write {example}. Its result is inserted behind it, with {end} at its end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tools(Environment):
  """The policy calls tools; a turn without a call is its answer, and ends the episode.

  The reward is that of verifiers, which judge the last turn. A call that cannot be read, names no tool
  or has arguments that do not fit, and a tool that refuses its arguments, are told to the policy as a
  result that begins with `error:`. A tool that fails in another way makes the row invalid.

  Three forms of calls:

  * template: the chat template of the model describes the tools (`tools` of the record), and calls are
    in its form (`calls`). Results are messages of the role `tool`.
  * described: the system turn describes the tools and the form of calls, for a template that knows no
    tools. Results are user turns, between <tool_response> tags.
  * inline: a call is short, `<12*7>`, and its result and `>` are added word for word, `84>`. This is
    what a tiny model learns: two characters of its alphabet are enough. The sampler needs what ends a
    call among its `stop_strings`, so that a turn ends with it. With one tool a call is its first
    argument; with several, the name of the tool comes before. A record with messages gets a system turn
    that describes this; a `prompt` that is text does not. An alphabet needs the characters of results
    (of the calculator: digits and `.-+e`) and of `failed`: a result that cannot be encoded makes the row
    invalid.

  Metrics of each turn: `tool_calls` and `tool_errors`, their numbers; `void`, 1 for a turn with neither
  a call nor an answer: it says nothing beside thoughts, or lacks what an answer must have.
  """

  tools: Mapping[str, toolbox.Part]  # by the names that the policy calls
  form: Form = 'template'
  marks: tuple = ('<', '>')  # what begins and ends an inline call
  # What a system turn says of the tools, with `{tools}` in their place; '' is a text of polgrad.
  description: str = ''
  failed: str = 'error'  # what the policy reads of an inline call with an error
  answer: str = ''  # a text that every answer has, such as `<answer>`; '' is any text
  error_penalty: NotNegative = 0.0  # taken from the reward of a turn with an error
  void_penalty: NotNegative = 0.0  # taken from the reward of a void turn

  def __post_init__(self):
    if not self.tools:
      raise ValueError('tools: expected at least one')
    if len(self.marks) != 2 or not all(isinstance(m, str) and m for m in self.marks):
      raise ValueError(f'marks: expected two texts, what begins and ends a call, got {self.marks}')
    for name, tool in self.tools.items():
      if not schemas.parameters(tool) and self.form == 'inline':
        raise ValueError(f'tools.{name}: an inline call has an argument, and this tool has none')

  @property
  def IN_PROCESS(self) -> bool:
    """The calculator alone needs no process."""
    return all(unbound(tool) in toolbox.IN_PROCESS for tool in self.tools.values())

  @property
  def roles(self) -> tuple[str, ...]:
    return ('tool',) if self.form == 'template' else ('user',)

  @property
  def schemas(self) -> list[dict]:
    """Descriptions of the tools for a chat template."""
    return [schemas.schema(name, tool) for name, tool in self.tools.items()]

  def prepare(self) -> None:
    for tool in self.tools.values():
      getattr(tool, 'prepare', lambda: None)()

  def opened(self, record: Mapping) -> dict:
    """The record with the tools.

    Raises:
      ValueError: a record whose prompt is text, for which no template writes the tools.
    """
    if 'messages' not in record:
      if self.form == 'inline':
        return dict(record)
      raise ValueError(f'a prompt that is text has no place for tools of the form {self.form!r}')
    if self.form == 'template':
      return {**record, 'tools': [*(record.get('tools') or ()), *self.schemas]}
    return {**record, 'messages': with_system(record['messages'], self._description())}

  def _description(self) -> str:
    begin, end = self.marks
    told = [one['function'] for one in self.schemas]
    short = '\n'.join(f'{one["name"]}: {one["description"]}' for one in told)
    tools = short if self.form == 'inline' else '\n'.join(map(json.dumps, self.schemas))
    if self.description:
      return self.description.replace('{tools}', tools)
    if self.form == 'described':
      return DESCRIPTION.format(tools=tools)
    named = '' if len(told) == 1 else 'NAME '
    return INLINE.format(tools=tools, example=f'{begin}{named}...{end}', end=end)

  def reset(self, record: Mapping, seed: int) -> int:
    """The number of turns so far: the tools have no state."""
    return 0

  def step(self, state: int, text: str) -> Step:
    asked = self._calls(text)
    if not asked:
      void = not calls.spoken(text).strip() or self.answer not in calls.spoken(text)
      metrics = {'tool_calls': 0.0, 'tool_errors': 0.0, 'void': float(void)}
      reward = -self.void_penalty if void else 0.0
      return Step(state + 1, reward=reward, done=True, metrics=metrics)
    results = [self._result(call) for call in asked]
    errors = sum(failed for _, failed in results)
    return Step(
      state + 1,
      self._observation(asked, [text for text, _ in results]),
      reward=-self.error_penalty if errors else 0.0,
      metrics={'tool_calls': float(len(asked)), 'tool_errors': float(errors), 'void': 0.0},
    )

  def _calls(self, text: str) -> list[Call]:
    if self.form == 'inline':
      return calls.inline_calls(text, self.marks, [*self.tools])
    return calls.calls(text)

  def _result(self, call: Call) -> tuple[str, bool]:
    """What the policy reads of a call, and whether it is an error."""
    try:
      if call.error:
        raise ValueError(call.error)
      if call.name not in self.tools:
        raise ValueError(f'no tool {call.name!r:.80}; tools are {[*self.tools]}')
      tool = self.tools[call.name]
      return _text(tool(**schemas.fitted(tool, call.arguments))), False
    except toolbox.MISTAKES as error:
      return f'error: {error}' if self.form != 'inline' else self.failed, True

  def _observation(self, asked: Sequence[Call], results: Sequence[str]) -> str | list[dict]:
    if self.form == 'inline':
      return ''.join(f'{text}{self.marks[1]}' for text in results)
    if self.form == 'described':
      return '\n'.join(f'<tool_response>\n{text}\n</tool_response>' for text in results)
    return [
      # Templates of Mistral want an id of nine characters.
      {'role': 'tool', 'name': call.name, 'content': text, 'tool_call_id': f'call{n:05d}'}
      for n, (call, text) in enumerate(zip(asked, results))
    ]


def calculator(
  *, form: Form = 'template', marks: tuple = ('<', '>'), max_turns: AtLeastOne = 8
) -> Tools:
  """The tool `calculate` alone; for more settings use `Tools`.

  Args:
    form, marks, max_turns: as in `Tools`.
  """
  return Tools(
    tools={'calculate': toolbox.calculate}, form=form, marks=tuple(marks), max_turns=max_turns
  )


def search(
  *,
  corpus: str,
  field: str = 'text',
  results: AtLeastOne = 3,
  form: Form = 'template',
  max_turns: AtLeastOne = 8,
) -> Tools:
  """The tool `search` alone, over a file of texts; for more settings use `Tools` and `toolbox.Search`.

  Args:
    corpus, field, results: as in `toolbox.Search`.
    form, max_turns: as in `Tools`.
  """
  tool = toolbox.Search(corpus=corpus, field=field, results=results)
  return Tools(tools={'search': tool}, form=form, max_turns=max_turns)


def python(
  *,
  form: Form = 'template',
  timeout_s: Positive = 5.0,
  isolation: Literal['namespaces', 'limits'] = 'namespaces',
  max_turns: AtLeastOne = 8,
) -> Tools:
  """The tool `python` alone; for more settings use `Tools` and `toolbox.Python`.

  Args:
    form, max_turns: as in `Tools`.
    timeout_s, isolation: as in `toolbox.Python`.
  """
  tool = toolbox.Python(timeout_s=timeout_s, isolation=isolation)
  return Tools(tools={'python': tool}, form=form, max_turns=max_turns)


def with_system(messages: Sequence[Mapping], text: str) -> list[dict]:
  """The messages with a text in their system turn, behind what it says already."""
  if messages[0]['role'] != 'system':
    return [{'role': 'system', 'content': text}, *map(dict, messages)]
  first = {**messages[0], 'content': f'{messages[0]["content"]}\n\n{text}'}
  return [first, *map(dict, messages[1:])]


def _text(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
