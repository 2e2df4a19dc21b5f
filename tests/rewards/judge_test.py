"""The judge over HTTP: what it asks, how it reads replies, and what becomes of every kind of failure."""

import contextlib
import email.utils
import http.server
import json
import math
import threading
import time

import numpy as np
import pytest

from polgrad import build, identity
from polgrad.options import from_text
from polgrad.registry import bind, part
from polgrad.rewards import comparisons, judge, scoring, verifiers
from polgrad.rewards.worker import Failure

RECORD = {'prompt': '2+2=', 'answer': '4'}


def said(text, logprobs=None) -> dict:
  choice = {'message': {'role': 'assistant', 'content': text}}
  if logprobs is not None:
    choice['logprobs'] = {'content': logprobs}
  return {'choices': [choice]}


def letters(token: str, **mass: float) -> list[dict]:
  """Log-probs of a reply of one token."""
  top = [{'token': t, 'logprob': math.log(p)} for t, p in mass.items()]
  return [{'token': token, 'logprob': 0.0, 'top_logprobs': top}]


@pytest.fixture(scope='module')
def serve():
  """A context: an endpoint that answers by a function of (request, number) -> reply.

  A reply is an object, bytes, or (status, headers, bytes). It keeps all requests and their headers.
  """

  @contextlib.contextmanager
  def serving(answer):
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        seen.append((self.path, dict(self.headers), body))
        reply = answer(body, len(seen))
        status, headers, data = reply if isinstance(reply, tuple) else (200, {}, reply)
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
          self.send_response(status)
          for name, value in headers.items():
            self.send_header(name, value)
          self.end_headers()
          self.wfile.write(data)

      def log_message(self, *arguments):
        pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
      yield f'http://127.0.0.1:{server.server_address[1]}/v1', seen
    finally:
      server.shutdown()
      server.server_close()

  return serving


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
  """Tries again at once."""
  monkeypatch.setattr(judge, '_waits', lambda retries: iter([0.0] * (retries + 1)))


def marks(url, completions=('four',), **knobs):
  n = len(completions)
  return judge.score(list(completions), [RECORD] * n, ['2+2='] * n, url=url, model='j', **knobs)


def criticised(url, completions, **knobs):
  n = len(completions)
  return judge.critique(list(completions), [RECORD] * n, ['2+2='] * n, url=url, model='j', **knobs)


def test_quotes_of_a_critique_are_parts_of_the_completion(serve):
  replies = {
    'a b a c': said('Here: {"good": ["a", "b a c", "zzz"], "bad": [" c ", ""]}'),
    'no json': said('all is well'),
    'no bad': said('{"good": []}'),
    'number': said('{"good": [], "bad": 3}'),
    'text': said('{"good": "a text", "bad": []}'),
  }
  answer = lambda body, number: next(
    reply
    for text, reply in replies.items()
    if f'[Answer]\n{text}\n' in body['messages'][0]['content']
  )
  with serve(answer) as (url, seen):
    found = criticised(url, replies)
  assert found[0] == [(0, 1, 1.0), (2, 6, 1.0), (6, 7, -1.0)]
  assert [x.kind for x in found[1:]] == ['NoVerdict'] * 4
  assert (
    len(seen) == 5 and '{"good": ["..."], "bad": ["..."]}' in seen[0][2]['messages'][0]['content']
  )


def wins(url, pairs, **knobs):
  first, second = zip(*pairs)
  n = len(pairs)
  return judge.compare(
    list(first), list(second), [RECORD] * n, ['2+2='] * n, url=url, model='j', **knobs
  )


def test_a_mark_is_scaled_to_one_and_the_question_is_the_template(serve):
  replies = {'four': '10', 'five': ' 1/10', 'six': 'Long thoughts of 3 steps. [[5.5]]'}
  answer = lambda body, n: said(next(v for k, v in replies.items() if k in str(body['messages'])))
  template = 'Q: {prompt} A: {completion} Solution: {record[answer]}'
  with serve(answer) as (url, seen):
    assert marks(url, replies, template=template) == [1.0, 0.0, 0.5]
  path, _, body = min(seen, key=lambda x: x[2]['messages'][0]['content'])
  assert path == '/v1/chat/completions'
  assert body['messages'][0]['content'] == 'Q: 2+2= A: five Solution: 4'
  assert (body['model'], body['temperature'], body['max_tokens']) == ('j', 0.0, 16)
  assert 'logprobs' not in body


