"""The trainer's side of a process that samples: starts it, asks it, kills it if it does not answer.

`vllm_worker.py` describes the messages. The process has its own interpreter and libraries; it gets ids
and folders of weights, and gives ids and log-probs.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

LARGEST = 2**31  # bytes of a reply
SHOWN = 5  # last lines of the output of a process that are part of an error


class EngineError(RuntimeError):
  """An engine did not do what it was asked to.

  Attributes:
    kind: 'Died', 'Timeout', 'BadReply', or 'Refused', where the engine itself says why.
  """

  def __init__(self, kind: str, reason: str):
    super().__init__(f'{kind}: {reason}')
    self.kind = kind


class Process:
  """A process of an engine, and the folder that weights are handed over in. It starts at once.

  Args:
    command: program and arguments; two file descriptors and the folder follow, see `vllm_worker.serve`.
    environment: variables besides those of this process.
    folder: where the folder is made; '' is /dev/shm, which is memory, where there is one.
  """

  def __init__(self, command: Sequence[str], environment: Mapping[str, str], folder: str):
    shared = '/dev/shm' if os.path.isdir('/dev/shm') else None
    self.folder = pathlib.Path(tempfile.mkdtemp(prefix='polgrad_engine_', dir=folder or shared))
    self.log = self.folder / 'output.txt'
    self.link, theirs = socket.socketpair()
    reading, self.lifeline = os.pipe()
    with theirs, self.log.open('wb') as output:
      fds = (theirs.fileno(), reading)
      try:
        self.child = subprocess.Popen(
          [*command, *map(str, fds), str(self.folder)],
          env=os.environ | dict(environment),
          stdin=subprocess.DEVNULL,
          stdout=output,
          stderr=output,
          pass_fds=fds,
          start_new_session=True,  # a group, which is killed as a whole
        )
      except OSError as error:
        shutil.rmtree(self.folder, ignore_errors=True)
        raise EngineError('Died', f'{command[0]} cannot be started ({error})') from error
      finally:
        os.close(reading)
    self.close = weakref.finalize(
      self, _end, self.child, self.link, self.lifeline, self.folder
    )  # also when the trainer ends

  def ask(self, seconds: float, **request: Any) -> dict:
    """Sends a request and waits for its reply.

    Args:
      seconds: that both may take.
      request: `do` and its arguments.

    Raises:
      EngineError: see its kinds. The process is then of no use and should be closed.
    """
    text, until = json.dumps(request).encode(), time.monotonic() + seconds
    try:
      self.link.settimeout(seconds)
      self.link.sendall(len(text).to_bytes(8, 'little') + text)
      size = int.from_bytes(self._read(8, until), 'little')
      if size > LARGEST:
        raise EngineError('BadReply', f'a reply of {size} bytes is announced')
      reply = json.loads(self._read(size, until))
    except TimeoutError:
      raise EngineError(
        'Timeout', f'no reply to {request["do"]!r} within {seconds:g} s{self.last_lines()}'
      ) from None
    except OSError as error:
      raise self._died(request['do']) from error
    except ValueError as error:
      raise EngineError('BadReply', f'to {request["do"]!r}: no JSON ({error})') from error
    if not isinstance(reply, dict):
      raise EngineError('BadReply', f'to {request["do"]!r}: {reply!r:.80}')
    if 'error' in reply:
      raise EngineError('Refused', f'{request["do"]!r}: {reply["error"]}{self.last_lines()}')
    return reply

  def _read(self, size: int, until: float) -> bytes:
    """The next bytes of the socket."""
    found = bytearray()
    while len(found) < size:
      self.link.settimeout(max(until - time.monotonic(), 1e-3))
      piece = self.link.recv(min(size - len(found), 2**20))
      if not piece:
        raise ConnectionResetError
      found += piece
    return bytes(found)

  def _died(self, doing: str) -> EngineError:
    """The error of a process that has ended, or has closed its socket."""
    with contextlib.suppress(subprocess.TimeoutExpired):
      self.child.wait(5)
    said = f'the process ended in {doing!r}, with exit code {self.child.returncode}'
    return EngineError('Died', said + self.last_lines())

  def last_lines(self) -> str:
    """The end of what the process has written, for errors."""
    lines = self.log.read_text(errors='replace').splitlines()[-SHOWN:] if self.log.exists() else []
    return '; its last lines:\n' + '\n'.join(lines) if lines else ''


def _end(child: subprocess.Popen, link: socket.socket, lifeline: int, folder: pathlib.Path) -> None:
  """Kills a process with all that it started, and removes its folder."""
  with contextlib.suppress(ProcessLookupError):
    os.killpg(child.pid, signal.SIGKILL)
  child.wait()
  link.close()
  os.close(lifeline)
  shutil.rmtree(folder, ignore_errors=True)
