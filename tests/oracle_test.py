"""What an optimizer may ask of an update: gradients elsewhere and of probes, halves, products."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from polgrad import learner, objectives
from polgrad.losses import aggregation, selections, surrogates, weights
from polgrad.types import Batch, TrainState
from tests.models import tiny

ROWS = 4
TOKENS = tiny.rows(0, ROWS, 12)
MASK = np.arange(12)[None] > np.zeros((ROWS, 1), int)
RNG = np.random.default_rng(0)
BATCH = Batch(
  tokens=TOKENS,
  segment_ids=jnp.ones_like(TOKENS),
  mask=jnp.asarray(MASK),
  advantages=jnp.asarray(np.repeat(RNG.normal(size=(ROWS, 1)), 12, axis=1), jnp.float32),
  proximal_logp=jnp.asarray(-4 + 0.3 * RNG.normal(size=(ROWS, 12)), jnp.float32),
)
OBJECTIVE = objectives.PolicyGradient(
  surrogate=surrogates.importance_weighted,
  aggregation=aggregation.token_mean,
  selections={'selected': functools.partial(selections.second_moment, limit=0.5)},
  weights={'keep': weights.selected},
  probes={'away': functools.partial(surrogates.clipped_away, eps_low=0.1, eps_high=0.1)},
)


def start(objective=OBJECTIVE) -> TrainState:
  zero = jnp.int32(0)
  return TrainState(
    **dict.fromkeys(('step', 'phase', 'phase_step', 'update', 'cursor', 'skipped'), zero),
    params=tiny.params(),
    opt_state=(),
    anchors={},
    **dict.fromkeys(('collect_state', 'credit_state'), ()),
    objective_state=objective.init(),
  )


def asked(question, *, micro_batches: int = 1, objective=OBJECTIVE):
  """What `question(oracle, params)` answers inside a compiled update, and the update's gradient."""
  policy = tiny.policy()

  @jax.jit
  def run(state, batch):
    found = {}

    def keep(grads, opt_state, params, *, oracle):
      found['answer'] = (grads, question(oracle, params))
      return jax.tree.map(jnp.zeros_like, grads), opt_state

    transform = optax.GradientTransformationExtraArgs(lambda p: (), keep)
    made = learner.Learner(policy, objective, transform, micro_batches=micro_batches)
    made.update(state, batch)
    return found['answer']

  return run(start(objective), BATCH)


def close(a, b, **tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_counts_are_known_before_the_model_runs():
  made = learner.Learner(tiny.policy(), OBJECTIVE, optax.sgd(1.0))
  state = start()
  terms, _ = made.terms(state, made.outputs(state, state.params, BATCH), BATCH)
  counts = made.counts(state, BATCH)
  assert counts.keys() == terms.keys() == {'policy', 'probe/away'}
  close(counts, {name: term.count for name, term in terms.items()})


def test_a_selection_is_taken_before_the_batch_is_cut_and_only_then():
  state = start()
  for micro_batches, added in ((1, set()), (2, {'selected'})):
    made = learner.Learner(tiny.policy(), OBJECTIVE, optax.sgd(1.0), micro_batches=micro_batches)
    found = made.select(state, state.params, BATCH)
    assert found.features.keys() - BATCH.features.keys() == added


@pytest.mark.parametrize('micro_batches', [1, 2])
def test_the_gradient_here_is_that_of_the_update(micro_batches):
  question = lambda oracle, params: (
    oracle.gradient(params),
    oracle.value(),
    oracle.value_and_gradient(params),
  )
  grads, (again, here, (value, same)) = asked(question, micro_batches=micro_batches)
  close(again, grads, rtol=1e-5, atol=1e-7)
  close(same, grads, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(value, here, rtol=1e-6)
  assert abs(here) > 0.01


def test_micro_batches_select_by_the_whole_batch():
  whole, _ = asked(lambda oracle, params: ())
  parts, _ = asked(lambda oracle, params: (), micro_batches=2)
  close(parts, whole, rtol=1e-4, atol=1e-6)


def test_a_probe_has_its_own_gradient_and_is_no_part_of_the_loss():
  grads, probe = asked(lambda oracle, params: oracle.gradient(params, 'probe/away'))
  without = dataclasses.replace(OBJECTIVE, probes={})
  plain, _ = asked(lambda oracle, params: (), objective=without)
  close(grads, plain, rtol=1e-5, atol=1e-7)
  assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(*map(jax.tree.leaves, (grads, probe))))


def test_an_unknown_probe_is_refused_by_name():
  with pytest.raises(ValueError, match=r"asks for 'bias'; there is \['probe/away'\]"):
    asked(lambda oracle, params: oracle.gradient(params, 'bias'))


def test_halves_are_the_first_and_the_last_rows():
  """Rows have equal lengths, so without a selection the mean of both is the whole gradient."""
  plain = objectives.PolicyGradient(
    surrogate=surrogates.importance_weighted, aggregation=aggregation.token_mean
  )
  grads, (first, second) = asked(lambda oracle, params: oracle.halves(), objective=plain)
  close(jax.tree.map(lambda a, b: (a + b) / 2, first, second), grads, rtol=1e-4, atol=1e-6)
  assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(*map(jax.tree.leaves, (first, second))))


def test_a_product_is_the_derivative_of_the_gradient_along_a_vector():
  direction = jax.tree.map(
    lambda p: jnp.asarray(np.random.default_rng(p.size).normal(size=p.shape), p.dtype),
    tiny.params(),
  )
  step = 1e-3

  def question(oracle, params):
    move = lambda sign: jax.tree.map(lambda p, v: p + sign * step * v, params, direction)
    difference = jax.tree.map(
      lambda a, b: (a - b) / (2 * step), oracle.gradient(move(1)), oracle.gradient(move(-1))
    )
    return oracle.product(direction), difference

  plain = objectives.PolicyGradient(
    surrogate=surrogates.importance_weighted, aggregation=aggregation.token_mean
  )
  _, (product, difference) = asked(question, objective=plain)
  size = max(np.abs(x).max() for x in jax.tree.leaves(difference))
  close(product, difference, atol=0.02 * size, rtol=0.05)
