"""A language model behind an OpenAI-compatible HTTP endpoint that judges completions.

`score` gives each completion a mark, `compare` says which of two completions is better, and `critique`
which words of a completion are good or bad. All ask
`URL/chat/completions`, as vLLM, SGLang, llama.cpp and hosted models serve it, for all rows of a batch at
once. A request that gets no answer after all retries, or an answer without a verdict, is a `Failure` of
its row. The row is then invalid, and never gets a reward of 0.

The key of the endpoint is read from an environment variable when a batch is judged. It is in no
configuration, and cut out of all messages. Only the standard library is used, because there is one kind
of request, and the rules by which it is tried again are in this module in any case.
"""

import dataclasses
import email.utils
import json
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Annotated, Any

from polgrad.registry import AtLeastOne, Count, NotNegative, Positive, Range, table
from polgrad.rewards import spans
from polgrad.rewards.worker import Failure, words

SCORE = """Rate the answer of an assistant.

[Conversation]
{prompt}

[Answer]
{completion}

[Task]
How correct, helpful and clear is the answer? Reply with one whole number from 1 (very bad) to 10 (very
good), and with nothing else."""
COMPARE = """Compare the answers of two assistants.

[Conversation]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

[Task]
Which answer is more correct, helpful and clear? Neither the order of the answers nor their length is a
reason. Reply with one letter, A or B, and with nothing else."""
CRITIQUE = """Criticise the answer of an assistant.

[Conversation]
{prompt}

[Answer]
{completion}

[Task]
Quote the parts of the answer that are good, and those that are wrong or bad, word for word and as short
as possible. Reply with JSON and with nothing else: {{"good": ["..."], "bad": ["..."]}}"""
# A reply that is a number, or a marked number in a longer reply.
NUMBER = r'\A[^\w-]*(-?\d+(?:\.\d+)?)(?:\s*/\s*\d+)?\W*\Z|\[\[(-?\d+(?:\.\d+)?)\]\]'
# A reply that is a letter, or a marked letter in a longer reply.
LETTER = r'\A\W*([AB])\W*\Z|\[\[([AB])\]\]'
LARGEST = 2**22  # bytes of a reply that are read by default
LONGEST_WAIT_S = 60.0  # between two tries, also if the server asks for more
# Answers of a server that may be another one when it is asked again.
TRANSIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})


def score(
  completions: Sequence[str],
  records: Sequence[Mapping],
  prompt: Sequence[str],
  *,
  url: str = 'http://localhost:8000/v1',
  model: str = '',
  template: str = SCORE,
  pattern: str = NUMBER,
  low: float = 1.0,
  high: float = 10.0,
  key_variable: str = '',
  temperature: NotNegative = 0.0,
  max_tokens: AtLeastOne = 16,
  timeout_s: Positive = 60.0,
  retries: Count = 4,
  concurrency: Annotated[int, Range(at_least=1, at_most=256)] = 16,
  batch_s: Positive = 600.0,
  options: Mapping = {},
) -> list[float | Failure]:
  """(mark - low) / (high - low), in [0, 1]: what a judge says of each completion.

  Args:
    completions: the texts, without stop token.
    records: those of the prompts.
    prompt: the texts that the model was given.
    url: of the endpoint, up to `/v1`, such as http://localhost:8000/v1.
    model: name of the judge at the endpoint.
    template: the question, with {prompt}, {completion} and fields of the record: {record[answer]}.
    pattern: regular expression; the last group of its last match that is not empty is the mark.
    low, high: the marks that mean 0 and 1; one outside is a failure.
    key_variable: name of the environment variable with the key of the endpoint; '' sends none.
    temperature: of the judge; 0 is its most likely reply.
    max_tokens: of a reply.
    timeout_s: seconds for one try.
    retries: further tries after an error that may pass.
    concurrency: requests at the same time.
    batch_s: seconds for all requests of a batch; those that are not answered then have failed.
    options: further fields of the request, such as {'seed': 1}; null takes a field out.

  Returns:
    A number in [0, 1] or a `Failure` for each completion.

  Raises:
    ValueError: low is not below high, or the environment variable is not set.
  """
  if not low < high:
    raise ValueError(f'judge.score: low={low} must be below high={high}')
  client = Client(
    *(url, model, key_variable, temperature, max_tokens),
    *(timeout_s, retries, concurrency, batch_s, options),
  )
  rows = zip(prompt, completions, records, strict=True)
  asked = [_filled(template, prompt=p, completion=c, record=r) for p, c, r in rows]

  def mark(reply: dict) -> float | Failure:
    text = _text(reply)
    found = _verdict(text, pattern)
    if found is None:
      return _no_verdict(text)
    value = float(found)
    if not low <= value <= high:
      return Failure('NoVerdict', f'the mark {value} is not between {low} and {high}')
    return (value - low) / (high - low)

  return [x if isinstance(x, Failure) else _read(mark, x) for x in client.ask(asked)]


