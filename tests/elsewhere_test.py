"""Teachers that are not on the devices of the run: on others, and behind a service."""

import contextlib
import dataclasses
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from polgrad import build, check, evaluate, loading, phases, sharding, teachers
from polgrad.collect.base import make_annotator
from polgrad.compiling import jit
from polgrad.losses import divergences
from polgrad.options import from_text
from polgrad.packing import pack
from polgrad.registry import part, weighted
from polgrad.rewards import judge
from polgrad.rewards.worker import Failure
from polgrad.types import Batch
from tests import hub

ROOT = build.__file__.rpartition('/polgrad/')[0]
TOP = {'top_ids': 5, 'top_log_probs': 5}
ROWS = [[5, 6, 7, 300], [9], [8, 8], [*range(40, 75)]]


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  base = tmp_path_factory.mktemp('models')
  student = hub.small('qwen3', base / 'student')
  return student, hub.small('gemma3', base / 'teacher', tokenizer='qwen3', hidden_size=48)


@pytest.fixture(scope='module')
def server(models):
  """A process of `polgrad.teacher_service`, and the URL that it says when it answers."""
  command = [sys.executable, '-m', 'polgrad.teacher_service', f'--path={models[1]}', '--name=big']
  command += ['--port=0', '--top=5', '--batch=2', '--max_length=32', '--compilation_cache=']
  env = {**os.environ, 'PYTHONPATH': ROOT, 'XLA_FLAGS': ''}
  started = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
  yield started
  started.kill()
  started.wait()


def url_of(process):
  """The URL of a started service; waits for it."""
  if not hasattr(process, 'url'):
    process.url = process.stdout.readline().split(' at ')[1].strip()
  return process.url


def config(models, method='sampled_distillation', **options):
  student, teacher = models
  text = ''.join(f',{name}={value}' for name, value in options.items())
  return from_text(
    f'method={method},task=addition,model=hf,path={student},smoke,teacher={teacher}{text}'
  )


def batch(prompt=9, length=20):
  """Rows with padding on both sides, of which the mask has the tokens behind the prompts."""
  random = np.random.default_rng(0)
  column = np.arange(length)
  begin = np.array([prompt - 6, prompt - 9, prompt - 2, prompt - 4])
  end = np.array([length, prompt + 3, prompt + 4, prompt - 3])
  seen = (column >= begin[:, None]) & (column < end[:, None])
  tokens = random.integers(640, size=seen.shape).astype(np.int32)
  return Batch(
    tokens=np.where(seen, tokens, 0),
    segment_ids=seen.astype(np.int32),
    mask=seen & (column >= prompt),
    proximal_logp=np.zeros(seen.shape, np.float32),
  )


def test_other_devices_give_the_log_probs_and_the_divergence_of_the_run_s_own(models):
  """A run on four devices, with the teacher of another family among them, and on the last two.

  The loss reads the teacher's log-probs of the tokens and the whole distribution. In both places the
  teacher does not read the first token of a row, which is for the policy alone.
  """
  found = {}
  for devices in (0, 2):
    settings = config(models, teacher_devices=devices)
    settings.mesh.data = 4
    distance = part(divergences.jensen_shannon, teacher_weight=0.3)
    settings.phases.train.objective.penalties = {'distance': weighted(2.0, distance)}
    settings.phases.train.pack = devices  # packed rows keep the states at their tokens
    run = build.build(settings)
    phase = run.phases['train']
    assert ('teacher' in phase.elsewhere) == (devices > 0)
    assert (phase.frozen['teacher'].hidden is None) == (devices > 0)
    with jax.set_mesh(run.mesh):
      annotate = make_annotator(evaluate.context(run, phase, 0), 0.7)
      assert set(annotate.of_anchor) == ({'teacher'} if devices == 0 else set())
      state = phases.begin(run, 0, None)
      rows = batch(phase.collect.prompt_length, phase.collect.length)
      first = np.cumsum(rows.segment_ids, axis=1) * rows.segment_ids == 1
      labelled = rows.with_arrays(policy_only=first.astype(np.float32))
      read = annotate(state, labelled)
      read = read.with_arrays(advantages=read.teacher_logp)
      packed = pack(read.replace(layout=phase.layout), parts=1, data_parallel_size=1)
      assert (packed.layout.rows > 0) == (devices > 0)
      learner = dataclasses.replace(phase.learner(run.policy), temperature=0.7)
      (loss, (terms, _)), grads = jit(learner.gradient)(
        state, state.params, sharding.place_batch(run.mesh, packed)
      )
    found[devices] = read.teacher_logp, loss, terms['distance'].value(), jax.device_get(grads)
  mask = rows.mask
  np.testing.assert_allclose(found[2][0][mask], found[0][0][mask], atol=1e-5)
  assert np.ptp(found[2][0][mask]) > 0.1
  np.testing.assert_allclose(found[2][1:3], found[0][1:3], rtol=1e-5)
  assert found[0][2] > 0.01
  close = lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5)
  jax.tree.map(close, found[2][3], found[0][3])


