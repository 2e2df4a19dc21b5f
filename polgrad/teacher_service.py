"""Serves the log-probs of a model, so that runs elsewhere can distil it.

    python -m polgrad.teacher_service --path=TEACHER --port=8000
    python -m polgrad.train --config=experiments/run.py:method=gkd,...,teacher=TEACHER,teacher_url=URL

It answers POST /v1/completions with the ids of a prompt and `prompt_logprobs`, as vLLM does: of each id
but the first its log-prob, and those of the likeliest tokens at its place. It writes no text. Requests
that arrive together are forwarded together. The first line of the output has the URL.
"""

import http.server
import json
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from polgrad import cli, teachers
from polgrad.rewards.worker import Failure

_PATH = flags.DEFINE_string('path', '', 'Hugging Face folder of the model.')
_NAME = flags.DEFINE_string('name', '', 'Name under which it is served; default: the folder.')
_HOST = flags.DEFINE_string(
  'host', '127.0.0.1', 'Address to listen at; 0.0.0.0: all of the machine.'
)
_PORT = flags.DEFINE_integer('port', 8000, 'Port; 0: a free one.', lower_bound=0)
_BATCH = flags.DEFINE_integer('batch', 16, 'Rows that are forwarded at once.', lower_bound=1)
_TOP = flags.DEFINE_integer('top', 20, 'Most listed tokens of a request.', lower_bound=1)
_LENGTH = flags.DEFINE_integer(
  'max_length', 0, 'Tokens that a row may have; 0: the limit of the model.', lower_bound=0
)
_DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Of the computation.')
_FSDP = flags.DEFINE_integer('fsdp', 1, 'Devices that hold the parameters.', lower_bound=1)

LARGEST = 2**26  # bytes of a request


class Refused(Exception):
  """A request that cannot be answered, with its HTTP status."""

  def __init__(self, status: int, reason: str):
    super().__init__(reason)
    self.status = status


class Question(NamedTuple):
  """What a request asks."""

  ids: list[int]
  top: int  # listed tokens


def question_of(request: Any, name: str, vocabulary: int, top: int) -> Question:
  """Reads a request.

  Args:
    name: of the model that is served.
    vocabulary: ids that it has.
    top: most tokens that it lists.

  Raises:
    Refused: says what is wrong.
  """
  if not isinstance(request, dict):
    raise Refused(400, 'expected a JSON object')
  if request.get('model') != name:
    raise Refused(404, f'no model {request.get("model")!r}; there is {name!r}')
  ids, count = request.get('prompt'), request.get('prompt_logprobs')
  whole = lambda x: isinstance(x, int) and not isinstance(x, bool)
  if not (isinstance(ids, list) and ids and all(whole(i) and 0 <= i < vocabulary for i in ids)):
    raise Refused(400, f'prompt must be a list of ids from 0 to {vocabulary - 1}')
  if not (whole(count) and 0 <= count <= top):
    raise Refused(400, f'prompt_logprobs must be a number from 0 to {top}')
  if request.get('max_tokens', 1) != 1 or request.get('temperature', 1) != 1:
    raise Refused(400, 'max_tokens and temperature must be 1: this service writes no text')
  return Question(ids, count)


def reply_of(question: Question, said: teachers.Answer) -> dict[str, Any]:
  """The reply, in the form of vLLM; numbers of float32 are read back exactly."""
  number = lambda x: {'logprob': float(str(x))}
  entries: list[dict | None] = [None]
  for place, own in enumerate(question.ids[1:]):
    entry = {str(own): number(said['logp'][place])}
    if question.top:
      listed = zip(said['top_ids'][place], said['top_log_probs'][place])
      entry |= {str(i): number(x) for i, x in list(listed)[: question.top]}
    entries.append(entry)
  return {'choices': [{'index': 0, 'text': '', 'prompt_logprobs': entries}]}


def asking_together(ask: teachers.Ask, most: int) -> Callable[[Question], futures.Future]:
  """Makes the function that queues a question; a thread answers those that wait, `most` at a time."""
  waiting: queue.Queue = queue.Queue()

  def work() -> None:
    while True:
      taken = [waiting.get()]
      while len(taken) < most and not waiting.empty():
        taken.append(waiting.get())
      names = frozenset({'logp'})
      if any(question.top for question, _ in taken):
        names |= {'top_ids', 'top_log_probs'}
      try:
        found = ask([question.ids for question, _ in taken], names, 1.0)
      except Exception as error:  # those who wait must hear of it
        found = [Failure(type(error).__name__, str(error))] * len(taken)
      for (_, future), one in zip(taken, found):
        future.set_result(one)

  threading.Thread(target=work, daemon=True).start()

  def add(question: Question) -> futures.Future:
    future: futures.Future = futures.Future()
    waiting.put((question, future))
    return future

  return add


def make_server(
  model: teachers.Elsewhere, *, name: str, vocabulary: int, batch: int, address: Sequence
) -> http.server.ThreadingHTTPServer:
  """An HTTP server of a model that listens at an address (host, port); `serve_forever` starts it."""
  add = asking_together(model.ask, batch)

  def answer(path: str, body: bytes) -> dict[str, Any]:
    if path != '/v1/completions':
      raise Refused(404, f'no {path}; there is /v1/completions')
    try:
      request = json.loads(body)
    except (ValueError, RecursionError) as error:
      raise Refused(400, f'no JSON: {error}') from error
    question = question_of(request, name, vocabulary, model.entries['top_ids'])
    said = add(question).result()
    if isinstance(said, Failure):
      raise Refused(400 if said.kind == 'TooLong' else 500, f'{said.kind}: {said.reason}')
    return reply_of(question, said)

  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def do_POST(self):
      try:
        size = int(self.headers.get('Content-Length') or 0)
        if not 0 <= size <= LARGEST:
          raise Refused(413, f'a request has at most {LARGEST} bytes')
        status, said = 200, answer(self.path, self.rfile.read(size))
      except Refused as error:
        status, said = error.status, {'error': {'message': str(error)}}
        self.close_connection = True
      text = json.dumps(said).encode()
      self.send_response(status)
      self.send_header('Content-Type', 'application/json')
      self.send_header('Content-Length', str(len(text)))
      self.end_headers()
      self.wfile.write(text)

    def log_message(self, *arguments):
      pass

  return http.server.ThreadingHTTPServer(tuple(address), Handler)


def main(argv: list[str]) -> None:
  cli.start(argv, needed=())
  with cli.refusals():
    if not _PATH.value:
      raise ValueError('name the folder of the model: --path=FOLDER')
    settings = dict(max_length=_LENGTH.value, dtype=_DTYPE.value, fsdp=_FSDP.value, top=_TOP.value)
    model = teachers.on_devices(
      path=_PATH.value, batch=_BATCH.value, devices=_FSDP.value, **settings
    )
    names = frozenset({'logp', 'top_ids', 'top_log_probs'})
    model.ask([[0, 1]], names, np.float32(1))  # reads the parameters before anybody waits for them
    name = _NAME.value or _PATH.value
    vocabulary = model.unembedding.config.vocab_size
    place = (_HOST.value, _PORT.value)
    served = dict(name=name, vocabulary=vocabulary, batch=_BATCH.value, address=place)
    server = make_server(model, **served)
  print(f'{name} at http://{_HOST.value}:{server.server_address[1]}/v1', flush=True)
  server.serve_forever()


if __name__ == '__main__':
  cli.run(main)
