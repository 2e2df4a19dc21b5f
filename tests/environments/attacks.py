"""An environment that does what the policy says, to itself."""

import contextlib
import ctypes
import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from polgrad.environments import Environment, Step


class Text(str):
  """A text that runs code where it is unpickled."""

  __slots__ = ()

  def __reduce__(self):
    return os._exit, (3,)


def fork_and_answer(state: int) -> Step:
  """The copy lives on and answers as well."""
  os.fork()
  return Step(state, f'fork {state}')


def speak_garbage(state: int) -> Step:
  """Writes into every open file, the pipe of the answers included."""
  for file in range(3, 30):
    with contextlib.suppress(OSError):
      os.write(file, b'\0\0\0\4junk')
  return Step(state)


def overwrite(state: int) -> Step:
  sys.stdout.write('x' * 10_000_000)
  os.write(2, b'y' * 10_000_000)
  return Step(state, 'printed')


ACTIONS = {
  'raise': lambda state: 1 / 0,
  'exit': lambda state: sys.exit(0),
  'loop': lambda state: any(iter(int, 1)),
  'late': lambda state: time.sleep(1000),
  'die': lambda state: os._exit(0),
  'segfault': lambda state: ctypes.string_at(0),
  'kill': lambda state: os.kill(os.getpid(), signal.SIGKILL),
  'fill': lambda state: Step(state, str(len(bytearray(2**33)))),
  'print': overwrite,
  'fork': fork_and_answer,
  'garbage': speak_garbage,
  'none': lambda state: None,
  'tuple': lambda state: (state, 'text', 0.0, False),
  'nan': lambda state: Step(state, reward=float('nan')),
  'word': lambda state: Step(state, reward='much'),
  'huge': lambda state: Step(state, 'x' * 1_000_001),
  'bytes': lambda state: Step(state, b'bytes'),
  'self': lambda state: Step(state, [{'role': 'assistant', 'content': 'mine'}]),
  'content': lambda state: Step(state, [{'role': 'tool', 'content': None}]),
  'done': lambda state: Step(state, done='no'),
  'metrics': lambda state: Step(state, metrics={'n': 'many'}),
  'lock': lambda state: Step(threading.Lock(), 'next'),
  'large': lambda state: Step(b'x' * 2000, 'next'),
  'code': lambda state: Step(state, Text('read me')),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attack(Environment):
  """Does what a turn says; another turn is added to the state and read back.

  Attributes:
    prepared: a file that gets the number of each process, when this is prepared; '' is none.
    then: what it does after that.
  """

  prepared: str = ''
  then: str = 'none'

  def prepare(self) -> None:
    if self.prepared:
      with open(self.prepared, 'a') as file:
        print(os.getpid(), file=file)
    ACTIONS[self.then](0)

  def reset(self, record: Mapping, seed: int) -> Any:
    if 'reset' in record:
      ACTIONS[record['reset']](0)
    return seed

  def step(self, state: Any, text: str) -> Step:
    if text in ACTIONS:
      return ACTIONS[text](state)
    return Step(state + 1, f'{text} {state}', reward=float(state))
