"""Which weights a run has changed, and training only those."""

import doctest
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from polgrad import optim, update_sparsity, weight_changes
from polgrad.models import hf, tensors
from polgrad.optim.wrappers import path_name, subnetwork
from polgrad.registry import bind, part
from tests.models import tiny

BF16 = ml_dtypes.bfloat16


def test_doctests():
  assert not doctest.testmod(weight_changes).failed


def test_the_overlap_of_independent_updates_is_their_density():
  random = np.random.default_rng(0)
  first, second = random.random((2, 500_000)) < np.array([[0.2], [0.3]])
  found = weight_changes.overlap(first, second)
  assert found.of_first() == pytest.approx(0.30, abs=0.004)
  assert found.of_second() == pytest.approx(0.20, abs=0.004)
  np.testing.assert_allclose(found.chance(), (0.3, 0.2), atol=0.004)
  parts = [weight_changes.overlap(x, y) for x, y in zip(np.split(first, 5), np.split(second, 5))]
  assert weight_changes.together(parts) == found
  same = weight_changes.overlap(first, first)
  assert same.of_first() == same.of_second() == 1
  assert np.isnan(weight_changes.overlap(first & False, second).of_first())


@pytest.mark.parametrize(('density', 'want', 'within'), [(0.1, 512, 0), (0.005, 444, 12)])
def test_a_sparse_update_may_have_full_rank(density, want, within):
  random = np.random.default_rng(0)
  update = np.where(random.random((512, 512)) < density, random.normal(size=(512, 512)), 0)
  found = weight_changes.change(np.zeros((512, 512)), update, precision='')
  assert abs(found.rank - want) <= within and found.full_rank == 512
  assert found.sparsity == pytest.approx(1 - density, abs=0.002)


def test_ranks_are_those_of_each_matrix():
  random = np.random.default_rng(0)
  update = random.normal(size=(3, 6, 2)) @ random.normal(size=(3, 2, 4))
  found = weight_changes.change(np.zeros((3, 6, 4)), update)
  assert (found.rank, found.full_rank, found.relative_rank) == (6, 12, 0.5)
  vector = weight_changes.change(np.zeros(5), np.ones(5))
  assert vector.full_rank == 0 and np.isnan(vector.relative_rank) and vector.unchanged == 0
  assert weight_changes.total([found, vector]) == weight_changes.Change(77, 0, 0, 6, 12)
  assert weight_changes.change(np.zeros((3, 6, 4)), update, rank=False).rank == 0


@pytest.mark.parametrize(
  ('lr', 'steps', 'want'), [(1e-6, 1000, 0.981), (1e-5, 100, 0.846)], ids=['1e-6', '1e-5']
)
def test_weights_in_bfloat16_round_small_steps_away(lr, steps, want):
  """Constant steps of one sign each on weights N(0, 0.02^2), stored in bfloat16 and in float32."""
  random = np.random.default_rng(0)
  begin = (0.02 * random.normal(size=40_000)).astype(BF16)
  step = (lr * random.choice([-1, 1], size=40_000)).astype(np.float32)
  low, high = begin, begin.astype(np.float32)
  for _ in range(steps):
    low = (low.astype(np.float32) + step).astype(BF16)
    high = high + step
  stored = lambda x: ~weight_changes.changed(begin.astype(x.dtype), x, atol=0, precision='')
  assert stored(low).mean() == pytest.approx(want, abs=0.01) and stored(high).mean() == 0
  # Rounded to bfloat16, the float32 weights have moved where the step is a large part of the weight.
  hidden = weight_changes.changed(begin.astype(np.float32), high)
  assert 0 < hidden.mean() <= 1


def test_tolerance_precision_and_numbers_that_are_none():
  before = np.array([1.0, 1.0, 1e-4, 1e-4, 0.0], np.float32)
  after = before + np.array([1e-3, 1e-2, 5e-6, 5e-5, np.nan], np.float32)
  of = lambda **how: weight_changes.changed(before, after, **how).tolist()
  assert of() == [False, True, False, True, True]
  assert of(precision='') == [True, True, False, True, True]
  assert of(atol=0, precision='float32') == [True] * 5
  with pytest.raises(ValueError, match="precision 'int8'; valid"):
    of(precision='int8')
  with pytest.raises(ValueError, match='shape'):
    weight_changes.changed(before, after[1:])


# Folders, and a subnetwork.


def tensors_of(arrays):
  def tensor(x):
    return tensors.Tensor(x.shape, x.dtype, lambda index: x[index])

  return {name: tensor(x) for name, x in arrays.items()}


