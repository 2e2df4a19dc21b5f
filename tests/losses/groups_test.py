"""Statistics of groups: those of the pairwise definition, in memory that grows with the rows alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from polgrad import credit, registry
from polgrad.losses import advantages, baselines, groups, listwise, log_partition, pointwise
from tests.losses.float64_test import equations
from tests.losses.properties_test import name_of
from tests.policy_gradient.harness import batch_of

OF_GROUPS = [
  *advantages.TABLE.values(),
  *baselines.TOKEN_BASELINES.values(),
  *log_partition.TABLE.values(),
  *pointwise.TABLE.values(),
  *listwise.TABLE.values(),
]
B, T = 24, 3


def rows(count=B, dtype=np.float32):
  """Scattered groups of one to seven rows, some of which do not count."""
  rng = np.random.default_rng(0)
  tokens = {n: rng.uniform(size=(count, T)) for n in ('score_norm', 'token_returns')}
  tokens |= {n: rng.normal(size=(count, T)) for n in ('logp', 'proximal_logp')}
  scalars = ('rewards', 'residual', 'scaled_rewards', 'first_value', 'score', 'label', 'uniform')
  x = tokens | {n: rng.uniform(size=count) for n in scalars}
  x |= dict(
    baseline_rewards=rng.normal(size=(count, 2)), beta=np.array(0.5), reference_point=np.array(0.1)
  )
  ids = rng.integers(0, max(count // 4, 1), count).astype(np.int32) * 5
  x |= {'matched_score': rng.uniform(size=count), 'pair_side': rng.integers(-1, 2, count)}
  x |= {n: rng.uniform(size=(count, T)) for n in ('reference_logp', 'token_weights')}
  x |= {n: rng.uniform(size=count) for n in ('target', 'tracked_value', 'density_ratio')}
  x |= {n: rng.integers(-1, 2, count) for n in ('shown_label', 'given_side')}
  x |= {n: rng.integers(0, 2, count) for n in ('stratum_term', 'mode_term', 'stream')}
  x = {n: a.astype(dtype) for n, a in x.items()}
  return x | dict(
    group_ids=ids, valid=rng.uniform(size=count) < 0.8, mask=rng.uniform(size=(count, T)) < 0.7
  )


def pairwise(x, ids, valid, weights):
  """x_i - sum_j w_j x_j / sum_j w_j, of valid rows j of the same group, in float64."""
  member = (ids[:, None] == ids[None, :]) & valid[:, None] & valid[None, :]
  w = np.where(member, weights[None, :].astype(float), 0)
  mean = (w @ x.astype(float)) / np.maximum(w.sum(1), 1e-30)
  return np.where(w.sum(1) > 0, x - mean, 0), member


@pytest.mark.parametrize('count', [1, 2, B, 301])
def test_sums_and_moments_are_those_of_the_matrix_of_pairs(count):
  a = rows(count)
  x, ids, valid, w = a['rewards'], a['group_ids'], a['valid'], a['uniform']
  found = groups.members(ids, valid)
  for weights in (np.ones_like(x), w):
    expected, member = pairwise(x, ids, valid, weights)
    np.testing.assert_allclose(groups.center(x, found, weights), expected, atol=1e-6)
  sums = member @ x.astype(float)
  np.testing.assert_allclose(groups.total(x, found), sums, rtol=1e-6, atol=1e-6)
  np.testing.assert_array_equal(groups.size(found), member.sum(1))
  centered, _ = pairwise(x, ids, valid, np.ones_like(x))
  squares = member @ centered**2 / np.maximum(member.sum(1) - 1, 1)
  got = groups.variance(centered.astype(np.float32), found, ddof=1)
  np.testing.assert_allclose(got, squares, rtol=1e-6, atol=1e-6)
  least = np.where(valid, np.min(np.where(member, x[None], np.inf), axis=1), 0)
  np.testing.assert_array_equal(groups.minimum(x, found), least)
  rank = (member & (x[None] < x[:, None])).sum(1)
  np.testing.assert_array_equal(groups.rank(x, found)[valid], rank[valid])


def test_each_column_is_treated_separately():
  a = rows()
  found = groups.members(a['group_ids'], a['valid'])
  columns = [groups.center(x, found, w) for x, w in zip(a['token_returns'].T, a['score_norm'].T)]
  got = groups.center(a['token_returns'], found, a['score_norm'])
  np.testing.assert_allclose(got, np.stack(columns, 1), atol=1e-6)


def test_rows_that_are_not_better_are_counted_with_ties():
  random = np.random.default_rng(0)
  x, ids = random.integers(0, 3, 40).astype(np.float32), random.integers(0, 4, 40)
  among = random.random(40) < 0.5
  found = groups.at_most(jnp.asarray(x), jnp.asarray(ids), jnp.asarray(among))
  pairs = (ids[:, None] == ids[None]) & among[None] & (x[None] <= x[:, None])
  np.testing.assert_array_equal(found, pairs.sum(axis=1))


def test_partners_are_the_two_rows_of_a_pair():
  ids = jnp.array([4, 1, 4, 2, 2, 2, 7])
  np.testing.assert_array_equal(groups.partner(groups.same(ids)), [2, 1, 0, 3, 4, 5, 6])


def test_the_sum_of_a_group_does_not_feel_another_group():
  """Nor its NaN, nor its size: a cumulative sum over all rows would lose 1e-3 here."""
  x = jnp.array([1e8, 1.0, 2.0, 3.0, jnp.nan])
  got = groups.total(x, groups.same(jnp.array([0, 1, 1, 1, 2])))
  np.testing.assert_array_equal(got[1:4], [6.0, 6.0, 6.0])


def test_the_mean_of_a_group_has_its_gradient():
  a = rows()
  ids, valid = a['group_ids'], a['valid']
  loss = lambda x: jnp.sum(a['uniform'] * groups.center(x, groups.members(ids, valid)) ** 2)
  expected = lambda x: jnp.sum(a['uniform'] * matrix(x, ids, valid) ** 2)
  got, wanted = (jax.grad(f)(jnp.asarray(a['rewards'])) for f in (loss, expected))
  np.testing.assert_allclose(got, wanted, atol=1e-6)


def matrix(x, ids, valid):
  member = (ids[:, None] == ids[None, :]) & valid[:, None] & valid[None, :]
  return jnp.where(valid, x - member @ jnp.where(valid, x, 0) / np.maximum(member.sum(1), 1), 0)


def largest(fn, arrays):
  """The number of entries of the largest array that a traced function makes."""
  jaxpr = jax.make_jaxpr(lambda x: registry.call(fn, x))(arrays)
  shapes = (v.aval.shape for e in equations(jaxpr.jaxpr) for v in e.outvars)
  return max(map(np.prod, shapes), default=0)


@pytest.mark.parametrize('fn', OF_GROUPS, ids=name_of)
def test_no_array_has_an_entry_for_each_pair_of_8192_rows(fn):
  count = 8192
  shapes = {
    n: jax.ShapeDtypeStruct((count, *x.shape[1:]) if x.ndim else (), x.dtype)
    for n, x in rows(8).items()
  }
  assert largest(fn, {n: shapes[n] for n in registry.inputs(fn)}) <= 8 * count


@pytest.mark.parametrize('estimator', [credit.win_rate(), credit.token_baseline()])
def test_no_estimator_compares_all_pairs_at_once(estimator):
  count = 8192
  batch = {n: np.zeros((count, *x.shape[1:]), x.dtype) for n, x in rows(8).items() if x.ndim}
  jaxpr = jax.make_jaxpr(lambda batch: estimator.apply(batch, ())[0])(batch_of(batch))
  sizes = [np.prod(v.aval.shape) for e in equations(jaxpr.jaxpr) for v in e.outvars]
  assert max(sizes) <= 64 * count


@pytest.mark.parametrize('fn', OF_GROUPS, ids=name_of)
def test_rows_on_eight_devices_have_the_statistics_of_one(fn):
  a = rows()
  arrays = {n: a[n] for n in registry.inputs(fn)}
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  place = lambda x: jax.device_put(
    x, NamedSharding(mesh, PartitionSpec(*(['data'] if np.ndim(x) else [])))
  )
  call = functools.partial(registry.call, fn)
  spread = jax.jit(call)({n: place(x) for n, x in arrays.items()})
  np.testing.assert_allclose(spread, call(arrays), rtol=1e-6, atol=1e-6)