score.batched = True


def compare(
  first: Sequence[str],
  second: Sequence[str],
  record: Sequence[Mapping],
  prompt: Sequence[str],
  *,
  url: str = 'http://localhost:8000/v1',
  model: str = '',
  template: str = COMPARE,
  pattern: str = LETTER,
  logprobs: bool = True,
  key_variable: str = '',
  temperature: NotNegative = 0.0,
  max_tokens: AtLeastOne = 16,
  timeout_s: Positive = 60.0,
  retries: Count = 4,
  concurrency: Annotated[int, Range(at_least=1, at_most=256)] = 16,
  batch_s: Positive = 600.0,
  options: Mapping = {},
) -> list[float | Failure]:
  """P(first beats second) = (P(A | first, second) + 1 - P(A | second, first)) / 2 (arXiv:2402.04792).

  Each pair is judged in both orders, because judges prefer a place. P(A | ...) is
  exp(l_A) / (exp(l_A) + exp(l_B)), with the log-probs of the two letters at the place of the verdict,
  if the endpoint returns them; otherwise it is 1 if the verdict is A and 0 if it is B. Two
  equal texts get 1/2 without being asked. If one order fails, the pair has failed.

  Args:
    first, second: the two completions of each pair.
    record: that of the prompt.
    prompt: the text that the model was given.
    template: the question, with {prompt}, {first}, {second} and fields of the record: {record[answer]}.
      The judge answers A or B.
    pattern: regular expression; the last group of its last match that is not empty is the letter.
    logprobs: ask for log-probs; some endpoints refuse requests that do.
    url, model, key_variable, temperature, max_tokens, timeout_s, retries, concurrency, batch_s, options:
      as in `score`.

  Returns:
    A number in [0, 1] or a `Failure` for each pair.

  Raises:
    ValueError: the environment variable is not set.
  """
  client = Client(
    *(url, model, key_variable, temperature, max_tokens),
    *(timeout_s, retries, concurrency, batch_s, options),
  )
  pairs = list(zip(first, second, record, prompt, strict=True))
  differ = [i for i, (one, other, _, _) in enumerate(pairs) if one != other]
  asked = []
  for i in differ:
    one, other, r, p = pairs[i]
    asked.append(_filled(template, prompt=p, first=one, second=other, record=r))
    asked.append(_filled(template, prompt=p, first=other, second=one, record=r))
  replies = client.ask(asked, logprobs=logprobs)
  read = [
    x if isinstance(x, Failure) else _read(lambda x: _probability(x, pattern), x) for x in replies
  ]
  found: list[float | Failure] = [0.5] * len(pairs)
  for i, forward, backward in zip(differ, read[::2], read[1::2], strict=True):
    failed = [x for x in (forward, backward) if isinstance(x, Failure)]
    found[i] = failed[0] if failed else (forward + 1 - backward) / 2
  return found


compare.batched = True


def critique(
  completions: Sequence[str],
  records: Sequence[Mapping],
  prompt: Sequence[str],
  *,
  url: str = 'http://localhost:8000/v1',
  model: str = '',
  template: str = CRITIQUE,
  good: float = 1.0,
  bad: float = -1.0,
  key_variable: str = '',
  temperature: NotNegative = 0.0,
  max_tokens: AtLeastOne = 512,
  timeout_s: Positive = 60.0,
  retries: Count = 4,
  concurrency: Annotated[int, Range(at_least=1, at_most=256)] = 16,
  batch_s: Positive = 600.0,
  options: Mapping = {},
) -> list[list[tuple[int, int, float]] | Failure]:
  """Scores of the parts of completions that a judge quotes as good or as bad (Text2Grad,
  arXiv:2505.22338).

  Every place of a quote in the completion has its score; where quotes overlap, the least one. Quotes
  that are not in the completion are left out. A reply without a JSON object with `good` and `bad`, lists
  of texts, is a failure of its row.

  Args:
    template: the question, with {prompt}, {completion} and fields of the record: {record[answer]}.
    good: score of what is good.
    bad: score of what is bad.
    completions, records, prompt, url, model, key_variable, temperature, max_tokens, timeout_s, retries,
      concurrency, batch_s, options: as in `score`.

  Returns:
    For each completion its parts (start, end, score), see `spans`, or a `Failure`.

  Raises:
    ValueError: the environment variable is not set.
  """
  client = Client(
    *(url, model, key_variable, temperature, max_tokens),
    *(timeout_s, retries, concurrency, batch_s, options),
  )
  rows = zip(prompt, completions, records, strict=True)
  asked = [_filled(template, prompt=p, completion=c, record=r) for p, c, r in rows]

  def parts(completion: str, reply: dict) -> list[spans.Span] | Failure:
    text = _text(reply)
    try:
      said = json.loads(text[text.index('{') : text.rindex('}') + 1])
      lists = (said['good'], good), (said['bad'], bad)
      if not all(isinstance(quotes, list) for quotes, _ in lists):  # a text would be its letters
        return _no_verdict(text)
    except (ValueError, KeyError, TypeError, RecursionError):
      return _no_verdict(text)
    places = lambda quote, score: spans.places(completion, str(quote), score)
    return spans.least([part for quotes, s in lists for q in quotes for part in places(q, s)])

  return [
    x if isinstance(x, Failure) else _read(lambda reply, c=c: parts(c, reply), x)
    for c, x in zip(completions, client.ask(asked), strict=True)
  ]


