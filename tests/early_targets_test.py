"""Running means of predictions: against whole distributions, in the collector, and to the statistic."""

import jax
import jax.numpy as jnp
import numpy as np

from polgrad import collect, packing
from polgrad.collect import early
from polgrad.losses import logit_stats
from polgrad.models.token_stats import token_stats
from polgrad.types import Batch, Layout
from tests.runs import method_of

RNG = np.random.default_rng(3)
V = 6


def distributions(*shape):
  z = RNG.normal(size=(*shape, V)) * 2
  return z, np.exp(z) / np.exp(z).sum(-1, keepdims=True)


def dense(tokens, means):
  found = np.zeros((*tokens.shape[:-1], V))
  for place in np.ndindex(tokens.shape):
    found[place[:-1]][tokens[place]] += means[place]
  return found


def test_means_of_all_entries_are_those_of_the_paper_and_the_largest_ones_are_kept():
  exact = np.zeros((2, 3, V))
  all_of, some = ((np.zeros((2, 3, k), 'i4'), np.zeros((2, 3, k), 'f4')) for k in (V, 4))
  for _ in range(4):
    z, p = distributions(2, 3)
    exact = 0.7 * exact + 0.3 * p
    found = np.asarray(logit_stats.most_likely(jnp.asarray(z, jnp.float32), k=V))
    all_of = early.followed(*all_of, found, decay=0.7)
    np.testing.assert_allclose(dense(*all_of), exact, rtol=1e-5, atol=1e-7)
    found = np.asarray(logit_stats.most_likely(jnp.asarray(z, jnp.float32), k=4))
    some = early.followed(*some, found, decay=0.7)
  # What is left out is small, and only lowers the means.
  assert np.all(dense(*some) <= exact + 1e-6) and np.all(np.diff(some[1], axis=-1) <= 0)
  np.testing.assert_array_equal(np.argmax(dense(*some), -1), np.argmax(exact, -1))
  assert np.all(logit_stats.most_likely(jnp.zeros(3), k=5)[8:] == 0)  # more than there are


def test_rows_of_the_data_have_their_own_means_and_may_push_others_out():
  settings = collect.EarlyTargets(rows=2, length=3, top=2, memory=4, decay=0.5)
  memory = settings.init()
  batch = Batch(
    tokens=np.zeros((2, 3), 'i4'), segment_ids=np.ones((2, 3), 'i4'), mask=np.ones((2, 3), bool)
  )
  seen = lambda ids, probs: np.tile(np.array([*ids, *probs], 'f4'), (2, 3, 1))
  step = lambda memory, rows, found: early.followed_rows(
    settings, batch, found, memory, np.array(rows)
  )
  out, memory, known = step(memory, [1, 3], seen([5, 2], [0.6, 0.4]))
  assert known == 0
  np.testing.assert_allclose(out['early_targets'][0], np.tile([0.3, 0.2], 3))
  before = jax.tree.map(np.copy, memory)
  out, memory, known = step(memory, [3, 2], seen([2, 1], [0.8, 0.2]))
  assert known == 0.5
  np.testing.assert_array_equal(out['early_tokens'], np.tile([[2, 5], [2, 1]], (1, 3)))
  np.testing.assert_allclose(out['early_targets'], np.tile([[0.5, 0.15], [0.4, 0.1]], (1, 3)))
  np.testing.assert_array_equal(memory.owner, [-1, 1, 2, 3])
  np.testing.assert_array_equal(before.owner, [-1, 1, -1, 3])  # the state before is not written on
  _, memory, known = step(memory, [5, 1], seen([0, 1], [0.5, 0.5]))  # 5 and 1 share a place
  assert known == 0.5


def test_the_penalty_of_the_rows_is_that_of_whole_targets():
  z, p = distributions(2, 4)
  t = 0.6 * distributions(2, 4)[1]
  ids = np.argsort(-t, -1)
  means = np.take_along_axis(t, ids, -1)
  mask = np.array([[0, 1, 1, 1], [0, 1, 1, 0]], bool)
  tokens = np.array([[0, 2, 5, 1], [3, 3, 0, 0]])
  logp = np.log(np.take_along_axis(p, tokens[..., None], -1)[..., 0])
  with jax.enable_x64(True):
    loss, _ = method_of('elr').loss(
      mask=mask,
      tokens=tokens,
      logits=z,
      logp=logp,
      early_tokens=ids.reshape(2, -1),
      early_targets=means.reshape(2, -1),
    )
    expected = (-logp + 3 * np.log(1 - (t * p).sum(-1)))[mask].mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    zeros = jnp.zeros((V,), int), jnp.zeros((V,))
    assert logit_stats.early_learning_of_rows(jnp.asarray(z[0, 0]), *zeros) == 0
    fn = lambda z: logit_stats.early_learning_of_rows(z, ids[0, 1], jnp.asarray(means[0, 1]))
    inner = (t * p)[0, 1].sum()
    gradient = -p[0, 1] * (t[0, 1] - inner) / (1 - inner)
    np.testing.assert_allclose(jax.grad(fn)(jnp.asarray(z[0, 1])), gradient, rtol=1e-10)


def test_wide_arrays_reach_their_tokens_in_chunks_and_in_packed_rows():
  tokens, table = jnp.asarray(RNG.integers(V, size=(3, 7))), jnp.asarray(distributions(V)[0], 'f4')
  wide = jnp.asarray(RNG.integers(V, size=(3, 7, 2)))
  stats = {'both': lambda logits, early_tokens: jnp.take_along_axis(logits, early_tokens, axis=1)}
  run = lambda **how: token_stats(
    table[tokens], tokens, lambda h: h, stats=stats, wide={'early_tokens': wide}, **how
  )['both']
  expected = np.zeros((3, 7, 2), 'f4')
  expected[:, 1:] = np.take_along_axis(
    np.asarray(table[tokens])[:, :-1], np.asarray(wide)[:, 1:], 2
  )
  np.testing.assert_allclose(run(), expected)
  np.testing.assert_allclose(run(chunk=6), expected)
  where = jnp.asarray(RNG.random((3, 7)) < 0.5)
  found = run(where=where, most=6)
  np.testing.assert_allclose(found[:, 1:], np.where(where[:, 1:, None], expected[:, 1:], 0))
  # Three short rows in two.
  lengths = np.array([3, 5, 4])
  seen = np.arange(7) < lengths[:, None]
  batch = Batch(tokens=np.asarray(tokens), segment_ids=seen.astype('i4'), mask=seen)
  batch = batch.with_arrays(early_tokens=np.asarray(wide).reshape(3, -1))
  batch = packing.pack(batch.replace(layout=Layout(pack=4)))
  assert batch.layout.rows == 2
  laid, back = packing.packed(jax.tree.map(jnp.asarray, batch))
  there = laid.features['early_tokens'].reshape(2, 7, 2)
  np.testing.assert_array_equal(back(there), np.where(seen[..., None], wide, 0))
