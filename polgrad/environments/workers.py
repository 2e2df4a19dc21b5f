"""Runs the calls of an environment: in other processes with limits, or in this one.

What a call returns is looked at where it was made, and only plain values reach the trainer. A call that
raises, hangs, dies or returns what makes no sense gives a `Failure`, which is never a reward of 0.

`rewards/worker.py` says what the processes keep out. What a call prints there is thrown away.
"""

import json
from collections.abc import Mapping
from concurrent import futures
from typing import Any, NamedTuple

import cloudpickle
import numpy as np

from polgrad.environments.base import Environment, Step
from polgrad.rewards import worker
from polgrad.rewards.worker import Failure, words

LARGEST_OBSERVATION = 1_000_000  # characters
LARGEST_STATE = 64 * 2**20  # bytes, where states travel between processes
MOST_METRICS = 100  # of a turn


class Reply(NamedTuple):
  """A `Step` whose values are plain."""

  state: Any  # bytes, where states travel between processes
  observation: str | list[dict]
  reward: float
  done: bool
  metrics: dict[str, float]
  player: int = 0
  others: Mapping[int, float] = {}


class Pool:
  """Answers calls of one environment, several at the same time.

  The processes start with the first calls, or `begin`, and live until `close`; one that was stopped is
  replaced.

  Args:
    environment: a frozen dataclass, see `Environment`.
    workers: processes, and so calls at the same time.
    timeout_s: seconds that one call may take; a process that takes longer is killed with all that it
      has started.
    memory_gib: address space of each process; 0: no limit.
    isolate: False runs every call in this process, without limits. So does an environment that says of
      itself that it needs no process (`IN_PROCESS`).

  Raises:
    ValueError: a limit that is not positive.
    TypeError: an environment that cannot be sent to another process.
  """

  def __init__(
    self,
    environment: Environment,
    *,
    workers: int = 2,
    timeout_s: float = 10.0,
    memory_gib: float = 4.0,
    isolate: bool = True,
  ):
    if not timeout_s > 0 or workers < 1 or not memory_gib >= 0:
      raise ValueError(
        f'limits of the environment: {timeout_s} s and {workers} workers must be positive, and '
        f'{memory_gib} GiB at least 0'
      )
    self.environment = environment
    self.isolated = isolate and not environment.IN_PROCESS
    if not self.isolated:
      _prepare(environment)
    else:
      self._workers = worker.Workers(workers, dumps(environment), timeout_s, memory_gib)
      self._threads = futures.ThreadPoolExecutor(workers, 'environment')

  def begin(self, rows: int) -> None:
    """Starts processes for a number of rows in the background; one that cannot start raises at its
    first call."""
    if self.isolated:
      self._workers.begin(rows)

  def reset(self, record: Mapping, seed: int) -> futures.Future:
    """The state in which an episode begins, or a `Failure`, when it is there."""
    return self._submit('reset', dict(record), int(seed))

  def step(self, state: Any, text: str) -> futures.Future:
    """The `Reply` to a turn, or a `Failure`, when it is there.

    Args:
      state: what an earlier reset or reply has given.
    """
    return self._submit('step', state, text)

  def _submit(self, *call: Any) -> futures.Future:
    if self.isolated:
      return self._threads.submit(self._workers.ask, ('environment', call))
    return ready(respond(self.environment, call, travels=False))

  def close(self) -> None:
    """Ends the processes, after the calls that are being answered."""
    if self.isolated:
      self._threads.shutdown(cancel_futures=True)
      self._workers.stop()


def ready(value: Any) -> futures.Future:
  """A future that has this value already."""
  future = futures.Future()
  future.set_result(value)
  return future


def _prepare(environment: Environment) -> None:
  """Prepares it in this process; an error of a kind that says nothing by itself gets a name."""
  try:
    environment.prepare()
  except (ValueError, TypeError, OSError, ImportError, RuntimeError):
    raise
  except Exception as error:  # whatever an environment raises
    raise RuntimeError(f'prepare: {type(error).__name__}: {words(error)}') from error


def dumps(environment: Environment) -> bytes:
  """The environment as bytes for a worker; what is written in a config file travels whole.

  Raises:
    TypeError: it cannot be sent.
  """
  try:
    for kind in type(environment).__mro__:
      worker.send_whole(kind.__module__)
    return cloudpickle.dumps((respond, {'environment': environment}, True))
  except Exception as error:  # whatever the objects that it refers to raise
    raise TypeError(
      f'{type(environment).__name__}: its calls run in other processes, and it cannot be sent there '
      f'({words(error)}): let it refer to no locks, files or other open objects, or set '
      'isolate_environment=False'
    ) from error


