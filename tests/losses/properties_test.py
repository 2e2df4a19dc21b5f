"""What holds for every entry of every table; a new entry is covered by being in one."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import registry
from polgrad.arrays import ARRAYS, WIDE
from polgrad.losses import (
  advantages,
  aggregation,
  baselines,
  difficulty,
  divergences,
  f_divergences,
  implicit_rewards,
  log_partition,
  multipliers,
  pair_offsets,
  pair_selections,
  pair_weights,
  penalties,
  pointwise,
  preference_losses,
  ratios,
  returns,
  reward_maps,
  reward_penalties,
  score_shapes,
  selections,
  strata,
  surrogates,
  weights,
)

WHOLE = {
  'bounds': [0.8, 1.2],
  'mean_entropy': 0.7,
  'beta': 0.5,
  'reference_point': 0.2,
  'excess_drift': 0.5,
}  # numbers of the whole batch
SELECTORS = {'mask', 'where', 'valid'}
REQUIRED_KNOBS = {aggregation.constant_length: {'length': 8}, aggregation.token_sum: {'rows': 8}}
B, T, V = 4, 3, 5

# Functions that compare the rows of a pair.
PAIRED = [
  score_shapes.adaptive_rejection,
  *pair_offsets.TABLE.values(),
  *pair_weights.TABLE.values(),
  *pair_selections.TABLE.values(),
]
SHAPES = [f for f in score_shapes.TABLE.values() if f not in PAIRED]
SCORES = list(implicit_rewards.TABLE.values())
REDUCTIONS = list(aggregation.TABLE.values())
OF_TOKENS = [f for f in multipliers.TABLE.values() if 'advantages' in registry.inputs(f)]
TO_ROWS = [
  *advantages.TABLE.values(),
  *SHAPES,
  *preference_losses.TABLE.values(),
  *pointwise.TABLE.values(),
  *log_partition.TABLE.values(),
  *f_divergences.TABLE.values(),
  *reward_penalties.TABLE.values(),
  *reward_maps.TABLE.values(),
  *(f for f in multipliers.TABLE.values() if f not in OF_TOKENS),
]
RETURNS = [
  *returns.TABLE.values(),
  *returns.OF_TURNS.values(),
  *returns.TARGETS.values(),
  *returns.CORRECTED.values(),
]
TO_TOKENS = [
  *RETURNS,
  *baselines.TOKEN_BASELINES.values(),
  *advantages.NORMALIZERS.values(),
  *ratios.TABLE.values(),
  *ratios.PROXIMALS.values(),
  *surrogates.TABLE.values(),
  *weights.TABLE.values(),
  *penalties.TABLE.values(),
  *OF_TOKENS,
]
DIVERGENCES = list(divergences.TABLE.values())
BATCH_STATISTICS = {
  *advantages.TABLE.values(),
  *reward_maps.TABLE.values(),
  *multipliers.TABLE.values(),
  advantages.whiten,
  baselines.optimal_token_baseline,
  reward_penalties.root_chi_square,
}
DATA = {*BATCH_STATISTICS, advantages.identity, *RETURNS}
ALL = [*SCORES, *REDUCTIONS, *TO_ROWS, *TO_TOKENS, *DIVERGENCES]


def name_of(fn):
  return f'{fn.__module__.split(".")[-1]}.{fn.__name__}'


every = pytest.mark.parametrize('fn', ALL, ids=name_of)
# Selections give booleans of the whole batch: selections_test.py has the rest.
listed = pytest.mark.parametrize('fn', [*ALL, *PAIRED, *selections.TABLE.values()], ids=name_of)


def make(fn, seed=0, rows=B):
  """Float32 arrays for the inputs of `fn`, zeroed where the mask is False."""
  rng = np.random.default_rng(seed)
  mask = np.array([[0, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 1]], bool)[:rows]
  arrays = {}
  for name in registry.inputs(fn):
    if name in ('mask', 'where'):
      arrays[name] = mask
    elif name == 'finished':
      arrays[name] = np.array([True, False, True, True])[:rows]
    elif name == 'valid':
      arrays[name] = np.array([True, True, False, True])[:rows]
    elif name == 'group_ids':
      groups = [3, 1, 3, 1] if fn.__name__.startswith('paired') else [3, 1, 3, 3]
      arrays[name] = np.array(groups, np.int32)[:rows]
    elif name == 'tokens':
      arrays[name] = rng.integers(50, size=(rows, T)).astype(np.int32)
    elif name == 'turn_ids':
      arrays[name] = np.where(mask, np.arange(T) // 2, -1).astype(np.int32)
    elif name == 'score':  # log-odds have a gradient below 0 only
      arrays[name] = rng.normal(size=rows).astype(np.float32)
    elif name == 'preferred':
      arrays[name] = np.array([True, False, False, True])[:rows]
    elif name in ('selected', 'reference_selected'):
      arrays[name] = mask & (rng.uniform(size=(rows, T)) < 0.5)
    elif name in WHOLE:
      arrays[name] = np.array(WHOLE[name], np.float32)
    elif name == 'baseline_rewards':
      arrays[name] = rng.uniform(size=(rows, 2)).astype(np.float32)
    elif name == 'score_norm':
      arrays[name] = np.where(mask, rng.uniform(0, 2, size=(rows, T)), 0).astype(np.float32)
    elif (
      name in ARRAYS and ARRAYS[name].shape == 'B'
    ):  # log-probs of further anchors are not listed
      arrays[name] = rng.uniform(size=rows).astype(np.float32)
    elif name in WIDE:
      ids = name.endswith('tokens')
      shape = rows, T, 2
      arrays[name] = rng.integers(V, size=shape).astype(np.int32) if ids else rng.random(shape) / 2
    elif name == 'context':
      arrays[name] = rng.integers(V, size=(rows, T, T)).astype(np.int32)
    elif name == 'context_mask':
      arrays[name] = np.ones((rows, T, T), bool)
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


@listed
def test_arrays_are_positional_and_knobs_are_keywords_with_numbers(fn):
  for parameter in inspect.signature(fn).parameters.values():
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
      required = parameter.name in REQUIRED_KNOBS.get(fn, {})
      is_part = hasattr(parameter.annotation, '__metadata__')
      assert required or is_part or isinstance(parameter.default, int | float)
    else:
      assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
      assert parameter.default is inspect.Parameter.empty
      assert parameter.name in ARRAYS or parameter.name.endswith('_logp')  # of an anchor


@listed
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
  dirty = dict(arrays)
  for selector in (arrays[n] for n in SELECTORS & {*arrays}):
    for n, x in arrays.items():
      if jnp.issubdtype(x.dtype, jnp.floating) and x.shape == selector.shape:
        dirty[n] = jnp.where(selector, x, jnp.nan)
  np.testing.assert_array_equal(run(fn, dirty), run(fn, arrays))


@every
def test_permuting_rows_permutes_the_output(fn):
  arrays = make(fn)
  order = jnp.array([2, 0, 3, 1])
  permuted = run(fn, {n: x if n in WHOLE else x[order] for n, x in arrays.items()})
  expected = run(fn, arrays)
  if fn not in REDUCTIONS:
    expected = expected[order]
  np.testing.assert_allclose(permuted, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
  'fn', [f for f in ALL if f not in REDUCTIONS and f not in BATCH_STATISTICS], ids=name_of
)
def test_duplicating_a_row_changes_no_other_row(fn):
  arrays = make(fn)
  twice = {n: x if n in WHOLE else x.at[3].set(x[0]) for n, x in arrays.items()}
  if 'group_ids' in arrays:  # the last row is a group of its own
    arrays['group_ids'] = twice['group_ids'] = jnp.array([3, 1, 3, 99], jnp.int32)
  np.testing.assert_array_equal(run(fn, twice)[:3], run(fn, arrays)[:3])


@pytest.mark.parametrize(
  'fn', [f for f in ALL if len({*registry.inputs(f)} - WHOLE.keys()) > 1], ids=name_of
)
def test_a_row_vector_does_not_broadcast_even_when_the_batch_is_square(fn):
  arrays = {n: x if n in WHOLE else x[:T] for n, x in make(fn).items()}
  for name, x in arrays.items():
    if name in WHOLE:  # not per row, whatever its shape
      continue
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


# Their gradient is another one by definition; surrogates_test.py says which.
OTHERWISE = {
  surrogates.clipped_away,
  surrogates.negative_aware,
  surrogates.probability_shaped,
  surrogates.probability_power,
  surrogates.path_consistency,
  surrogates.drift,
  surrogates.entropy_adaptive,  # tokens of low entropy have less than A
}
LIKE_REINFORCE = [f for f in surrogates.TABLE.values() if f not in OTHERWISE]
OWN_TOKEN = [f for f in ratios.TABLE.values() if f is not ratios.sequence_product]


@pytest.mark.parametrize('level', OWN_TOKEN, ids=name_of)
@pytest.mark.parametrize('surrogate', LIKE_REINFORCE, ids=name_of)
def test_on_policy_every_surrogate_has_the_gradient_of_reinforce(surrogate, level):
  rng = np.random.default_rng(0)
  mask = jnp.array([[True, True, False], [True, True, True]])
  old = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
  arrays = dict(
    advantages=jnp.broadcast_to(jnp.array([[1.5], [-0.5]]), (2, 3)),
    behavior_logp=old,
    proximal_logp=old,
    old_kl=jnp.zeros((2, 3)),
    turn_ids=jnp.array([[0, 0, -1], [0, 1, 1]]),
    bounds=jnp.array([0.8, 1.2]),
    local_weight=jnp.array([0.3, 0.9]),
    replay_weight=jnp.array([0.4, 1.0]),
    token_staleness=jnp.where(mask, 1.0, 0.0),
    mask=mask,
  )
  arrays['global_advantages'] = arrays['advantages']

  def loss(logp, fn):
    log_ratio = registry.call(level, dict(arrays, log_ratio=logp - old))
    loss = registry.call(fn, dict(arrays, logp=logp, log_ratio=log_ratio))
    return aggregation.sequence_mean(loss, mask).value()

  expected = jax.grad(loss)(old, surrogates.reinforce)
  message = 'not that of REINFORCE: a mistake, or by definition and then an entry of OTHERWISE'
  np.testing.assert_allclose(jax.grad(loss)(old, surrogate), expected, rtol=1e-6, err_msg=message)


# What a function differentiates, if it is not every float array that it reads.
NOTHING = [
  *ratios.PROXIMALS.values(),
  *weights.TABLE.values(),
  *f_divergences.TABLE.values(),
  *reward_penalties.TABLE.values(),
]
LIVE = {fn: set() for fn in NOTHING} | {
  surrogates.reinforce: {'logp', 'advantages'},
  surrogates.entropy_adaptive: {'log_ratio', 'advantages'},
  surrogates.truncated: {'logp', 'advantages'},
  penalties.importance_k3: {'log_ratio', 'logp', 'reference_logp'},
  surrogates.centered_clip: {'logp', 'behavior_logp', 'advantages'},
  surrogates.path_consistency: {'logp', 'reference_logp', 'values', 'rewards'},
  ratios.centered: {'log_ratio'},
  ratios.sequence_geometric_clipped: {'log_ratio'},
  **dict.fromkeys(ratios.PROXIMALS.values(), frozenset()),
  **dict.fromkeys(weights.TABLE.values(), frozenset()),
  **{fn: {'logits'} for fn in divergences.TABLE.values()},
  log_partition.group_mean: {'residual'},
  log_partition.group_mean_detached: set(),
  log_partition.leave_one_out: {'residual'},
  log_partition.reward_mean: set(),
  log_partition.zero: set(),
  pointwise.paired_joint_clip: {'logp', 'rewards'},
  pointwise.kto: {'score', 'label'},
  pointwise.bco: {'score', 'label'},
  pointwise.matched_bco: {'score', 'label'},
  advantages.leave_one_out_normalized: set(),  # the groups here have fewer than three valid rows
  baselines.balanced_group_mean: {'rewards'},
  advantages.pass_at_k: set(),
  log_partition.log_partition: set(),
  log_partition.value: {'first_value'},
  log_partition.soft_baseline: set(),
  **dict.fromkeys(f_divergences.TABLE.values(), frozenset()),
  **dict.fromkeys(reward_penalties.TABLE.values(), frozenset()),
  implicit_rewards.bellman_sum: {'logp', 'reference_logp', 'log_normalizer'},
  penalties.entropy_band: {'entropy', 'mean_entropy'},
  penalties.entropy_band_published: set(),
  penalties.easy_k3: {'logp', 'reference_logp'},
  surrogates.drift: {'log_ratio'},
  **dict.fromkeys(multipliers.TABLE.values(), frozenset()),
  reward_maps.brief_when_right: set(),
  reward_maps.mistaken: set(),
  reward_maps.signed: set(),
  difficulty.two_sided: set(),
  strata.mode_choice: {'rewards'},
  strata.stratified: set(),  # normalised groups of two
}


@pytest.mark.parametrize('fn', [f for f in ALL if f not in REDUCTIONS], ids=name_of)
def test_gradient_flows_where_the_definition_says_and_nowhere_else(fn):
  arrays = make(fn, seed=1)
  floats = {n: x for n, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
  out = run(fn, arrays)
  rows = jnp.arange(1.0, 1 + B).reshape(B, *[1] * (out.ndim - 1))  # unlike, so nothing cancels
  gradients = jax.grad(lambda x: jnp.sum(rows * run(fn, {**arrays, **x})))(floats)
  found = {n for n, g in gradients.items() if np.any(np.abs(g) > 1e-6)}
  assert found == LIVE.get(fn, set(floats)), 'if this is the definition, it is an entry of LIVE'


TRUST_REGION = [f for f in surrogates.TABLE.values() if 'log_ratio' in registry.inputs(f)]


@pytest.mark.parametrize('surrogate', TRUST_REGION, ids=name_of)
@pytest.mark.parametrize('level', ratios.TABLE.values(), ids=name_of)
def test_what_stands_behind_the_mask_reaches_neither_loss_nor_gradient(surrogate, level):
  """The chain of an objective: zero once at the door, then ratio, surrogate and reduction."""
  rng = np.random.default_rng(0)
  mask = jnp.array([[True, True, False], [False, True, True]])
  old, logp, adv = (jnp.asarray(rng.normal(size=(2, 3)), jnp.float32) for _ in range(3))
  constants = dict(
    turn_ids=jnp.where(mask, 0, -1),
    bounds=jnp.array([0.8, 1.2]),
    success_rate=jnp.array([0.3, 0.6]),
    local_weight=jnp.array([0.3, 0.9]),
    replay_weight=jnp.array([0.4, 1.0]),
    token_staleness=jnp.where(mask, 1.0, 0.0),
    excess_drift=jnp.array(0.5),
    signed_entropy=jnp.where(mask, 0.5, 0.0),
    mask=mask,
  )

  def loss(logp, old, adv):
    logp, old, adv = (jnp.where(mask, x, 0) for x in (logp, old, adv))
    arrays = dict(constants, logp=logp, advantages=adv, log_ratio=logp - old, old_kl=old**2)
    arrays['global_advantages'] = -adv
    arrays['log_ratio'] = registry.call(level, arrays)
    return aggregation.token_mean(registry.call(surrogate, arrays), mask).value()

  clean = jax.value_and_grad(loss)(logp, old, adv)
  for junk in (jnp.nan, jnp.inf, -jnp.inf, 1e9):
    dirty = jax.value_and_grad(loss)(*(jnp.where(mask, x, junk) for x in (logp, old, adv)))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
