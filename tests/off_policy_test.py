"""The facts of every run about how far it is from the policy that sampled, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import objectives
from polgrad.losses import aggregation, logit_stats, selections, surrogates, weights
from polgrad.reductions import EffectiveSampleSize, Quantile
from polgrad.types import Batch, Outputs

RNG = np.random.default_rng(0)
GAP = (0.7 * RNG.normal(size=(6, 40))).astype(np.float32)
WHERE = RNG.uniform(size=GAP.shape) < 0.7


def test_the_effective_sample_size_is_that_of_importance_weights():
  weight = np.exp(GAP[WHERE])
  got = EffectiveSampleSize.of(jnp.exp(GAP), WHERE)
  np.testing.assert_allclose(
    got.value(), weight.sum() ** 2 / (weight.size * (weight**2).sum()), rtol=1e-5
  )
  parts = [EffectiveSampleSize.of(jnp.exp(GAP[i : i + 3]), WHERE[i : i + 3]) for i in (0, 3)]
  np.testing.assert_allclose((parts[0] + parts[1]).value(), got.value(), rtol=1e-5)
  assert EffectiveSampleSize.of(jnp.full((2, 3), 7.0), np.ones((2, 3), bool)).value() == 1
  assert EffectiveSampleSize.of(jnp.ones((2, 3)), np.zeros((2, 3), bool)).value() == 0


@pytest.mark.parametrize('fraction', [0.01, 0.5, 0.9])
def test_quantiles_are_within_a_tenth_of_the_log_ratio_and_merge_exactly(fraction):
  got = Quantile.of(GAP, WHERE, fraction=fraction)
  expected = np.quantile(GAP[WHERE], fraction, method='inverted_cdf')
  np.testing.assert_allclose(np.log(got.value()), expected, rtol=0.1, atol=1e-3)
  parts = [Quantile.of(GAP[i : i + 2], WHERE[i : i + 2], fraction=fraction) for i in (0, 2, 4)]
  assert (parts[0] + parts[1] + parts[2]).value() == got.value()


def test_on_policy_all_facts_say_so():
  metrics = metrics_of(np.zeros((1, 4)), surrogates.importance_weighted)
  for name in ('ratio_q01', 'ratio_q50', 'ratio_q99', 'effective_sample_size'):
    assert metrics[name].value() == 1
  assert metrics['sampler_kl'].value() == 0
  assert metrics['kept_positive'].value() == metrics['kept_negative'].value() == 1


def metrics_of(log_ratio, surrogate, **slots):
  objective = objectives.PolicyGradient(
    surrogate=surrogate, aggregation=aggregation.token_mean, **slots
  )
  shape = log_ratio.shape
  old = jnp.full(shape, -1.0)
  batch = Batch(
    tokens=jnp.zeros(shape, jnp.int32),
    segment_ids=jnp.ones(shape, jnp.int32),
    mask=jnp.ones(shape, bool),
    behavior_logp=old,
    proximal_logp=old,
    advantages=jnp.asarray([[1.0, 1.0, -1.0, -1.0]]),
  )
  return objective.apply(Outputs(logp=old + log_ratio), batch, {}, step=0)[1]


@pytest.mark.parametrize(
  ('surrogate', 'slots', 'positive', 'negative'),
  [
    # ratios 1.5, 0.5 for A = 1 and 1.5, 0.5 for A = -1
    (functools.partial(surrogates.clipped, eps_low=0.2, eps_high=0.2), {}, 0.5, 0.5),
    (surrogates.truncated, {}, 1.0, 1.0),
    (functools.partial(surrogates.dual_clipped, cap=1.4), {}, 0.5, 0.0),
    (surrogates.reinforce, {'weights': {'keep': weights.two_sided}}, 0.0, 0.0),
    (surrogates.reinforce, {'weights': {'keep': weights.one_sided}}, 0.5, 0.5),
  ],
)
def test_kept_shares_are_of_tokens_with_a_gradient_by_sign(surrogate, slots, positive, negative):
  metrics = metrics_of(np.log([[1.5, 0.5, 1.5, 0.5]]), surrogate, **slots)
  assert metrics['kept_positive'].value() == positive
  assert metrics['kept_negative'].value() == negative


def test_a_name_that_two_slots_give_is_refused():
  stat, selection = logit_stats.score_norm, selections.second_moment
  with pytest.raises(ValueError, match=r'selections\.kept: the name is taken by stats'):
    metrics_of(
      jnp.zeros((1, 4)), surrogates.reinforce, stats={'kept': stat}, selections={'kept': selection}
    )
  with pytest.raises(ValueError, match=r'stats\.logp: the name is taken by the batch'):
    metrics_of(jnp.zeros((1, 4)), surrogates.reinforce, stats={'logp': stat})


def test_facts_do_not_move_the_gradient():
  """Metrics are data: the gradient through them is zero."""
  fn = lambda gap: metrics_of(gap, surrogates.importance_weighted)['sampler_kl'].value()
  assert not np.any(jax.grad(fn)(jnp.full((1, 4), 0.3)))
