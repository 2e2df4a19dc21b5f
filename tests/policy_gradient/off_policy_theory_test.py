"""Regressions and off-policy methods as configured: reductions, and where they come to rest.

On a bandit of a few arms a row is one token. Data in exactly the frequencies of a policy make the batch
the population, so that descent follows the expected gradient.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from polgrad import build, credit, objectives, optim
from polgrad.credit import assign
from polgrad.registry import bind, part
from polgrad.types import Batch, Outputs
from tests.policy_gradient import harness
from tests.runs import Run, method_of


def credit_of(name: str, rewards, **features):
  """The fields that an experiment's credit makes of one group of rows of one token."""
  batch = harness.scored(rewards=jnp.asarray(rewards, float), **features)
  estimator = bind(method_of(name).credit, credit.TABLE)
  return assign(estimator, batch, estimator.init())[0]


def bandit(anchor, counts, rewards, **fields):
  """One group of `counts` rows an arm, with the anchor as behaviour, old policy and reference."""
  arms = np.repeat(np.arange(len(counts)), counts)
  rows = len(arms)
  logp = jnp.log(jnp.asarray(anchor))[arms][:, None]
  rewards = jnp.asarray(rewards)[arms]
  batch = Batch(
    tokens=jnp.asarray(arms)[:, None],
    segment_ids=jnp.ones((rows, 1), int),
    mask=jnp.ones((rows, 1), bool),
    group_ids=jnp.zeros(rows, int),
    behavior_logp=logp,
    proximal_logp=logp,
    reference_logp=logp,
    rewards=rewards,
    advantages=(rewards - rewards.mean())[:, None],
    **fields,
  )
  return batch, arms


def loss_of(objective, batch, arms, params):
  """The loss of a policy softmax(logits) on the arms, with one value for all."""
  logp = jax.nn.log_softmax(params['logits'])[arms][:, None]
  outputs = Outputs(logp=logp, values=jnp.full(logp.shape, params.get('value', 0.0)))
  terms = harness.terms_of(objective, outputs, batch, step=0)
  return sum(t.value() for t in terms.values())


def descend(loss, params, *, rate, steps):
  step = lambda x, _: (jax.tree.map(lambda a, g: a - rate * g, x, jax.grad(loss)(x)), None)
  return jax.jit(lambda x: jax.lax.scan(step, x, length=steps)[0])(params)


# Where off-policy data lead: three arms, of which the best is rare.

RARE = dict(anchor=[0.05, 0.45, 0.5], counts=[1, 9, 10], rewards=[1.0, 0.8, 0.0])


def rest_of(name, *, rate=0.5, steps=4000, **overrides):
  batch, arms = bandit(**RARE)
  objective = harness.objective_of(name, **overrides)
  start = {'logits': jnp.log(jnp.array(RARE['anchor']))}
  loss = lambda params: loss_of(objective, batch, arms, params)
  return jax.nn.softmax(descend(loss, start, rate=rate, steps=steps)['logits'])


def test_plain_reinforce_on_old_data_ends_at_the_common_arm_not_at_the_best():
  """The first step moves the logits by mu (R - mean), most for the arm that is drawn most."""
  policy = rest_of('opmd_simple')
  assert policy @ jnp.array(RARE['rewards']) == pytest.approx(0.8, abs=2e-3)
  assert policy[0] < 1e-2


@pytest.mark.parametrize(('low', 'high', 'reward'), [(0.8, 1.2, 0.5180), (0.4, 3.0, 0.8273)])
def test_a_trust_region_freezes_the_policy_where_it_leaves_the_region(low, high, reward, x64):
  bounds = {'weights__region__low': low, 'weights__region__high': high}
  policy = rest_of('rec_one_side', **bounds)
  assert policy @ jnp.array(RARE['rewards']) == pytest.approx(reward, abs=1e-4)
  if high == 3.0:
    np.testing.assert_allclose(policy, [0.1431, 0.8553, 0.0017], atol=1e-4)


