"""Partial rollouts: rows that continue over updates are drawn once, by the weights that they name."""

import functools

import jax
import numpy as np
import pytest

from benchmarks import kills
from polgrad import build, phases, sharding
from polgrad.collect import Rollouts, partial
from polgrad.models.policy import learned
from polgrad.registry import part
from polgrad.sampling import make_resumable_sampler, make_sampler, resumable
from polgrad.types import TrainState
from tests.models import tiny
from tests.train_test import config

POLICY, PARAMS, OTHERS = tiny.policy(), tiny.params(), tiny.params(1)
WIDTH, NEW, GROUP, PROMPTS = 6, 12, 2, 4
SETTINGS = dict(max_new_tokens=NEW, samples_per_prompt=GROUP, stop_ids=(3, 5), pad_id=1)
TOKENS = np.asarray(tiny.rows(0, PROMPTS, WIDTH))
MASK = np.arange(WIDTH)[None] >= np.array([0, 2, 5, 1])[:, None]
IDS = np.array([7, 3, 11, 4], np.int32)


def in_flight():
  """The rows of the four prompts, before anything is drawn."""
  spread = lambda x: np.repeat(x, GROUP, axis=0)
  rows = resumable.empty(PROMPTS, GROUP, WIDTH, NEW)
  rows.tokens[:, :WIDTH], rows.real[:, :WIDTH] = spread(TOKENS), spread(MASK)
  rows.begun[:] = 2
  rows.prompt_ids[:] = rows.noise_ids[:] = spread(IDS)
  return rows


@functools.cache
def sampler():
  return make_resumable_sampler({}, default=POLICY, **SETTINGS)


def piece(params, rows, version, **asked):
  asked = {'due': np.zeros(PROMPTS, bool), 'needed': PROMPTS, **asked}
  return sampler()({'policy': params}, rows, seed=5, version=version, **asked)


def test_rows_in_pieces_are_those_of_one_piece_by_the_same_weights():
  whole = make_sampler({}, default=POLICY, **SETTINGS)
  expected = whole({'policy': PARAMS}, TOKENS, MASK, IDS, seed=5, step=2)
  rows, versions = in_flight(), 0
  while not rows.over.all():
    rows = piece(PARAMS, rows, versions, chunk=5, stop=lambda rows: True)
    versions += 1
  assert 2 < versions < 5 and set(np.unique(rows.versions)) == set(range(versions))
  batch = partial.batch_of(rows, GROUP, 1)
  for name in ('tokens', 'segment_ids', 'mask', 'finished', 'prompt_ids', 'group_ids'):
    np.testing.assert_array_equal(batch[name], expected[name], err_msg=name)
  np.testing.assert_allclose(batch.behavior_logp, expected.behavior_logp, atol=2e-5)


def test_every_token_is_drawn_by_the_weights_that_its_version_names():
  rows = piece(PARAMS, in_flight(), 8, chunk=4, stop=lambda rows: True)
  rows = piece(OTHERS, rows, 9)
  batch = partial.batch_of(rows, GROUP, 1)
  assert rows.over.all() and {8, 9} <= set(np.unique(batch['versions'][batch.mask]))
  for version, params in [(8, PARAMS), (9, OTHERS)]:
    drawn = batch.mask & (batch['versions'] == version)
    logp = np.asarray(tiny.logp(POLICY, params, batch.tokens, batch.segment_ids))
    np.testing.assert_allclose(batch.behavior_logp[drawn], logp[drawn], atol=2e-5)


@functools.partial(jax.jit, static_argnums=0)
def read_one(policy, params, token, position, column, cache):
  valid = np.ones((1, 1), bool)
  found, cache = policy.decode(
    params, token[None, None], position[None, None], valid, cache, column
  )
  return jax.nn.log_softmax(policy.unembed(params, found[0, 0])), cache


def one_by_one(rows, row, by_version):
  """The log-probs of the drawn tokens of a row, whose tokens are read one after the other, each by the
  weights that draw the token behind it."""
  width, cache = rows.tokens.shape[1] - NEW, POLICY.init_cache(1, rows.tokens.shape[1])
  columns = np.flatnonzero(rows.real[row])
  unstacked = {v: POLICY.unstack(x) for v, x in by_version.items()}
  found, first = [], rows.versions[row, 0]
  for position, column in enumerate(columns[:-1]):
    behind = columns[position + 1] - width
    version = first if behind < 0 else rows.versions[row, behind]
    token = rows.tokens[row, column]
    logp, cache = read_one(POLICY, unstacked[version], token, np.int32(position), column, cache)
    if behind >= 0:
      found.append(logp[rows.tokens[row, behind + width]])
  return np.array(found)