def test_both_orders_are_averaged_so_a_judge_that_prefers_a_place_is_undecided(serve):
  first_place = letters('A', A=0.9, B=0.1)
  with serve(lambda body, n: said('A', first_place)) as (url, seen):
    np.testing.assert_allclose(wins(url, [('x', 'y')]), [0.5], atol=1e-12)
    np.testing.assert_allclose(wins(url, [('x', 'y')], logprobs=False), [0.5], atol=1e-12)
  assert [body.get('top_logprobs') for _, _, body in seen] == [10, 10, None, None]
  texts = [body['messages'][0]['content'] for _, _, body in seen[:2]]
  assert sorted(t.index('x\n') < t.index('y\n') for t in texts) == [False, True]


def test_the_probability_is_that_of_the_two_letters_and_without_log_probs_the_verdict(serve):
  """P(A | x, y) = .6 / .8 and P(A | y, x) = .1 / .5; tokens differ in their white space."""

  def answer(body, n):
    forward = 'x\n\n[Answer B]' in body['messages'][0]['content']
    if not body.get('logprobs'):
      return said('[[A]]' if forward else 'B.')
    if forward:
      return said(' A', letters(' A', **{' A': 0.4, 'A': 0.2, ' B': 0.2, 'C': 0.1}))
    return said('**B**', letters('B', A=0.1, B=0.4))

  with serve(answer) as (url, _):
    np.testing.assert_allclose(wins(url, [('x', 'y')]), [(0.75 + 1 - 0.2) / 2], rtol=1e-12)
    assert wins(url, [('x', 'y')], logprobs=False) == [1.0]


def test_a_record_without_a_field_of_the_template_is_a_failure_of_its_row(serve):
  with serve(lambda body, n: said('10')) as (url, _):
    one, other = judge.score(
      *(['a', 'b'], [RECORD, {'prompt': 'x'}], ['p', 'p']),
      **{'url': url, 'model': 'j', 'template': '{completion} {record[answer]}'},
    )
  assert one == 1.0 and other.kind == 'Template' and 'answer' in other.reason


def test_equal_texts_are_a_tie_that_nobody_is_asked_about(serve):
  with serve(lambda body, n: said('A')) as (url, seen):
    assert wins(url, [('x', 'x')]) == [0.5]
  assert not seen


@pytest.mark.parametrize(
  ('reply', 'kind'),
  [
    (said('I am sorry, but I cannot help with A.'), 'NoVerdict'),
    (said(None), 'NoVerdict'),
    (said('A', letters('A', A=1.0)), None),
    ({'choices': []}, 'BadReply'),
    ({'error': 'x'}, 'BadReply'),
    (b'<html>', 'BadReply'),
    (b'[1]', 'BadReply'),
    ((400, {}, b'no logprobs here'), 'HTTP400'),
    ((500, {}, b''), 'HTTP500'),
  ],
)
def test_a_reply_without_a_verdict_is_a_failure_of_its_pair_and_no_number(serve, reply, kind):
  good = lambda body: 'good' in body['messages'][0]['content']
  with serve(lambda body, n: said('A') if good(body) else reply) as (url, _):
    bad, fine = wins(url, [('x', 'y'), ('good', 'z')], retries=1)
  assert fine == 0.5
  assert (bad == 0.5) if kind is None else (isinstance(bad, Failure) and bad.kind == kind)


@pytest.mark.parametrize('mark', ['0', '11', '-3', '1000', 'ten', ''])
def test_a_mark_out_of_range_is_a_failure(serve, mark):
  with serve(lambda body, n: said(mark)) as (url, _):
    [found] = marks(url)
  assert isinstance(found, Failure) and found.kind == 'NoVerdict'


