"""Networks that score hidden states: their equations, how they learn, and what is refused."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from polgrad import build, credit, explain, learner, optim, sharding
from polgrad.checks import memory, tracing
from polgrad.losses import discounted_values as valued
from polgrad.objectives import networks
from polgrad.phases import opt_shardings
from polgrad.registry import bind, part
from polgrad.types import Batch, TrainState
from tests.models import tiny
from tests.runs import addition, method_of

SEGMENTS = np.array([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
MASK = np.array([[0, 0, 1, 1, 1], [0, 0, 1, 1, 0], [0, 0, 1, 0, 1], [0, 0, 0, 1, 1]], bool)


def batch_of(**arrays) -> Batch:
  """Four rows, of which the first, third and last are right, and the last is not valid."""
  rows = dict(
    uniform=jnp.array([0.1, 0.5, 0.3, 0.9]),
    rewards=jnp.array([1.0, 0.0, 1.0, 1.0]),
    valid=jnp.array([True, True, True, False]),
  )
  batch = Batch(tokens=tiny.rows(0, 4, 5), segment_ids=jnp.array(SEGMENTS), mask=jnp.array(MASK))
  return batch.with_arrays(**rows | arrays)


def state_of(name, one, policy=None, params=()) -> TrainState:
  """A state in which there is one network."""
  own = one.network.init(jax.random.key(0), one.policy.config.width)
  entry = one.init(own, lambda optimizer, params: optimizer.init(params))
  return TrainState(
    **dict.fromkeys(('step', 'phase', 'phase_step', 'cursor', 'skipped', 'update'), jnp.int32(0)),
    **dict.fromkeys(('opt_state', 'collect_state', 'credit_state', 'objective_state'), ()),
    params=params,
    anchors={},
    networks={name: entry},
  )


def scaled(params, seed):
  """Parameters without zeros, as they are after some steps."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda p: jnp.asarray(0.5 * rng.normal(size=p.shape), p.dtype), params)


# The flow, one token and one layer at a time, in float64.