def test_kept_caches_hold_what_the_weights_of_each_time_have_read():
  weights = {8: PARAMS, 9: OTHERS, 10: tiny.params(2)}
  sample = make_resumable_sampler({}, default=POLICY, refill=False, **SETTINGS)
  asked = dict(seed=5, due=np.zeros(PROMPTS, bool), needed=PROMPTS, chunk=2, stop=lambda rows: True)
  rows = in_flight()
  for version in (8, 8, 9, 10):
    rows = sample({'policy': weights[version]}, rows, version=version, **asked)
    if version == 9:  # new rows in the places of others
      put = lambda x, y: np.concatenate([x[:2], y[2:4], x[4:]])
      rows = jax.tree.map(put, rows, in_flight())
  rows = sample({'policy': weights[10]}, rows, version=10, **asked | {'chunk': 0})
  assert rows.over.all() and weights.keys() <= set(rows.versions[rows.made > 6].flat)
  gap = 0.0
  for row, made in enumerate(rows.made):
    np.testing.assert_allclose(rows.logp[row, :made], one_by_one(rows, row, weights), atol=2e-5)
    # Keys and values of old weights are not those of the weights that draw.
    batch = partial.batch_of(rows, GROUP, 1)
    new = np.asarray(tiny.logp(POLICY, weights[10], batch.tokens, batch.segment_ids))[row, WIDTH:]
    drawn = np.arange(NEW) < made
    gap = max(gap, np.abs(new - rows.logp[row])[drawn & (rows.versions[row] == 10)].max(initial=0))
  assert gap > 0.01


def test_a_piece_ends_when_enough_prompts_are_complete_and_those_that_are_due():
  rows = piece(PARAMS, in_flight(), 0, needed=1)
  done = resumable.complete(rows, GROUP)
  assert done.any() and not done.all()
  late = np.flatnonzero(~done)[-1]
  rows = piece(PARAMS, in_flight(), 0, needed=1, due=np.arange(PROMPTS) == late)
  assert resumable.complete(rows, GROUP)[late]


@pytest.mark.parametrize(('prompts', 'longest', 'flying'), [(2, 0, 2), (2, 1, 4), (3, 2, 7)])
def test_no_prompt_is_late_whatever_the_order_in_which_they_end(prompts, longest, flying):
  random, begun, largest = np.random.default_rng(0), np.zeros(flying, int), 0
  for number in range(60):
    due = partial.number_due(begun, number, prompts=prompts, longest=longest)
    assert due <= prompts
    order = np.argsort(begun, kind='stable')
    others = random.permutation(order[due:])  # worst of all: the newest end first
    if number % 2:
      others = order[due:][::-1]
    used = np.concatenate([order[:due], others])[:prompts]
    largest = max(largest, (number - begun[used]).max())
    begun = np.concatenate([np.delete(begun, used), np.full(prompts, number + 1)])
  assert largest == longest


class Run:
  """A phase whose updates are made by hand: in each step all parameters change."""

  def __init__(self, **changes):
    made = config()
    made.phases.train.collect.update(in_flight=8, batches_in_flight=2, **changes)
    made.phases.train.curriculum = part(phases.curricula.epochs)
    self.run = build.build(made)
    self.phase = self.run.phases['train']
    self.index = self.run.order.index('train')
    self.restart()

  def restart(self):
    """A new process: what was compiled and what a thread has in hand is gone."""
    with jax.set_mesh(self.run.mesh):
      self.collect = self.phase.collect.make(phases.context(self.run, self.phase, self.index))

  def begin(self) -> TrainState:
    with jax.set_mesh(self.run.mesh):
      return phases.begin(self.run, self.index, None)

  def steps(self, state, first, last):
    """The state after some steps, and their batches."""
    batches = []
    for step in range(first, last):
      with jax.set_mesh(self.run.mesh):
        draw = phases.Drawer(self.phase, 0, int(state.cursor), self.run.tokenizer, ())
        collected = self.collect(state, draw, step)
        collected = collected.finished()
        state = phases.advance(self.run.mesh, state, collected, draw.cursor)
        state = state.replace(params=jax.tree.map(lambda p: p * 0.9 + 0.01, state.params))
      batches.append(collected)
    return state, batches

  def trained_and_in_flight(self, state, batches):
    """Prompts of all batches, of those that wait and of the rows in flight; and all that were drawn."""
    flight, size = sharding.to_host(state.collect_state), self.phase.collect.samples_per_prompt
    found = [one.batch.prompt_ids[::size] for one in batches]
    for n in range(len(batches), int(flight.memory.count) if flight.memory else 0):
      found.append(
        flight.memory.batches.prompt_ids[n % len(flight.memory.batches.prompt_ids)][::size]
      )
    rows = flight.rows
    found.append(rows.prompt_ids[::size][rows.begun[::size] != resumable.EMPTY])
    drawer = phases.Drawer(self.phase, 0, 0, self.run.tokenizer, ())
    return np.concatenate(found).tolist(), [x['id'] for x in drawer(int(state.cursor))]


