"""Advantages of steps and of tree nodes: published numbers, transcriptions, telescoping, holes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad.losses import advantages, trees

# The prompt has two nodes a and b of one token each, and each of these two leaves of one token.
DRAWN_BY = np.array([[0, 0], [0, 1], [2, 2], [2, 3]])
LENGTH = 7
step_advantages = jax.jit(trees.step_advantages)
tree_values = jax.jit(trees.tree_values)


def values_of(rewards, drawn_by, mask=None, trained=None, valid=None, group_ids=None):
  rows = len(rewards)
  every = np.ones(rows, bool)
  mask = np.ones(np.shape(drawn_by), bool) if mask is None else mask
  return tree_values(
    jnp.asarray(rewards),
    jnp.zeros(rows, int) if group_ids is None else jnp.asarray(group_ids),
    jnp.asarray(every if valid is None else valid),
    jnp.asarray(drawn_by),
    jnp.asarray(mask),
    jnp.asarray(every if trained is None else trained),
  )


def test_values_and_advantages_of_four_leaves_are_the_published_ones():
  found = values_of([1.0, 0, 0, 0], DRAWN_BY)
  third = 1 / 3
  np.testing.assert_allclose(
    found.node_values, [[third, 1], [third, -third], [-third, -third], [-third, -third]], rtol=1e-6
  )
  np.testing.assert_allclose(found.parent_values[:, 0], 0)
  np.testing.assert_array_equal(found.node_leaves, [[2, 1]] * 4)
  np.testing.assert_array_equal(found.parent_leaves, [[4, 2]] * 4)
  of = lambda weighting: trees.tree_advantages(*found, weighting=weighting)
  np.testing.assert_allclose(of('none')[:2, 1], [1 + 2 / 3, -1], rtol=1e-6)
  np.testing.assert_allclose(of('advantage')[:2], [[0.47140, 1.66667], [0.47140, -1]], atol=1e-5)
  np.testing.assert_allclose(of('value')[:2], [[0.47140, 1.76430], [0.47140, -0.90237]], atol=1e-5)


def test_a_tree_without_forks_has_twice_the_leave_one_out_advantages():
  rewards = np.random.default_rng(0).normal(size=4).astype(np.float32)
  found = values_of(rewards, np.repeat(np.arange(4)[:, None], 2, axis=1))
  want = advantages.leave_one_out(jnp.asarray(rewards), jnp.zeros(4, int), jnp.ones(4, bool))
  for weighting in ('advantage', 'value', 'none'):  # a single leaf, and a root with the value 0
    got = trees.tree_advantages(*found, weighting=weighting)
    np.testing.assert_allclose(got, np.repeat(2 * want[:, None], 2, axis=1), rtol=1e-5)


def random_forest(random):
  """Two prompts with leaves of several trees, some tokens of the prompt before them."""
  drawn_by = np.repeat(np.arange(9)[:, None], LENGTH, axis=1)
  mask = np.arange(LENGTH)[None] >= 2
  mask = mask & (np.arange(LENGTH)[None] < 2 + random.integers(2, 6, (9, 1)))
  parents = {2: (1, 4), 3: (2, 3), 4: (1, 3), 6: (5, 3), 7: (6, 4), 8: (6, 3)}
  for child, (parent, column) in parents.items():
    drawn_by[child, :column] = drawn_by[parent, :column]
    mask[[child, parent], : column + 1] |= np.arange(column + 1) >= 2
  return drawn_by, mask, np.array([0] * 5 + [1] * 4)


def by_paths(rewards, group, valid, drawn_by, mask, trained):
  """The definition, by sets of leaves, for every token of a valid row."""
  out = np.zeros((4, *mask.shape))
  for b, t in zip(*np.nonzero(mask)):
    if not valid[b]:
      continue
    same = [i for i in range(len(mask)) if group[i] == group[b]]
    good = [i for i in same if valid[i]]
    value = lambda i, good=good: rewards[i] - np.mean([rewards[j] for j in good if j != i])
    below = lambda t, b=b, same=same: {
      i for i in same if mask[i, t] and drawn_by[i, t] == drawn_by[b, t]
    }
    mean = lambda s, value=value: np.mean([value(i) for i in s if valid[i]])
    count = lambda s: sum(trained[i] and valid[i] for i in s)
    node = below(t)
    before = [u for u in range(t) if mask[b, u] and below(u) != node]
    parent = below(before[-1]) if before else set(same)
    out[:, b, t] = mean(node), mean(parent) if before else 0, count(node), count(parent)
  return out


@pytest.mark.parametrize('seed', range(3))
def test_values_of_random_trees_are_means_over_the_leaves_below(seed, x64):
  random = np.random.default_rng(seed)
  drawn_by, mask, group = random_forest(random)
  rewards, trained = random.normal(size=9), random.random(9) < 0.6
  valid = np.arange(9) != random.integers(9)
  got = [np.asarray(x) for x in values_of(rewards, drawn_by, mask, trained, valid, group)]
  want = by_paths(rewards, group, valid, drawn_by, mask, trained)
  np.testing.assert_allclose(np.stack(got), want, atol=1e-12)
  # Numbers of rows and prompts do not matter.
  order = random.permutation(9)
  moved = values_of(
    *(rewards[order], np.argsort(order)[drawn_by[order]]),
    *(mask[order], trained[order], valid[order], group[order]),
  )
  np.testing.assert_allclose(np.stack(moved), np.stack(got)[:, order], atol=1e-12)


def step_arrays(seed=0):
  random = np.random.default_rng(seed)
  mask = random.random((6, 8)) < 0.7
  mask[2] = False
  steps = np.cumsum(random.random((6, 8)) < 0.4, axis=1)
  steps = np.where(mask, steps - steps.min(axis=1, keepdims=True), -1)
  # One value for each step.
  values = np.take_along_axis(random.normal(size=(6, 9)), np.maximum(steps, 0), axis=1)
  return random.normal(size=(6, 8)), values, steps, mask


def by_steps(rewards, values, steps, mask):
  out = np.zeros(mask.shape)
  for b in range(len(mask)):
    numbers = sorted({j for j in steps[b][mask[b]]})
    for place, j in enumerate(numbers):
      here = mask[b] & (steps[b] == j)
      following = 0.0
      if place + 1 < len(numbers):
        following = values[b][mask[b] & (steps[b] == numbers[place + 1])][0]
      out[b, here] = rewards[b][here].sum() + following - values[b][here][0]
  return out


def test_step_advantages_are_those_of_the_definition(x64):
  arrays = step_arrays()
  got = step_advantages(*map(jnp.asarray, arrays))
  np.testing.assert_allclose(got, by_steps(*arrays), atol=1e-12)


def test_step_advantages_add_up_to_the_reward_minus_the_first_value(x64):
  rewards, values, steps, mask = step_arrays(1)
  got = np.asarray(step_advantages(*map(jnp.asarray, (rewards, values, steps, mask))))
  for b in np.flatnonzero(mask.any(axis=1)):
    _, first = np.unique(np.where(mask[b], steps[b], 99), return_index=True)
    first = first[mask[b][first]]
    want = rewards[b][mask[b]].sum() - values[b][first[0]]
    np.testing.assert_allclose(got[b][first].sum(), want, atol=1e-12)


@pytest.mark.parametrize('at', [[0, 0], [1, 3], [8, 8]])
def test_masked_tokens_anywhere_leave_the_others_alone(at, x64):
  plain = step_arrays(2)
  holed = [np.insert(x, at, junk, axis=1) for x, junk in zip(plain, (np.nan, np.nan, 7, False))]
  got = np.asarray(step_advantages(*map(jnp.asarray, holed)))
  want = np.asarray(step_advantages(*map(jnp.asarray, plain)))
  np.testing.assert_array_equal(np.delete(got, [a + i for i, a in enumerate(at)], axis=1), want)
