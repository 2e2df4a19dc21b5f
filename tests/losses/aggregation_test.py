"""Aggregation: unequal lengths by hand, empty rows, denominators."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad.losses import aggregation

LOSS = jnp.array([[1.0, 9.0, 9.0], [0.0, 0.0, 0.0]])
WHERE = jnp.array([[True, False, False], [True, True, True]])
ALL = [
  (aggregation.token_mean, {}),
  (aggregation.sequence_mean, {}),
  (aggregation.sequence_sum, {}),
  (aggregation.constant_length, dict(length=4)),
]


@pytest.mark.parametrize(('case', 'expected'), [*zip(ALL, [1 / 4, 1 / 2, 1 / 2, 1 / 8])])
def test_rows_of_one_and_three_tokens_by_hand(case, expected):
  fn, knobs = case
  assert fn(LOSS, WHERE, **knobs).value() == expected


@pytest.mark.parametrize(
  ('case', 'expected'),
  [*zip(ALL, [[1 / 4, 1 / 4], [1 / 2, 1 / 6], [1 / 2, 1 / 2], [1 / 8, 1 / 8]])],
)
def test_what_one_token_of_a_short_and_of_a_long_row_weighs(case, expected):
  fn, knobs = case
  gradient = jax.grad(lambda x: fn(x, WHERE, **knobs).value())(LOSS)
  np.testing.assert_allclose(gradient[:, 0], expected, rtol=1e-6)
  assert gradient[0, 1] == 0


@pytest.mark.parametrize(('fn', 'knobs'), ALL)
@pytest.mark.parametrize('junk', [0.0, np.nan, np.inf])
def test_fully_masked_batch_is_zero_with_zero_gradient(fn, knobs, junk):
  where = jnp.zeros((2, 3), bool)
  loss = jnp.full((2, 3), junk)
  value, gradient = jax.jit(jax.value_and_grad(lambda x: fn(x, where, **knobs).value()))(loss)
  assert value == 0
  np.testing.assert_array_equal(gradient, np.zeros((2, 3)))


@pytest.mark.parametrize(('fn', 'knobs'), ALL[:3])
def test_fully_masked_row_leaves_the_mean_of_the_others_alone(fn, knobs):
  loss = jnp.concatenate([LOSS, jnp.full((1, 3), jnp.nan)])
  where = jnp.concatenate([WHERE, jnp.zeros((1, 3), bool)])
  assert fn(loss, where, **knobs).value() == fn(LOSS, WHERE, **knobs).value()


def test_constant_length_counts_rows_without_tokens():
  loss = jnp.concatenate([LOSS, jnp.zeros((2, 3))])
  where = jnp.concatenate([WHERE, jnp.zeros((2, 3), bool)])
  assert aggregation.constant_length(loss, where, length=4).value() == 1 / 16


@pytest.mark.parametrize(('fn', 'knobs'), ALL)
def test_more_padding_changes_nothing(fn, knobs):
  pad = ((0, 0), (2, 5))
  wider = fn(jnp.pad(LOSS, pad, constant_values=7.0), jnp.pad(WHERE, pad), **knobs)
  assert wider.value() == fn(LOSS, WHERE, **knobs).value()


def test_a_length_without_tokens_is_refused():
  with pytest.raises(ValueError, match='length'):
    aggregation.constant_length(LOSS, WHERE, length=0)