MODES = {
  'in turns': {},
  'beside': dict(overlap=True, lag=1),
  'interrupted': dict(overlap=True, lag=2, chunk=2, weights_every=2, refill=False),
}


@pytest.mark.parametrize('mode', MODES)
def test_no_row_is_lost_or_trained_twice(mode):
  run = Run(**MODES[mode])
  state, early = run.steps(run.begin(), 0, 3)
  whole, late = run.steps(state, 3, 6)
  run.restart()
  again, repeated = run.steps(state, 3, 6)
  for after, batches in [(whole, early + late), (again, early + repeated)]:
    found, drawn = run.trained_and_in_flight(after, batches)
    assert sorted(found) == sorted(drawn) and len(found) > 6 * 4
    for step, one in enumerate(batches):
      batch, bound = one.batch, 2 + run.phase.collect.lag + run.phase.collect.weights_every - 1
      ages = batch['token_staleness'][batch.mask]
      np.testing.assert_array_equal(ages, (step - batch['versions'])[batch.mask])
      assert ages.min() >= 0 and ages.max() <= bound
      assert batch.staleness.max() == ages.max()
  assert max(one.batch['token_staleness'].max() for one in early + late) > 0
  if mode == 'interrupted':
    assert [one.metrics['bytes/transfer'] > 0 for one in early + late] == [True, False] * 3
  else:
    equal = lambda a, b: np.testing.assert_array_equal(a, b)
    for one, other in zip(late, repeated, strict=True):
      jax.tree.map(equal, one.batch, other.batch)
    jax.tree.map(equal, *map(sharding.to_host, (whole.collect_state, again.collect_state)))


def test_what_no_update_changes_is_sent_to_the_sampler_once():
  made = kills.get_config('lora')
  made.phases.train.collect.update(in_flight=8, overlap=True, lag=1)
  run = build.build(made)
  phase = run.phases['train']
  with jax.set_mesh(run.mesh):
    state = phases.begin(run, 0, None)
    context = phases.context(run, phase, 0)
    steps = partial.make_in_flight_steps(phase.collect, context, phase.collect._parts(context))
    first = steps.lent(state)
    assert steps.meter.take()['bytes/transfer'] == sum(
      x.nbytes for x in jax.tree.leaves(learned(run.policy, state.params))
    )
    moved = state.replace(params=jax.tree.map(lambda x: x + 1, state.params))
    second = steps.lent(moved)
  labels = run.policy.labels(state.params)
  for label, one, other, live in zip(
    *map(jax.tree.leaves, (labels, first.params, second.params, moved.params)), strict=True
  ):
    np.testing.assert_array_equal(other, one if label == 'frozen' else live)
  assert {'frozen', 'train'} <= set(jax.tree.leaves(labels))


@pytest.mark.parametrize(
  ('asked', 'said'),
  [
    (dict(chunk=4), 'chunk=4 interrupts sampling .* so it needs overlap and in_flight'),
    (dict(weights_every=2), 'weights_every=2 needs a chunk'),
    (dict(refill=False), 'refill=False needs a chunk'),
    (dict(in_flight=4), 'must be at least prompts=8, and at most 16'),
    (dict(in_flight=8, lag=1), 'lag=1 needs overlap'),
    (dict(in_flight=8, max_resamples=1, slots=4), r"\['max_resamples', 'slots'\] cannot be set"),
  ],
)
def test_what_has_no_rows_in_flight_is_refused(asked, said):
  with pytest.raises(ValueError, match=said):
    Rollouts(**asked)