def flow_oracle(params, flow, states, segments, noise, times):
  """Errors [B, T] at the times [n, B, T]; NaN where a token has no neighbour."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  silu = lambda x: x / (1 + np.exp(-x))
  dense = lambda w, x: x @ w['weight'] + w['bias']
  rms = lambda x: x / np.sqrt(np.mean(x**2) + 1e-6)

  def perceptron(w, x):
    hidden = dense(w['0'], x)
    return dense(w['1'], np.where(hidden > 0, hidden, 0.2 * hidden))

  def shown(x):
    k = np.arange(1, 9)
    return np.concatenate([np.cos(np.pi * k * x), np.sin(np.pi * k * x)])

  def velocity(x, s, beside, depth):
    given = dense(p['condition'], beside) + perceptron(p['time'], shown(s))
    given = silu(given + perceptron(p['layer'], shown(depth)))
    y = dense(p['state'], x)
    for i in range(flow.blocks):
      shift, scale, gate = np.split(dense(p['blocks'][str(i)]['modulation'], given), 3)
      y = y + gate * perceptron(p['blocks'][str(i)]['mlp'], rms(y) * (1 + scale) + shift)
    return dense(p['output'], rms(y))

  count, rows, length, _ = states.shape
  out = np.full((rows, length), np.nan)
  step = -1 if flow.side == 'before' else 1
  for b in range(rows):
    for t in range(length):
      if not (0 <= t + step < length and segments[b, t] and segments[b, t + step]):
        continue
      errors = []
      for i in range(count):
        h, beside, s = states[i, b, t], states[i, b, t + step], times[i, b, t]
        if flow.normalize:
          h, beside = rms(h), rms(beside)
        x = s * h + (1 - s) * noise[i, b, t]
        v = velocity(x, s, beside, flow.layers[i])
        errors.append(np.mean((v - (h - noise[i, b, t])) ** 2))
      out[b, t] = np.mean(errors)
  return out


@pytest.mark.parametrize(('side', 'normalize'), [('before', False), ('after', True)])
def test_the_flow_is_its_transcription(side, normalize):
  flow = networks.Flow(layers=(0.3, 0.9), side=side, normalize=normalize, hidden=3, blocks=2)
  params = scaled(flow.init(jax.random.key(0), 4), 1)
  states = np.random.default_rng(2).normal(size=(2, 4, 5, 4)).astype(np.float32)
  batch = batch_of()
  noise, normal = flow.noise(states, batch, networks.LEARNING)
  times = 1 / (1 + np.exp(-np.float64(normal)))
  learns = np.asarray(flow.learns(batch))
  got = np.asarray(jax.jit(flow.errors)(params, states, batch))
  wanted = flow_oracle(params, flow, states, SEGMENTS, np.float64(noise), times)
  np.testing.assert_allclose(got[learns], wanted[learns], rtol=2e-5)
  # Right rows learn, at tokens of the mask with a neighbour, which may be the prompt's.
  has = ~np.isnan(wanted)
  right = np.array([True, False, True, False])[:, None]
  np.testing.assert_array_equal(learns, MASK & has & right)
  assert learns[2].tolist() == [False, False, True, False, side == 'before']

  # All rows are scored, with other noise, at one time.
  noise, _ = flow.noise(states, batch, networks.SCORING)
  wanted = flow_oracle(params, flow, states, SEGMENTS, np.float64(noise), np.full((2, 4, 5), 0.8))
  got = np.asarray(jax.jit(flow.scores)(params, states, batch))
  np.testing.assert_allclose(got, np.where(MASK & has, 4 * wanted, 0), rtol=2e-5)


def test_noise_depends_on_the_row_and_not_on_its_place():
  flow, states = networks.Flow(), jnp.zeros((3, 4, 5, 2))
  batch = batch_of()
  noise, normal = flow.noise(states, batch, 0)
  back, _ = flow.noise(states, batch_of(uniform=batch['uniform'][::-1]), 0)
  np.testing.assert_array_equal(back[:, ::-1], noise)
  other, _ = flow.noise(states, batch, 1)
  numbers = np.concatenate([np.ravel(x) for x in (noise, normal, other)])
  assert len(np.unique(numbers)) == len(numbers)


# RDD: a matrix of one-hot states is a table of running means.


def table_of_visits(rows: int, outputs: int, sigma: float) -> learner.NetworkLearner:
  """A learner whose states are one-hot tokens, and whose n-th step makes the mean of n targets."""
  seen = lambda params, tokens, segment_ids, layers: jax.nn.one_hot(tokens, rows)[None]
  average = optax.sgd(lambda step: rows * outputs / (2 * (step + 1.0)))
  return learner.NetworkLearner(
    name='bonus',
    policy=types.SimpleNamespace(
      states=seen, config=types.SimpleNamespace(num_layers=1, width=rows)
    ),
    states_of='policy',
    network=networks.RandomTargets(hidden=0, outputs=outputs, sigma=sigma),
    optimizer=optim.wrappers.rated_like(average, optim.sgd()),
  )


@pytest.mark.parametrize('sigma', [1.0, 0.5, 0.0])
def test_the_bonus_of_a_table_counts_visits(sigma):
  """Theorem: E b = sigma^2 / n after n visits; without noise one visit is enough (RND)."""
  rows, outputs = 200, 64
  one = table_of_visits(rows, outputs, sigma)
  state = state_of('bonus', one)
  tokens = jnp.stack([jnp.zeros(rows, jnp.int32), jnp.arange(rows)], axis=1)
  ones = jnp.ones((rows, 2), jnp.int32)
  batch = Batch(tokens=tokens, segment_ids=ones, mask=ones > 0)

  def visit(state, uniform):
    rows = batch.with_arrays(uniform=uniform)
    state, report = one.update(state, rows)
    return state, (one.scores((), state.networks['bonus']['params'], rows), report['tokens'])

  uniform = jnp.asarray(np.random.default_rng(0).uniform(size=(16, rows)), jnp.float32)
  after, (found, tokens) = jax.jit(functools.partial(jax.lax.scan, visit))(state, uniform)
  assert not found[:, :, 0].any() and (tokens == rows).all()  # the last token is the visited one
  for n in (1, 4, 16):
    mean = float(jnp.mean(found[n - 1, :, 1]))
    assert mean == pytest.approx(sigma**2 / n, rel=0.05, abs=1e-9)  # 4 standard errors are .05
  fixed = lambda state: state.networks['bonus']['params']['target']['0']['weight']
  np.testing.assert_array_equal(fixed(after), fixed(state))


def test_the_visited_states_are_the_last_or_all():
  batch = batch_of()
  last = networks.RandomTargets().learns(batch)
  assert last.sum(axis=1).tolist() == [1] * 4 and last[2, 4] and last[1, 3]
  np.testing.assert_array_equal(networks.RandomTargets(states='each').learns(batch), MASK)


# AMAGO: critics at several discounts.


def test_popart_changes_no_value_and_its_statistics_are_those_of_the_targets():
  rng, x = np.random.default_rng(0), np.random.default_rng(1).normal(size=(4, 3))
  with jax.enable_x64(True):
    popart = valued.first_popart(3)
    seen = []
    for n in range(1, 4):
      y = rng.normal(3, 5, (50, 3))
      before = np.asarray(popart.values(x))
      popart = valued.moved(popart, jnp.mean(y, 0), jnp.mean(y**2, 0), rate=0.1)
      np.testing.assert_allclose(popart.values(x), before, atol=1e-12)
      seen.append(y)
      # A moving average that forgets its start: weights 0.9^(age), divided by their sum.
      ages = 0.9 ** np.arange(n)[::-1] / sum(0.9 ** np.arange(n))
      mean = sum(w * y.mean(0) for w, y in zip(ages, seen))
      square = sum(w * (y**2).mean(0) for w, y in zip(ages, seen))
      np.testing.assert_allclose(popart.mean, mean, atol=1e-12)
      np.testing.assert_allclose(popart.scale, np.sqrt(square - mean**2), atol=1e-12)
    still = valued.moved(valued.first_popart(3), jnp.ones(3), jnp.ones(3) * 9, rate=0.0)
    np.testing.assert_array_equal(still.values(x), x)  # frozen: values are not normalised
    np.testing.assert_array_equal(still.normalized(x), x)


def critics_oracle(critics, params, states, batch, draws):
  """(errors, scores), one token, discount and critic at a time, in float64; draws [B, 2, T, G]."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  pop, mask, segments = p['popart'], np.asarray(batch.mask), np.asarray(batch.segment_ids)
  scale = np.sqrt(np.clip(pop['square'] - pop['mean'] ** 2, 1e-4, 1e8))
  rows, length = mask.shape
  count, gammas = critics.critics, critics.discounts

  def given(which, c, h):
    """x of critic c, [G]."""
    layers = [{k: v[c] for k, v in p[which][str(i)].items()} for i in range(len(p[which]))]
    for i, one in enumerate(layers):
      h = np.where(h > 0, h, 0.2 * h) if i else h
      h = h @ one['weight'] + one['bias']
    return h

  def value(which, c, b, t):
    """[G], in units of the reward, of the state before the token."""
    x = given(which, c, states[0, b, t - 1])
    return scale * (pop['weight'] * x + pop['bias']) + pop['mean']

  def chosen(which, c, b, t):
    later = [s for s in range(t + 1, length) if mask[b, s]]
    if not later:
      return np.full(len(gammas), float(batch['rewards'][b]))
    return np.array(gammas) * value(which, c, b, later[0])

  errors, scores = np.full((2, rows, length), np.nan)
  scores[:] = 0
  for b in range(rows):
    for t in range(1, length):
      if not (mask[b, t] and segments[b, t - 1]):
        continue
      two = np.stack([[chosen('target', c, b, t) for c in range(count)]])[0]
      pick = np.stack([two[draws[b, i, t], range(len(gammas))] for i in range(2)])
      y = pick.min(axis=0) if critics.improve else pick.mean(axis=0)
      own = np.stack([value('critics', c, b, t) for c in range(count)])
      q = np.stack([chosen('critics', c, b, t) for c in range(count)])
      errors[b, t] = np.mean(((own - pop['mean']) / scale - (y - pop['mean']) / scale) ** 2)
      a = (q.mean(axis=0) - own.mean(axis=0)) / scale
      least = (q.min(axis=0) - own.mean(axis=0)) / scale
      f = {'positive': a > 0, 'exponential': np.minimum(np.exp(a), 20)}[critics.choose.__name__]
      scores[b, t] = np.mean(critics.improve * least + critics.imitate * f)
  return errors, scores