TILTED, KIMI = [0.11924, 0.71938, 0.16138], [0.10290, 0.69576, 0.20133]


@pytest.mark.parametrize(
  ('name', 'overrides', 'expected'),
  [
    ('opmd', {'beta': 0.5}, TILTED),
    ('opmd_log_partition', {'beta': 0.5}, TILTED),
    ('tba', {'beta': 0.5}, TILTED),
    ('opmd_kimi_sequence', {'beta': 0.5}, KIMI),
    ('opmd_kimi', {'penalties__mirror__weight': 0.5}, KIMI),
    ('dro', {'penalties__mirror__weight': 0.5}, KIMI),
  ],
)
def test_mirror_descent_rests_at_the_tilted_policy_unless_the_mean_reward_stands_for_log_z(
  name, overrides, expected, x64
):
  np.testing.assert_allclose(rest_of(name, **overrides), expected, atol=6e-6)


@pytest.mark.parametrize(
  ('shift', 'reward', 'support'), [(0.6, 0.6698, 10), (0.3, 0.7819, 7), (0.1, 0.8951, 4)]
)
def test_a_lowered_baseline_keeps_several_arms_alive(shift, reward, support, x64):
  """Ten arms with rewards i / 9 under uniform data; at rest pi is (mu (R - V) - t)^+ / shift."""
  batch, arms = bandit([0.1] * 10, [1] * 10, np.arange(10) / 9)
  objective = harness.objective_of('asymre', penalties__shift__weight=shift)
  loss = lambda params: loss_of(objective, batch, arms, params)
  rest = descend(loss, {'logits': jnp.zeros(10)}, rate=5.0, steps=20_000)
  policy = jax.nn.softmax(rest['logits'])
  assert policy @ batch.rewards == pytest.approx(reward, abs=2e-4)
  assert np.sum(policy > 1e-3) == support


# Where learned and sampled values lead: data of another policy than the reference.

VALUED = dict(anchor=[0.3, 0.3, 0.4], counts=[7, 2, 1], rewards=[1.0, 0.2, -0.5])
BEST, SOFT_VALUE = np.array([0.788470, 0.159189, 0.052341]), 0.516844


@pytest.mark.parametrize(
  ('name', 'overrides', 'unit'),
  [('dro_v', {'beta': 0.5, 'scale': 0.25}, 0.5), ('pcl', {'surrogate__beta': 0.5}, 1.0)],
)
def test_policy_and_value_come_to_rest_together_whoever_sampled(name, overrides, unit, x64):
  """On one token path consistency is DRO-V, but for the unit of its value."""
  batch, arms = bandit(**VALUED)
  objective = harness.objective_of(name, **overrides)
  start = {'logits': jnp.zeros(3), 'value': jnp.array(0.0)}
  rest = descend(lambda p: loss_of(objective, batch, arms, p), start, rate=0.5, steps=15_000)
  np.testing.assert_allclose(jax.nn.softmax(rest['logits']), BEST, atol=1e-6)
  np.testing.assert_allclose(unit * rest['value'], SOFT_VALUE, atol=1e-6)


def test_a_star_po_rests_at_the_best_policy_once_its_value_is_exact(x64):
  """Rewards of the reference in exactly its frequencies, and one temperature for both stages."""
  baseline = np.repeat(VALUED['rewards'], [3, 3, 4])
  batch, arms = bandit(**VALUED, baseline_rewards=jnp.tile(baseline, (10, 1)))
  objective = harness.objective_of('a_star_po', beta=0.5, scale=0.5)
  gradient = jax.grad(lambda params: loss_of(objective, batch, arms, params))
  at_rest = gradient({'logits': jnp.log(jnp.asarray(BEST / BEST.sum()))})['logits']
  np.testing.assert_allclose(at_rest, 0, atol=1e-6)
  assert np.abs(gradient({'logits': jnp.zeros(3)})['logits']).max() > 1e-2


