"""An external engine draws from the policy that the trainer has now, and fails with a name.

The engine is `tiny_engine.py`, a Llama in NumPy, in a process that speaks the protocol of vLLM's.
"""

import dataclasses
import functools
import os
import pathlib
import re
import sys
import time

import jax
import numpy as np
import pytest

from benchmarks import engine_mismatch
from polgrad import build, collect, environments, evaluate, models, phases, sharding
from polgrad.checks import memory
from polgrad.losses import logit_stats
from polgrad.registry import part
from polgrad.sampling import behavior_policies, engines, make_sampler, processors, resumable, turns
from polgrad.sampling.engine_process import EngineError, Process
from polgrad.sampling.sampler import configure
from polgrad.types import Batch
from tests.models import tiny
from tests.runs import addition, method_of

SCRIPT = pathlib.Path(__file__).with_name('tiny_engine.py')
POLICY, PARAMS, OTHER = tiny.policy(), tiny.params(), tiny.params(1)
WIDTH, NEW, GROUP, STOPS = 6, 7, 3, (3, 5, 8)
TOKENS = np.asarray(tiny.rows(0, 4, WIDTH))
MASK = np.arange(WIDTH)[None] >= np.array([0, 2, 5, 1])[:, None]
IDS = np.array([7, 3, 11, 4], np.int32)
SETTINGS = dict(max_new_tokens=NEW, samples_per_prompt=GROUP, stop_ids=STOPS, pad_id=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiny(engines.External):
  """The engine of `tiny_engine.py`."""

  trouble: str = ''

  @property
  def command(self):
    return [sys.executable, '-I', str(SCRIPT), self.trouble]

  def settings(self, max_length):
    return {'max_length': max_length}

  def check_installed(self, path):
    """It is always there."""


@pytest.fixture(scope='module')
def engine():
  made = Tiny()
  yield made
  made.served.stop()


def draw(engine, params=PARAMS, rows=slice(None), seed=0, step=0, **settings):
  sample = engine.sampler({'policy': POLICY}, **SETTINGS | settings)
  return sample({'policy': params}, TOKENS[rows], MASK[rows], IDS[rows], seed=seed, step=step)


def trainer_logp(batch, params, temperature=1.0, policy=POLICY):
  """Log-probs as the trainer has them, on the mask."""
  with jax.default_matmul_precision('highest'):
    hidden = policy.hidden(params, batch.tokens, batch.segment_ids)
    logits = policy.unembed(params, hidden)[:, :-1] / temperature
  logp = jax.nn.log_softmax(logits)
  found = np.take_along_axis(np.asarray(logp), batch.tokens[:, 1:, None], axis=-1)[..., 0]
  return np.where(batch.mask, np.pad(found, ((0, 0), (1, 0))), 0)


def test_log_probs_are_those_of_the_weights_that_the_trainer_has_now(engine):
  for params, others in ((PARAMS, OTHER), (OTHER, PARAMS)):
    batch = draw(engine, params, temperature=0.7)
    np.testing.assert_allclose(batch.behavior_logp, trainer_logp(batch, params, 0.7), atol=2e-5)
    assert np.abs(batch.behavior_logp - trainer_logp(batch, others, 0.7)).max() > 0.5
  size = sum(x.nbytes for x in jax.tree.leaves(PARAMS)) / 2**20
  found = engine.take()
  assert found['engine/weights_mib'] == pytest.approx(2 * size)
  assert found['engine/weights_s'] > 0 and found['engine/restarts'] == 0
  draw(engine, OTHER)  # it has these weights
  assert engine.take() == dict.fromkeys(found, 0.0)


def test_an_adapter_is_merged_and_a_value_head_left_out(engine):
  policy = models.lora(base=tiny.policy(value_head=True), rank=2)
  params = jax.tree.map(lambda x: x + 0.1, policy.init(jax.random.key(2)))
  sample = engine.sampler({}, default=policy, **SETTINGS)
  batch = sample({'policy': params}, TOKENS, MASK, IDS, seed=0, step=0)
  np.testing.assert_allclose(
    batch.behavior_logp, trainer_logp(batch, params, policy=policy), atol=2e-5
  )
  engine.check_there(policy, 'config.engine')
  with pytest.raises(ValueError, match=r'config.engine: the model cannot .*: no family'):
    engine.check_there(
      tiny.policy(num_experts=4, experts_per_token=2, qk_norm='all'), 'config.engine'
    )


def test_rows_are_laid_out_as_by_our_sampler_and_have_their_own_seeds(engine):
  whole = draw(engine)
  assert 0 < whole.finished.sum() < len(whole.finished)
  ours = make_sampler({'policy': POLICY}, **SETTINGS)
  shape = jax.eval_shape(
    lambda params: ours(params, TOKENS, MASK, IDS, seed=0, step=0), {'policy': PARAMS}
  )
  same = lambda a, b: a.shape == b.shape and a.dtype == b.dtype
  assert all(jax.tree.leaves(jax.tree.map(same, whole, shape)))
  assert whole.prompt_ids.tolist() == [7] * 3 + [3] * 3 + [11] * 3 + [4] * 3
  assert whole.group_ids.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
  np.testing.assert_array_equal(whole.segment_ids[:, :WIDTH], np.repeat(MASK, GROUP, axis=0))
  for ids, drawn, finished in zip(whole.tokens[:, WIDTH:], whole.mask[:, WIDTH:], whole.finished):
    stops = np.isin(ids[drawn], STOPS)
    assert not stops[:-1].any() and stops[-1] == finished and (finished or drawn.all())
    assert (ids[~drawn] == 1).all()

  # A row depends on its seed, step, prompt and sample alone.
  last = draw(engine, rows=slice(2, 4))
  np.testing.assert_array_equal(last.tokens, whole.tokens[6:])
  for other in (draw(engine, seed=1), draw(engine, step=1)):
    assert (other.tokens != whole.tokens).any()
  assert len({row.tobytes() for row in whole.tokens[:3]}) == 3


def test_filters_and_greedy_are_those_of_our_sampler(engine):
  few = draw(engine, top_k=2, top_p=0.9, temperature=0.8)
  np.testing.assert_array_less(
    trainer_logp(few, PARAMS, 0.8)[few.mask], few.behavior_logp[few.mask]
  )
  settings = SETTINGS | dict(samples_per_prompt=1, behavior_policy=behavior_policies.greedy)
  greedy, ours = (
    make({'policy': POLICY}, **settings)({'policy': PARAMS}, TOKENS, MASK, IDS, seed=0, step=0)
    for make in (engine.sampler, make_sampler)
  )
  jax.tree.map(np.testing.assert_array_equal, greedy, jax.device_get(ours))


@pytest.mark.parametrize(
  ('kind', 'said'),
  [
    ('dies', 'Died: .*exit code -9.*out of memory, as it were'),
    ('hangs', "Timeout: no reply to 'sample' within 0.6 s"),
    ('garbage', "BadReply: to 'sample': no JSON"),
    ('endless', 'BadReply: a reply of 1152921504606846976 bytes'),
    ('fewer', 'BadReply: 12 rows were asked for, the reply has 11'),
    ('other id', 'BadReply: row 0 has the token 1000000, of 23 ids'),
    ('no number', 'BadReply: row 0 has the log-prob nan'),
    ('cut off', 'BadReply: row 0 ends after 1 of 7 tokens, without a stop'),
    ('raises', "Refused: 'sample': MemoryError: no room for keys and values"),
  ],
)
def test_a_failure_has_a_name_and_the_next_process_draws_the_same_rows(
  kind, said, tmp_path, engine
):
  made = Tiny(trouble=f'{tmp_path / "file"}:{kind}', retries=0, folder=str(tmp_path))
  made = dataclasses.replace(made, rollout_s=0.6 if kind == 'hangs' else 60.0)
  (tmp_path / 'file').touch()
  with pytest.raises(RuntimeError, match=re.compile(said, re.DOTALL)) as raised:
    draw(made)
  assert 'config.engine: Tiny' in str(raised.value) and 'last checkpoint' in str(raised.value)
  assert made.served.process is None and not list(tmp_path.glob('polgrad_engine_*'))
  if kind == 'hangs':  # its child is killed with it
    with pytest.raises(ProcessLookupError):
      gone(int((tmp_path / 'child').read_text()))
  if kind in ('dies', 'hangs'):
    (tmp_path / 'file').touch()
    again = dataclasses.replace(made, retries=1, rollout_s=3.0)
    with pytest.warns(UserWarning, match='started again, and asked for the same rows: [DT]'):
      rows = draw(again)
    jax.tree.map(np.testing.assert_array_equal, rows, draw(engine))
    assert again.take()['engine/restarts'] == 1
    again.served.stop()


def gone(pid):
  """Waits until a process has ended, and then raises ProcessLookupError."""
  for _ in range(100):
    os.kill(pid, 0)
    if pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] == 'Z':
      raise ProcessLookupError
    time.sleep(0.05)