def test_rows_of_all_lengths_on_devices_that_share_the_parameters(models):
  score = teachers.on_devices(path=models[1], devices=4, fsdp=2, batch=2, max_length=32, top=5)
  found = score.ask(ROWS, frozenset({'logp', 'top_ids', 'top_log_probs'}), 1.0)
  assert isinstance(found[3], Failure) and found[3].kind == 'TooLong'
  assert [len(x['logp']) for x in found[:3]] == [3, 0, 1]
  # One row alone, on one device, from its logits.
  policy, params = loading.beside(models[1], build.build(loading.bare(models[0])))
  tokens = np.array([ROWS[0]])
  logits = np.asarray(policy.unembed(params, policy.hidden(params, tokens, tokens * 0 + 1)), float)
  logp = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[0]
  want = [logp[t, ROWS[0][t + 1]] for t in range(3)]
  np.testing.assert_allclose(found[0]['logp'], want, atol=1e-5)
  np.testing.assert_array_equal(found[0]['top_ids'], np.argsort(-logp[:3])[:, :5])
  np.testing.assert_allclose(found[0]['top_log_probs'], -np.sort(-logp[:3])[:, :5], atol=1e-5)


@contextlib.contextmanager
def serving(answer):
  """An endpoint that answers by (request, number) -> (status, reply)."""
  seen = []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      seen.append((self.path, json.loads(self.rfile.read(int(self.headers['Content-Length'])))))
      status, reply = answer(seen[-1][1], len(seen))
      self.send_response(status)
      self.end_headers()
      self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *arguments):
      pass

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
  try:
    yield f'http://127.0.0.1:{server.server_address[1]}/v1', seen
  finally:
    server.shutdown()
    server.server_close()


def said(request, number=1):
  """The log-prob of id i at place t is -(i + t / 10); another id is listed beside it."""
  entries = [None] + [
    {str(i): {'logprob': -(i + t / 10), 'rank': 3}, '640': {'logprob': -0.1, 'rank': 1}}
    for t, i in enumerate(request['prompt'][1:], start=1)
  ]
  return 200, {'choices': [{'text': 'x', 'prompt_logprobs': entries}]}


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
  monkeypatch.setattr(judge, '_waits', lambda retries: iter([0.0] * (retries + 1)))


def test_a_service_gives_the_log_probs_of_every_token(monkeypatch):
  with serving(lambda body, n: (503, {}) if n == 1 else said(body)) as (url, seen):
    score = teachers.service(model='big', url=url, concurrency=1)
    found = teachers.arrays_of(score, 'teacher', batch(), {'logp': 1}, 1.0)['teacher_logp']
  path, request = seen[-1]
  assert path == '/v1/completions'
  assert {k: v for k, v in request.items() if k != 'prompt'} == dict(
    model='big', max_tokens=1, temperature=1.0, prompt_logprobs=0
  )
  rows = batch()
  for row, tokens in enumerate(rows.tokens):
    columns = np.flatnonzero(rows.segment_ids[row])
    want = np.zeros(20)
    want[columns[1:]] = [-(tokens[c] + t / 10) for t, c in enumerate(columns[1:], start=1)]
    np.testing.assert_allclose(found[row], want, rtol=1e-6)
  assert len(seen) == 4  # one try again; a row of one token is not asked for