def test_contrastive_pairs_recover_the_regularised_optimum_from_data_of_two_policies(x64):
  """The bandit of the paper: every pair of arms in exactly its frequency, reference uniform."""
  beta, rewards = 0.5, np.array([2.5, 2.0, 1.0])
  first, second = np.repeat(np.arange(3), [1, 2, 7]), np.repeat(np.arange(3), [1, 1, 18])
  arms = np.stack(np.meshgrid(first, second, indexing='ij'), axis=-1).reshape(-1)
  rows = len(arms)
  batch = Batch(
    tokens=jnp.asarray(arms)[:, None],
    segment_ids=jnp.ones((rows, 1), int),
    mask=jnp.ones((rows, 1), bool),
    group_ids=jnp.arange(rows) // 2,
    reference_logp=jnp.full((rows, 1), -jnp.log(3.0)),
    rewards=jnp.asarray(rewards)[arms],
  )
  objective = harness.objective_of('copg', beta=beta, scale=beta)
  loss = lambda logits: loss_of(objective, batch, arms, {'logits': logits})
  optimizer = optax.adam(1e-2)

  def step(carry, _):
    logits, state = carry
    updates, state = optimizer.update(jax.grad(loss)(logits), state)
    return (logits + updates, state), None

  start = jnp.zeros(3)
  run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=2000)[0])
  policy = jax.nn.softmax(run((start, optimizer.init(start)))[0])
  np.testing.assert_allclose(policy, [0.705385, 0.259496, 0.035119], atol=1e-4)
  value = policy @ rewards - beta * policy @ jnp.log(3 * policy)
  assert value == pytest.approx(2.125200, abs=1e-6)


# One method is another one.


def weight(name, x, **overrides):
  objective = harness.objective_of(name, **overrides)
  return harness.loss_and_weight(objective, x)[1]['logp']


def arrays_for(name, **kwargs):
  return harness.random_arrays(harness.objective_of(name), **kwargs)


def on_policy(x):
  return x | {'logp': x['proximal_logp'], 'reference_logp': x['proximal_logp']}


@pytest.mark.parametrize(
  'name',
  ['rec_one_side', 'rec_one_side_is', 'rec_two_side', 'rec_ring', 'softmax_ppo', 'topr_token',
   'opmd_kimi', 'dro', 'opmd_simple', 'red_drop', 'red_weight'],
)  # fmt: skip
def test_on_fresh_data_it_is_reinforce(name, x64):
  x = on_policy(arrays_for(name))
  np.testing.assert_allclose(weight(name, x), harness.token_mean(x['advantages'], x['mask']))


def test_on_fresh_data_topr_is_reinforce_of_whole_answers(x64):
  x = on_policy(arrays_for('topr'))
  np.testing.assert_allclose(weight('topr', x), harness.sequence_sum(x['advantages'], x['mask']))


@pytest.mark.parametrize(
  ('name', 'scale'), [('opmd', 1.0), ('opmd_kimi_sequence', 1.0), ('tba', 2 / 0.0139)]
)
def test_on_fresh_data_a_regression_is_reinforce_with_the_mean_of_the_group(name, scale, x64):
  x = on_policy(arrays_for(name))
  used, rewards = x['mask'].any(axis=1), x['rewards']
  mean = [rewards[used & (x['group_ids'] == g)].mean() for g in x['group_ids']]
  expected = harness.sequence_sum((rewards - mean)[:, None] + 0 * x['logp'], x['mask'])
  np.testing.assert_allclose(weight(name, x), scale * expected, atol=1e-12)


