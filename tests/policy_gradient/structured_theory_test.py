"""What the experiments of `oracles_structured` are in their limits, and where papers say they lead.

Bandits have ten rows in exactly the frequencies of the policy, so means over rows are expectations.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import credit, optim
from polgrad.losses import divergences
from polgrad.reductions import Mean
from polgrad.registry import bind
from polgrad.types import Batch, Outputs
from tests import examples
from tests.policy_gradient import harness, oracles_structured
from tests.policy_gradient.harness import ppo, ratio_of, sequence_mean, sequence_sum, token_mean
from tests.runs import method_of

INF = float('inf')
OLD = np.array([0.5, 0.3, 0.2])
ARMS = np.repeat([0, 1, 2], [5, 3, 2])
REWARDS = np.array([1.0, 0.2, -0.5])


def column(values):
  """A number for each arm to [10, 1]."""
  return jnp.asarray(values)[ARMS][:, None]


def loss_of(objective, logits, advantages, **stats):
  """The objective on ten pulls of three arms."""
  old = column(np.log(OLD))
  batch = Batch(
    tokens=jnp.asarray(ARMS)[:, None],
    segment_ids=jnp.ones((10, 1), jnp.int32),
    mask=jnp.ones((10, 1), bool),
    advantages=advantages,
    proximal_logp=old,
    behavior_logp=old,
  )
  outputs = Outputs(logp=column(jax.nn.log_softmax(logits)), stats=stats)
  terms = harness.terms_of(objective, outputs, batch, step=0)
  return sum(t.value() for t in terms.values())


def credited(name, reference, rewards=REWARDS):
  """Advantages that the credit of an experiment gives to the ten pulls."""
  estimator = bind(method_of(name).credit, credit.TABLE)
  old = column(np.log(OLD))
  batch = harness.scored(
    rewards=jnp.asarray(rewards)[ARMS],
    proximal_logp=old,
    behavior_logp=old,
    reference_logp=column(np.log(reference)),
  )
  return credit.assign(estimator, batch, estimator.init())[0].advantages


def kl(p, q):
  return jnp.sum(p * jnp.log(p / q))


ON_POLICY = {  # what keeps a selection from dropping tokens, and the aggregation
  'mdpo': ({}, token_mean),
  'bapo': ({}, token_mean),
  'lp_reg': ({'selections__selected__share': 0.0}, token_mean),
  'epo': ({}, token_mean),
  'harpg': ({}, sequence_sum),
  'st_ppo': ({}, sequence_mean),
  'capo': ({'selections__kept__learning_rate': 0.0}, sequence_mean),
  'grpo_guard': ({}, sequence_mean),
  'clip_cov': ({'selections__selected__low': 4.9}, token_mean),
  'kl_cov': ({}, token_mean),
  'm2po': ({}, token_mean),
  'remix': ({}, token_mean),
  'props': ({}, token_mean),
  'humanline': ({}, token_mean),
}


@pytest.mark.parametrize('name', ON_POLICY)
def test_on_policy_it_is_reinforce_with_the_same_aggregation(name, x64):
  overrides, aggregate = ON_POLICY[name]
  objective = harness.objective_of(name, **overrides)
  x = harness.random_arrays(objective)
  x |= {k: x['logp'] for k in x if k.endswith('_logp')} | {'old_kl': np.zeros_like(x['logp'])}
  _, weight = harness.loss_and_weight(objective, x)
  np.testing.assert_allclose(weight['logp'], aggregate(x['advantages'], x['mask']), atol=1e-12)


REDUCTIONS = [  # what undoes the method, and what is left
  (
    'bapo',
    {'selections__bounds__share': 0.0},
    lambda x: token_mean(ppo(x, ratio_of(x), 0.6, 1.2), x['mask']),
  ),
  (
    'lp_reg',
    {'penalties__protection__weight': 0.0},
    lambda x: token_mean(ppo(x, ratio_of(x), 0.0, 10.0), x['mask']),
  ),
  (
    'capo',
    {'selections__kept__limit_objective': INF, 'selections__kept__limit_divergence': INF},
    lambda x: sequence_mean(ratio_of(x) * x['advantages'], x['mask']),
  ),
  (
    'm2po',
    {'selections__bounds__limit': INF},
    lambda x: token_mean(ratio_of(x) * x['advantages'], x['mask']),
  ),
  (
    'humanline',
    {'ratio__low': -INF, 'ratio__high': INF, 'penalties__kl__weight': 0.0},
    lambda x: token_mean(ppo(x, ratio_of(x), 0.85, 1.15), x['mask']),
  ),
]


@pytest.mark.parametrize(('name', 'overrides', 'left'), REDUCTIONS)
def test_without_its_idea_the_base_method_is_left(name, overrides, left, x64):
  objective = harness.objective_of(name, **overrides)
  x = harness.random_arrays(objective)
  _, weight = harness.loss_and_weight(objective, x)
  np.testing.assert_allclose(weight['logp'], left(x), atol=1e-12)


COARSE = [  # knobs of a selection under which many of the few tokens are selected
  ('bapo', 'bounds', {'share': 0.4}),
  ('lp_reg', 'selected', {'share': 0.6}),
  ('clip_cov', 'selected', {'share': 0.2, 'low': 0.02, 'high': 0.5}),
  ('kl_cov', 'selected', {'share': 0.4}),
  ('m2po', 'bounds', {'limit': 0.02, 'low': 1.0, 'high': 1.0}),
]


@pytest.mark.parametrize(('name', 'selection', 'knobs'), COARSE)
def test_larger_selections_are_the_tokens_of_the_papers_rule(name, selection, knobs, x64):
  overrides = {f'selections__{selection}__{k}': v for k, v in knobs.items()}
  objective = harness.objective_of(name, **overrides)
  x = harness.random_arrays(objective, seed=1)
  oracle = oracles_structured.ORACLES[name]
  assert np.sum(oracle(x, **knobs) != oracle(x)) > 2
  _, weight = harness.loss_and_weight(objective, x)
  np.testing.assert_allclose(weight['logp'], oracle(x, **knobs), atol=1e-12)


def test_mdpo_inner_updates_lead_to_the_tilted_old_policy(x64):
  step, advantages = 0.7, column([1.0, -0.5, 0.2])
  objective = harness.objective_of('mdpo', penalties__kl__weight=1 / step)

  def loss(logits):
    exact = divergences.reverse_kl(jnp.log(OLD), logits)
    return loss_of(objective, logits, advantages, kl=jnp.full((10, 1), exact))

  start, gradient = jnp.log(OLD), jax.jit(jax.grad(loss))
  np.testing.assert_allclose(-gradient(start), [0.305, -0.267, -0.038], atol=1e-12)
  found = jax.lax.fori_loop(0, 500, lambda _, z: z - gradient(z), start)
  np.testing.assert_allclose(jax.nn.softmax(found), [0.695195, 0.145965, 0.158841], atol=1e-6)


def schedule(name, penalty):
  return bind(method_of(name).objective.schedules[penalty], optim.SCHEDULES)


def test_mdpo_weighs_the_kl_by_one_over_a_step_that_shrinks_with_every_rollout():
  phase, weigh = method_of('mdpo'), schedule('mdpo', 'kl')
  assert phase.anchors['teacher'].every == phase.epochs
  steps = 150  # of the run, see `method_of`
  rollout = np.array([1, 1, 2, 76, steps, steps])
  updates = (rollout - 1) * phase.epochs + np.array([0, phase.epochs - 1, 0, 1, 0, 9])
  found = weigh(jnp.asarray(updates))
  np.testing.assert_allclose(found, 1 / (1 - (rollout - 1) / steps), rtol=1e-6)


def test_epo_weighs_its_band_as_published():
  weigh = schedule('epo', 'band')
  found = [float(weigh(jnp.int32(2 * epoch))) for epoch in (0, 37.5, 74, 75, 112.5, 150)]
  np.testing.assert_allclose(found, [1, 0.8736, 0.8278, 0.8, 0.1785, 0.0398], atol=2e-3)
  second = np.mean([float(weigh(jnp.int32(update))) for update in range(150, 300)])
  np.testing.assert_allclose(second, 0.8 * (1 - np.exp(-3)) / 3, atol=5e-3)


def test_remix_mixes_both_divergences_convexly():
  base, old = schedule('remix', 'base'), schedule('remix', 'old')
  rollouts = np.array([0, 50, 51, 60, 61, 70, 90, 100, 150])
  found = np.array([[float(f(jnp.int32(2 * r))) for f in (base, old)] for r in rollouts])
  np.testing.assert_allclose(found[:, 0], [1, 1, 0.9, 0.9, 0.8, 0.8, 0.6, 0.5, 0.5], atol=1e-6)
  np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)


def test_remix_on_fresh_rows_is_ppo_with_a_kl(x64):
  objective = harness.objective_of('remix')
  x = harness.random_arrays(objective)
  x |= {'behavior_logp': x['proximal_logp']}
  _, weight = harness.loss_and_weight(objective, x)
  kl_weight = -0.01 * (x['logp'] - x['reference_logp'])
  expected = token_mean(ppo(x, ratio_of(x), 0.8, 1.2) + kl_weight, x['mask'])
  np.testing.assert_allclose(weight['logp'], expected, atol=1e-12)


def test_epo_pulls_the_entropy_back_into_the_band_of_earlier_updates(x64):
  objective = harness.objective_of('epo')
  x = harness.random_arrays(objective)
  history = objective.advance(objective.init(), {'entropy': Mean(total=24.0, count=24.0)})
  _, weight = harness.loss_and_weight(examples.changed(objective, init=lambda: history), x, step=0)
  pull = (x['entropy'] < 0.8) * 1.0 - (x['entropy'] > 1.2)
  assert {-1, 0, 1} <= set(pull[x['mask']])
  np.testing.assert_allclose(weight['entropy'], token_mean(0.001 * (1 + pull), x['mask']))


@pytest.mark.parametrize(('limit', 'imitating'), [(-1, []), (0, [0]), (2, [0, 1]), (4, [0, 1, 2])])
def test_hpt_imitates_where_at_most_so_many_samples_are_right(limit, imitating):
  spec = method_of('hpt').credit
  spec.limit = limit
  estimator = bind(spec, credit.TABLE)
  solved = np.array([[0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]])
  batch = harness.scored(
    length=2,
    rewards=jnp.asarray(np.pad(solved, ((0, 0), (0, 1)), constant_values=1).ravel(), float),
    group_ids=jnp.repeat(jnp.arange(3), 5),
    stream=jnp.tile(jnp.array([1, 1, 1, 1, 0]), 3),
  )
  credited, _ = credit.assign(estimator, batch, estimator.init())
  kept = np.asarray(credited.mask).all(axis=1).reshape(3, 5)
  expected = [[False] * 4 + [True] if g in imitating else [True] * 4 + [False] for g in range(3)]
  np.testing.assert_array_equal(kept, expected)
  advantages = np.asarray(credited.advantages)[:, 0].reshape(3, 5)[:, :4]
  np.testing.assert_allclose(advantages, [[0] * 4, [0.5, -0.5, 0.5, -0.5], [0] * 4])


def test_st_ppo_probe_is_what_clipping_takes_from_the_importance_weighted_gradient(x64):
  objective = harness.objective_of('st_ppo')
  x = harness.random_arrays(objective)
  _, kept = harness.loss_and_weight(objective, x)
  _, both = harness.loss_and_weight(objective, x, with_probes=True)
  unclipped = harness.objective_of('st_ppo', surrogate__eps_low=INF, surrogate__eps_high=INF)
  _, whole = harness.loss_and_weight(unclipped, x)
  np.testing.assert_allclose(both['logp'], whole['logp'], atol=1e-12)
  assert np.abs(whole['logp'] - kept['logp']).max() > 0.01
  assert method_of('st_ppo').optimizer.probe in objective.probes


def test_harpg_loss_has_the_hessian_of_the_expected_return(x64):
  objective = harness.objective_of('harpg')
  hessian = jax.jit(jax.hessian(lambda z: loss_of(objective, z, column(REWARDS))))
  expected = jax.hessian(lambda z: -jax.nn.softmax(z) @ REWARDS)(jnp.log(OLD))
  np.testing.assert_allclose(hessian(jnp.log(OLD)), expected, atol=1e-12)


def test_correlated_proxies_descend_the_root_of_chi_square(x64):
  reference = np.array([0.2, 0.5, 0.3])
  objective = harness.objective_of('correlated_proxies')
  advantages = credited('correlated_proxies', reference)

  def exact(z):
    pi = jax.nn.softmax(z)
    return -pi @ REWARDS + 0.03 * jnp.sqrt(jnp.sum((pi - reference) ** 2 / reference))

  got = jax.jit(jax.grad(lambda z: loss_of(objective, z, advantages)))(jnp.log(OLD))
  # Leaving the row out of its baseline scales all of it by 10 / 9.
  np.testing.assert_allclose(got, 10 / 9 * jax.grad(exact)(jnp.log(OLD)), atol=1e-12)


def test_f_dpg_descends_its_divergence_to_the_tilted_reference(x64):
  reference = np.array([0.2, 0.5, 0.3])
  target = reference * np.exp(REWARDS / 0.3)
  target /= target.sum()

  def exact(z):
    pi = jax.nn.softmax(z)
    middle = (pi + target) / 2
    return kl(pi, middle) + kl(target, middle)

  objective, advantages = harness.objective_of('f_dpg'), credited('f_dpg', reference)
  got = jax.jit(jax.grad(lambda z: loss_of(objective, z, advantages)))(jnp.log(OLD))
  np.testing.assert_allclose(got, jax.grad(exact)(jnp.log(OLD)), atol=1e-9)


def test_demonstration_regularised_optimum_is_the_tilted_imitator(x64):
  imitator = OLD * np.exp(-REWARDS / 0.1)
  advantages = credited('demo_regularized', imitator / imitator.sum())
  np.testing.assert_allclose(advantages, 0, atol=1e-12)
  assert np.abs(credited('demo_regularized', OLD)).max() > 0.1


def test_oblr_baseline_has_the_least_variance(x64):
  rewards, pi = np.array([1, 0.5, 0, 2]), np.exp([1.0, 0.2, -0.5, -1.0])
  pi /= pi.sum()
  scores = np.eye(4) - pi
  squares = np.sum(scores**2, axis=1)
  batch = harness.scored(
    rewards=jnp.asarray(rewards),
    score_norm=jnp.asarray(pi * squares)[:, None],  # rows weigh what they would in samples of pi
  )
  estimator = bind(method_of('oblr_po').credit, credit.TABLE)
  advantages = credit.assign(estimator, batch, ())[0].advantages[:, 0]
  advantages = np.asarray(advantages)
  np.testing.assert_allclose(rewards - advantages, 0.739991, atol=1e-6)
  gradient = (pi * advantages) @ scores
  variance = pi @ (advantages**2 * squares) - gradient @ gradient
  np.testing.assert_allclose(variance, 0.213844, atol=1e-6)