def test_a_process_serves_the_log_probs_of_a_model(models, server):
  """The numbers are those of the model on devices of this process."""
  asked = {'logp': 1, **TOP}
  score = teachers.service(model='big', url=url_of(server), top=5)
  found = teachers.arrays_of(score, 'teacher', batch(), asked, 1.0)
  near = teachers.on_devices(path=models[1], devices=4, fsdp=2, batch=2, max_length=32, top=5)
  want = teachers.arrays_of(near, 'teacher', batch(), asked, 1.0)
  assert found.keys() == {'teacher_logp', 'teacher_top_ids', 'teacher_top_log_probs'}
  assert found['teacher_top_ids'].shape == (4, 100)
  for name in found:
    np.testing.assert_allclose(found[name], want[name], atol=1e-5)
  # Fewer are the likeliest of these.
  few = teachers.service(model='big', url=url_of(server), top=2).ask(ROWS[:1], frozenset(TOP), 1.0)[
    0
  ]
  many = score.ask(ROWS[:1], frozenset(TOP), 1.0)[0]
  np.testing.assert_array_equal(few['top_ids'], many['top_ids'][:, :2])


ASKED = {
  'another model': (dict(model='small'), ROWS[0], "HTTP404: .*no model 'small'; there is 'big'"),
  'too long': ({}, ROWS[3], 'HTTP400: .*TooLong: 35 tokens, the model reads 32'),
  'another vocabulary': ({}, [5, 640], 'HTTP400: .*prompt must be a list of ids from 0 to 639'),
  'too many': (dict(top=6), ROWS[0], 'HTTP400: .*prompt_logprobs must be a number from 0 to 5'),
  'another path': (dict(suffix='/v2'), ROWS[0], 'HTTP404: .*no /v1/v2/completions'),
}


@pytest.mark.parametrize('name', ASKED)
def test_the_service_refuses_by_name(name, server):
  knobs, row, message = ASKED[name]
  given = {'model': 'big', 'top': 5, **knobs}
  url = url_of(server) + given.pop('suffix', '')
  (found,) = teachers.service(url=url, **given).ask([row], frozenset(TOP), 1.0)
  assert re.search(message, f'{found.kind}: {found.reason}')


def test_a_service_that_hangs_or_has_gone_is_named_after_its_retries(models, server):
  url = url_of(server)
  score = teachers.service(model='big', url=url, timeout_s=0.1, retries=1)
  server.send_signal(signal.SIGSTOP)
  with pytest.raises(RuntimeError, match=r"'teacher' gave no log-probs of 3 of 3 rows.* Timeout: "):
    teachers.arrays_of(score, 'teacher', batch(), {'logp': 1}, 1.0)
  server.send_signal(signal.SIGCONT)
  again = teachers.service(model='big', url=url)
  assert len(again.ask(ROWS[:1], frozenset({'logp'}), 1.0)[0]['logp']) == 3
  server.kill()
  server.wait()
  with pytest.raises(RuntimeError, match=r'Unreachable: .*the run can be resumed'):
    teachers.arrays_of(score, 'teacher', batch(), {'logp': 1}, 1.0)
  with pytest.raises(ValueError, match=r'train\.elsewhere\.teacher: .*no log-probs \(Unreachable'):
    build.check_data(build.build(config(models, 'gkd', teacher_url=url)))