@pytest.mark.parametrize(('step', 'beta'), [(0, 0.014), (150, 0.009), (300, 0.004), (500, 0.004)])
def test_tba_lowers_beta_over_the_run(step, beta, x64):
  """On fresh data the weight of a row is 2 (R - mean) / beta, over the 7 rows with tokens."""
  x = on_policy(arrays_for('tba'))
  used, rewards = x['mask'].any(axis=1), x['rewards']
  mean = [rewards[used & (x['group_ids'] == g)].mean() for g in x['group_ids']]
  _, got = harness.loss_and_weight(harness.objective_of('tba'), x, step=step)
  expected = np.where(x['mask'], 2 * (rewards - mean)[:, None] / beta / used.sum(), 0)
  np.testing.assert_allclose(got['logp'], expected, rtol=1e-6, atol=1e-12)


def test_on_fresh_data_sppo_is_reinforce_on_win_rates(x64):
  x = on_policy(arrays_for('sppo'))
  above = 2 * 10 * (x['label'] - 0.5)[:, None] + 0 * x['logp']
  np.testing.assert_allclose(weight('sppo', x), harness.sequence_sum(above, x['mask']))


@pytest.mark.parametrize(
  ('with_itself', 'expected'),
  [(True, [0.617839, 0.382161, 0.5, 0.5]), (False, [0.676759, 0.323241, 0.5, 0.5])],
)
def test_sppo_trains_on_the_best_and_the_worst_row_and_counts_a_row_against_itself(
  with_itself, expected, x64
):
  """sigmoid(1) = .731059 and sigmoid(.5) = .622459; the last row is a group of one."""
  estimator = credit.win_rate(with_itself=with_itself)
  batch = harness.scored(
    rewards=jnp.array([1.0, 0.0, 0.5, 7.0, 2.0, 2.0, 2.0, 9.0]),
    group_ids=jnp.array([0, 0, 0, 1, 2, 2, 2, 2]),
    valid=jnp.array([True] * 7 + [False]),
  )
  fields, _ = assign(estimator, batch, ())
  np.testing.assert_allclose(fields['label'][:4], expected, atol=1e-6)
  np.testing.assert_array_equal(fields['mask'][:, 0], [1, 1, 0, 1, 1, 0, 1, 0])
  every, _ = assign(credit.win_rate(extremes=False), batch, ())
  np.testing.assert_array_equal(every['mask'][:, 0], batch.valid)


@pytest.mark.parametrize('name', ['p3o', 'p3o_separate'])
def test_on_fresh_data_a_pair_has_half_its_gap_whatever_is_added_to_both_rewards(name, x64):
  x = on_policy(arrays_for(name, group=2)) | {'mask': np.ones((8, 6), bool)}
  x['rewards'] = np.array([1.0, -0.5, 0.2, 0.2, 3.0, 4.0, 0.0, -1.0])
  gap = np.array([0.75, -0.75, 0, 0, -0.5, 0.5, 0.5, -0.5])
  expected = np.repeat(gap[:, None] / 4, 6, axis=1)  # the mean over four pairs
  np.testing.assert_allclose(weight(name, x), expected, atol=1e-12)
  x['rewards'] = x['rewards'] + np.repeat([5.0, -2.0, 0.0, 1.0], 2)
  np.testing.assert_allclose(weight(name, x), expected, atol=1e-12)


@pytest.mark.parametrize('normalized', [False, True])
def test_nft_on_fresh_data_is_dr_grpo_and_standardized_grpo_of_the_population(normalized, x64):
  """The credit and the loss together: weights R - q, or (R - q) / std."""
  rewards = np.array([1.0, 0, 0, 1, 0, 0, 0, 0])
  spec = method_of('nft').credit
  spec.standardized = normalized
  estimator = bind(spec, credit.TABLE)
  x = on_policy(arrays_for('nft')) | {'mask': np.ones((8, 6), bool)}
  batch = harness.scored(mask=x['mask'], rewards=rewards)
  fields, _ = assign(estimator, batch, estimator.init())
  x |= {name: np.asarray(fields[name]) for name in ('advantages', 'success_rate')}
  expected = rewards - 0.25
  if normalized:
    expected = expected / rewards.std()
  np.testing.assert_allclose(
    weight('nft', x), np.repeat(expected[:, None], 6, axis=1) / (8 * 5), rtol=1e-6
  )


