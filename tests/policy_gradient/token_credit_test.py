"""Credit of single tokens: numbers of the papers, identities, and transcriptions in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from polgrad import credit, optim
from polgrad.losses import process_rewards, returns
from tests.policy_gradient.harness import scored
from tests.runs import Run

pytestmark = pytest.mark.usefixtures('quick_compiler')
min_form = jax.jit(process_rewards.min_form, static_argnames='temperature')


def test_lambda_grows_with_the_length_so_that_its_powers_sum_to_a_fraction_of_it():
  lengths = np.array([10, 20, 100, 1000, 10000])
  mask = np.arange(10000) < lengths[:, None]
  found = np.asarray(returns.length_adaptive_trace(mask, scale=0.05))
  np.testing.assert_allclose(found, [0, 0, 0.8, 0.98, 0.998], atol=1e-6)
  np.testing.assert_allclose(1 / (1 - found[2:]), [5, 50, 500], rtol=1e-3)
  with pytest.raises(ValueError, match='scale must be positive'):
    returns.length_adaptive_trace(mask, scale=0.0)


def gae(rewards, values, trace):
  """A_t = sum_k trace^k delta_{t + k}, of one row without holes."""
  after = np.append(values[1:], 0)
  delta = rewards + after - values
  return np.array([
    sum(trace ** (k - t) * delta[k] for k in range(t, len(delta))) for t in range(len(delta))
  ])  # fmt: skip


def assigned(estimator, **arrays):
  assign = jax.jit(lambda batch: credit.assign(estimator, batch, estimator.init())[0])
  return assign(scored(**arrays))


def test_policy_and_critic_have_their_own_lambda(x64):
  random = np.random.default_rng(0)
  mask = np.arange(60) < np.array([[40], [60], [10]])
  values = np.where(mask, random.normal(size=mask.shape), 0)
  arrays = dict(rewards=np.array([1.0, 0.0, 1.0]), mask=mask, old_values=values)
  estimator = credit.decoupled(trace=0.9, normalizer=lambda a, mask: a)
  fixed = assigned(estimator, **arrays)
  adaptive = assigned(credit.decoupled(length_scale=0.05, normalizer=lambda a, mask: a), **arrays)
  for row, length in enumerate(mask.sum(axis=1)):
    reward = np.zeros(length)
    reward[-1] = arrays['rewards'][row]
    for batch, trace in ((fixed, 0.9), (adaptive, max(1 - 1 / (0.05 * length), 0))):
      expected = gae(reward, values[row, :length], trace)
      np.testing.assert_allclose(batch.advantages[row, :length], expected, atol=1e-12)
      np.testing.assert_allclose(batch.returns[row, :length], arrays['rewards'][row], atol=1e-12)


def test_a_critic_that_is_wrong_by_a_constant_errs_at_late_tokens_unless_lambda_is_one():
  """V = V* + .5: the last error alone changes, by -.5, and a token at distance d sees lambda^d of it."""
  mask = np.ones((1, 101), bool)
  rewards, values = np.zeros((1, 101)), np.full((1, 101), 0.5)
  found = np.asarray(returns.gae(rewards, values, mask, trace=0.95))
  np.testing.assert_allclose(found[0, [0, -1]], [-0.0030, -0.5], atol=1e-4)
  np.testing.assert_allclose(returns.gae(rewards, values, mask, trace=1.0), -0.5, atol=1e-6)
  # The reward of 1 at the end, seen from 100 tokens before it.
  decayed = returns.gae(returns.place_last(jnp.ones(1), mask), 0 * values, mask, trace=0.95)
  np.testing.assert_allclose(decayed[0, 0], 0.00592, atol=1e-5)


def test_before_ppo_a_phase_moves_the_value_head_alone():
  phases = Run('vapo').get_config('warm_start=5')
  assert phases.order == ('warm_start', 'value_pretraining', 'train')
  first = phases.phases.value_pretraining
  assert first.optimizer.only == 'value_head$' and first.steps == 50
  made = optim.adamw(learning_rate=0.1, only='value_head$', max_grad_norm=1.0)
  params = {'layer': {'query': jnp.ones(2)}, 'value_head': jnp.ones(2)}
  grads = {'layer': {'query': jnp.full(2, 1e9)}, 'value_head': jnp.full(2, 0.1)}
  state = made.init(params)
  steps, state = made.update(grads, state, params)
  moved = optax.apply_updates(params, steps)
  np.testing.assert_array_equal(moved['layer']['query'], 1)
  np.testing.assert_allclose(moved['value_head'], 0.9, rtol=1e-5)
  assert optim.learning_rate(made, state)['learning_rate'] == pytest.approx(0.1)
  with pytest.raises(ValueError, match='no parameter that is trained has a name'):
    optim.adamw(only='critic').init(params)


def steps_of(scores, lengths=None):
  """Arrays of one row whose steps have these scores and lengths (one token each)."""
  lengths = np.ones(len(scores), int) if lengths is None else np.asarray(lengths)
  ids = np.repeat(np.arange(len(scores)), lengths)[None]
  return np.repeat(np.asarray(scores, float), lengths)[None], ids, np.ones(ids.shape, bool)


@pytest.mark.parametrize(
  ('scores', 'temperature', 'wanted'),
  [
    ([0.9, 0.8, -0.5], 0.1, -0.499996),
    ([0.9, 0.8, -0.5], 1.0, -0.0395),
    ([0.5, 0.5, 0.5], 0.1, 0.5),
    ([0.9, 0.8, -0.5], 1e6, 0.4),
    ([0.7], 0.1, 0.7),
  ],
)
def test_the_value_of_a_row_is_near_its_worst_step(scores, temperature, wanted, x64):
  found = min_form(*steps_of(scores), temperature=temperature)
  np.testing.assert_allclose(found.sum(), wanted, atol=1e-4)
  if wanted == -0.0395:
    np.testing.assert_allclose(np.asarray(found[0]) / scores, [0.1623, 0.1794, 0.6583], atol=1e-4)
  if temperature == 1e6 or len(set(scores)) == 1:
    np.testing.assert_allclose(found[0], np.array(scores) / len(scores), rtol=1e-5)
  with pytest.raises(ValueError, match='temperature must be positive'):
    process_rewards.min_form(*steps_of(scores), temperature=0.0)


def random_steps(seed=0):
  """Six rows of eight tokens with holes in mask and parts; row 5 has no step, row 2 is not valid."""
  random = np.random.default_rng(seed)
  mask = random.uniform(size=(6, 8)) < 0.8
  ids = np.sort(random.integers(-1, 3, size=mask.shape), axis=1)
  ids[5] = -1
  scores = np.take_along_axis(random.uniform(-1, 1, size=(6, 3)), np.maximum(ids, 0), axis=1)
  return {
    'mask': mask,
    'span_ids': ids,
    'span_scores': np.where(ids >= 0, scores, 0),
    'rewards': random.normal(size=6),
    'group_ids': np.array([4, 1, 4, 1, 4, 4]),
    'valid': np.array([True, True, False, True, True, True]),
    'proximal_logp': random.normal(size=mask.shape),
    'reference_logp': random.normal(size=mask.shape),
  }


def pure(x, *, temperature, baseline, outcome, drop_ends, kl):
  """The advantages of PURE, step by step."""
  rows, length = x['mask'].shape
  use = [b for b in range(rows) if x['valid'][b]]
  steps = {b: {} for b in use}  # row -> number of the step -> its tokens
  for b in use:
    for t in range(length):
      if x['mask'][b, t] and x['span_ids'][b, t] >= 0:
        steps[b].setdefault(x['span_ids'][b, t], []).append(t)
  earned = {b: {} for b in use}  # row -> last token of a step -> reward
  for b in use:
    p = {s: x['span_scores'][b, at[-1]] for s, at in steps[b].items()}
    z = sum(np.exp(-q / temperature) for q in p.values())
    earned[b] = {s: np.exp(-q / temperature) / z * q for s, q in p.items()}
  others = {b: [c for c in use if c != b and x['group_ids'][c] == x['group_ids'][b]] for b in use}
  tokens = lambda b: sum(len(at) for at in steps[b].values())
  value = lambda b: sum(earned[b].values())
  reward = np.zeros((rows, length))
  for b in use:
    for s, at in steps[b].items():
      if baseline == 'step':
        of = [value(c) / len(steps[c]) if steps[c] else 0.0 for c in others[b]]
        base = np.mean(of) if of else 0.0
      else:
        number = sum(tokens(c) for c in others[b])
        base = sum(value(c) for c in others[b]) / number * len(at) if number else 0.0
      reward[b, at[-1]] += earned[b][s] - base
    own = [x['rewards'][c] for c in others[b]]
    at = np.flatnonzero(x['mask'][b])
    reward[b, at[-1]] += outcome * (x['rewards'][b] - np.mean(own) if own else 0.0)
    reward[b] -= kl * np.where(x['mask'][b], x['proximal_logp'][b] - x['reference_logp'][b], 0)
  kept = x['mask'] & x['valid'][:, None]
  future = np.cumsum(np.where(kept, reward, 0)[:, ::-1], axis=1)[:, ::-1]
  if drop_ends:
    for b in use:
      for t in [np.flatnonzero(x['mask'][b])[-1], *(at[-1] for at in steps[b].values())]:
        kept[b, t] = False
  return np.where(kept, (future - future[kept].mean()) / future[kept].std(), 0)


@pytest.mark.parametrize(('baseline', 'drop_ends'), [('token', True), ('step', False)])
def test_pure_is_its_transcription(baseline, drop_ends, x64):
  x = random_steps()
  knobs = dict(temperature=0.3, baseline=baseline, outcome=0.7, drop_ends=drop_ends)
  found = assigned(credit.process_min(**knobs, kl_coefficient=0.2), **x).advantages
  np.testing.assert_allclose(found, pure(x, **knobs, kl=0.2), rtol=1e-6, atol=1e-7)


def test_one_step_that_has_the_reward_as_its_score_is_outcome_reward():
  """The default of `Phase.spans`; then PURE is REINFORCE with a baseline of the other rows."""
  rewards = np.array([1.0, 0.0, 0.0, 1.0])
  mask = np.ones((4, 3), bool)
  found = assigned(
    credit.process_min(outcome=0.0, baseline='step', drop_ends=False),
    rewards=rewards,
    mask=mask,
    span_ids=np.zeros((4, 3), int),
    span_scores=np.repeat(rewards[:, None], 3, axis=1),
  )
  np.testing.assert_allclose(found.advantages, np.repeat([[1], [-1], [-1], [1]], 3, 1), rtol=1e-5)
