"""What the standard methods become in the limits that their papers name, as configured."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import credit
from polgrad.losses import advantages, baselines, logit_stats
from polgrad.registry import bind, part
from tests.policy_gradient import harness
from tests.policy_gradient.oracles_standard import INF, ORACLES
from tests.runs import method_of

RATES = ('reference_logp', 'behavior_logp', 'proximal_logp')


def weights_of(name, x, **overrides):
  _, weights = harness.loss_and_weight(harness.objective_of(name, **overrides), x)
  return weights['logp']


def arrays_of(name, **changes):
  x = harness.random_arrays(harness.objective_of(name))
  return x | {k: x[v] for k, v in changes.items()}


def aggregate(name, weight, mask):
  """The weights of tokens under the aggregation of an experiment."""
  spec = method_of(name).objective.aggregation
  knobs = {k: v for k, v in spec.items() if k != 'name'}
  return getattr(harness, spec['name'].partition('.')[2])(weight, mask, **knobs)


def credited(name, arrays, **knobs):
  spec = method_of(name).credit
  with spec.unlocked():
    for knob, value in knobs.items():
      spec[knob] = value
  estimator = bind(spec, credit.TABLE)
  return credit.assign(estimator, arrays, estimator.init())[0]


def rows(rewards, groups, **arrays):
  """Scored rows of one token, or of as many as the arrays have."""
  shape = next(
    (v.shape for k, v in arrays.items() if v.ndim == 2 and k != 'baseline_rewards'),
    (len(rewards), 1),
  )
  return harness.scored(
    rewards=jnp.asarray(rewards, float),
    group_ids=jnp.asarray(groups),
    length=shape[1],
    **{k: jnp.asarray(v) for k, v in arrays.items()},
  )


@pytest.mark.parametrize('name', sorted(ORACLES))
def test_while_all_policies_agree_every_method_is_reinforce(name, x64):
  x = arrays_of(name, **dict.fromkeys(RATES, 'logp'))
  expected = aggregate(name, x['advantages'], x['mask'])
  np.testing.assert_allclose(weights_of(name, x), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('name', ['tis', 'mis', 'icepop', 'decoupled_ppo', 'retrace'])
def test_without_mismatch_a_correction_leaves_ppo(name, x64):
  x = arrays_of(name, behavior_logp='proximal_logp')
  np.testing.assert_allclose(weights_of(name, x), weights_of(name, x, weights={}), rtol=1e-12)


OPEN = {'surrogate__eps_low': INF, 'surrogate__eps_high': INF}


@pytest.mark.parametrize(
  ('name', 'overrides', 'other'),
  [
    ('grpo', OPEN | {'penalties': {}}, 'proximal_logp'),
    ('dual_clip_ppo', OPEN | {'surrogate__cap': INF, 'penalties': {}}, 'proximal_logp'),
    ('intellect2', OPEN | {'surrogate__cap': INF, 'penalties': {}}, 'proximal_logp'),
    ('cispo', {'surrogate__cap': INF}, 'proximal_logp'),
    ('deepseek_v32', OPEN | {'weights__opsm__limit': INF, 'penalties': {}}, 'proximal_logp'),
    (
      'dppo',
      {'weights__region__low': INF, 'weights__region__high': INF, 'surrogate__cap': INF},
      'behavior_logp',
    ),
    ('tis', OPEN | {'weights__mismatch__cap': INF}, 'behavior_logp'),
    ('icepop', OPEN | {'weights__mismatch__low': 0.0, 'weights__mismatch__high': INF}, 'behavior_logp'),
    ('decoupled_ppo', OPEN | {'weights__behavior__cap': INF}, 'behavior_logp'),
    ('a3po', OPEN | {'weights__behavior__high': INF}, 'behavior_logp'),
  ],
)  # fmt: skip
def test_without_bounds_what_is_left_is_importance_weighting(name, overrides, other, x64):
  """By the proximal policy, or, with a correction of the sampler, by the behaviour policy."""
  x = arrays_of(name)
  expected = aggregate(name, harness.ratio_of(x, other) * x['advantages'], x['mask'])
  np.testing.assert_allclose(weights_of(name, x, **overrides), expected, rtol=1e-9, atol=1e-12)


def test_sapo_without_steepness_is_importance_weighting(x64):
  x = arrays_of('sapo')
  got = weights_of('sapo', x, surrogate__tau_positive=1e-5, surrogate__tau_negative=1e-5)
  expected = harness.sequence_mean(harness.ratio_of(x) * x['advantages'], x['mask'])
  np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-12)


def test_gmpo_without_a_bound_is_gspo_without_one(x64):
  x = arrays_of('gmpo')
  got = weights_of('gmpo', x, ratio__eps_low=INF, ratio__eps_high=INF)
  np.testing.assert_allclose(got, weights_of('gspo', x, **OPEN), rtol=1e-12)


def test_a3po_is_ppo_against_the_sampler_when_fresh_and_never_clips_when_stale(x64):
  x = arrays_of('a3po')
  fresh, stale = (x | {'staleness': np.full(8, age)} for age in (1.0, 1e12))
  ratio = harness.ratio_of(x, 'behavior_logp')
  expected = harness.token_mean(harness.ppo(x, ratio, 0.8, 1.2), x['mask'])
  np.testing.assert_allclose(weights_of('a3po', fresh), expected, rtol=1e-9)
  expected = harness.token_mean(ratio * x['advantages'], x['mask'])
  np.testing.assert_allclose(weights_of('a3po', stale), expected, rtol=1e-9)


@pytest.mark.parametrize(
  ('size', 'p', 'expected'),
  [(4, 0.3, 0.3433), (8, 0.3, 0.4122), (64, 0.3, 0.4539), (4, 0.1, 0.1521), (8, 0.5, 0.4639)],
)
def test_grpo_weighs_the_gradient_of_the_success_rate_by_the_mean_deviation(size, p, expected, x64):
  """Its expected gradient is c_G(p) / (p (1 - p)) grad p with the population deviation, c_G =
  E[sqrt(q (1 - q))]: for a logit, grad p = p (1 - p) and the score of a row is R - p."""
  mean = 0.0
  for k in range(size + 1):
    rewards = (np.arange(size) < k).astype(float)
    knobs = {'advantage': part(advantages.group_normalized, ddof=0, eps=1e-12)}
    a = credited('grpo', rows(rewards, np.zeros(size, int)), **knobs)['advantages'][:, 0]
    chance = math.comb(size, k) * p**k * (1 - p) ** (size - k)
    mean += chance * np.mean(a * (rewards - p))
  np.testing.assert_allclose(mean, expected, atol=5e-5)


def test_remax_is_unbiased_and_silent_where_samples_earn_what_greed_earns(x64):
  """The exact mean over a bandit of three arms, for any reward of the greedy answer."""
  rewards, probs = np.array([1.0, 0.2, -0.5]), np.array([0.5, 0.3, 0.2])
  score = np.eye(3) - probs
  for greedy in (-1.0, 0.0, 7.0):
    x = rows(rewards, np.zeros(3, int), baseline_rewards=np.full((3, 1), greedy))
    x = x.replace(mask=jnp.ones((3, 1), bool))
    a = credited('remax', x)['advantages'][:, 0]
    np.testing.assert_allclose((probs * a) @ score, probs * (rewards - probs @ rewards), atol=1e-12)
    np.testing.assert_allclose(a, rewards - greedy)


def test_opo_is_the_group_mean_at_equal_lengths_and_balances_tokens_otherwise(x64):
  rewards, groups = [1.0, 0.0, 0.5, 0.0], np.zeros(4, int)
  full = np.ones((4, 3), bool)
  x = rows(rewards, groups, mask=full)
  expected = credited('dr_grpo', x)['advantages']
  np.testing.assert_allclose(credited('opo', x)['advantages'], expected, atol=1e-12)
  x = x.replace(mask=jnp.asarray(full & (np.arange(3) < np.array([[1], [3], [2], [3]]))))
  a = credited('opo', x)['advantages']
  np.testing.assert_allclose(jnp.sum(a), 0, atol=1e-12)  # every token of a row has its advantage
  np.testing.assert_allclose(a[:, 0], np.array(rewards) - 2 / 9, atol=1e-12)


def test_gpg_rescales_by_informative_rows_and_its_code_by_rewards_that_are_not_zero():
  x = rows([1, 0, 0, 0, 1, 1, 1, 1], np.repeat([0, 1], 4))
  centered = np.array([0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0])
  np.testing.assert_allclose(credited('gpg', x)['advantages'][:, 0], 2.0 * centered)
  code = credited('gpg', x, advantage=part(baselines.nonzero_mean))['advantages'][:, 0]
  np.testing.assert_allclose(code, 1.6 * centered, rtol=1e-6)


def test_otb_weighs_rows_by_the_squared_score_up_to_each_token(x64):
  """pi = (.5, .2, .9) with sum pi^2 = (.4, .3, .82) has W = (.4, 1.3, 1.32); the other row 1, 2, 3."""
  norm = np.array([[0.4, 0.9, 0.02], [1.0, 1.0, 1.0]])
  a = credited('otb', rows([1.0, 0.0], [0, 0], score_norm=norm))['advantages']
  weights = np.array([[0.4, 1.3, 1.32], [1.0, 2.0, 3.0]])
  baseline = weights[0] / weights.sum(axis=0)
  np.testing.assert_allclose(a, np.array([1 - baseline, -baseline]), atol=1e-12)


@pytest.mark.parametrize(('bound', 'value'), [(1.0, 5 / 6), (2.0, 1.0), (INF, 1.3)])
def test_impala_rests_at_the_value_of_the_policy_cut_at_rho_bar(bound, value, x64):
  """pi_rho ~ min(rho_bar mu, pi) on a bandit: there targets and advantages are right on average."""
  mu, pi = np.array([0.6, 0.3, 0.1]), np.array([0.2, 0.3, 0.5])
  logs = {'behavior_logp': np.log(mu)[:, None], 'proximal_logp': np.log(pi)[:, None]}
  x = rows([0, 1, 2], np.zeros(3, int), old_values=np.full((3, 1), value), **logs)
  fields = credited('impala', x, rho_bar=bound, rho_pg=bound)
  np.testing.assert_allclose(mu @ fields['returns'], value, atol=1e-12)
  np.testing.assert_allclose(mu @ fields['advantages'], 0, atol=1e-12)


def test_on_policy_vtrace_and_retrace_are_generalised_advantages(x64):
  """V in the place of Q makes Retrace's target minus V the lambda-sum of one-step errors."""
  rng = np.random.default_rng(0)
  logs = dict.fromkeys(('behavior_logp', 'proximal_logp'), rng.normal(size=(4, 5)))
  x = rows(rng.normal(size=4), np.zeros(4, int), old_values=rng.normal(size=(4, 5)), **logs)
  x = x.replace(mask=jnp.asarray(rng.uniform(size=(4, 5)) < 0.7))
  gae = credited('dual_clip_ppo', x)
  retrace = credited('retrace', x)
  for field in ('advantages', 'returns'):
    np.testing.assert_allclose(retrace[field], gae[field], atol=1e-12)
  full = credited('dual_clip_ppo', x, trace=1.0)
  np.testing.assert_allclose(credited('impala', x)['returns'], full['returns'], atol=1e-12)


def test_reinforce_plus_plus_charges_every_token_the_kl_of_what_follows(x64):
  logs = {
    'proximal_logp': np.array([[-1.0, -2.0], [-0.5, -1.5]]),
    'reference_logp': np.zeros((2, 2)),
  }
  x = rows([1.0, 0.0], [0, 1], **logs)
  a = credited('reinforce_plus_plus', x, normalizer=part(advantages.identity))['advantages']
  np.testing.assert_allclose(a, [[1.03, 1.02], [0.02, 0.015]], atol=1e-12)
  a = credited('reinforce_plus_plus', x)['advantages']
  np.testing.assert_allclose([jnp.mean(a), jnp.var(a, ddof=1)], [0, 1], atol=1e-6)


def test_the_entropy_bonus_moves_logits_by_minus_p_times_log_p_plus_entropy(x64):
  logits = jnp.array([0.5, -0.3, 1.2, 0.0])
  p = np.asarray(jax.nn.softmax(logits))
  expected = -p * (np.log(p) - p @ np.log(p))
  np.testing.assert_allclose(jax.grad(logit_stats.entropy)(logits), expected, atol=1e-12)