@pytest.mark.parametrize(
  ('improve', 'choose', 'hidden'), [(1.0, 'positive', 3), (0.0, 'exponential', 0)]
)
def test_the_critics_are_their_transcription(improve, choose, hidden):
  choose = getattr(valued, choose)
  critics = networks.Critics(
    discounts=(0.3, 0.9), critics=3, improve=improve, imitate=0.7, hidden=hidden, choose=choose
  )
  params = scaled(critics.init(jax.random.key(0), 4), 1)
  params['popart'] |= dict(mean=jnp.array([0.2, -0.1]), square=jnp.array([0.5, 2.0]))
  states = np.random.default_rng(2).normal(size=(1, 4, 5, 4)).astype(np.float32)
  batch = batch_of()
  keys = [jax.random.fold_in(k, networks.LEARNING) for k in networks.row_keys(batch['uniform'])]
  draws = np.stack([jax.random.randint(k, (2, 5, 2), 0, 3) for k in keys])
  errors, scores = critics_oracle(critics, params, states, batch, draws)
  learns = np.asarray(critics.learns(batch))
  np.testing.assert_array_equal(learns, ~np.isnan(errors) & np.asarray(batch['valid'])[:, None])
  got = np.asarray(jax.jit(critics.errors)(params, states, batch))
  np.testing.assert_allclose(got[learns], errors[learns], rtol=2e-5)
  got = np.asarray(jax.jit(critics.scores)(params, states, batch))
  np.testing.assert_allclose(got, scores, rtol=2e-5, atol=1e-6)