def test_an_engine_that_cannot_start_or_lost_weights_says_so(tmp_path):
  made = Tiny(max_length=65, folder=str(tmp_path))
  with pytest.raises(RuntimeError, match="'start': ValueError: max_length 65 is more than 64"):
    draw(made)
  lost = Tiny(trouble=':lost', retries=0)
  draw(lost)
  with pytest.raises(RuntimeError, match='BadReply: 20 tensors were sent'):
    draw(lost, OTHER)
  with pytest.raises(EngineError, match='Died: /no/python cannot be started'):
    Process(['/no/python'], {}, str(tmp_path))
  assert not list(tmp_path.iterdir())


def test_the_process_and_its_weights_end_with_the_trainer(tmp_path):
  process = Process(Tiny().command, {}, str(tmp_path))
  os.close(process.lifeline)  # as the kernel does when the trainer is killed
  assert process.child.wait(60) == -9
  assert not list(tmp_path.iterdir())
  process.close.detach()


def config():
  """GRPO whose ratio to the engine is corrected."""
  made = addition(method_of('tis'))
  made.phases.train.collect.lag = 0  # otherwise rows are those of an earlier policy
  made.engine = part(Tiny)
  return made


def test_what_an_engine_cannot_do_is_refused_by_name():
  made = config()
  made.phases.train.collect.slots = 8
  with pytest.raises(ValueError, match='slots: Tiny fills its own'):
    build.build(made)
  made = config()
  made.sampler_mesh = part(sharding.beside)
  with pytest.raises(ValueError, match='engine samples on its own devices'):
    build.build(made)
  entropy = {'old_entropy': logit_stats.entropy}
  for values, said in (
    (dict(stop_strings=('a',)), 'stop_strings: Tiny knows stop tokens, and no texts'),
    (dict(in_flight=9), 'in_flight: Tiny finishes the rows that it begins'),
    (dict(environment=environments.calculator()), 'environment: Tiny draws one turn'),
    (
      dict(behavior_policy=behavior_policies.reference),
      'behavior_policy: Tiny draws from the policy, or greedily, not from reference',
    ),
    (
      dict(opponents=1, opponent_policy=behavior_policies.previous),
      'opponent_policy: Tiny .* not from previous',
    ),
    (
      dict(token_temperature=processors.entropy_scaled, stats=entropy),
      'token_temperature: Tiny has one',
    ),
  ):
    with pytest.raises(ValueError, match=f'place.{said}'):
      Tiny().check(collect.Rollouts(**values), 'place')
  with pytest.raises(ValueError, match='rows of 128 tokens, but config'):
    Tiny(max_length=99).check(collect.Rollouts(), 'place')
  with pytest.raises(ValueError, match='max_length: 65 tokens, but the model'):
    Tiny(max_length=65).check_there(POLICY, 'place')
  with pytest.raises(FileNotFoundError, match=r'place.folder: there is no folder'):
    Tiny(folder='/no/folder').check_there(POLICY, 'place')
  Tiny().check(collect.Rollouts(baseline_samples=1, top_k=4, lag=1, overlap=True), 'place')


