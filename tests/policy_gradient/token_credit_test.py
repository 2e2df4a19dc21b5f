"""Credit of single tokens: numbers of the papers, identities, and transcriptions in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from polgrad import credit, optim
from polgrad.losses import (
  advantages,
  baselines,
  conflicts,
  down_sampling,
  entropy_shaping,
  process_rewards,
  returns,
  selections,
  surrogates,
)
from tests.policy_gradient.harness import scored
from tests.runs import Run

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


conflict_weights = jax.jit(conflicts.conflict_weights)
THREE = np.array([[5, 6, 7, 8, 9], [5, 6, 3, 8, 9], [5, 2, 7, 9, 0]])
THREE_MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]], bool)
GAINS = np.array([1.0, -0.5, -0.5])


def test_conflicting_tokens_of_three_rows_are_the_published_ones():
  got = conflict_weights(THREE, THREE_MASK, GAINS, np.zeros(3, int))
  np.testing.assert_array_equal(got, [[2, 2, 2, 4, 4], [0, 0, 1, 0, 0], [0, 1, 1, 0, 1]])
  # Rows in another order, with holes and tokens in between that are not in the mask.
  order = [2, 0, 1]
  holed = lambda x, fill: np.insert(x[order], [0, 2, 5], fill, axis=1)
  moved = conflict_weights(
    holed(THREE, 5), holed(THREE_MASK, False), GAINS[order], np.zeros(3, int)
  )
  np.testing.assert_array_equal(moved, holed(np.asarray(got), 1))
  good = conflict_weights(THREE, THREE_MASK, np.abs(GAINS), np.zeros(3, int))
  apart = conflict_weights(THREE, THREE_MASK, GAINS, np.arange(3))
  assert (good == 1).all() and (apart == 1).all()


def conflicting(tokens, gains):
  """The first shared tokens of each list, by sets of the tokens at a place."""
  found = []
  for row in tokens:
    run = 0
    while run < len(row) and all(
      any(
        len(other) > run and other[run] == row[run] and sign * gain > 0
        for other, gain in zip(tokens, gains)
      )
      for sign in (1, -1)
    ):
      run += 1
    found.append(run)
  return found


def test_gtpo_is_its_transcription(x64):
  random = np.random.default_rng(0)
  tokens, mask = random.integers(0, 2, (12, 9)), np.arange(9) < random.integers(1, 9, (12, 1))
  groups, rewards = np.arange(12) % 3, random.integers(0, 2, 12).astype(float)
  entropy = random.uniform(0.2, 1.1, (12, 9))
  x = dict(tokens=tokens, mask=mask, group_ids=groups, rewards=rewards, old_entropy=entropy)
  found = assigned(credit.conflict_aware(), **x).advantages
  expected = np.zeros(mask.shape)
  for g in range(3):
    rows = np.flatnonzero(groups == g)
    gains = rewards[rows] - rewards[rows].mean()
    lists = [tokens[r][mask[r]].tolist() for r in rows]
    ahead, back = conflicting(lists, gains), conflicting([x[::-1] for x in lists], gains)
    for r, gain, first, last in zip(rows, gains, ahead, back):
      n = mask[r].sum()
      weight = {True: 2.0, False: 0.0 if gain < 0 else 1.0}[gain > 0]
      factors = np.array([weight ** ((t < first) + (t >= n - last)) for t in range(n)])
      h = entropy[r][mask[r]].mean()
      expected[r][mask[r]] = factors * (gain - 0.1 * h if h <= 0.7 else 0)
  assert (expected == 0).any() and len(np.unique(np.round(expected, 6))) > 8
  np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)


def test_a_common_first_token_is_pushed_up_instead_of_cancelling():
  """Two rows of two tokens, +1 and -1, with the same first token; GTPO gives it 2 / L, GRPO nothing."""
  tokens = np.array([[1, 2, 0, 0, 0], [1, 3, 0, 0, 0], [0, 0, 0, 0, 0]])
  mask, gains = np.tile([True, True, False, False, False], (3, 1)), np.array([1.0, -1.0, 0.0])
  weights = conflict_weights(tokens, mask, gains, np.zeros(3, int))
  of_first = (np.asarray(weights) * gains[:, None] / 2)[:, 0]
  assert of_first.sum() == 1.0 and (gains / 2).sum() == 0


def test_empg_gives_the_published_advantages(x64):
  """Two rows of three steps of two tokens; their mean entropies and gains are those of the example."""
  steps = np.array([[0.2, 0.8, 0.5], [1.0, 0.1, 0.4]])
  entropy = np.repeat(steps, 2, axis=1) + np.tile([0.05, -0.05], 3)
  ids, mask = np.repeat(np.tile(np.arange(3), (2, 1)), 2, axis=1), np.ones((2, 6), bool)
  modulated = jax.jit(entropy_shaping.modulated)
  found = np.asarray(modulated(np.array([1.0, -1.0]), entropy, ids, mask))
  wanted = [[1.33729, 0.70604, 0.94128], [-0.49269, -1.43648, -1.05543]]
  np.testing.assert_allclose(found[:, ::2], wanted, atol=1e-5)
  np.testing.assert_array_equal(found[:, ::2], found[:, 1::2])
  knobs = dict(decay=0.0, bonus=0.0)
  plain = modulated(np.array([1.0, -1.0]), entropy, ids, mask, **knobs)
  np.testing.assert_allclose(plain, [[1] * 6, [-1] * 6], atol=1e-7)
  # The theorem behind it: the squared norm of the score is 1 minus the collision probability.
  p = np.array([0.7, 0.2, 0.1])
  norm = sum(p[a] * np.sum((np.eye(3)[a] - p) ** 2) for a in range(3))
  np.testing.assert_allclose([norm, 1 - np.sum(p**2)], 0.46)


GAINS_OF_EIGHT = np.array([-1.5, -0.7, -0.2, 0.1, 0.3, 0.9, 1.1, 0.0])


def test_the_rows_of_largest_variance_are_the_published_ones(x64):
  choose = jax.jit(down_sampling.largest_variance)
  every = np.ones(8, bool)
  known = {2: 1.69, 3: 1.39556, 4: 1.1875, 6: 0.81472}
  for number in range(1, 9):
    kept = np.asarray(choose(GAINS_OF_EIGHT, every, number))
    assert kept.sum() == number
    best = max(np.var(c) for c in itertools.combinations(GAINS_OF_EIGHT, number))
    np.testing.assert_allclose(np.var(GAINS_OF_EIGHT[kept]), best, atol=1e-12)
    np.testing.assert_allclose(best, known.get(number, best), atol=1e-5)
    scaled = GAINS_OF_EIGHT / GAINS_OF_EIGHT.std()
    assert number == 1 or np.var(scaled[kept]) > 1 - 1e-12
  valid = np.arange(8) != 0
  kept = np.asarray(choose(GAINS_OF_EIGHT, valid, 2))
  np.testing.assert_array_equal(np.flatnonzero(kept), [1, 6])
  np.testing.assert_array_equal(choose(GAINS_OF_EIGHT, valid, 8), valid)
  assert not np.any(choose(GAINS_OF_EIGHT, ~every, 3))


def test_fewer_tokens_of_fewer_rows_are_kept_at_the_beginning():
  random = np.random.default_rng(0)
  entropy, mask = random.uniform(size=(8, 5)), np.ones((8, 5), bool)
  mask[:, 3:] = False
  x = scored(rewards=GAINS_OF_EIGHT, mask=mask, old_entropy=entropy)
  inner = credit.outcome(advantage=lambda rewards: rewards)
  estimator = credit.down_sampled(credit=inner, rows=(0.5, 1.0), tokens=(0.25, 1.0), batches=2)
  assign = jax.jit(lambda batch, state: credit.assign(estimator, batch, state))
  state, kept = estimator.init(), []
  for _ in range(4):
    batch, state = assign(x, state)
    kept.append(np.asarray(batch.mask))
    np.testing.assert_allclose(batch.advantages[:, 0], GAINS_OF_EIGHT, rtol=1e-6)
  # Of 8 rows of 3 tokens: 4 rows and a quarter of 12 tokens, 6 rows and 5/8 of 18, and all.
  assert [one.sum() for one in kept] == [3, 12, 24, 24]
  rows = np.isin(np.arange(8), [0, 1, 5, 6])[:, None] & mask
  scores = np.where(rows, np.abs(GAINS_OF_EIGHT)[:, None] * entropy, -1)
  np.testing.assert_array_equal(kept[0], scores >= np.sort(scores.ravel())[-3])
  with pytest.raises(ValueError, match=r'rows: expected two fractions in \(0, 1\]'):
    credit.down_sampled(credit=inner, rows=(0.0, 1.0))


def test_hapo_gives_the_published_numbers():
  """Entropies of five tokens, the bounds on both sides, and advantages of four rows."""
  entropy, mask = jnp.array([[0.05, 0.1, 0.5, 1.0, 2.0]]), np.ones((1, 5), bool)
  h = selections.signed_entropy(entropy, mask)
  np.testing.assert_allclose(h, [[-1, -0.76863, -0.23138, 0, 1]], atol=1e-5)
  # Temperatures of the same tokens: distributions with these entropies, of two tokens or of many.
  levels = selections.entropy_levels(entropy, mask)
  np.testing.assert_allclose(levels, [0, np.log(2), -np.log(0.05)], atol=1e-6)
  heat = 1 + 0.05 * selections.scaled_entropy(entropy, levels)
  np.testing.assert_allclose(heat, [[0.95, 0.96157, 0.98843, 1, 1.05]], atol=1e-5)
  np.testing.assert_array_equal(selections.scaled_entropy(entropy, jnp.zeros(3)), 0)
  np.testing.assert_array_equal(selections.entropy_levels(entropy, ~mask), 0)
  # Far below and far above their bounds, tokens have the loss of the bound; A' = A (1 + h) at h > 0.
  loss = lambda ratio, a: surrogates.entropy_adaptive(
    jnp.full((1, 5), np.log(ratio)), jnp.full((1, 5), a), h
  )
  low = 1 - 0.2 * np.array([2, 1.76863, 1.23138, 1, 1])
  high = 1 + 0.2 * np.array([1, 1, 1, 1, 2])
  np.testing.assert_allclose(loss(0.1, -1.0)[0], low * [1, 1, 1, 1, 2], atol=1e-5)
  np.testing.assert_allclose(loss(3.0, 1.0)[0], -high * [1, 1, 1, 1, 2], atol=1e-5)
  lengths = np.array([10, 30, 40, 20])
  tokens, groups, valid = np.arange(40) < lengths[:, None], jnp.zeros(4, int), jnp.ones(4, bool)
  rewards = jnp.array([1.0, 0, 0, 1])
  found = baselines.token_normalized(rewards, tokens, groups, valid)
  np.testing.assert_allclose(found, [1.52752, -0.65465, -0.65465, 1.52752], atol=1e-4)
  drift = lambda a: float(np.sum(lengths * np.asarray(a)))
  assert abs(drift(found)) < 1e-4
  of_rows = advantages.group_normalized(rewards, groups, valid, ddof=0)
  np.testing.assert_allclose(drift(of_rows), -40, atol=1e-3)
  equal = baselines.token_normalized(rewards, tokens[:1].repeat(4, axis=0), groups, valid)
  np.testing.assert_allclose(equal, of_rows, atol=1e-5)
  # One short row among many tokens of others.
  far = baselines.token_normalized(
    rewards[:2], np.arange(40) < np.array([[1], [40]]), groups[:2], valid[:2]
  )
  np.testing.assert_allclose(far, [0.70711, -0.70711], atol=1e-4)


def test_scores_of_words_are_rewards_of_their_tokens():
  """With V = 0 and without a penalty: the sums of the scores from each token on."""
  scores = np.array([[0.0, 1, 0, -1]])
  x = dict(
    rewards=np.zeros(1),
    mask=np.ones((1, 4), bool),
    span_ids=np.array([[-1, 0, -1, 1]]),
    span_scores=scores,
    old_values=np.zeros((1, 4)),
  )
  plain = dict(kl_coefficient=0.0, normalizer=advantages.identity)
  found = assigned(credit.spans_generalized(trace=1.0, **plain), **x)
  np.testing.assert_allclose(found.advantages, [[0, 0, -1, -1]])
  np.testing.assert_array_equal(found.returns, found.advantages)


def test_a_part_at_the_end_is_outcome_reward_and_the_coefficient_follows_the_kl(x64):
  random = np.random.default_rng(0)
  mask = np.arange(6) < np.array([[6], [4], [5]])
  last, rewards = np.cumsum(mask, axis=1) == mask.sum(axis=1, keepdims=True), np.array([1.0, 0, 2])
  last &= mask
  logps = {
    n: np.where(mask, random.normal(size=mask.shape), 0)
    for n in ('proximal_logp', 'reference_logp')
  }
  x = dict(
    rewards=rewards,
    mask=mask,
    old_values=np.where(mask, random.normal(size=mask.shape), 0),
    span_ids=np.where(last, 0, -1),
    span_scores=np.where(last, rewards[:, None], 0),
    **logps,
  )
  estimator = credit.spans_generalized(kl_coefficient=0.3, kl_target=0.5, horizon=100.0)
  found, beta = jax.jit(lambda b: credit.assign(estimator, b, estimator.init()))(scored(**x))
  outcome = assigned(credit.generalized(kl_coefficient=0.3), **x)
  np.testing.assert_allclose(found.advantages, outcome.advantages, rtol=1e-6)
  kl = (logps['proximal_logp'] - logps['reference_logp']).sum() / 3
  np.testing.assert_allclose(
    beta, 0.3 * (1 + np.clip(kl / 0.5 - 1, -0.2, 0.2) * 3 / 100), rtol=1e-6
  )
  # The exact KL is one array instead of two.
  exact = credit.spans_generalized(kl_coefficient=0.3, kl_target=0.5, horizon=100.0, kl='exact')
  assert 'reference_logp' not in exact.requires
  x['old_kl'] = logps['proximal_logp'] - logps['reference_logp']
  x['old_kl'][~mask] = np.nan
  again, other = jax.jit(lambda b: credit.assign(exact, b, exact.init()))(scored(**x))
  np.testing.assert_allclose(again.advantages, found.advantages, rtol=1e-12)
  np.testing.assert_allclose(other, beta, rtol=1e-12)


def prime(x, process, outcome):
  """The advantages of PRIME before they are whitened, row by row."""
  rows = [b for b in range(len(x['mask'])) if x['valid'][b]]
  gap = np.where(x['mask'] & x['valid'][:, None], x['reward_model_logp'] - x['reference_logp'], 0)
  gap = gap / (np.abs(np.cumsum(gap[:, ::-1], axis=1)).max() + 1e-6)
  out = np.zeros(gap.shape)
  for b in rows:
    group = [c for c in rows if x['group_ids'][c] == x['group_ids'][b]]
    n, at = len(group), np.flatnonzero(x['mask'][b])
    if n == 1:
      continue
    means = sum(gap[c][x['mask'][c]].mean() for c in group)
    reward = process * (n / (n - 1) * gap[b, at] - means / (n - 1))
    reward[-1] += outcome * (n * x['rewards'][b] - sum(x['rewards'][c] for c in group)) / (n - 1)
    out[b, at] = np.cumsum(reward[::-1])[::-1]
  return out


def test_prime_is_its_transcription(x64):
  x = random_steps()
  x = {n: x[n] for n in ('mask', 'rewards', 'group_ids', 'valid', 'reference_logp')}
  x['reward_model_logp'] = np.random.default_rng(5).normal(size=x['mask'].shape)
  estimator = credit.implicit_process(process=0.7, outcome=1.3, normalizer=advantages.identity)
  found = assigned(estimator, **x)
  np.testing.assert_allclose(found.advantages, prime(x, 0.7, 1.3), rtol=1e-6, atol=1e-7)
  np.testing.assert_array_equal(found.label, x['rewards'] > 0.5)
  # A reward model that is the reference has nothing to say of tokens: leave-one-out of the outcome.
  same = assigned(credit.implicit_process(), **x | {'reward_model_logp': x['reference_logp']})
  outcome = credit.outcome(advantage=advantages.leave_one_out, normalizer=advantages.whiten)
  np.testing.assert_allclose(
    same.advantages, assigned(outcome, **x).advantages, rtol=1e-6, atol=1e-12
  )


def test_implicit_rewards_are_consistent_over_prefixes():
  """If beta log(model / reference) of every sequence is its reward, then of every prefix it is the soft
  value under the reference: enumerated on two steps of two tokens."""
  random, beta = np.random.default_rng(0), 0.3
  first, second = random.dirichlet([1, 1]), random.dirichlet([1, 1], size=2)
  reference = first[:, None] * second
  reward = random.normal(size=(2, 2))
  reward -= beta * np.log(
    (reference * np.exp(reward / beta)).sum()
  )  # so that the model is normalised
  model = reference * np.exp(reward / beta)
  of_prefix = beta * np.log(model.sum(axis=1) / first)
  soft = beta * np.log((second * np.exp(reward / beta)).sum(axis=1))
  np.testing.assert_allclose(of_prefix, soft, rtol=1e-12)


def test_a_critic_has_one_step_targets_in_states_of_the_data(x64):
  random = np.random.default_rng(3)
  mask = np.arange(6) < np.array([[6], [3], [5], [2]])
  arrays = dict(
    rewards=random.normal(size=4),
    mask=mask,
    old_values=np.where(mask, random.normal(size=(4, 6)), 0),
  )
  stream = np.array([0, 1, 0, 1])
  estimator = credit.hybrid(trace=0.9, normalizer=lambda a, mask: a)
  got = assigned(estimator, **arrays, stream=stream)
  for row, length in enumerate(mask.sum(axis=1)):
    values, reward = arrays['old_values'][row, :length], np.zeros(length)
    reward[-1] = arrays['rewards'][row]
    one_step = reward + np.append(values[1:], 0)
    wanted = one_step if stream[row] == 0 else np.full(length, arrays['rewards'][row])
    np.testing.assert_allclose(got.returns[row, :length], wanted, atol=1e-12)
    expected = gae(reward, values, 0.9)
    np.testing.assert_allclose(got.advantages[row, :length], expected, atol=1e-12)
  # Without rows of the data the targets are those of two lambdas.
  alone = assigned(estimator, **arrays, stream=np.ones(4, int))
  other = assigned(credit.decoupled(trace=0.9, normalizer=lambda a, mask: a), **arrays)
  np.testing.assert_allclose(alone.returns, other.returns, atol=1e-12)