def test_the_critics_of_a_chain_are_its_values_at_every_discount():
  """V of the state with k tokens to come is discount^(k - 1) R; with it, no token is better than V."""
  tokens, discounts = 6, (0.1, 0.5, 0.9)
  one = dataclasses.replace(
    table_of_visits(tokens, 1, 0.0),
    network=networks.Critics(discounts=discounts, critics=2, hidden=0, follow=1.0, normalize=0.01),
    optimizer=optim.sgd(learning_rate=0.4),
  )
  state = state_of('bonus', one)
  row = jnp.arange(tokens)[None]
  batch = Batch(tokens=row, segment_ids=jnp.ones_like(row), mask=row > 0)
  batch = batch.with_arrays(
    rewards=jnp.array([3.0]), valid=jnp.array([True]), uniform=jnp.array([0.5])
  )
  step = lambda state, _: (one.update(state, batch)[0], ())
  state, _ = jax.jit(lambda state: jax.lax.scan(step, state, None, length=1500))(state)
  own = state.networks['bonus']['params']
  states = jax.nn.one_hot(row, tokens)[None]
  x, _ = one.network.before(own['critics'], states, batch)
  found = valued.PopArt(**own['popart']).values(x)[:, 0, 1:]
  closed = 3 * np.array(discounts)[None] ** np.arange(tokens - 2, -1, -1)[:, None]
  np.testing.assert_allclose(found, np.broadcast_to(closed, found.shape), atol=1e-4)
  # The actor's term is 0 there; the first token has no state before it.
  critics = dataclasses.replace(one.network, imitate=0.0)
  np.testing.assert_allclose(critics.scores(own, states, batch), 0, atol=1e-3)
  everything = dataclasses.replace(one.network, choose=valued.exponential, imitate=1.0)
  np.testing.assert_allclose(everything.scores(own, states, batch)[0, 1:], 1, atol=1e-3)


def test_statistics_and_target_critics_follow_the_whole_minibatch():
  """One step, in one piece and in two: the same, with the mean of all targets that are learned."""
  critics = networks.Critics(discounts=(0.5, 0.9), critics=2, hidden=0, follow=0.25)
  one = dataclasses.replace(
    table_of_visits(32, 1, 0.0), network=critics, optimizer=optim.sgd(learning_rate=0.1)
  )
  state, batch = state_of('bonus', one), batch_of()
  before = state.networks['bonus']['params']
  look = lambda own: (critics.targets(own, one.states((), batch), batch), critics.learns(batch))
  targets, learns = map(np.asarray, jax.jit(look)(before))
  before['critics'] = jax.tree.map(lambda x: x + 1, before['critics'])
  moved = []
  for pieces in (1, 2):
    update = jax.jit(dataclasses.replace(one, micro_batches=pieces).update)
    moved.append(update(state, batch)[0].networks['bonus'])
  close(*moved)
  after = moved[0]['params']
  np.testing.assert_allclose(after['popart']['mean'], targets[learns].mean(axis=0), rtol=1e-5)
  np.testing.assert_allclose(after['popart']['square'], (targets[learns] ** 2).mean(0), rtol=1e-5)
  jax.tree.map(  # a quarter of the way to the critics before the step
    lambda a, b, c: np.testing.assert_allclose(a, 0.75 * b + 0.25 * c, rtol=1e-5, atol=1e-6),
    *(after['target'], before['target'], before['critics']),
  )


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (dict(discounts=(0.9, 1.5)), r'discounts=\(0.9, 1.5\): expected numbers in \[0, 1\]'),
    (dict(discounts=()), 'expected numbers'),
    (dict(layers=(0.5, 1.0)), 'expected one fraction'),
  ],
)
def test_critics_that_cannot_be_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    networks.Critics(**settings)


