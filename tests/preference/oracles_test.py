"""Every preference method: value and gradient of its loss are those of its oracle, and what every
method owes: padding may hold anything, and micro-batches change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from polgrad import credit as credits
from polgrad.arrays import MODEL
from polgrad.reductions import Mean
from polgrad.registry import call
from polgrad.types import Batch, Outputs
from tests.preference import harness

ORACLES = harness.oracles()
EACH = pytest.mark.parametrize('name', [name for name in harness.NAMES if name in ORACLES])
CASES = [(name, {}, ORACLES[name][0]) for name in ORACLES] + harness.variants()
# One spelling of a case: the method, and its knobs if they are not the default ones.
NAMED = [pytest.param(*case, id=' '.join([case[0], *map(str, case[1].values())])) for case in CASES]


def test_every_method_has_one_oracle():
  found = {name: len(ORACLES.get(name, [])) for name in {*harness.NAMES, *ORACLES}}
  assert found == dict.fromkeys(harness.NAMES, 1), 'ORACLES of tests/preference/oracles_*.py'


@pytest.mark.parametrize(('name', 'knobs', 'oracle'), NAMED)
def test_loss_and_gradient_are_those_of_the_paper(name, knobs, oracle, x64):
  method = harness.make(name, knobs)
  x = harness.random_arrays(method)
  value, gradient = harness.value_and_gradient(method, x)
  np.testing.assert_allclose(value, oracle(x, x), rtol=1e-6)
  wanted = harness.differences(oracle, x)
  assert any(np.abs(g).max() > 1e-6 for g in wanted.values())
  for leaf in wanted:
    np.testing.assert_allclose(gradient[leaf], wanted[leaf], rtol=1e-5, atol=1e-8, err_msg=leaf)


def credited(method, x):
  """The objective of a method, what the model says, and the batch after credit, without gradient."""
  credit, objective = method.bound()
  arrays = {k: jnp.asarray(v) for k, v in x.items()}
  mask = arrays.pop('mask')
  live = {k: arrays.pop(k) for k in harness.LIVE if k in arrays}
  batch = Batch(tokens=jnp.zeros(mask.shape, int), segment_ids=mask.astype(int), mask=mask)
  arrays['valid'] = jnp.ones(len(mask), bool)
  batch = batch.with_arrays(**{k: v for k, v in arrays.items() if k != 'teacher_logits'})
  return objective, live, arrays, credits.assign(credit, batch, credit.init())[0]


def totals(objective, live, arrays, batch, counts=None):
  """The loss, with the counts of another batch if they are given, and its gradient."""

  def loss(live):
    stats = {k: call(f, {**arrays, **live}) for k, f in objective.stats.items()}
    fields = {k: live.get(k) for k in MODEL}
    outputs = Outputs(**fields, stats=stats)
    terms, _ = objective.apply(outputs, batch, objective.init(), step=0)
    kept = {k: t for k, t in terms.items() if k not in objective.probes}
    own = {k: t.count for k, t in kept.items()} if counts is None else counts
    return sum(Mean(total=t.total, count=own[k]).value() for k, t in kept.items()), own

  (value, own), gradient = jax.value_and_grad(loss, has_aux=True)(live)
  return (value, gradient), own


def close(a, b):
  jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-9, atol=1e-12), a, b)


@EACH
def test_padding_and_micro_batches_change_nothing(name, x64):
  """Arrays outside the mask may be NaN. Each half of the pairs alone, divided by the counts of all,
  gives its part of the sum."""
  method = harness.make(name, {})
  x = harness.random_arrays(method)
  objective, live, arrays, batch = credited(method, x)
  whole, counts = totals(objective, live, arrays, batch)

  spoil = lambda a: jnp.where(batch.mask, a, jnp.nan) if is_token_array(a, batch.mask) else a
  dirty, _ = totals(objective, *jax.tree.map(spoil, (live, arrays, batch)))
  close(dirty, whole)

  if objective.select is not None:
    stats = {k: call(f, {**arrays, **live}) for k, f in objective.stats.items()}
    outputs = Outputs(**{k: live.get(k) for k in MODEL}, stats=stats)
    found = objective.select(outputs, batch, objective.init(), step=0)
    batch = batch.replace(features=batch.features | found)
  rows = len(batch.mask)
  first = (np.arange(rows) < rows // 2)[:, None]
  halves = [
    totals(objective, live, arrays, batch.replace(mask=batch.mask & half), counts)[0]
    for half in (first, ~first)
  ]
  close(jax.tree.map(lambda a, b: a + b, *halves), whole)


def is_token_array(a, mask):
  return a.shape == mask.shape and jnp.issubdtype(a.dtype, jnp.floating)


@pytest.mark.parametrize('name', ['arpo'])
def test_devices_change_nothing(name, x64):
  """Rows spread over eight devices: pairs, and a mean over rows, are those of the whole batch."""
  method = harness.make(name, {})
  case = credited(method, harness.random_arrays(method))
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  rows = NamedSharding(mesh, PartitionSpec('data'))
  spread = jax.tree.map(lambda a: jax.device_put(a, rows), case[1:])
  compiled = jax.jit(functools.partial(totals, case[0]))(*spread)
  close(compiled, totals(*case))