def test_vllm_that_is_not_there_is_refused_before_a_run():
  said = "config.engine.python: there is no Python '/no/python'; docs/engines.md"
  with pytest.raises(FileNotFoundError, match=said):
    engines.Vllm(python='/no/python').check_installed('config.engine')
  with pytest.raises(ValueError, match=r'config.engine.python: .* finds no vLLM; docs/engines.md'):
    engines.Vllm(python=sys.executable).check_installed('config.engine')
  made = config()
  made.engine = part(engines.Vllm, python='/no/python')
  with pytest.raises(FileNotFoundError, match=said):
    build.check_data(build.build(made))


def test_a_collector_samples_by_the_weights_of_each_step():
  """Proximal log-probs are the trainer's, by the parameters of the step."""
  run = build.build(config())
  phase = run.phases['train']
  with jax.set_mesh(run.mesh):
    state = phases.begin(run, 0, None)
    collect_batch = phase.collect.make(evaluate.context(run, phase, 0))
    draw = lambda count: [{**phase.source[i], 'id': i} for i in range(count)]
    for step in range(2):
      found = collect_batch(state, draw, step)
      gap = np.where(found.batch.mask, found.batch.behavior_logp - found.batch.proximal_logp, 0)
      assert np.abs(gap).max() < 1e-4 and found.metrics['engine/weights_mib'] > 0
      assert found.metrics['mismatch/kl'] < 1e-8 < 1e-4 > found.metrics['mismatch/max_gap']
      state = state.replace(params=jax.tree.map(lambda x: 1.5 * x, state.params))
  run.engine.served.stop()


