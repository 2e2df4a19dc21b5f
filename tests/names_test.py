"""Names that peers use for different things: both meanings can be written, and they differ.

The arguments name the meaning; the docstrings of the functions say who takes which.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import credit, objectives
from polgrad.losses import (
  advantages,
  aggregation,
  baselines,
  implicit_rewards,
  log_partition,
  penalties,
  preference_losses,
  ratios,
  surrogates,
  weights,
)
from polgrad.registry import Weighted
from polgrad.types import Batch
from tests import examples
from tests.objectives_test import loss_of


def gradient(objective, batch=None):
  batch = examples.batch() if batch is None else batch
  fn = jax.grad(lambda x: loss_of(objective, x, batch)[0])
  return fn(jax.tree.map(jnp.asarray, examples.leaves()))['logp']


def policy(surrogate=surrogates.importance_weighted, reduce=aggregation.token_mean, **slots):
  return objectives.PolicyGradient(surrogate=surrogate, aggregation=reduce, **slots)


def pairs(score):
  return objectives.Pairwise(
    score=score, link=functools.partial(preference_losses.squared, target=5.0)
  )


CLIPPED = functools.partial(surrogates.clipped, eps_low=0.02, eps_high=0.02)
CISPO = lambda cap: functools.partial(surrogates.truncated, cap=cap)
MEANINGS = {
  'GSPO: mean over sequences, or over tokens': (
    policy(CLIPPED, aggregation.sequence_mean, ratio=ratios.sequence_geometric),
    policy(CLIPPED, aggregation.token_mean, ratio=ratios.sequence_geometric),
  ),
  'IPO: sum or mean of log-ratios': (
    pairs(implicit_rewards.log_ratio_sum),
    pairs(implicit_rewards.log_ratio_mean),
  ),
  'CISPO: 0.28 is a distance from 1, or the cap itself': (
    policy(CISPO(1 + 0.28)),
    policy(CISPO(0.28)),
  ),
  'SAPO: gate live or detached': (
    policy(surrogates.soft_gated),
    policy(surrogates.reinforce, weights={'gate': weights.soft_gate}),
  ),
  'KL loss: k2 or k3': (
    policy(penalties={'kl': Weighted(0.1, penalties.k2)}),
    policy(penalties={'kl': Weighted(0.1, penalties.k3)}),
  ),
  'KL loss: k3 or the unbiased k3': (
    policy(penalties={'kl': Weighted(0.1, penalties.k3)}),
    policy(penalties={'kl': Weighted(0.1, penalties.importance_k3)}),
  ),
  'OPMD: centre of rewards, or of the whole residual': tuple(
    objectives.Regression(
      score=implicit_rewards.old_log_ratio_sum, center=center, beta=0.5, rows_per_prompt=2
    )
    for center in (log_partition.reward_mean, log_partition.group_mean)
  ),
  'TOPR: ratio of the row or of the token': tuple(
    policy(
      surrogates.reinforce,
      aggregation.sequence_sum,
      ratio=level,
      weights={'taper': weights.tapered},
    )
    for level in (ratios.sequence_product, ratios.token)
  ),
}


@pytest.mark.parametrize('name', MEANINGS)
def test_both_meanings_can_be_written_and_differ(name):
  first, second = (gradient(objective) for objective in MEANINGS[name])
  assert np.all(np.isfinite(first)) and np.all(np.isfinite(second))
  assert np.abs(first).max() > 1e-6
  assert np.abs(first - second).max() > 1e-3 * np.abs(first).max()


REWARDS = jnp.asarray([1.0, 0.0, 0.0, 0.0])
GROUP, VALID = jnp.zeros(4, jnp.int32), jnp.ones(4, bool)


@pytest.mark.parametrize(
  ('ddof', 'eps', 'first'), [(1, 1e-9, 1.5), (0, 1e-9, 3**0.5), (1, 0.5, 0.75)]
)
def test_group_std_says_its_ddof_and_eps(ddof, eps, first):
  got = advantages.group_normalized(REWARDS, GROUP, VALID, ddof=ddof, eps=eps)
  np.testing.assert_allclose(got[0], first, rtol=1e-6)


@pytest.mark.parametrize('scale', [baselines.informative_mean, baselines.nonzero_mean])
def test_gpg_scales_by_groups_with_signal_or_by_rewards_that_are_not_zero(scale):
  """Of a mixed group (1, 0, 0, 0) and one that is all right: 2 in the paper, 8 / 5 in the code."""
  rewards = jnp.concatenate([REWARDS, jnp.ones(4)])
  groups = jnp.repeat(jnp.arange(2), 4)
  got = scale(rewards, groups, jnp.ones(8, bool))[0] / 0.75
  np.testing.assert_allclose(got, 2.0 if scale is baselines.informative_mean else 1.6, rtol=1e-6)


def test_kl_in_the_reward_is_credit_and_in_the_loss_a_term():
  mask = jnp.ones((4, 1), bool)
  batch = Batch(
    tokens=jnp.zeros((4, 1), jnp.int32),
    segment_ids=jnp.ones((4, 1), jnp.int32),
    mask=mask,
    rewards=REWARDS,
    valid=VALID,
    group_ids=GROUP,
    proximal_logp=jnp.asarray([[-1.0], [-2.0], [-1.0], [-1.0]]),
    reference_logp=-jnp.ones((4, 1)),
  )
  within = credit.outcome(advantage=advantages.raw, kl_coefficient=0.1).apply(batch, ())[0]
  np.testing.assert_allclose(within['advantages'][:, 0], [1.0, 0.1, 0.0, 0.0], atol=1e-6)
  without = policy(penalties={'kl': Weighted(0.1, penalties.k2)})
  terms, _ = without.apply(examples.outputs(examples.leaves(), {}), examples.batch(), (), step=0)
  assert set(terms) == {'policy', 'kl'}