def test_errors_that_may_pass_are_tried_again_and_others_are_not(serve):
  def answer(body, n):
    return {1: (500, {}, b'busy'), 2: b'{"cut', 3: (503, {}, b'')}.get(n, said('10'))

  with serve(answer) as (url, seen):
    assert marks(url, retries=3) == [1.0]
  assert len(seen) == 4
  with serve(lambda body, n: (401, {}, b'who are you?')) as (url, seen):
    [found] = marks(url, retries=3)
  assert len(seen) == 1 and found.kind == 'HTTP401' and 'who are you?' in found.reason


def test_a_busy_server_is_asked_again_after_the_time_that_it_names(serve):
  def answer(body, n):
    return (429, {'Retry-After': '0.2'}, b'') if n == 1 else said('10')

  began = time.monotonic()
  with serve(answer) as (url, _):
    assert marks(url) == [1.0]
  assert time.monotonic() - began >= 0.2
  date = email.utils.formatdate(time.time() + 30, usegmt=True)
  assert 25 < judge._retry_after({'Retry-After': date}) <= 30
  assert judge._retry_after({'Retry-After': '1e9'}) == judge.LONGEST_WAIT_S
  assert judge._retry_after({'Retry-After': 'soon'}) == judge._retry_after({}) == 0


def test_a_slow_server_and_one_that_is_not_there_are_failures_in_time(serve):
  def slowly(body, n):
    time.sleep(0.3)
    return said('10')

  began = time.monotonic()
  with serve(slowly) as (url, _):
    [late] = marks(url, timeout_s=0.05, retries=1)
    batch = marks(url, 'abcd', concurrency=1, batch_s=0.4)
  [gone] = marks(url, retries=1)
  assert time.monotonic() - began < 2
  assert late.kind == 'Timeout' and gone.kind == 'Unreachable'
  assert batch[0] == 1.0 and batch[-1].kind == 'Timeout'


def test_requests_run_at_the_same_time_but_not_more_than_allowed(serve):
  running, most, lock = [0], [0], threading.Lock()

  def answer(body, n):
    with lock:
      running[0] += 1
      most[0] = max(most[0], running[0])
    time.sleep(0.03)
    with lock:
      running[0] -= 1
    return said('10')

  with serve(answer) as (url, _):
    assert marks(url, 'abcdefgh', concurrency=3) == [1.0] * 8
  assert most[0] == 3


def test_the_key_is_sent_and_shown_nowhere_else(serve, monkeypatch):
  monkeypatch.setenv('JUDGE_KEY', 'secret-key')
  with serve(lambda body, n: (403, {}, b'bad key secret-key')) as (url, seen):
    [found] = marks(url, key_variable='JUDGE_KEY')
  assert seen[0][1]['Authorization'] == 'Bearer secret-key'
  assert found.kind == 'HTTP403' and 'secret' not in str(found)
  monkeypatch.delenv('JUDGE_KEY')
  with pytest.raises(ValueError, match='JUDGE_KEY is not set'):
    marks(url, key_variable='JUDGE_KEY')
  with serve(lambda body, n: said('10')) as (url, seen):
    marks(url)
  assert 'Authorization' not in seen[0][1]


def test_a_redirection_is_no_way_to_get_the_key(serve, monkeypatch):
  monkeypatch.setenv('JUDGE_KEY', 'secret-key')
  with (
    serve(lambda body, n: said('10')) as (other, seen),
    serve(lambda body, n: (302, {'Location': other}, b'')) as (url, _),
  ):
    [found] = marks(url, key_variable='JUDGE_KEY')
  assert found.kind == 'HTTP302' and not seen


def test_options_are_added_to_the_request_and_null_takes_something_out(serve):
  with serve(lambda body, n: said('10')) as (url, seen):
    marks(url, options={'max_tokens': None, 'max_completion_tokens': 8})
  assert seen[0][2].keys() == {'model', 'messages', 'temperature', 'max_completion_tokens'}