@pytest.mark.parametrize('method', ['gkd', 'distillm', 'top_k_distillation,k=7', 'ps_kd'])
def test_a_service_lists_tokens_for_any_divergence(method, models):
  """The divergence of a method is taken on the listed tokens, also that of a term of its loss."""
  entry = lambda i, t: {str(j): {'logprob': -3.0 - t} for j in {*range(16), i}}
  lists = lambda body, n: (
    200,
    {'choices': [{'prompt_logprobs': [None, *map(entry, body['prompt'][1:], range(99))]}]},
  )
  with serving(lists) as (url, seen):
    settings = config(models, method, teacher_url=url)
    run = build.build(settings)
    build.check_data(run)  # traces the loss, and asks the service for a list
    assert seen[0][1]['prompt_logprobs'] == (7 if 'k=7' in method else 16)
  whole = from_text(f'method={method},task=addition,model=tiny,smoke,warm_start=1')
  named = lambda one: set(
    re.findall(r'divergences\.\w+', one.phases.train.objective.to_json_best_effort())
  )
  assert named(settings) == named(whole) - {'divergences.top_k'} | {'divergences.listed'}


BAD = {
  'fewer tokens': ([None, {'6': {'logprob': -1.0}}], '2 prompt_logprobs of 4 tokens'),
  'another id': ([None, *[{'1': {'logprob': -1.0}}] * 3], 'no log-prob of each id'),
  'nothing': (None, 'no log-prob of each id'),
  'a probability': ([None, *[{str(i): {'logprob': 0.5} for i in ROWS[0]}] * 3], 'at most 0'),
  'not a number': ([None, *[{str(i): {'logprob': 'x'} for i in ROWS[0]}] * 3], 'no log-prob'),
}


@pytest.mark.parametrize('name', BAD)
def test_a_reply_without_log_probs_stops_the_run_and_says_why(name):
  entries, message = BAD[name]
  rows = Batch(
    tokens=np.array(ROWS[:1]), segment_ids=np.ones((1, 4), int), mask=np.ones((1, 4), bool)
  )
  with serving(lambda body, n: (200, {'choices': [{'prompt_logprobs': entries}]})) as (url, _):
    score = teachers.service(model='big', url=url)
    with pytest.raises(RuntimeError, match=rf"'teacher' gave no .* 1 of 1 rows.*{message}"):
      teachers.arrays_of(score, 'teacher', rows, {'logp': 1}, 1.0)


REFUSED = {
  'rows are drawn from it': (
    dict(method='minillm', teacher_devices=1),
    r"elsewhere: rows are sampled with 'teacher', so it must be an anchor",
  ),
  'two places': (dict(teacher_devices=1, teacher_url='http://x'), 'teacher is at one of the two'),
  'no teacher': (dict(method='grpo', teacher_devices=1), 'for a method with a teacher'),
  'too many devices': (dict(teacher_devices=9), 'devices=9 and fsdp=1 do not fit the 8 devices'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_cannot_be_elsewhere_is_refused(name, models):
  options, message = REFUSED[name]
  with pytest.raises(ValueError, match=message):
    build.build(config(models, **options))


def test_a_service_is_refused_before_a_run_that_samples_at_another_temperature(models):
  settings = config(models, teacher_url='http://localhost:1/v1')
  settings.phases.train.collect.temperature = 0.7
  with pytest.raises(
    ValueError, match=r'elsewhere\.teacher: .* temperature 1, but .* at 0\.7; set'
  ):
    build.build(settings)


def test_an_anchor_that_is_elsewhere_too_is_refused(models):
  settings = config(models, teacher_url='http://localhost:1/v1')
  assert settings.phases.train.elsewhere.teacher.url == 'http://localhost:1/v1'
  settings.phases.train.anchors = from_text(
    'method=sampled_distillation,task=addition,model=tiny'
  ).phases.train.anchors
  with pytest.raises(ValueError, match=r"elsewhere: 'teacher' is an anchor too"):
    build.build(settings)


def test_a_service_is_asked_before_the_first_step(models):
  with serving(said) as (url, seen):
    build.check_data(build.build(config(models, teacher_url=url)))
    assert len(seen) == 1
  for other, message in [(url, 'no log-probs .*refused'), ('x:1/v1', 'must begin with http')]:
    run = build.build(config(models, teacher_url=other))
    with pytest.raises(ValueError, match=rf'train\.elsewhere\.teacher: .*{message}'):
      build.check_data(run)
    (finding,) = check.check_outside(run).findings
    assert finding.fails and 'train.elsewhere.teacher' in str(finding)
