"""What holds for every entry of every table; a new entry is covered by being in one."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import registry
from polgrad.losses import (
  advantages,
  aggregation,
  divergences,
  implicit_rewards,
  links,
  penalties,
  pointwise,
  ratios,
  returns,
  surrogates,
  weights,
)

VOCABULARY = {
  *('logp', 'entropy', 'values', 'log_ratio', 'reference_logp', 'proximal_logp', 'behavior_logp'),
  *('teacher_logp', 'advantages', 'returns', 'old_values', 'mask', 'label', 'rewards'),
  *('group_ids', 'valid', 'score', 'margin', 'loss', 'where', 'logits', 'teacher_logits'),
  *('token_rewards', 'residual'),
}
ROW_INPUTS = {'label', 'rewards', 'group_ids', 'valid', 'score', 'margin', 'residual'}
SELECTORS = {'mask', 'where', 'valid'}
REQUIRED_KNOBS = {aggregation.constant_length: {'length': 8}}
B, T, V = 4, 3, 5

SCORES = list(implicit_rewards.TABLE.values())
REDUCTIONS = list(aggregation.TABLE.values())
TO_ROWS = [
  *advantages.TABLE.values(),
  *links.TABLE.values(),
  *pointwise.TABLE.values(),
  *pointwise.CENTERS.values(),
]
TO_TOKENS = [
  *returns.TABLE.values(),
  *advantages.NORMALIZERS.values(),
  *ratios.TABLE.values(),
  *surrogates.TABLE.values(),
  *weights.TABLE.values(),
  *penalties.TABLE.values(),
]
DIVERGENCES = list(divergences.TABLE.values())
DATA = {*advantages.TABLE.values(), *advantages.NORMALIZERS.values(), *returns.TABLE.values()}
BATCH_STATISTICS = {*advantages.TABLE.values(), advantages.whiten}
ALL = [*SCORES, *REDUCTIONS, *TO_ROWS, *TO_TOKENS, *DIVERGENCES]


def name_of(fn):
  return f'{fn.__module__.split(".")[-1]}.{fn.__name__}'


every = pytest.mark.parametrize('fn', ALL, ids=name_of)


def make(fn, seed=0, rows=B):
  """Float32 arrays for the inputs of `fn`, zeroed where the mask is False."""
  rng = np.random.default_rng(seed)
  mask = np.array([[0, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 1]], bool)[:rows]
  arrays = {}
  for name in registry.inputs(fn):
    if name in ('mask', 'where'):
      arrays[name] = mask
    elif name == 'valid':
      arrays[name] = np.array([True, True, False, True])[:rows]
    elif name == 'group_ids':
      arrays[name] = np.array([3, 1, 3, 3], np.int32)[:rows]
    elif name in ROW_INPUTS:
      arrays[name] = rng.uniform(size=rows).astype(np.float32)
    elif name in ('logits', 'teacher_logits'):
      arrays[name] = rng.normal(size=(rows, T, V)).astype(np.float32)
    else:
      arrays[name] = np.where(mask, rng.normal(size=(rows, T)), 0).astype(np.float32)
  return {name: jnp.asarray(x) for name, x in arrays.items()}


def run(fn, arrays):
  out = registry.call(fn, arrays) if fn not in REQUIRED_KNOBS else _with_knobs(fn, arrays)
  return jnp.stack([out.total, out.count]) if fn in REDUCTIONS else out


def _with_knobs(fn, arrays):
  return fn(*(arrays[name] for name in registry.inputs(fn)), **REQUIRED_KNOBS[fn])


@every
def test_arrays_are_positional_and_knobs_are_keywords_with_numbers(fn):
  for parameter in inspect.signature(fn).parameters.values():
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
      required = parameter.name in REQUIRED_KNOBS.get(fn, {})
      is_part = hasattr(parameter.annotation, '__metadata__')
      assert required or is_part or isinstance(parameter.default, int | float)
    else:
      assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
      assert parameter.default is inspect.Parameter.empty
      assert parameter.name in VOCABULARY


@every
def test_docstring_names_a_source_and_shapes(fn):
  text = inspect.getdoc(fn)
  assert 'arXiv:' in text or 'standard' in text
  assert 'Args:' in text
  for name in inspect.signature(fn).parameters:
    assert f'{name}:' in text


@every
def test_float32_in_float32_out_in_the_expected_shape(fn):
  out = run(fn, make(fn))
  shape = (2,) if fn in REDUCTIONS else (B, T) if fn in TO_TOKENS + DIVERGENCES else (B,)
  assert out.shape == shape
  assert out.dtype == jnp.float32
  assert np.all(np.isfinite(out))


@pytest.mark.parametrize('fn', [f for f in ALL if f not in DATA], ids=name_of)
def test_gradient_is_finite_for_log_probabilities_fifty_nats_apart(fn):
  arrays = make(fn)
  far = {n: 50 * jnp.sign(x) for n, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
  gradients = jax.grad(lambda x: jnp.sum(run(fn, {**arrays, **x})))(far)
  for name, gradient in gradients.items():
    assert np.all(np.isfinite(gradient)), name


@pytest.mark.parametrize('fn', [f for f in ALL if SELECTORS & {*registry.inputs(f)}], ids=name_of)
def test_nan_at_masked_places_changes_nothing(fn):
  arrays = make(fn)
  selector = arrays[next(n for n in arrays if n in SELECTORS)]
  dirty = {
    n: jnp.where(selector, x, jnp.nan)
    if jnp.issubdtype(x.dtype, jnp.floating) and x.shape == selector.shape
    else x
    for n, x in arrays.items()
  }
  np.testing.assert_array_equal(run(fn, dirty), run(fn, arrays))


@every
def test_permuting_rows_permutes_the_output(fn):
  arrays = make(fn)
  order = jnp.array([2, 0, 3, 1])
  permuted = run(fn, {n: x[order] for n, x in arrays.items()})
  expected = run(fn, arrays)
  if fn not in REDUCTIONS:
    expected = expected[order]
  np.testing.assert_allclose(permuted, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
  'fn', [f for f in ALL if f not in REDUCTIONS and f not in BATCH_STATISTICS], ids=name_of
)
def test_trap_12_duplicating_a_row_changes_no_other_row(fn):
  arrays = make(fn)
  twice = {n: x.at[3].set(x[0]) for n, x in arrays.items()}
  if 'group_ids' in arrays:  # the last row is a group of its own
    arrays['group_ids'] = twice['group_ids'] = jnp.array([3, 1, 3, 99], jnp.int32)
  np.testing.assert_array_equal(run(fn, twice)[:3], run(fn, arrays)[:3])


@pytest.mark.parametrize('fn', [f for f in ALL if len(registry.inputs(f)) > 1], ids=name_of)
def test_trap_13_a_row_vector_does_not_broadcast_even_when_the_batch_is_square(fn):
  arrays = {n: x[:T] for n, x in make(fn).items()}
  for name, x in arrays.items():
    wrong = x[:, 0] if x.ndim > 1 else jnp.broadcast_to(x[:, None], (T, T))
    with pytest.raises((AssertionError, ValueError)):
      run(fn, dict(arrays, **{name: wrong}))


@pytest.mark.parametrize('fn', REDUCTIONS, ids=name_of)
def test_micro_batches_add_to_the_whole_in_value_and_gradient(fn):
  arrays = make(fn)

  def total(loss, parts):
    means = [run(fn, dict(loss=loss[rows], where=arrays['where'][rows])) for rows in parts]
    return sum(m[0] for m in means), sum(m[1] for m in means)

  differentiate = jax.value_and_grad(total, has_aux=True)
  whole = differentiate(arrays['loss'], [jnp.arange(4)])
  split = differentiate(arrays['loss'], [jnp.array([2]), jnp.array([3, 0, 1])])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), split, whole)


@pytest.mark.parametrize('level', ratios.TABLE.values(), ids=name_of)
@pytest.mark.parametrize('surrogate', surrogates.TABLE.values(), ids=name_of)
def test_on_policy_every_surrogate_has_the_gradient_of_reinforce(surrogate, level):
  rng = np.random.default_rng(0)
  mask = jnp.array([[True, True, False], [True, True, True]])
  old = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
  row_advantages = jnp.broadcast_to(jnp.array([[1.5], [-0.5]]), (2, 3))

  def loss(logp, fn):
    arrays = dict(logp=logp, advantages=row_advantages, log_ratio=level(logp - old, mask))
    return aggregation.sequence_mean(registry.call(fn, arrays), mask).value()

  expected = jax.grad(loss)(old, surrogates.reinforce)
  np.testing.assert_allclose(jax.grad(loss)(old, surrogate), expected, rtol=1e-6)


# What a function differentiates; every other input of a listed function is constant by definition.
LIVE = {
  surrogates.reinforce: {'logp', 'advantages'},
  surrogates.truncated: {'logp', 'advantages'},
  penalties.importance_k3: {'log_ratio', 'logp', 'reference_logp'},
  weights.truncated_importance: set(),
  weights.masked_importance: set(),
  weights.truncated_sequence_importance: set(),
  divergences.forward_kl: {'logits'},
  divergences.reverse_kl: {'logits'},
  divergences.jensen_shannon: {'logits'},
  pointwise.group_mean: {'residual'},
  pointwise.group_mean_detached: set(),
  pointwise.leave_one_out: {'residual'},
}


@pytest.mark.parametrize('fn', LIVE, ids=name_of)
def test_trap_10_gradient_flows_where_the_definition_says_and_nowhere_else(fn):
  arrays = make(fn, seed=1)
  floats = {n: x for n, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
  out = run(fn, arrays)
  rows = jnp.arange(1.0, 1 + B).reshape(B, *[1] * (out.ndim - 1))  # unlike, so nothing cancels
  gradients = jax.grad(lambda x: jnp.sum(rows * run(fn, {**arrays, **x})))(floats)
  assert {n for n, g in gradients.items() if np.any(np.abs(g) > 1e-6)} == LIVE[fn]


TRUST_REGION = [f for f in surrogates.TABLE.values() if 'log_ratio' in registry.inputs(f)]


@pytest.mark.parametrize('surrogate', TRUST_REGION, ids=name_of)
@pytest.mark.parametrize('level', ratios.TABLE.values(), ids=name_of)
def test_what_stands_behind_the_mask_reaches_neither_loss_nor_gradient(surrogate, level):
  """The chain of an objective: zero once at the door, then ratio, surrogate and reduction."""
  rng = np.random.default_rng(0)
  mask = jnp.array([[True, True, False], [False, True, True]])
  old, logp, adv = (jnp.asarray(rng.normal(size=(2, 3)), jnp.float32) for _ in range(3))

  def loss(logp, old, adv):
    logp, old, adv = (jnp.where(mask, x, 0) for x in (logp, old, adv))
    arrays = dict(logp=logp, advantages=adv, log_ratio=level(logp - old, mask))
    return aggregation.token_mean(registry.call(surrogate, arrays), mask).value()

  clean = jax.value_and_grad(loss)(logp, old, adv)
  for junk in (jnp.nan, jnp.inf, -jnp.inf, 1e9):
    dirty = jax.value_and_grad(loss)(*(jnp.where(mask, x, junk) for x in (logp, old, adv)))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
