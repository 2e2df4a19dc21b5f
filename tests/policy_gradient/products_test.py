"""What every policy-gradient experiment owes, whatever it computes.

Padding may hold anything, the order of groups does not matter, and neither micro-batches nor devices
change loss or gradient. Selections see the whole batch first, as they do in the learner.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from polgrad import packing
from polgrad.reductions import Mean
from polgrad.types import Outputs
from tests.policy_gradient import harness
from tests.policy_gradient.harness import LIVE

EACH = pytest.mark.parametrize('name', harness.DISTINCT)
# One of every kind: selections of the whole batch, pairs, groups, sequences, turns, sums, statistics.
SPREAD = (
  *('bapo', 'capo', 'clip_cov', 'm2po', 'kl_cov', 'lp_reg', 'p3o', 'sppo', 'copg', 'opmd', 'dapo'),
  *('gspo', 'mis', 'topr', 'st_ppo', 'hpt', 'otr', 'epo', 'grpo_guard', 'dr_grpo', 'rloo'),
)
# Random numbers are drawn by position in the batch, so another order is another draw.
DRAWS = {'clip_cov'}


@functools.cache
def case(name: str):
  """An objective with leaves and a batch in float32, two groups of four (or four of two)."""
  objective = harness.objective_of(name)
  x = harness.random_arrays(objective, group=2 if objective.rows_per_prompt == 2 else 4)
  x = {k: np.asarray(v, np.float32) if v.dtype == np.float64 else v for k, v in x.items()}
  leaves = {k: x[k] for k in (*LIVE, *objective.stats)}
  batch = harness.batch_of({k: v for k, v in x.items() if k not in leaves})
  return objective, leaves, batch


def outputs_of(objective, leaves) -> Outputs:
  return Outputs(**{k: leaves[k] for k in LIVE}, stats={k: leaves[k] for k in objective.stats})


def terms_of(objective, leaves, batch):
  terms = harness.terms_of(objective, outputs_of(objective, leaves), batch, step=jnp.int32(3))
  return {k: t for k, t in terms.items() if k not in objective.probes}


def value_and_grad(objective, leaves, batch, counts=None):
  def loss(leaves):
    terms = terms_of(objective, leaves, batch)
    counted = {k: t.count if counts is None else counts[k] for k, t in terms.items()}
    return sum(Mean(total=t.total, count=counted[k]).value() for k, t in terms.items())

  return jax.value_and_grad(loss)(jax.tree.map(jnp.asarray, leaves))


@functools.cache
def plain(name: str):
  """The loss and gradient of a case."""
  return value_and_grad(*case(name))


def with_selections(objective, leaves, batch):
  if objective.select is None:
    return batch
  found = objective.select(
    outputs_of(objective, leaves), batch, objective.init(), step=jnp.int32(3)
  )
  return batch.replace(features=batch.features | found)


def close(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-6), a, b)


@EACH
def test_padding_may_hold_anything(name):
  objective, leaves, batch = case(name)
  loss, grads = plain(name)
  mask = batch.mask
  spoil = lambda a: (
    np.where(mask, a, np.nan) if a.shape == mask.shape and a.dtype.kind == 'f' else a
  )
  dirty, dirty_grads = value_and_grad(
    objective, jax.tree.map(spoil, leaves), jax.tree.map(spoil, batch)
  )
  np.testing.assert_array_equal(dirty, loss)
  jax.tree.map(np.testing.assert_array_equal, dirty_grads, grads)


@EACH
def test_micro_batches_and_the_order_of_groups_change_nothing(name):
  objective, leaves, batch = case(name)
  loss, grads = plain(name)
  whole = with_selections(objective, leaves, batch)
  counts = {k: t.count for k, t in terms_of(objective, leaves, whole).items()}
  group = 2 if objective.rows_per_prompt == 2 else 4
  order = np.arange(8).reshape(-1, group)[::-1].reshape(-1)
  pieces = packing.split((leaves, whole), 2, group)
  parts = [
    value_and_grad(objective, *jax.tree.map(lambda a, i=i: a[i], pieces), counts) for i in range(2)
  ]
  close(sum(part[0] for part in parts), loss)
  stacked = jax.tree.map(lambda *a: jnp.stack(a), *(part[1] for part in parts))
  close(packing.join(stacked, group), grads)
  if name not in DRAWS:
    turned = value_and_grad(objective, *jax.tree.map(lambda a: a[order], (leaves, batch)))
    close(turned, (loss, jax.tree.map(lambda a: a[order], grads)))


@EACH
def test_a_batch_without_tokens_has_loss_and_gradient_zero(name):
  objective, leaves, batch = case(name)
  empty = batch.replace(mask=np.zeros_like(batch.mask))
  loss, grads = value_and_grad(objective, leaves, empty)
  assert loss == 0
  assert not any(np.any(g) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize('name', SPREAD)
def test_devices_change_nothing(name):
  """Rows spread over eight devices: the compiled loss and gradient are those of one."""
  objective, leaves, batch = case(name)
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  rows = NamedSharding(mesh, PartitionSpec('data'))
  spread = jax.tree.map(lambda a: jax.device_put(a, rows), (leaves, batch))
  compiled = jax.jit(functools.partial(value_and_grad, objective))(*spread)
  close(compiled, plain(name))
