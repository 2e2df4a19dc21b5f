"""Environments of the package verifiers, in this process: `pip install "polgrad[verifiers]"`.

An environment of verifiers drives its own rollout: it asks a client for the next turn, runs tools, says
when it is over, and scores. Here the client is a seat at which the sampler's policy sits: `step` hands
in what the policy said and waits until the environment asks again or has finished.
"""

import asyncio
import concurrent.futures
import dataclasses
import functools
import json
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from polgrad.data import verifiers_package
from polgrad.environments import calls
from polgrad.environments.base import Environment, Step
from polgrad.registry import Positive


class Talk:
  """An episode: a rollout of verifiers that waits for what the policy says.

  It cannot be copied, and an episode that was continued cannot be continued again from an earlier place.
  """

  def __init__(self, environment: Any, row: Mapping, timeout_s: float):
    self._timeout_s = timeout_s
    self._requests = asyncio.Queue()  # prompts; then the output of the rollout, or its error
    self._replies = asyncio.Queue()
    rollout = _rollout(environment, dict(row), self._requests, self._replies)
    task = asyncio.run_coroutine_threadsafe(rollout, loop())
    weakref.finalize(self, task.cancel)  # of a row that was not played to its end
    self.turns = 0
    self.read: list[dict] = []
    self.read = self._next()

  def say(self, text: str) -> list[dict] | dict:
    """Hands in a turn and returns the whole conversation that follows, or the output of the rollout."""
    self.turns += 1
    loop().call_soon_threadsafe(self._replies.put_nowait, text)
    return self._next()

  def _next(self) -> Any:
    waiting = asyncio.run_coroutine_threadsafe(self._requests.get(), loop())
    try:
      found = waiting.result(self._timeout_s)
    except concurrent.futures.TimeoutError as error:
      waiting.cancel()
      raise TimeoutError(f'no answer of the environment in {self._timeout_s:g} s') from error
    if isinstance(found, BaseException):
      raise RuntimeError(f'{type(found).__name__}: {found}') from found
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verifiers(Environment):
  """An environment of the package verifiers: a SingleTurnEnv, ToolEnv or other MultiTurnEnv.

  Its data set is the source `sources.verifiers`; its own code decides what the policy reads, when the
  episode is over and what the reward is, which the last turn gets. Weighted reward functions are summed
  by its rubric; each, and each metric, is a metric of the last turn.

  Tool calls are read in the forms that chat templates have (`environments/calls.py`).

  It runs in the process of the trainer, since its rollouts hold open objects. An answer may take
  `timeout_s` seconds, but code that blocks the event loop of verifiers stops all of its episodes.

  Refused: rewards that compare the rollouts of a group; environments that change what was said before
  (a row only grows), or whose setup changes the prompt of the data set.

  Attributes:
    load: name of an installed package of an environment, or `file.py:function` for your own.
    options: arguments of its `load_environment`, or of your function.
    timeout_s: seconds that an answer may take.
  """

  IN_PROCESS = True

  load: str
  options: dict = dataclasses.field(default_factory=dict)
  timeout_s: Positive = 60.0
  max_turns: int = 100  # the environment has its own limit

  @property
  def roles(self) -> tuple[str, ...]:
    """The role of its messages; some environments have others as well."""
    return ('tool',) if verifiers_package.load(self.load, self.options).tool_defs else ('user',)

  def reset(self, record: Mapping, seed: int) -> Talk:
    environment = verifiers_package.load(self.load, self.options)
    talk = Talk(environment, record['verifiers_row'], self.timeout_s)
    given = record.get('messages') or [{'role': 'user', 'content': record.get('prompt')}]
    if _said(talk.read) != _said(given):
      raise ValueError(
        'its setup changes the prompt of the data set, which the policy has read already'
      )
    return talk

  def step(self, state: Talk, text: str) -> Step:
    before = [*_said(state.read), ('assistant', _words(text))]
    found = state.say(text)
    if isinstance(found, dict):
      return Step(state, '', float(found['reward']), True, _numbers(found.get('metrics')))
    if _said(found)[: len(before)] != before:
      raise ValueError('the environment changes what was said before; here rows only grow')
    state.read = found
    return Step(state, [_message(m) for m in found[len(before) :]])


