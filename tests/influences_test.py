"""Products of the gradients of single rewards, which credit may read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from polgrad import build, learner, methods, phases
from polgrad.checks import tracing
from polgrad.collect import influences
from polgrad.digests import path_name
from polgrad.models.policy import learned, overlay
from polgrad.types import Batch
from tests.runs import addition, method_of


def scored_rows(run, rng):
  """Rows of random tokens behind the prompt, with two rewards; one row failed."""
  collector = run.phases['train'].collect
  rows, length, start = collector.rows, collector.length, collector.prompt_length
  stop = rng.integers(start + 1, length + 1, rows)[:, None]
  position = np.arange(length)[None]
  right, brevity = rng.integers(0, 2, rows), rng.uniform(-1, 0, rows)
  valid = np.arange(rows) != 3
  return Batch(
    tokens=rng.integers(0, run.tokenizer.vocab_size, (rows, length)).astype(np.int32),
    segment_ids=(position < stop).astype(np.int32),
    mask=(position >= start) & (position < stop),
    rewards=np.where(valid, right + brevity, 0).astype(np.float32),
    valid=valid,
    group_ids=np.arange(rows, dtype=np.int32) // collector.rows_per_prompt,
    prompt_ids=np.zeros(rows, np.int32),
  ).with_arrays(brevity_term=np.where(valid, brevity, 0).astype(np.float32))


def test_influences_are_products_of_the_gradients_of_single_rewards():
  """Gradients of -mean over rows of sums of A_k log pi, by hand, for all parameters and for some."""
  config = addition(method_of('gradient_guided'))
  config.model.num_layers = 1
  run = build.build(config)
  phase = run.phases['train']
  batch = scored_rows(run, np.random.default_rng(0))
  mask = batch.mask & batch.valid[:, None]
  brevity = batch.features['brevity_term']
  contrasts = []
  for x in (batch.rewards - brevity, brevity):
    a = np.zeros(len(x))
    for g in np.unique(batch.group_ids):
      rows = np.flatnonzero((batch.group_ids == g) & batch.valid)
      a[rows] = (x[rows] - x[rows].mean()) / (x[rows].std(ddof=1) + 1e-6)
    contrasts.append(a)

  def losses(trainable, params):
    rows = Batch(tokens=batch.tokens, segment_ids=batch.segment_ids, mask=mask)
    logp = learner.forward(run.policy, overlay(params, trainable), rows).logp
    count = jnp.sum(jnp.any(mask, axis=1))
    return -jnp.asarray(np.stack(contrasts)) @ jnp.sum(jnp.where(mask, logp, 0), axis=1) / count

  with jax.set_mesh(run.mesh):
    state = phases.begin(run, 0, None)
    behavior = jax.jit(functools.partial(learner.forward, run.policy))(state.params, batch).logp
    behavior = np.asarray(behavior)
    seen = batch.with_arrays(
      behavior_logp=behavior,
      proximal_logp=behavior,
      finished=batch.valid,
      staleness=np.zeros(len(mask), np.float32),
      uniform=np.zeros(len(mask), np.float32),
    )
    context = phases.context(run, phase, 0)
    got = influences.make_influences(context, 1.0)(state, seen)['influences']
    found = jax.jit(jax.jacrev(losses))(learned(run.policy, state.params), state.params)
  every = np.stack(
    [
      np.asarray(ravel_pytree(jax.tree.map(lambda x, k=k: x[k], found))[0], np.float64)
      for k in range(2)
    ]
  )
  gram = every @ every.T
  assert abs(gram[0, 1]) > 1e-3 * gram[0, 0]
  assert got.shape == (len(mask), 2) and (got == got[:1]).all()
  np.testing.assert_allclose(got[0], gram.sum(axis=1), rtol=2e-3)
  # Of some parameters alone.
  names = influences.chosen(run.policy, 'embed')
  assert 0 < len(names) < len(influences.chosen(run.policy, ''))
  leaves = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(found)}
  flat = [np.asarray(leaves[name], np.float64).reshape(2, -1) for name in names]
  some = np.concatenate(flat, axis=1)
  got = influences.influences_of(
    [jax.tree.map(lambda x, k=k: x[k], found) for k in range(2)], names
  )
  np.testing.assert_allclose(got, (some @ some.T).sum(axis=1), rtol=1e-3)


def test_what_cannot_be_compared_is_refused():
  method = methods.gradient_guided(max_new_tokens=5, parameters='no_such')
  with pytest.raises(
    ValueError, match=r"credit.parameters: 'no_such' finds no parameter; there are"
  ):
    build.build(addition(method))
  method.credit.parameters = '('
  with pytest.raises(ValueError, match='no regular expression'):
    build.build(addition(method))
  method.credit.parameters = ''
  run = build.build(addition(method))
  tracing.trace_objective('config.phases.train', run.phases['train'], run.policy)
  method = dataclasses.replace(method, objective=methods.sft().objective)
  with pytest.raises(ValueError, match=r'must be objectives\.PolicyGradient, not '):
    build.build(addition(method))
