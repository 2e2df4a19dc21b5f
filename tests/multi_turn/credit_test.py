"""Credit over several turns: published numbers, transcriptions, masked tokens that change nothing."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import credit
from polgrad.losses import (
  advantages,
  aggregation,
  auxiliary_rewards,
  f_divergences,
  multipliers,
  ratios,
  reward_maps,
  row_scores,
)
from polgrad.registry import table_of
from polgrad.types import Batch

GROUP = 4
ROWS = 2 * GROUP
USED = 12  # three turns of up to three tokens, each behind a masked one
WIDTH = USED + 5  # columns


def batch_of(rows) -> Batch:
  """Rows written as lists of turns, each (number of tokens, reward), with one masked token before each.

  All batches have one shape, so one program serves all tests: rows that are not given are not valid.
  """
  mask, rewards = np.zeros((ROWS, WIDTH), bool), np.zeros((ROWS, WIDTH))
  for b, row in enumerate(rows):
    at = 0
    for tokens, reward in row:
      mask[b, at + 1 : at + 1 + tokens] = True
      at += 1 + tokens
      rewards[b, at - 1] = reward
  x = {
    'turn_rewards': rewards,
    'rewards': rewards.sum(axis=1),
    'group_ids': np.zeros(ROWS, int),
    'valid': np.arange(ROWS) < len(rows),
  }
  batch = Batch(tokens=np.zeros(mask.shape, int), segment_ids=mask.astype(int), mask=mask)
  return batch.with_arrays(**{k: jnp.asarray(v) for k, v in x.items()})


def padded(rows):
  """Short rows of numbers in an array of the shape of all batches, or numbers of rows."""
  first = np.asarray(rows)
  out = np.zeros((ROWS, WIDTH) if first.ndim == 2 else ROWS, first.dtype)
  out[tuple(slice(n) for n in first.shape)] = first
  return jnp.asarray(out)


def advantages_of(estimator, batch, state=None) -> np.ndarray:
  state = estimator.init() if state is None else state
  return np.asarray(credit.assign(estimator, batch, state)[0].advantages)


@functools.cache
def compiled(estimator):
  """`credit.assign` as one program, for an estimator that several tests call."""
  return jax.jit(lambda batch, state: credit.assign(estimator, batch, state))


def of_turns(values, batch) -> list[list[float]]:
  """The values at tokens, one number a turn; all tokens of a turn must have the same."""
  found = []
  for row, mask in zip(values, np.asarray(batch.mask)):
    if not mask.any():  # not a row of the test
      continue
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    turns = [row[a:b] for a, b in edges.reshape(-1, 2)]
    assert all(np.ptp(turn) < 1e-6 for turn in turns)
    found.append([round(float(turn[0]), 5) for turn in turns])
  return found


def random_batch(seed: int = 0) -> Batch:
  """Two groups of four rows of one to three turns, with every array that an estimator may read."""
  rng = np.random.default_rng(seed)
  rows = [
    [(int(rng.integers(1, 4)), float(rng.normal())) for _ in range(rng.integers(1, 4))]
    for _ in range(ROWS)
  ]
  batch = batch_of(rows)
  mask, shape = np.asarray(batch.mask), batch.mask.shape
  starts = mask & ~np.pad(mask[:, :-1], ((0, 0), (1, 0)))
  ids = np.where(mask, np.cumsum(starts, axis=1) - 1, -1)
  per_turn = lambda x: np.where(mask, np.take_along_axis(x, np.maximum(ids, 0), axis=1), 0)
  seen = rng.integers(5, 7, shape)
  seen[:, 0] = 1 + np.arange(ROWS) // GROUP  # the prompt
  tokens = ('old_values', 'score_norm', 'behavior_logp', 'proximal_logp', 'reference_logp')
  tokens += ('teacher_logp', 'previous_logp', 'node_values', 'parent_values')
  tokens += (
    'node_leaves',
    'parent_leaves',
    'old_entropy',
    'reward_model_logp',
    'flow_scores',
    'critics_scores',
  )
  x = {name: np.where(mask, rng.uniform(0.1, 1, shape), 0) for name in tokens}
  x |= {
    'turn_ids': ids,
    'step_ids': ids,
    'step_values': per_turn(rng.uniform(size=shape)),
    'span_ids': ids,
    'span_scores': per_turn(rng.uniform(-1, 1, size=shape)),
    'opponent': np.tile([0.0, 1.0, 0.0, 1.0], 2),
    'observation_ids': per_turn(seen),
    'void_turns': per_turn(rng.integers(0, 2, shape)),
    'turn_players': per_turn(rng.integers(0, 2, shape)),
    'group_ids': np.arange(ROWS) // GROUP,
    'valid': np.arange(ROWS) != 2,
    'stream': np.tile([0, 1, 1, 1], 2),
    'label': np.tile([0.0, 1.0, 0.0, 0.0], 2),
    'uniform': rng.uniform(size=ROWS),
    'discriminator_head_score': rng.normal(size=ROWS),
    **{f'{name}_term': rng.integers(0, 2, ROWS).astype(float) for name in TERMS},
    'wins': rng.uniform(size=(ROWS, GROUP)),
    'influences': np.tile([0.5, -0.2], (ROWS, 1)),
    'baseline_wins': rng.uniform(size=(ROWS, 2)),
  }
  return batch.with_arrays(**{k: jnp.asarray(v) for k, v in x.items()})


TERMS = ('answer', 'appeal', 'brevity', 'mode')
# Estimators that need another part, and settings that the tests below ask for.
BUILT = {
  'credit.divergence_reward': lambda fn: fn(derivative=f_divergences.reverse_kl),
  'credit.of_samples': lambda fn: fn(credit=credit.reward_to_go(normalizer=advantages.identity)),
  'credit.by_stream': lambda fn: fn(
    demonstration=credit.outcome(), sampled=credit.reward_to_go(normalizer=advantages.identity)
  ),
  'credit.gated': lambda fn: fn(credit=credit.reward_to_go(normalizer=advantages.identity)),
  'credit.graded': lambda fn: fn(credit=credit.reward_to_go(normalizer=advantages.identity)),
  'credit.without_void': lambda fn: fn(credit=credit.reward_to_go()),
  'credit.of_wins': lambda fn: fn(credit=credit.reward_to_go(discount=0.9)),
  'credit.filtered': lambda fn: fn(
    credit=credit.outcome(), score=functools.partial(row_scores.brevity), keep=2
  ),
  'credit.filtered_by_difficulty': lambda fn: fn(
    credit=credit.outcome(), score=functools.partial(row_scores.brevity), keeps=(1, 2), warmup=0
  ),
  'credit.with_success_rate': lambda fn: fn(credit=credit.outcome(), least=0.5),
  'credit.appealed': lambda fn: fn(credit=credit.outcome()),
  'credit.hypervolume_guided': lambda fn: fn(credit=credit.outcome(), terms={'brevity': 0.5}),
  'credit.gradient_guided': lambda fn: fn(credit=credit.outcome(), terms={'brevity': 0.5}),
  'credit.decomposed': lambda fn: fn(credit=credit.outcome(), terms=('brevity', 'mode')),
  'credit.laddered': lambda fn: fn(credit=credit.outcome(), rungs=('mode', 'brevity')),
  'credit.of_term': lambda fn: fn(credit=credit.outcome(), term='brevity', high=0.5),
  'credit.scored_by': lambda fn: fn(credit=credit.outcome()),
  'credit.shaped': lambda fn: fn(credit=credit.outcome(), reward=reward_maps.bent),
  'credit.scaled': lambda fn: fn(
    credit=credit.outcome(),
    multiplier=functools.partial(multipliers.logistic_hardness, least=0.5),
  ),
  'credit.token_rewarded': lambda fn: fn(
    credit=credit.outcome(), rewards=functools.partial(auxiliary_rewards.flow_rewards, keep=2)
  ),
  'credit.down_sampled': lambda fn: fn(credit=credit.outcome()),
  'credit.generalized': lambda fn: fn(kl_coefficient=0.1),
  'credit.turn_returns': lambda fn: fn(discount=0.9),
  'credit.self_correction': lambda fn: fn(bonus=3.0),
  'credit.self_play': lambda fn: fn(decay=0.5),
}
ESTIMATORS = {name: BUILT.get(name, lambda fn: fn())(fn) for name, fn in credit.TABLE.items()} | {
  'gigpo per turn': credit.gigpo(per='turn'),
  'turns of a state': credit.turn_returns(among='state', discount=0.9),
  'state of a player': credit.turn_returns(among='state', discount=0.9, players=2),
  'turns of a group': credit.turn_returns(advantage=advantages.group_normalized, among='group'),
}


def with_masked_tokens(batch: Batch, seed: int) -> tuple[Batch, np.ndarray]:
  """The batch with masked tokens of junk anywhere in every row, and where the used columns went."""
  rng = np.random.default_rng(seed)
  place = np.stack([np.sort(rng.choice(WIDTH, USED, replace=False)) for _ in range(ROWS)])

  def spread(x, junk):
    out = np.full((ROWS, WIDTH), junk, np.asarray(x).dtype)
    np.put_along_axis(out, place, np.asarray(x)[:, :USED], axis=1)
    return jnp.asarray(out)

  tokens = {n: batch[n] for n in batch if batch[n].shape == (ROWS, WIDTH)}
  junk = {n: False if n == 'mask' else 97 for n in tokens}
  return batch.with_arrays(**{n: spread(x, junk[n]) for n, x in tokens.items()}), place


@pytest.mark.parametrize('name', ESTIMATORS)
def test_masked_tokens_anywhere_change_no_credit(name):
  estimator, batch = ESTIMATORS[name], random_batch()
  holed, place = with_masked_tokens(batch, seed=1)
  expected, state = compiled(estimator)(batch, estimator.init())
  got, holed_state = compiled(estimator)(holed, estimator.init())
  for key in estimator.provides:
    x, wanted = np.asarray(got[key]), np.asarray(expected[key])
    if x.ndim == 2:
      assert key == 'mask' or np.abs(x[~np.asarray(holed.mask)]).max() == 0
      x, wanted = np.take_along_axis(x, place, axis=1), wanted[:, :USED]
      x, wanted = (np.where(batch.mask[:, :USED], y, 0) for y in (x, wanted))
    np.testing.assert_allclose(x, wanted, rtol=1e-5, atol=1e-5, err_msg=key)
  jax.tree.map(np.testing.assert_array_equal, state, holed_state)


# Transcriptions in float64: loops over rows and turns.


def turns_of(batch):
  """Per row the turns, each a dict of what is known of it; an invalid row has none."""
  x = {n: np.asarray(batch[n]) for n in batch}
  found = []
  for b in range(len(x['mask'])):
    at = np.flatnonzero(x['mask'][b]) if x['valid'][b] else []
    turns = []
    for k in sorted({x['turn_ids'][b, t] for t in at}):
      own = [t for t in at if x['turn_ids'][b, t] == k]
      turns.append({
        'row': b, 'k': k, 'at': own, 'group': x['group_ids'][b],
        'r': x['turn_rewards'][b, own].sum(), 'state': x['observation_ids'][b, own[0]],
        'void': x['void_turns'][b, own[0]], 'player': x['turn_players'][b, own[0]],
      })  # fmt: skip
    found.append(turns)
  return found


def written(batch, values):
  """Values of turns, by (row, k), at their tokens."""
  out = np.zeros(batch.mask.shape)
  for turns in turns_of(batch):
    for turn in turns:
      out[turn['row'], turn['at']] = values[turn['row'], turn['k']]
  return out


def to_go(batch, discount):
  return {
    (t['row'], t['k']): sum(discount**j * later['r'] for j, later in enumerate(turns[i:]))
    for turns in turns_of(batch)
    for i, t in enumerate(turns)
  }


def compared(batch, values, key, normalize):
  """Every turn less the mean of the turns with the same key, over their deviation if `normalize`."""
  every = [t for turns in turns_of(batch) for t in turns]
  out = {}
  for t in every:
    x = np.array([values[o['row'], o['k']] for o in every if key(o) == key(t)])
    own = values[t['row'], t['k']]
    if len(x) == 1:
      out[t['row'], t['k']] = 0.0
    elif normalize:
      out[t['row'], t['k']] = (own - x.mean()) / (x.std(ddof=1) + 1e-6)
    else:
      out[t['row'], t['k']] = (own - x.mean()) * len(x) / (len(x) - 1)  # leave-one-out
  return out


def gigpo(batch, per):
  steps = to_go(batch, 0.95)
  totals = {
    (t['row'], t['k']): sum(o['r'] for o in turns) for turns in turns_of(batch) for t in turns
  }
  for turns in turns_of(batch):
    for t in turns:
      steps[t['row'], t['k']] -= 0.1 * t['void']
      cost = t['void'] if per == 'turn' else np.mean([o['void'] for o in turns])
      totals[t['row'], t['k']] -= 0.1 * cost
  by_state = compared(batch, steps, lambda t: (t['group'], t['state']), True)
  if per == 'turn':
    by_row = compared(batch, totals, lambda t: t['group'], True)
  else:
    by_row = {}
    for turns in turns_of(batch):
      for t in turns:
        x = [
          totals[o[0]['row'], o[0]['k']]
          for o in turns_of(batch)
          if o and o[0]['group'] == t['group']
        ]
        own = totals[t['row'], t['k']]
        by_row[t['row'], t['k']] = (own - np.mean(x)) / (np.std(x, ddof=1) + 1e-6)
  return {key: by_row[key] + by_state[key] for key in by_state}


def self_correction(batch, bonus, first_turn):
  shaped = {}
  for turns in turns_of(batch):
    for i, t in enumerate(turns):
      gain = bonus * (t['r'] - turns[i - 1]['r']) if i else 0.0
      shaped[t['row'], t['k']] = t['r'] + gain
  found = compared(batch, shaped, lambda t: (t['group'], t['k']), False)
  return {key: x if first_turn or key[1] else 0.0 for key, x in found.items()}


def own_to_go(batch, discount):
  """The reward of a turn and those of later turns of its player, discounted by these turns."""
  out = {}
  for turns in turns_of(batch):
    for t in turns:
      later = [o['r'] for o in turns if o['player'] == t['player'] and o['k'] >= t['k']]
      out[t['row'], t['k']] = sum(r * discount**n for n, r in enumerate(later))
  return out


def self_play(batch, baseline):
  out = {}
  for turns in turns_of(batch):
    for t in turns:
      earned = sum(o['r'] for o in turns if o['player'] == t['player'])
      out[t['row'], t['k']] = earned - baseline[t['player']]
  return out


BY_NUMBER = lambda t: (t['group'], t['k'])
BY_STATE = lambda t: (t['group'], t['state'])
EQUAL = {
  'credit.turn_returns': lambda b: compared(b, to_go(b, 0.9), BY_NUMBER, False),
  'turns of a state': lambda b: compared(b, to_go(b, 0.9), BY_STATE, False),
  'state of a player': lambda b: compared(b, own_to_go(b, 0.9), BY_STATE, False),
  'turns of a group': lambda b: compared(b, to_go(b, 1.0), lambda t: t['group'], True),
  'credit.gigpo': functools.partial(gigpo, per='trajectory'),
  'gigpo per turn': functools.partial(gigpo, per='turn'),
  'credit.self_correction': functools.partial(self_correction, bonus=3.0, first_turn=True),
}


@pytest.mark.parametrize('seed', [0, 1])
@pytest.mark.parametrize('name', EQUAL)
def test_estimators_equal_their_transcriptions(name, seed):
  batch = random_batch(seed)
  expected = written(batch, EQUAL[name](batch))
  got = compiled(ESTIMATORS[name])(batch, ESTIMATORS[name].init())[0].advantages
  np.testing.assert_allclose(got, expected, atol=2e-5)
  assert np.abs(expected).max() > 0.1


def test_self_play_compares_each_role_with_its_own_past():
  batch = random_batch()
  state = {'total': jnp.array([3.0, -1.0]), 'weight': jnp.array([2.0, 1.0])}
  expected = written(batch, self_play(batch, [1.5, -1.0]))
  got, after = compiled(ESTIMATORS['credit.self_play'])(batch, state)
  np.testing.assert_allclose(got.advantages, expected, atol=2e-5)
  means = []
  for player in (0, 1):
    rows = [[t['r'] for t in turns if t['player'] == player] for turns in turns_of(batch)]
    means.append(np.mean([sum(row) for row in rows if row]))
  np.testing.assert_allclose(after['total'], 0.5 * state['total'] + np.array(means), atol=1e-5)
  np.testing.assert_allclose(after['weight'], [2.0, 1.5])


def test_a_player_without_a_turn_keeps_its_average():
  """Players take turns where nothing says who they are, so one-turn rows are those of player 0."""
  batch = batch_of([[(2, 1.0)], [(1, 0.0)]])
  estimator = credit.self_play()
  state = {'total': jnp.array([1.0, 5.0]), 'weight': jnp.array([2.0, 5.0])}
  assert of_turns(advantages_of(estimator, batch, state), batch) == [[0.5], [-0.5]]
  _, after = credit.assign(estimator, batch, state)
  np.testing.assert_allclose(after['total'], [0.95 + 0.5, 5.0])
  np.testing.assert_allclose(after['weight'], [0.95 * 2 + 1, 5.0])


def test_the_loser_of_a_game_learns_from_its_own_reward():
  batch = batch_of([[(1, 0.0), (1, -1.0), (2, 1.0)]])
  assert of_turns(advantages_of(credit.self_play(), batch), batch) == [[1.0, -1.0, 1.0]]


# Published numbers.

RAW = functools.partial(credit.turn_returns, advantage=advantages.raw)


def test_an_outcome_counts_once_whatever_the_number_of_turns():
  batch = batch_of([[(1, 1.0)], [(1, 0.0), (2, 0.0), (1, 0.0)]])
  outcome = advantages_of(credit.outcome(advantage=advantages.group_mean), batch)
  assert of_turns(outcome, batch) == [[0.5], [-0.5, -0.5, -0.5]]
  # Pooled over turns, the longer row counts three times.
  pooled = credit.gigpo(advantage=advantages.group_mean, per='turn', state_weight=0.0)
  assert of_turns(advantages_of(pooled, batch), batch) == [[0.75], [-0.25, -0.25, -0.25]]


@pytest.mark.parametrize(('discount', 'expected'), [(0.9, [0.81, 0.9, 1]), (1.0, [1, 1, 1])])
def test_turns_are_discounted_and_tokens_are_not(discount, expected):
  batch = batch_of([[(2, 0.0), (1, 0.0), (3, 1.0)]])
  assert of_turns(advantages_of(RAW(discount=discount), batch), batch) == [expected]


def test_a_solution_after_failed_attempts_counts_less():
  batch = batch_of([[(1, 1.0)], [(2, 0.0), (1, 0.0), (1, 1.0)], [(1, 0.0)]])
  estimator = credit.discounted_outcome(advantage=advantages.raw, discount=0.9)
  assert of_turns(advantages_of(estimator, batch), batch) == [[1.0], [0.81, 0.81, 0.81], [0.0]]


def test_bilevel_advantages_of_two_turns():
  batch = batch_of([[(2, 0.2), (2, 1.0)]])
  batch = batch.with_arrays(old_values=jnp.zeros(batch.mask.shape))
  estimator = credit.bilevel_generalized(normalizer=advantages.identity)
  assert of_turns(advantages_of(estimator, batch), batch) == [[1.15, 1.0]]


def test_a_turn_with_reward_zero_is_a_turn():
  """The released code of RAGEN takes it for a part of the next one."""
  batch = batch_of([[(1, 0.0), (1, 1.0)]])
  batch = batch.with_arrays(old_values=jnp.zeros(batch.mask.shape))
  estimator = credit.bilevel_generalized(turn_discount=0.5, normalizer=advantages.identity)
  assert of_turns(advantages_of(estimator, batch), batch) == [[0.5, 1.0]]


def test_turns_that_share_a_state_are_compared_by_what_comes_later():
  batch = batch_of([[(1, 0.0), (1, 1.0)], [(1, 0.0), (1, 0.0)]])
  mean = functools.partial(credit.gigpo, advantage=advantages.group_mean, discount=1.0)
  seen = lambda a, b: batch.with_arrays(observation_ids=padded([[0, 1, 0, a], [0, 2, 0, b]]))
  assert of_turns(advantages_of(mean(), seen(7, 7)), batch) == [[0.5, 1.0], [-0.5, -1.0]]
  grpo = advantages_of(credit.outcome(advantage=advantages.group_mean), batch)
  np.testing.assert_array_equal(advantages_of(mean(), seen(7, 8)), grpo)  # all states differ
  np.testing.assert_array_equal(advantages_of(mean(state_weight=0.0), seen(7, 7)), grpo)


def test_states_of_other_prompts_are_other_states():
  batch = batch_of([[(1, 1.0)], [(1, 0.0)]])
  batch = batch.with_arrays(observation_ids=padded([[0, 7], [0, 7]]))
  apart = batch.with_arrays(group_ids=padded([3, 4]))
  estimator = credit.turn_returns(among='state')
  assert of_turns(advantages_of(estimator, batch), batch) == [[1.0], [-1.0]]
  assert of_turns(advantages_of(estimator, apart), batch) == [[0.0], [0.0]]


@pytest.mark.parametrize(
  ('first', 'second', 'shaped'), [(0, 0, 0), (0, 1, 11), (1, 0, -10), (1, 1, 1)]
)
def test_the_bonus_of_self_correction_belongs_to_the_second_turn(first, second, shaped):
  batch = batch_of([[(1, first), (2, second)]])
  estimator = credit.self_correction(advantage=advantages.raw, bonus=10.0)
  assert of_turns(advantages_of(estimator, batch), batch) == [[first, shaped]]
  one = credit.self_correction(advantage=advantages.raw, bonus=0.0, first_turn=False)
  assert of_turns(advantages_of(one, batch), batch) == [[0, second]]


def test_without_a_bonus_self_correction_is_two_turn_reinforcement():
  batch = random_batch()
  plain = credit.self_correction(advantage=advantages.raw, bonus=0.0)
  np.testing.assert_allclose(
    advantages_of(plain, batch), advantages_of(RAW(discount=0.0), batch), atol=1e-6
  )


def test_a_void_row_leaves_the_loss_and_stays_in_the_group():
  batch = batch_of([[(1, 1.0)], [(1, 0.0)], [(2, 0.0), (1, 0.0)]])
  inner = credit.outcome(advantage=advantages.group_mean)
  estimator = credit.without_void(credit=inner)
  plain = credit.assign(inner, batch, ())[0]
  void = [[0, 0, 0, 0, 0]] * 2 + [[0, 1, 1, 0, 0]]  # the first turn of the last row
  for marked, kept in ((None, [1, 1, 1]), ([[0], [0], [0]], [1, 1, 1]), (void, [1, 1, 0])):
    given = batch if marked is None else batch.with_arrays(void_turns=padded(marked))
    got = credit.assign(estimator, given, ())[0]
    np.testing.assert_array_equal(got.mask, batch.mask & padded(kept).astype(bool)[:, None])
    np.testing.assert_array_equal(got.advantages, plain.advantages)


def test_ratios_of_tokens_turns_and_rows():
  """What the tool said has a log-ratio of 50 here."""
  d, ids, seen = (
    padded([x]) for x in ([0.1, 0.3, 50.0, -0.2], [0, 0, 0, 1], [True, True, False, True])
  )
  for found, expected in (
    (ratios.token(d, seen), [1.10517, 1.34986, 0.81873]),
    (ratios.turn_geometric(d, ids, seen), [1.2214, 1.2214, 0.81873]),
    (ratios.sequence_product(d, seen), [1.2214] * 3),
    (ratios.sequence_geometric(d, seen), [1.06894] * 3),
  ):
    np.testing.assert_allclose(np.exp(found)[np.asarray(seen)], expected, atol=6e-6)


def test_turns_count_the_same_in_their_mean():
  loss = padded([[1.0, 3.0, np.nan, 7.0], [5.0, 0.0, 0.0, 0.0]])
  where = padded([[True, True, False, True], [True, False, False, False]])
  assert aggregation.turn_mean(loss, where).value() == (2 + 7 + 5) / 3


# What a batch of one turn a row gets.

ONE_TURN = {
  'number': (credit.turn_returns(discount=0.3), credit.outcome(advantage=advantages.leave_one_out)),
  'retries': (
    credit.discounted_outcome(discount=0.3),
    credit.outcome(advantage=advantages.group_normalized),
  ),
  'bilevel': (credit.bilevel_generalized(trace=0.9), credit.generalized(trace=0.9)),
  'self_correction': (credit.self_correction(), credit.outcome(advantage=advantages.leave_one_out)),
  'without_void': (credit.without_void(credit=credit.reward_to_go()), credit.reward_to_go()),
  'self_play': (credit.self_play(decay=0.9), credit.moving_baseline(decay=0.9)),
}


def without_rewards_of_turns(batch: Batch) -> Batch:
  features = {n: x for n, x in batch.features.items() if n != 'turn_rewards'}
  return batch.replace(features=features)


@pytest.mark.parametrize('name', ONE_TURN)
def test_rows_of_one_turn_get_the_credit_of_the_base_method(name):
  estimator, base = ONE_TURN[name]
  batch = batch_of([[(2, 1.0)], [(1, 0.0)], [(3, 0.5)]])
  batch = batch.with_arrays(
    old_values=jnp.linspace(0, 1, batch.mask.size).reshape(batch.mask.shape)
  )
  plain = without_rewards_of_turns(batch)
  expected = advantages_of(base, plain)
  for given in (batch, plain):
    np.testing.assert_allclose(advantages_of(estimator, given), expected, atol=1e-6)
  assert np.abs(expected).max() > 0.1


def test_in_rows_of_one_turn_all_states_are_the_prompt():
  """So both terms of GiGPO are the advantage of GRPO."""
  batch = batch_of([[(2, 1.0)], [(1, 0.0)], [(3, 0.5)]])
  grpo = advantages_of(credit.outcome(advantage=advantages.group_normalized), batch)
  np.testing.assert_allclose(advantages_of(credit.gigpo(), batch), 2 * grpo, atol=1e-6)


PLACED = ('reward_to_go', 'token_baseline', 'generalized', 'vtrace', 'retrace')


@pytest.mark.parametrize('name', PLACED)
def test_a_reward_in_the_last_turn_is_the_reward_of_the_row(name):
  """`turn_rewards` that say no more than `rewards` change no bit."""
  estimator, batch = ESTIMATORS[f'credit.{name}'], random_batch()
  last = np.asarray(batch.mask) & (np.cumsum(batch.mask[:, ::-1], axis=1)[:, ::-1] == 1)
  told = batch.with_arrays(turn_rewards=jnp.where(last, batch.rewards[:, None], 0))
  found = lambda batch: np.asarray(compiled(estimator)(batch, estimator.init())[0].advantages)
  plain = found(without_rewards_of_turns(batch))
  np.testing.assert_array_equal(found(told), plain)
  assert np.abs(found(batch) - plain).max() > 1e-3


def test_every_estimator_is_tested_for_masked_tokens():
  """A new one that needs a part gets a row in BUILT."""
  for name, fn in credit.TABLE.items():
    hints = inspect.get_annotations(fn, eval_str=True)
    needed = [
      n
      for n, p in inspect.signature(fn).parameters.items()
      if p.default is p.empty and table_of(hints[n]) is not None
    ]
    assert not needed or name in BUILT