async def _rollout(environment, row, requests, replies) -> None:
  """Plays and scores one rollout; what becomes of it is the last thing in `requests`."""
  try:
    row.setdefault('example_id', 0)
    client = _seat(requests, replies)
    output = await environment.run_rollout(row, client, 'policy', {})
    failed = output.get('error')
    requests.put_nowait(RuntimeError(str(failed)) if failed else dict(output))
  except Exception as error:  # whatever the code of an environment raises
    requests.put_nowait(error)


def _seat(requests: asyncio.Queue, replies: asyncio.Queue) -> Any:
  """The client that passes prompts on, and waits for what the policy says."""

  class Seat(_seat_class()):
    async def get_response(self, prompt, model, sampling_args, tools=None, **kwargs):
      requests.put_nowait([_plain(message) for message in prompt])
      return _response(await replies.get())

  return Seat(None)


@functools.cache
def _seat_class() -> type:
  """A client of verifiers without an endpoint."""
  from verifiers.clients import Client

  unused = {name: _no_endpoint for name in Client.__abstractmethods__}
  return type('Seat', (Client,), unused)


def _no_endpoint(*args, **kwargs):
  raise RuntimeError('the policy is in this process: there is no endpoint')


def _response(text: str) -> Any:
  """What the policy said, as verifiers reads it."""
  from verifiers.types import Response, ResponseMessage, ToolCall

  called = [ToolCall(**_tool_call(i, call)) for i, call in enumerate(calls.calls(text))]
  message = ResponseMessage(
    content=_words(text),
    tool_calls=called or None,
    finish_reason='tool_calls' if called else 'stop',
    is_truncated=False,
  )
  return Response(id='', created=0, model='policy', message=message)


def _tool_call(number: int, call: calls.Call) -> dict[str, str]:
  """A call as verifiers reads it; one that cannot be read has the name ''."""
  arguments = call.arguments if isinstance(call.arguments, str) else json.dumps(call.arguments)
  name, arguments = ('', call.error) if call.error else (call.name, arguments)
  return {'id': f'call_{number}', 'name': name, 'arguments': arguments}


def _words(text: str) -> str:
  """What is said beside calls."""
  return text.partition('<tool_call>')[0].strip() if calls.calls(text) else text


def _plain(message: Any) -> dict:
  return dict(message) if isinstance(message, Mapping) else message.model_dump(exclude_none=True)


def _said(messages: Sequence[Mapping]) -> list[tuple[str, str]]:
  """Roles and words, by which conversations are compared."""
  return [(m['role'], _text(m.get('content'))) for m in messages]


def _message(message: Mapping) -> dict:
  """A message as chat templates read it."""
  kept = {name: message[name] for name in ('name', 'tool_call_id') if message.get(name)}
  return {'role': message['role'], 'content': _text(message.get('content')), **kept}


def _text(content: Any) -> str:
  """The words of a message, whose content may be a list of parts."""
  if content is None or isinstance(content, str):
    return content or ''
  parts = [dict(part) for part in content]
  others = {part.get('type') for part in parts} - {'text'}
  if others:
    raise ValueError(f'parts of messages that are no text: {sorted(map(str, others))}')
  return ''.join(part['text'] for part in parts)


def _numbers(metrics: Mapping | None) -> dict[str, float]:
  return {name: float(value) for name, value in (metrics or {}).items() if value is not None}


@functools.cache
def loop() -> asyncio.AbstractEventLoop:
  """The event loop of all episodes, in a separate thread."""
  made = asyncio.new_event_loop()
  threading.Thread(target=made.run_forever, name='verifiers', daemon=True).start()
  return made