critique.batched = True


def _filled(template: str, **fields: Any) -> str | Failure:
  """The question; a record without a field that the template names is a `Failure` of its row."""
  try:
    return template.format(**fields)
  except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
    return Failure('Template', f'{type(error).__name__}: {words(error)}')


def _probability(reply: dict, pattern: str) -> float | Failure:
  """P(A) of a reply, by its log-probs or its verdict."""
  text = _text(reply)
  letter = _verdict(text, pattern)
  if letter not in ('A', 'B'):
    return _no_verdict(text)
  # The last token that is the verdict; servers write it with a space or a bracket before it.
  steps = ((reply['choices'][0].get('logprobs') or {}).get('content')) or []
  steps = [s for s in steps if _letter_of(s) == letter]
  mass = {'A': 0.0, 'B': 0.0}
  for entry in steps[-1].get('top_logprobs') or () if steps else ():
    if _letter_of(entry) in mass:
      mass[_letter_of(entry)] += math.exp(min(float(entry['logprob']), 0.0))
  if not sum(mass.values()) > 0:
    return float(letter == 'A')
  return mass['A'] / sum(mass.values())


def _letter_of(entry: Mapping) -> str:
  return re.sub(r'[\W_▁Ġ]', '', str(entry['token']))


def _verdict(text: str, pattern: str) -> str | None:
  """The last group that is not empty of the last match; None: no match, or no group in it."""
  matches = list(re.finditer(pattern, text))
  groups = [g for g in matches[-1].groups() if g] if matches else []
  return groups[-1] if groups else None


def _no_verdict(text: str) -> Failure:
  return Failure('NoVerdict', f'the judge replied {text[:80]!r}')


def _text(reply: dict) -> str:
  return str(reply['choices'][0]['message']['content'] or '')


def _read(what: Callable[[dict], float | Failure], reply: dict) -> float | Failure:
  """What is read of a reply; one of another form than the API's is a `Failure`."""
  try:
    return what(reply)
  except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
    return Failure('BadReply', f'{type(error).__name__}: {words(error)}')