# How networks learn, beside a model.


@functools.cache
def flow_learner(micro_batches: int = 1) -> learner.NetworkLearner:
  return learner.NetworkLearner(
    name='flow',
    policy=tiny.policy(),
    states_of='policy',
    network=networks.Flow(layers=(0.5, 1.0), hidden=8, blocks=1),
    optimizer=optim.adamw(learning_rate=1e-2),
    micro_batches=micro_batches,
  )


@pytest.fixture(scope='module')
def stepped():
  """A state, and what one step on a batch makes of it."""
  one = flow_learner()
  state = state_of('flow', one, params=tiny.params())
  state.networks['flow']['params'] = scaled(state.networks['flow']['params'], 3)
  update = jax.jit(lambda state, batch: step(one, state, batch))
  return state, update, update(state, batch_of())


def step(one, state, batch):
  """The next state, and the report with the scores before the step."""
  scores = one.scores(state.params, state.networks[one.name]['params'], batch)
  state, report = one.update(state, batch)
  return state, report | {'scores': scores}


def close(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5), a, b)


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_micro_batches_and_a_mesh_change_no_step(stepped):
  state, _, (moved, report) = stepped
  assert report['tokens'] == 5 and report['grad_norm'] > 0
  same(moved.replace(networks={}), state.replace(networks={}))
  mesh = sharding.make_mesh(data=2)
  with jax.set_mesh(mesh):
    batch = sharding.place_batch(mesh, batch_of())
    placed = sharding.replicate(mesh, sharding.to_host(state))
    found, told = jax.jit(functools.partial(step, flow_learner(2)))(placed, batch)
  close(found.networks, moved.networks)
  close(told, report)


def test_a_batch_without_right_rows_is_not_learned_and_one_that_is_not_finite_is_counted(stepped):
  state, update, (moved, _) = stepped
  nothing, report = update(moved, batch_of(rewards=jnp.zeros(4)))
  same(nothing, moved)
  assert report['tokens'] == 0 and report['empty/loss'] and report['skipped'] == 0
  bad = moved.replace(params=jax.tree.map(lambda p: p + jnp.nan, state.params))
  for number in (1, 2):
    bad, report = update(bad, batch_of())
    assert report['skipped'] == number
  same(bad.networks['flow']['params'], moved.networks['flow']['params'])
  good, report = update(bad.replace(params=state.params), batch_of())
  assert report['skipped'] == 0 and good.networks['flow']['skipped'] == 0


def test_the_loss_falls_on_the_same_states(stepped):
  state, update, _ = stepped
  losses = []
  for _ in range(30):
    state, report = update(state, batch_of())
    losses.append(float(report['loss']))
  assert losses[-1] < 0.5 * losses[0]


# The methods.


def credited(method, **arrays):
  estimator = bind(method.credit, credit.TABLE)
  batch = Batch(
    tokens=jnp.zeros((4, 4), jnp.int32),
    segment_ids=jnp.ones((4, 4), jnp.int32),
    mask=jnp.array([[1, 1, 1, 1]] * 3 + [[1, 1, 0, 0]], bool),
    rewards=jnp.array([1.0, 0, 1, 0]),
    valid=jnp.ones(4, bool),
    group_ids=jnp.zeros(4, jnp.int32),
  ).with_arrays(**arrays)
  assign = jax.jit(functools.partial(credit.assign, estimator))
  return np.asarray(assign(batch, estimator.init())[0].advantages)


SCORES = jnp.array([[0.1, 0.7, 1.0, 0.4]] * 3 + [[0.5, 2.0, 9.0, 9.0]])


def test_the_advantages_of_rlfr_are_those_of_the_worked_example():
  got = credited(method_of('rlfr'), flow_scores=SCORES)
  outcome = np.array([1, -1, 1, -1]) * 0.5 / np.sqrt(1 / 3)
  extra = np.array([[-1 / 60, -1 / 60, -0.01, 0]] * 3 + [[-0.01, -0.01, 0, 0]])
  wanted = outcome[:, None] + extra
  wanted[3, 2:] = 0
  np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_the_advantages_of_rdd_are_normalised_with_the_bonus():
  bonus = jnp.array([[0, 0, 0, 0.5], [0, 0, 0, 2.0], [0, 0, 0, 0], [0, 1.0, 7, 7]])
  got = credited(method_of('rdd'), bonus_scores=bonus)
  r = np.array([1.5, 2, 1, 1])
  wanted = (r - r.mean()) / (r.std(ddof=1) + 1e-6)
  np.testing.assert_allclose(got[:, 0], wanted, atol=1e-6)