def test_models_are_compared_tensor_by_tensor():
  random = np.random.default_rng(0)
  before = {'a': random.normal(size=(8, 4)).astype(np.float32), 'b': np.zeros(3, BF16)}
  after = {'a': before['a'] + np.eye(8, 4, dtype=np.float32), 'b': before['b']}
  other = {'a': before['a'] + np.eye(8, 4, k=1, dtype=np.float32), 'b': np.ones(3, BF16)}
  how = dict(atol=1e-5, precision='bfloat16', rank=True)
  rows = list(update_sparsity.compare(*map(tensors_of, (before, after, other)), **how))
  (name, found, common, stored), (_, last, _, low) = rows
  assert (name, found.unchanged, found.rank, stored) == ('a', 28, 4, ('float32', 'float32'))
  assert (last.unchanged, last.full_rank, low) == (3, 0, ('bfloat16', 'bfloat16'))
  assert common == weight_changes.Overlap(32, 4, 3, 0)
  with pytest.raises(ValueError, match=r"different tensors, such as \['b'\]"):
    list(update_sparsity.compare(tensors_of(before), tensors_of({'a': after['a']}), None, **how))
  with pytest.raises(ValueError, match='a has shape'):
    sizes = ({'a': before['a']}, {'a': other['b']})
    list(update_sparsity.compare(*map(tensors_of, sizes), None, **how))


def test_parameters_have_the_tensors_of_their_folder(tmp_path):
  config, params = tiny.policy().config, tiny.params()
  hf.save(tmp_path / 'model', config, params)
  stored, made = tensors.open_folder(tmp_path / 'model'), hf.as_tensors(config, params)
  assert stored.keys() == made.keys()
  for name, one in stored.items():
    np.testing.assert_array_equal(one.all(), made[name].all())


PARAMS = {
  'layers': {'q': jnp.arange(6.0).reshape(2, 3)},
  'embedding': jnp.ones((4, 2), jnp.bfloat16),
}


def trained(optimizer, steps=5):
  """Parameters after some steps of a loss without a minimum."""
  params, state = PARAMS, optimizer.init(PARAMS)
  update = jax.jit(optimizer.update)
  gradient = lambda x, i: np.cos(np.asarray(x, np.float32) + i).astype(x.dtype)
  for i in range(steps):
    grads = jax.tree.map(functools.partial(gradient, i=i), params)
    step, state = update(grads, state, params)
    params = optax.apply_updates(params, step)
  return jax.tree.map(np.asarray, params)


def test_a_mask_of_ones_is_the_full_run_bit_for_bit_and_zeros_stay():
  adamw = optim.adamw(learning_rate=0.1, weight_decay=0.1, decay='all')
  full = trained(adamw)
  ones = trained(subnetwork(adamw, lambda name, shape: np.ones(shape, bool)))
  jax.tree.map(np.testing.assert_array_equal, ones, full)
  upper = lambda name, shape: np.arange(np.prod(shape)).reshape(shape) % 2 == 0
  some = trained(subnetwork(adamw, upper))
  for (path, x), y, begin in zip(
    jax.tree_util.tree_leaves_with_path(some), jax.tree.leaves(full), jax.tree.leaves(PARAMS)
  ):
    on = upper(path_name(path), x.shape)
    np.testing.assert_array_equal(x[~on], begin[~on])
    assert (x[on] != begin[on]).all() and (y[~on] != begin[~on]).all()


def test_the_mask_of_a_run_trains_what_it_changed(tmp_path):
  moved = jax.tree.map(lambda x: x.at[0].add(1), PARAMS)
  out = str(tmp_path / 'changed.npz')
  update_sparsity.write_mask(out, PARAMS, moved, atol=1e-5, precision='bfloat16')
  spec = part(optim.masked, optimizer=part(optim.sgd, learning_rate=0.5), mask=out)
  again = trained(bind(spec, optim.TABLE))
  for x, begin in zip(jax.tree.leaves(again), jax.tree.leaves(PARAMS)):
    np.testing.assert_array_equal(x[1:], begin[1:])
    assert (x[0] != begin[0]).any()
  with pytest.raises(FileNotFoundError, match='no file'):
    bind(part(optim.masked, optimizer=part(optim.sgd), mask=f'{out}.other'), optim.TABLE)
  with pytest.raises(ValueError, match='no mask of other'):
    optim.masked(optimizer=optim.sgd(), mask=out).init({'other': jnp.ones(2)})
  with pytest.raises(ValueError, match=r'expected bool\(2, 2\)'):
    optim.masked(optimizer=optim.sgd(), mask=out).init({'embedding': jnp.ones((2, 2))})


@pytest.mark.parametrize('text', [b'', b'hello', b'PK\x03\x04 cut off'])
def test_a_file_that_holds_no_masks_is_refused_before_training(text, tmp_path):
  (tmp_path / 'x.npz').write_bytes(text)
  with pytest.raises(ValueError, match=r'x\.npz.* is damaged, or no file of'):
    optim.masked(optimizer=optim.adamw(learning_rate=1e-3), mask=str(tmp_path / 'x.npz'))