def test_rec_with_importance_weights_is_dr_grpo_with_a_token_mean(x64):
  x = arrays_for('rec_one_side_is')
  x['logp'] = x['proximal_logp'] + 4 * (x['logp'] - x['proximal_logp'])  # far enough to be clipped
  aggregation = method_of('rec_one_side_is').objective.aggregation
  ppo = weight(
    'dr_grpo', x, surrogate__eps_low=0.6, surrogate__eps_high=2.0, aggregation=aggregation
  )
  assert np.sum(ppo[x['mask']] == 0) > 0
  np.testing.assert_allclose(weight('rec_one_side_is', x), ppo, atol=1e-12)


def test_a_region_without_bounds_is_reinforce_however_old_the_data(x64):
  x = arrays_for('rec_one_side')
  bounds = {'weights__region__low': 0.0, 'weights__region__high': np.inf}
  np.testing.assert_allclose(
    weight('rec_one_side', x, **bounds), harness.token_mean(x['advantages'], x['mask'])
  )


def test_trajectory_balance_around_the_old_policy_is_mirror_descent(x64):
  x = arrays_for('tba')
  x['reference_logp'] = x['proximal_logp']
  balance = weight('tba', x, beta=1.0, schedule=part(optim.constant))
  np.testing.assert_allclose(balance, 2 * weight('opmd', x), atol=1e-12)


def test_pairs_in_trajectory_balance_are_contrastive_policy_gradients(x64):
  """Up to the factor 1 / (2 beta)."""
  x = arrays_for('copg', group=2) | {'mask': np.ones((8, 6), bool)}
  balance = weight('tba', x, beta=0.06, schedule=part(optim.constant))
  np.testing.assert_allclose(balance, weight('copg', x) / (2 * 0.06), rtol=1e-9)


def test_ipo_is_the_contrastive_policy_gradient_of_rewards_of_a_quarter(x64):
  x = arrays_for('copg', group=2) | {'mask': np.ones((8, 6), bool)}
  x |= {'rewards': np.tile([0.25, -0.25], 4), 'label': np.tile([1.0, 0.0], 4)}
  spec = method_of('ipo').objective
  spec.link.target = 1 / (2 * 0.06)
  squared = harness.loss_and_weight(bind(spec, objectives.TABLE), x)[1]['logp']
  np.testing.assert_allclose(weight('copg', x), 0.06 / 2 * squared, rtol=1e-9)


# Credit and rewards as configured.


def test_red_drop_keeps_one_bad_row_for_each_good_one():
  got = credit_of('red_drop', [1, 0, 0, 0], uniform=jnp.array([0.9, 0.5, 0.1, 0.7]))
  np.testing.assert_array_equal(got['advantages'][:, 0], [0.5, 0, -0.5, 0])


def test_red_weight_adds_up_to_nothing():
  got = credit_of('red_weight', [1, 0, 0, 0])['advantages'][:, 0]
  np.testing.assert_allclose(got, [1.1106, *[-0.3702] * 3], atol=5e-5)
  assert jnp.sum(got) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize('name', ['topr', 'topr_token'])
def test_topr_rewards_right_answers_with_one_and_all_others_with_minus_one(name):
  run = build.build(Run(name).get_config('smoke'))
  score = run.phases['train'].score
  scores = score(['12', '13', '', '1\n'], [{'answer': '12'}] * 4, [2, 2, 1, 2])
  np.testing.assert_array_equal(scores.total, [1, -1, -1, -1])
  got = credit_of(name, scores.total)['advantages'][:, 0]
  np.testing.assert_array_equal(got, scores.total)