@pytest.mark.parametrize(
  ('name', 'off', 'scores'),
  [
    ('rlfr', dict(coefficient=0.0), 'flow_scores'),
    ('rlfr', dict(threshold=1.0), 'flow_scores'),
    ('rdd', dict(coefficient=0.0), 'bonus_scores'),
  ],
)
def test_without_its_rewards_a_method_has_the_gradient_of_grpo(name, off, scores):
  method, grpo = method_of(name), method_of('grpo')
  inside = method.credit.rewards if name == 'rlfr' else method.credit.reward
  inside.update(off)
  grpo.objective.penalties.kl.weight = 0.0
  grpo.credit.advantage.eps = method.credit.credit.advantage.eps
  rng = np.random.default_rng(0)
  arrays = dict(
    behavior_logp=jnp.asarray(-rng.uniform(size=(4, 4)), jnp.float32),
    rewards=jnp.array([1.0, 0, 1, 0]),
    group_ids=jnp.zeros(4, jnp.int32),
    mask=jnp.ones((4, 4), bool),
  )
  logp = arrays['behavior_logp'] + 0.3
  of = lambda one, **more: jax.jit(jax.grad(lambda x: one.loss(logp=x, **arrays, **more)[0]))(logp)
  found = of(method, **{scores: SCORES})
  assert np.abs(found).max() > 0
  same(found, of(grpo, reference_logp=arrays['behavior_logp']))


def smoke(name, **phase):
  config = addition(method_of(name))
  config.phases.train.update(phase)
  return config


def test_the_network_of_a_method_is_explained():
  config = smoke('rlfr')
  text = ' '.join(' '.join(explain.explain(config, build.build(config))).split())
  assert 'loss of network flow = ' in text and 'metrics: flow/loss' in text
  assert (
    'flow_scores network flow' in text and 'states of policy behind layers 1, 2, 2 of 2' in text
  )


def test_a_network_is_traced_and_its_memory_is_counted():
  run = build.build(smoke('rdd'))
  phase = run.phases['train']
  (one,) = phase.network_learners(run.policy).values()
  batch = tracing.batch_shapes(phase, phase.collect.rows)
  state = tracing.state_shapes(phase, run.policy)
  moved, report = jax.eval_shape(one.update, state, batch)
  assert jax.tree.map(lambda x: x.shape, moved) == jax.tree.map(lambda x: x.shape, state)
  assert {'loss', 'grad_norm', 'skipped', 'tokens'} <= report.keys()
  uses = {one.name: one for one in memory.of_phase(phase, run.policy, run.mesh, opt_shardings)}
  size = lambda tree: sum(4 * np.prod(x.shape) for x in jax.tree.leaves(tree))
  own = size(one.shapes()) + 2 * size(one.trained(one.shapes()))  # two moments
  assert own <= uses['network bonus'].device < own + 64


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda phase: phase.networks.__delitem__('flow'), "a network 'flow' is needed; there are"),
    (lambda phase: phase.networks.update(other=phase.networks.flow), 'reads other_scores'),
    (lambda phase: phase.networks.flow.update(states_of='polcy'), "did you mean 'policy'"),
    (lambda phase: phase.networks.flow.update(minibatches=5), '16 rows do not divide into 5 minib'),
    (lambda phase: phase.networks.flow.network.update(layers=(0.5, 1.5)), 'fractions of the depth'),
    (lambda phase: phase.networks.flow.network.update(time=1.0), 'expected a number'),
    (lambda phase: phase.networks.flow.optimizer.update(name='optim.harpg'), 'unknown .optim.harpg'),
    (lambda phase: phase.anchors.update(flow=part(optim.fixed)), 'is taken'),
  ],
)  # fmt: skip
def test_a_network_that_cannot_be_used_is_refused(change, message):
  config = smoke('rlfr')
  with config.unlocked():
    change(config.phases.train)
  with pytest.raises(ValueError, match=message):
    build.build(config)
