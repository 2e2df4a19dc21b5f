"""Sums keep their digits in half precision and over long rows, and NaN is not taken for 0."""

import jax.numpy as jnp
import numpy as np
import pytest

from polgrad.losses import advantages, aggregation, implicit_rewards
from polgrad.registry import call

HALF = pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
LENGTH = 32_768


@pytest.mark.parametrize(
  'score', [implicit_rewards.log_ratio_sum, implicit_rewards.old_log_ratio_sum]
)
@HALF
def test_a_score_of_a_long_row_is_a_sum_of_differences(score, dtype):
  """2,048 tokens that differ by 1/64 nat, which half precision has exactly near 1."""
  own, other = jnp.full(2048, -1.0, dtype), jnp.full(2048, -1 - 1 / 64, dtype)
  assert score(own, other, jnp.ones(2048, bool)) == 32.0


def test_a_score_of_32768_tokens_has_its_digits_in_float32():
  rng = np.random.default_rng(0)
  other = -rng.exponential(2.0, LENGTH)
  own = other + 1e-4 * rng.normal(size=LENGTH)
  exact = np.sum(own.astype(np.float32).astype(float) - other.astype(np.float32).astype(float))
  args = jnp.asarray(own, jnp.float32), jnp.asarray(other, jnp.float32), jnp.ones(LENGTH, bool)
  np.testing.assert_allclose(implicit_rewards.log_ratio_sum(*args), exact, atol=1e-6)
  np.testing.assert_allclose(implicit_rewards.log_ratio_mean(*args), exact / LENGTH, atol=1e-10)


@HALF
@pytest.mark.parametrize(
  'reduction', [aggregation.token_mean, aggregation.sequence_mean, aggregation.sequence_sum]
)
def test_means_over_many_tokens_neither_overflow_nor_lose_counts(reduction, dtype):
  loss = jnp.full((8, 4099), 8.0, dtype)
  got = reduction(loss, jnp.ones(loss.shape, bool))
  rows = reduction is aggregation.sequence_sum
  assert got.value() == (8.0 * 4099 if rows else 8.0)
  assert got.count == (8 * 4099 if reduction is aggregation.token_mean else 8)


@pytest.mark.parametrize('fn', advantages.TABLE.values(), ids=lambda fn: fn.__name__)
def test_a_reward_that_is_nan_is_not_an_advantage_of_zero(fn):
  rewards = jnp.array([1.0, jnp.nan, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0])
  arrays = dict(rewards=rewards, group_ids=jnp.repeat(jnp.arange(2), 4), valid=jnp.ones(8, bool))
  arrays |= dict(
    uniform=jnp.linspace(0, 0.9, 8),
    baseline_rewards=jnp.zeros((8, 2)),
    tracked_value=jnp.zeros(8),
    score_norm=jnp.ones((8, 1)),
    mask=jnp.ones((8, 1), bool),
    stratum_term=jnp.tile(jnp.arange(2.0), 4),
    mode_term=jnp.tile(jnp.arange(2.0), 4),
  )
  got = call(fn, arrays)
  assert np.isnan(np.asarray(got)[:4]).any()