def test_a_server_that_sends_forever_is_left_in_time():
  endless = type('Endless', (), {'read1': lambda self, n: b'x' * n})()
  with pytest.raises(TimeoutError):
    list(judge._pieces(endless, late=0.0, largest=1_000_000))
  with pytest.raises(ValueError, match='more than 100000 bytes'):
    list(judge._pieces(endless, late=time.monotonic() + 60, largest=100_000))


def test_a_url_that_is_none_is_refused():
  with pytest.raises(ValueError, match="url='localhost:8000' must begin with http"):
    marks('localhost:8000')
  with pytest.raises(ValueError, match='must be below high'):
    marks('http://x', low=3.0, high=3.0)


def test_waits_grow_and_the_last_try_waits_for_nothing(monkeypatch):
  monkeypatch.undo()
  found = list(judge._waits(9))
  assert len(found) == 10 and found[-1] == 0
  assert all(0.25 * 2**k <= w <= 0.5 * 2**k for k, w in enumerate(found[:7]))
  assert max(found) <= judge.LONGEST_WAIT_S


def test_a_judge_fills_the_slots_of_rewards_and_of_comparisons(serve):
  """One row fails: it is invalid, and its reward is no number."""

  def answer(body, n):
    text = body['messages'][0]['content']
    if 'fail' in text:
      return said('no')
    return said('7' if 'Rate' in text else 'A')

  with serve(answer) as (url, _):
    fn = bind(part(judge.score, url=url, model='j'), verifiers.TABLE)
    score = scoring.make_scorer({'judge': fn})
    found = score(['a', 'fail'], [RECORD] * 2, [1, 1], {'prompt': lambda: ['p', 'p']})
    np.testing.assert_allclose(found.total, [6 / 9, np.nan])
    assert found.errors == {'judge/NoVerdict': 1} and list(found.valid) == [True, False]

    fn = bind(part(judge.compare, url=url, model='j'), comparisons.TABLE)
    compare = scoring.make_comparer(fn)
    pair = {'record': RECORD, 'first_reward': 0.0, 'second_reward': 0.0}
    pairs = [{'first': 'a', 'second': 'b', **pair}, {'first': 'fail', 'second': 'b', **pair}]
    found = compare(pairs, {'prompt': lambda: ['p', 'p']})
    np.testing.assert_allclose(found.wins, [0.5, np.nan])


def test_the_address_of_a_judge_and_its_question_are_no_files_of_a_run():
  knobs = {'url': 'http://localhost/v1', 'template': '/long ' * 1000}
  assert not list(identity._paths({'source': knobs, 'phases': {'reward': knobs}}))


def test_a_reward_whose_judge_does_not_answer_is_refused_in_words():
  config = from_text('method=grpo,task=addition,model=tiny,smoke')
  config.phases.train.reward.exact = part(judge.score, url='http://127.0.0.1:9/v1', retries=0)
  with pytest.raises(
    ValueError, match=r'reward.exact: .* own answers \(Unreachable: .*refused>\)$'
  ):
    build.check_data(build.build(config))


def test_a_run_whose_judge_does_not_answer_is_refused_in_words(serve):
  config = from_text('method=online_ipo,task=addition,model=tiny,smoke')
  config.phases.train.comparison = part(judge.compare, url='http://127.0.0.1:9/v1', model='j')
  config.phases.train.comparison.retries = 0
  run = build.build(config)
  [section] = [s for s in build.data_sections(run) if s.path == 'config.phases.train']
  with pytest.raises(ValueError, match=r'train.comparison: it fails on all of 4 records \(Unreach'):
    build._try_judge(section, run.tokenizer)
  with serve(lambda body, n: said('A')) as (url, seen):
    config.phases.train.comparison.url = url
    run = build.build(config)
    [section] = [s for s in build.data_sections(run) if s.path == 'config.phases.train']
    build._try_judge(section, run.tokenizer)
  assert len(seen) == 8 and RECORD['prompt'][1] in seen[0][2]['messages'][0]['content']