@dataclasses.dataclass(frozen=True)
class Client:
  """Requests to one endpoint; all but the last three fields are the arguments of `score`."""

  url: str
  model: str
  key_variable: str
  temperature: float
  max_tokens: int
  timeout_s: float
  retries: int
  concurrency: int
  batch_s: float
  options: Mapping
  path: str = '/chat/completions'  # behind the URL
  name: str = 'judge'  # what errors call it
  largest: int = LARGEST  # bytes of a reply that are read

  def ask(
    self, questions: Sequence[str | Failure], *, logprobs: bool = False
  ) -> list[dict | Failure]:
    """The reply to each question, or why there is none; what is a failure already stays one."""
    bodies = [q if isinstance(q, Failure) else self._body(q, logprobs) for q in questions]
    return self.send(bodies)

  def send(self, bodies: Sequence[Mapping | Failure]) -> list[dict | Failure]:
    """The reply to each request, or why there is none; what is a failure already stays one.

    Raises:
      ValueError: the environment variable of the key is not set, or the URL is none of HTTP.
    """
    if not re.match(r'https?://[^/\s]', self.url):
      raise ValueError(f'{self.name}: url={self.url!r} must begin with http:// or https://')
    key = os.environ.get(self.key_variable, '') if self.key_variable else ''
    if self.key_variable and not key:
      raise ValueError(f'{self.name}: the environment variable {self.key_variable} is not set')
    if not bodies:
      return []
    ended = threading.Event()
    deadline = time.monotonic() + self.batch_s
    threads = futures.ThreadPoolExecutor(min(self.concurrency, len(bodies)))
    try:
      one = lambda body: self._persist(json.dumps(dict(body)).encode(), key, deadline, ended)
      running = [x if isinstance(x, Failure) else threads.submit(one, x) for x in bodies]
      return [x if isinstance(x, Failure) else self._result(x, deadline) for x in running]
    finally:  # after an interruption, no thread waits for its next try
      ended.set()
      threads.shutdown(wait=False, cancel_futures=True)

  def _result(self, running: futures.Future, deadline: float) -> dict | Failure:
    try:  # a second more, so that a try that ends at the deadline says why it failed
      return running.result(timeout=max(deadline - time.monotonic(), 0.0) + 1.0)
    except TimeoutError:
      return Failure('Timeout', f'the batch was not judged in {self.batch_s} s')

  def _body(self, question: str, logprobs: bool) -> dict:
    content = {
      'model': self.model,
      'messages': [{'role': 'user', 'content': question}],
      'temperature': self.temperature,
      'max_tokens': self.max_tokens,
    }
    if logprobs:
      content |= {'logprobs': True, 'top_logprobs': 10}
    content |= self.options
    return {k: v for k, v in content.items() if v is not None}

  def _persist(
    self, body: bytes, key: str, deadline: float, ended: threading.Event
  ) -> dict | Failure:
    """One question, asked again after errors that may pass."""
    failure = Failure('Timeout', f'the batch was not judged in {self.batch_s} s')
    for wait in _waits(self.retries):
      left = deadline - time.monotonic()
      if left <= 0 or ended.is_set():
        return failure
      reply, asked_to_wait = self._post(body, key, min(self.timeout_s, left))
      if not isinstance(reply, Failure):
        return reply
      failure = Failure(reply.kind, reply.reason.replace(key, '***') if key else reply.reason)
      if asked_to_wait < 0:  # the same request would fail again
        return failure
      ended.wait(max(min(max(wait, asked_to_wait), deadline - time.monotonic()), 0.0))
    return failure

  def _post(self, body: bytes, key: str, seconds: float) -> tuple[dict | Failure, float]:
    """One try: the reply or failure, and the seconds to wait; -1: another try has no use."""
    import http.client  # here, because workers of verifiers import this module and must start quickly
    import urllib.error
    import urllib.request

    class Refuse(urllib.request.HTTPRedirectHandler):  # another host would get the key
      def redirect_request(self, *args: Any) -> None:
        return None

    headers = {'Content-Type': 'application/json', 'User-Agent': 'polgrad'}
    if key:
      headers['Authorization'] = f'Bearer {key}'
    request = urllib.request.Request(
      self.url.rstrip('/') + self.path, data=body, headers=headers, method='POST'
    )
    late = time.monotonic() + seconds
    try:
      with urllib.request.build_opener(Refuse).open(request, timeout=seconds) as response:
        text = b''.join(_pieces(response, late, self.largest))
      reply = json.loads(text)
      if isinstance(reply, dict):
        return reply, 0.0
      return Failure('BadReply', f'expected an object, got {type(reply).__name__}'), 0.0
    except urllib.error.HTTPError as error:
      with error:
        said = error.read(500).decode(errors='replace')
      failure = Failure(f'HTTP{error.code}', f'{error.reason}: {said}')
      return failure, _retry_after(error.headers) if error.code in TRANSIENT else -1.0
    except TimeoutError:
      return Failure('Timeout', f'no reply in {seconds:.0f} s'), 0.0
    except urllib.error.URLError as error:
      kind = 'Timeout' if isinstance(error.reason, TimeoutError) else 'Unreachable'
      return Failure(kind, words(error)), 0.0
    except (OSError, http.client.HTTPException) as error:
      return Failure('Unreachable', f'{type(error).__name__}: {words(error)}'), 0.0
    except (ValueError, RecursionError) as error:
      return Failure('BadReply', f'it is no JSON: {words(error)}'), 0.0


def _pieces(response: Any, late: float, largest: int) -> Iterator[bytes]:
  """What the server sends, up to a number of bytes and a time, however slowly it sends.

  Raises:
    TimeoutError: the time has passed.
    ValueError: there are more bytes.
  """
  size = 0
  while piece := response.read1(65536):
    size += len(piece)
    if size > largest:
      raise ValueError(f'more than {largest} bytes')
    if time.monotonic() > late:
      raise TimeoutError
    yield piece


def _waits(retries: int) -> Iterator[float]:
  """Seconds to wait after each try: about 1/2, 1, 2, ..., with noise, and 0 after the last."""
  for number in range(retries):
    yield min(0.5 * 2**number, LONGEST_WAIT_S) * random.uniform(0.5, 1.0)
  yield 0.0


def _retry_after(headers: Mapping[str, str]) -> float:
  """The seconds that a server asks for, at most `LONGEST_WAIT_S`; 0 where it does not say."""
  value = headers.get('Retry-After', '')
  try:
    seconds = float(value)
  except ValueError:
    try:
      seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (TypeError, ValueError):
      return 0.0
  return min(max(seconds, 0.0), LONGEST_WAIT_S) if math.isfinite(seconds) else 0.0


SCORES = table('judge', score)
COMPARISONS = table('judge', compare)
SPANS = table('judge', critique)