def respond(environment: Environment, call: tuple, travels: bool = True) -> Any:
  """Makes one call; every error becomes a `Failure`.

  Args:
    call: ('reset', record, seed) or ('step', state, text).
    travels: whether states are bytes outside this function.
  """
  return worker.contained(lambda: _called(environment, *call, travels=travels))


def _called(environment: Environment, kind: str, given: Any, other: Any, travels: bool) -> Any:
  """What a call returns: a state, a `Reply` or a `Failure`."""
  pack = _packed if travels else lambda state, environment: state
  if kind == 'reset':
    return pack(environment.reset(given, other), environment)
  state = cloudpickle.loads(given) if travels else given
  reply = checked(environment.step(state, other))
  if isinstance(reply, Failure):
    return reply
  packed = pack(reply.state, environment)
  return packed if isinstance(packed, Failure) else reply._replace(state=packed)


def _packed(state: Any, environment: Environment) -> bytes | Failure:
  """The state as bytes."""
  try:
    packed = cloudpickle.dumps(state)
  except Exception as error:
    return Failure(
      'NotPicklable',
      f'a state of {type(environment).__name__} cannot be sent between processes ({words(error)}): let '
      'it hold plain data, or set isolate_environment=False, which runs it in the process of the run',
    )
  if len(packed) > LARGEST_STATE:
    return Failure('TooLarge', f'a state of {len(packed)} bytes; the limit is {LARGEST_STATE}')
  return packed


def checked(step: Any) -> Reply | Failure:
  """What an environment returned, as plain values; a `Failure` if it makes no sense."""
  if not isinstance(step, Step):
    return Failure('NotAStep', f'step returned {type(step).__name__}, expected environments.Step')
  reward = worker.number(step.reward)
  if isinstance(reward, Failure):
    return reward._replace(reason=f'reward: {reward.reason}')
  if not isinstance(step.done, bool | np.bool_):
    return Failure('NotAStep', f'done must be True or False, got {type(step.done).__name__}')
  metrics = _metrics(step.metrics)
  others = _others(step.others)
  observation = '' if step.done else _observation(step.observation)
  for value in (metrics, others, observation):
    if isinstance(value, Failure):
      return value
  return Reply(step.state, observation, reward, bool(step.done), metrics, int(step.player), others)


def _others(rewards: Any) -> dict[int, float] | Failure:
  """Rewards of other players."""
  found = {}
  for player, value in dict(rewards).items():
    found[int(player)] = worker.number(value)
    if isinstance(found[int(player)], Failure):
      return found[int(player)]._replace(reason=f'others: {found[int(player)].reason}')
  return found


def _metrics(metrics: Any) -> dict[str, float] | Failure:
  if not isinstance(metrics, Mapping) or len(metrics) > MOST_METRICS:
    return Failure('NotAStep', f'metrics must be at most {MOST_METRICS} numbers by name')
  found = {}
  for name, value in metrics.items():
    value = worker.number(value)
    if not isinstance(name, str) or isinstance(value, Failure):
      return Failure('NotAStep', f'metrics: {name!r:.80} must be a text and have a finite number')
    found[str(name)] = value
  return found


def _observation(observation: Any) -> str | list[dict] | Failure:
  """The observation as a text or as messages of plain values."""
  if not isinstance(observation, str):
    wrong = _wrong_messages(observation)
    if wrong:
      return Failure('NotAnObservation', wrong)
    observation = [dict(message) for message in observation]
  written = json.dumps(observation)
  size = len(observation) if isinstance(observation, str) else len(written)
  if size > LARGEST_OBSERVATION:
    return Failure(
      'TooLarge', f'an observation of {size} characters; the limit is {LARGEST_OBSERVATION}'
    )
  return json.loads(written)  # plain values, also of subclasses


def _wrong_messages(messages: Any) -> str:
  """What is wrong with messages, '' if nothing is."""
  if not isinstance(messages, list | tuple) or not messages:
    return f'an observation is a text or messages, got {messages!r:.80}'
  for message in messages:
    if not isinstance(message, Mapping) or not isinstance(message.get('content'), str):
      return f'a message of an observation has a role and a text as content, got {message!r:.80}'
    if not isinstance(message.get('role'), str) or message['role'] == 'assistant':
      return f'a message of an observation is not from {message.get("role")!r:.80}'
  return ''
