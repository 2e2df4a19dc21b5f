"""Float64 arrays give float64 results: nothing on the way is rounded to a lower precision."""

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core

from polgrad.losses import logit_stats, selections
from tests import examples
from tests.losses.properties_test import ALL, make, name_of, run
from tests.objectives_test import OBJECTIVES

EVERY = [*ALL, *selections.TABLE.values(), *logit_stats.TABLE.values()]


def in_float64(tree):
  is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64) if is_float(x) else x, tree)


def equations(jaxpr):
  """All equations, those of inner functions included."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jax.tree.leaves(
      equation.params, is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr)
    ):
      if isinstance(inner, core.Jaxpr | core.ClosedJaxpr):
        yield from equations(getattr(inner, 'jaxpr', inner))


def check_no_rounding(fn, *args):
  """Traces a function, and returns the types of its results."""
  jaxpr = jax.make_jaxpr(fn)(*args)
  for equation in equations(jaxpr.jaxpr):
    if equation.primitive.name == 'convert_element_type':
      old, new = equation.invars[0].aval.dtype, equation.params['new_dtype']
      rounds = old == jnp.float64 and jnp.issubdtype(new, jnp.floating) and new != jnp.float64
      assert not rounds, f'{old} becomes {new}'
  return {x.dtype for x in jaxpr.out_avals}


@pytest.mark.parametrize('fn', EVERY, ids=name_of)
def test_a_function_of_float64_arrays_computes_in_float64(fn, x64):
  arrays = in_float64(make(fn))
  if 'tokens' in arrays:
    arrays['tokens'] = jnp.zeros(arrays['tokens'].shape, jnp.int32)
  found = check_no_rounding(lambda arrays: run(fn, arrays), arrays)
  assert found == ({jnp.dtype(bool)} if returns_booleans(fn) else {jnp.dtype('float64')})


def returns_booleans(fn):
  numbers = (
    selections.balanced_bounds,
    selections.second_moment_bounds,
    selections.self_normalized,
    selections.per_prompt,
    selections.excess_drift,
    selections.signed_entropy,
  )
  return fn in selections.TABLE.values() and fn not in numbers


@pytest.mark.parametrize('name', OBJECTIVES)
def test_the_loss_and_gradient_of_an_objective_are_float64(name, x64):
  objective = OBJECTIVES[name]
  x, batch = in_float64((examples.leaves(), examples.batch()))

  def loss(x):
    outputs = examples.outputs(x, objective.stats)
    terms, _ = objective.apply(outputs, batch, objective.init(), step=0)
    return sum(term.value() for term in terms.values())

  assert check_no_rounding(jax.value_and_grad(loss), x) == {jnp.dtype('float64')}