def test_our_own_sampler_draws_from_rounded_weights_that_are_sent_in_eight_bits():
  """The mismatch is that of any engine; what is sent are values of 8 bits and their scales."""
  made = config()
  made.engine = part(engines.Own, weights='int8', cache='int8')
  run = build.build(made)
  phase = run.phases['train']
  with jax.set_mesh(run.mesh):
    state = phases.begin(run, 0, None)
    context = evaluate.context(run, phase, 0)._replace(sampler_mesh=run.mesh)
    collect_batch = phase.collect.make(context)
    found = collect_batch(state, lambda n: [{**phase.source[i], 'id': i} for i in range(n)], 0)
    sent = memory.sent(run.engine, run.policy, run.mesh)
    kept = run.engine.rounded(run.policy)(state.params)
    lent = collect_batch.__self__.lent(state).params
  size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
  assert found.metrics['bytes/transfer'] == size(sent) < 0.3 * size(run.policy.shapes())
  jax.tree.map(np.testing.assert_array_equal, lent, kept)
  jax.tree.map(lambda x, y: x.sharding == y.sharding or pytest.fail(f'{x} {y}'), lent, sent)
  assert 1e-9 < found.metrics['mismatch/kl'] < 1e-2 and found.metrics['mismatch/max_gap'] < 0.5


@pytest.mark.parametrize('settings', [dict(tie_embeddings=False), dict(num_experts=4)])
def test_samplers_of_turns_and_of_rows_in_flight_read_eight_bits(settings):
  """Their programs are traced."""
  policy = engines.Own(weights='int8', cache='float8', dtype='bfloat16').drawn_from(
    tiny.policy(**settings)
  )
  draws = dict(max_new_tokens=NEW, samples_per_prompt=1, slots=0, stop_ids=STOPS, pad_id=1)
  settings = dict(temperature=1.0, top_k=0, top_p=1.0, token_temperature=processors.unchanged)
  own = dict(default=policy, behavior_policy=behavior_policies.current, **draws, **settings)
  params = {'policy': policy.shapes()}

  one = configure(turns.TurnSampler, {}, None, turn_tokens=3, **own)
  begin = functools.partial(one.begin, common=2)
  begun = jax.eval_shape(begin, params, TOKENS, MASK, IDS, 0, 0)
  unstacked, keys, prompts, state, _ = begun
  state = jax.eval_shape(one.fill, prompts, state)
  extend = functools.partial(one.extend, width=WIDTH)
  [chunk] = (turns.Chunk(*(x[0] for x in c)) for c in [turns.empty_chunks(1, 1, len(IDS))])
  assert jax.eval_shape(extend, unstacked, state, chunk) == state
  advance = functools.partial(one.advance, width=WIDTH)
  after, _ = jax.eval_shape(advance, unstacked, keys, None, state, np.bool_(True))
  assert after == state
  types = {x.dtype for x in jax.tree.leaves(state.decoding.caches)}
  assert types == {np.dtype(x) for x in ('float8_e4m3fn', 'float32', 'int32')}

  one = configure(resumable.ResumableSampler, {}, None, **own)
  rows = resumable.empty(len(IDS), 1, WIDTH, NEW)
  unstacked, rows, read = jax.eval_shape(one.read_rows, params, rows, np.int32(0))
  asked = np.int32(0), np.int32(0), np.zeros(len(IDS), bool), np.int32(1), np.int32(9)
  advance = lambda *arrays: one.advance(*arrays[:3], None, *arrays[3:])
  assert jax.eval_shape(advance, unstacked, rows, read, *asked) == (rows, read)


def test_types_that_no_sampler_has_are_refused_by_name():
  made = config()
  made.engine = part(engines.Own)
  for name, value in (('weights', 'int4'), ('cache', 'bfloat16'), ('dtype', 'float16')):
    wrong = made.copy_and_resolve_references()
    wrong.engine[name] = value
    with pytest.raises(ValueError, match=f'config.engine.*{name}.*{value}.*int8|float32'):
      build.build(wrong)


def test_weights_that_did_not_arrive_are_noticed():
  """Gaps are over the mask; a token that the trainer's filters leave out counts apart."""
  mask = np.array([[True, True, True, False]])
  batch = Batch(
    tokens=None, segment_ids=None, mask=mask, behavior_logp=np.array([[-1.0, -2.0, -3.0, 0.0]])
  )
  own, before = np.array([[-1.5, -2.0, -np.inf, 9.0]]), np.array([[-4.0, -5.0, -6.0, 9.0]])
  found = engine_mismatch.gap(batch, own, before)
  kl = (np.expm1(-0.5) + 0.5) / 2
  used = (1 + np.exp(-0.5)) ** 2 / (2 * (1 + np.exp(-1)))
  np.testing.assert_allclose(found, (0.25, 0.5, kl, 3.0, 1 / 3, used, 0.0))
  engine_mismatch.check([found, found])
  with pytest.raises(ValueError, match='the weights did not arrive'):
    engine_mismatch.check([found, engine_mismatch.gap(batch, before, own)])
