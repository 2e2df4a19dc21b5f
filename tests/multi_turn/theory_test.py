"""What credit over turns follows in expectation, exactly, on environments with few episodes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.tabular import enumerable, turns
from polgrad.tabular.estimators import gradient_distributions
from polgrad.types import Batch

WORLDS = {'deterministic': turns.deterministic, 'stochastic': turns.stochastic}
GROUP = 3
MOST = 10**GROUP  # groups of the larger world
LOO, RAW = advantages.leave_one_out, advantages.raw


@functools.cache
def made(name):
  """The world, a policy, and d log-prob of each token by the logits, [S, H, P * V]."""
  world = turns.episodes(WORLDS[name])
  shape = int(world.policy.prefixes.max()) + 1, 2
  params = 0.7 * np.random.default_rng(0).normal(size=shape)
  slopes = jax.jacobian(lambda x: enumerable.logp(world.policy, x))(jnp.asarray(params))
  return world, params, np.asarray(slopes).reshape(*world.policy.mask.shape, -1)


def gradient_of(name, x):
  """The gradient of E[x] by the logits."""
  world, params, _ = made(name)
  return np.asarray(jax.grad(lambda p: turns.objective(world, p, x))(jnp.asarray(params))).ravel()


def expected(name, estimator):
  """E[mean over rows of sum_t A_t grad log pi], over all groups of `GROUP` samples.

  All groups are one batch with as many prompts, so this is for credit that compares the rows of a
  prompt alone.
  """
  world, params, slopes = made(name)
  rows = np.indices((len(world.rewards),) * GROUP).reshape(GROUP, -1).T
  weight = turns.probabilities(world, params)[rows].prod(axis=1)
  # Groups of no weight, so that all worlds have batches of one shape.
  rows = np.pad(rows, ((0, MOST - len(rows)), (0, 0))).ravel()
  weight = np.pad(weight, (0, MOST - len(weight)))
  mask = world.policy.mask[rows]
  batch = Batch(tokens=world.policy.tokens[rows], segment_ids=mask.astype(int), mask=mask)
  batch = batch.with_arrays(
    rewards=world.rewards[rows],
    valid=np.ones(len(rows), bool),
    group_ids=np.arange(len(rows)) // GROUP,
    turn_rewards=world.turn_rewards[rows],
    observation_ids=world.observation_ids[rows],
    old_values=turns.values(world, params)[rows],
  )
  found = np.asarray(credit.assign(estimator, batch, estimator.init())[0].advantages, np.float64)
  by_episode = np.zeros(world.policy.mask.shape)
  np.add.at(by_episode, rows, np.repeat(weight, GROUP)[:, None] * found / GROUP)
  return np.einsum('sh,shp->p', by_episode, slopes)


def angle(a, b):
  return np.degrees(np.arccos(np.clip(a @ b / np.linalg.norm(a) / np.linalg.norm(b), -1, 1)))


EXACT = {
  'outcome': credit.outcome(advantage=RAW),
  'outcome, leave-one-out': credit.outcome(advantage=LOO),
  'to go': credit.turn_returns(advantage=RAW),
  'tokens to go': credit.reward_to_go(normalizer=advantages.identity),
  'critic of tokens': credit.generalized(trace=0.9, normalizer=advantages.identity),
  'critic of turns': credit.turn_generalized(normalizer=advantages.identity),
  'critic of both': credit.bilevel_generalized(turn_discount=1.0, normalizer=advantages.identity),
}
EQUALLY_LONG = {
  'turns of a number': credit.turn_returns(advantage=LOO),
}


@pytest.mark.parametrize(
  ('name', 'world'),
  [*((n, w) for n in EXACT for w in WORLDS), *((n, 'deterministic') for n in EQUALLY_LONG)],
)
def test_these_are_unbiased(name, world, x64):
  got = expected(world, (EXACT | EQUALLY_LONG)[name])
  np.testing.assert_allclose(got, gradient_of(world, None), atol=1e-9)


def test_a_group_mean_of_turns_shrinks_the_gradient_and_keeps_its_direction(x64):
  got = expected('deterministic', credit.turn_returns(advantage=advantages.group_mean))
  true = gradient_of('deterministic', None)
  np.testing.assert_allclose(got, (GROUP - 1) / GROUP * true, atol=1e-9)


@pytest.mark.parametrize(
  ('name', 'world', 'least'),
  [
    ('turns of a number', 'stochastic', 1.0),  # a turn that only one row has is not credited
    ('turns of a state', 'deterministic', 1.0),
    ('GiGPO', 'deterministic', 1.0),
    ('discounted', 'deterministic', 0.1),
    ('bi-level', 'deterministic', 0.1),
  ],
)
def test_these_are_biased(name, world, least, x64):
  estimator = {
    'turns of a number': credit.turn_returns(advantage=LOO),
    'turns of a state': credit.turn_returns(advantage=LOO, among='state'),
    'GiGPO': credit.gigpo(advantage=advantages.group_mean, discount=1.0),
    'discounted': credit.turn_returns(advantage=LOO, discount=0.9),
    'bi-level': credit.bilevel_generalized(normalizer=advantages.identity),
  }[name]
  assert least < angle(expected(world, estimator), gradient_of(world, None)) < 45


def by_turn(name):
  """Which logits belong to first turns, bool[P * V]."""
  world = made(name)[0]
  first = np.zeros(world.policy.prefixes.max() + 1, bool)
  first[world.policy.prefixes[world.policy.mask & (world.observation_ids == 0)]] = True
  return np.repeat(first, 2)


def rewards_of_turns(name):
  """r_1 and r_2 of every episode, f64[S]."""
  world = made(name)[0]
  first = np.where(world.observation_ids == 0, world.turn_rewards, 0).sum(axis=1)
  return first, world.rewards - first


@pytest.mark.parametrize('bonus', [0.0, 10.0])
def test_a_bonus_for_correction_rescales_the_second_turn(bonus, x64):
  """The first turn climbs E[r_1]; what it brings the second is not its business in SCoRe."""
  first, (r1, r2) = by_turn('deterministic'), rewards_of_turns('deterministic')
  got = expected('deterministic', credit.self_correction(advantage=LOO, bonus=bonus))
  np.testing.assert_allclose(got[first], gradient_of('deterministic', r1)[first], atol=1e-9)
  second = (1 + bonus) * gradient_of('deterministic', r2)[~first]
  np.testing.assert_allclose(got[~first], second, atol=1e-9)


def test_the_first_stage_of_self_correction_leaves_the_first_turn_alone(x64):
  first, (_, r2) = by_turn('deterministic'), rewards_of_turns('deterministic')
  estimator = credit.self_correction(advantage=LOO, bonus=0.0, first_turn=False)
  got = expected('deterministic', estimator)
  assert not got[first].any()
  np.testing.assert_allclose(got[~first], gradient_of('deterministic', r2)[~first], atol=1e-9)


def test_a_bonus_that_the_first_turn_shares_makes_it_pay_to_fail(x64):
  """Of the whole row, r_1 + r_2 + bonus (r_2 - r_1), the first turn gets (1 - bonus) r_1 and more."""
  bonus, first = 10.0, by_turn('deterministic')
  world, _, _ = made('deterministic')
  r1, r2 = rewards_of_turns('deterministic')
  shared = gradient_of('deterministic', r1 + r2 + bonus * (r2 - r1))
  parts = (1 - bonus) * gradient_of('deterministic', r1) + (1 + bonus) * gradient_of(
    'deterministic', r2
  )
  np.testing.assert_allclose(shared, parts, atol=1e-9)
  # The first turn that is paid at once, '0': credited with its own reward it becomes likelier, and
  # credited with the shared bonus less likely.
  start = world.policy.prefixes[0, 0] * 2
  own = expected('deterministic', credit.self_correction(advantage=LOO, bonus=bonus))
  assert own[start] > 0 > shared[start] and first[start]


def test_the_moments_of_all_groups_are_those_of_one_batch(x64):
  """`gradient_distributions` weighs episodes by the chance of the answers in them."""
  world, params, _ = made('stochastic')
  estimator = credit.turn_returns(advantage=advantages.group_normalized, among='state')
  objective = objectives.PolicyGradient(
    surrogate=surrogates.reinforce, aggregation=aggregation.sequence_sum
  )
  one = turns.setting(world, params)
  found = gradient_distributions([one], estimator, objective, rows_per_prompt=GROUP, chunk=1024)[0]
  np.testing.assert_allclose(found.mean, expected('stochastic', estimator), atol=1e-9)
  assert found.variance > 0


@pytest.mark.parametrize('name', WORLDS)
def test_episodes_and_their_values_are_those_of_the_environment(name):
  world, params, _ = made(name)
  assert len(world.rewards) == {'deterministic': 9, 'stochastic': 10}[name]
  chances = turns.probabilities(world, params)
  np.testing.assert_allclose(chances.sum(), 1, atol=1e-6)
  value = turns.values(world, params)
  np.testing.assert_allclose(value[:, 0], chances @ world.rewards, atol=1e-6)
  ends = world.policy.mask.sum(axis=1)
  assert ends.min() == (2 if name == 'deterministic' else 1) and ends.max() == 4
