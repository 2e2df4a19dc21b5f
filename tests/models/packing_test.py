"""Short rows forwarded several to a row: the same numbers and gradients, for less work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import learner
from polgrad.losses import divergences, logit_stats
from polgrad.packing import join, pack, split
from polgrad.types import Batch, Layout
from tests.models import tiny

ROWS, LENGTH = 6, 12
MODELS = {
  'llama': {},
  'qwen, values': dict(qk_norm='head', attention_bias=True, tie_embeddings=False, value_head=True),
  'gemma, recomputed': dict(window=3, local_layers=(0,), attention_softcap=5.0, remat='full'),
  'experts': dict(num_experts=4, experts_per_token=2, balance_rate=0.01),
}


def batch(sizes, *, prompt: int = 1, length: int = LENGTH, before: int = 0, pack: int = 8) -> Batch:
  """Rows of so many tokens, `prompt` of them not scored, from column `before` on, two a group."""
  column = np.arange(length)[None] - before
  seen = (column >= 0) & (column < np.array(sizes)[:, None])
  return Batch(
    tokens=np.asarray(tiny.rows(3, len(sizes), length)),
    segment_ids=seen.astype(np.int32),
    mask=seen & (column >= prompt),
    group_ids=np.arange(len(sizes), dtype=np.int32) // 2,
    features={
      'early_tokens': np.asarray(tiny.rows(4, len(sizes), 2 * length)),
      'early_targets': np.random.default_rng(4).random((len(sizes), 2 * length), np.float32) / 2,
    },
    layout=Layout(pack=pack),
  )


# Of the logits alone, of the tokens before, and of several numbers of a token.
STATS = {
  'kl': divergences.reverse_kl,
  'repeats': functools.partial(logit_stats.unlikelihood, prompt=True),
  'early': logit_stats.early_learning_of_rows,
}
RAGGED = batch([3, 8, 5, 2, 9, 4], before=2)


def close(got, want, **tolerance):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, want)


@pytest.mark.parametrize('name', MODELS)
def test_all_outputs_and_gradients_are_those_of_the_rows_alone(name):
  policy, params = tiny.policy(**MODELS[name]), tiny.params(**MODELS[name])
  values = {'values', 'values_after'} if policy.config.value_head else set()
  fields = frozenset({'entropy'} | values)
  teacher = tiny.policy(), tiny.params(seed=1)
  weights = np.random.default_rng(0).normal(size=(7, ROWS, LENGTH))

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def read(params, batch):
    out = learner.forward(
      policy,
      params,
      batch,
      fields=fields,
      stats=STATS,
      temperature=0.7,
      teacher=teacher,
    )
    found = [out.logp, out.entropy, *out.stats.values(), out.values, out.values_after]
    found = [jnp.where(batch.mask, x, 0) for x in found if x is not None]
    return sum(jnp.sum(w * x) for w, x in zip(weights, found)), found

  packed = pack(RAGGED)
  assert packed.layout.rows == 3
  (_, want), gradient = read(params, RAGGED)
  (_, got), packed_gradient = read(params, packed)
  close(got, want, atol=1e-5)
  # Sums over tokens are rounded in another order: 1e-5 of the largest entry (8 in the embedding).
  scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient))
  close(packed_gradient, gradient, rtol=1e-5, atol=1e-5 * scale)


def test_what_is_not_in_the_mask_is_zero_and_may_hold_anything():
  packed = pack(RAGGED)
  forward = functools.partial(learner.forward, tiny.policy(), tiny.params())
  logp = forward(packed).logp
  assert (np.asarray(logp) != 0).tolist() == RAGGED.mask.tolist()
  spoiled = packed.replace(tokens=np.where(RAGGED.segment_ids, RAGGED.tokens, tiny.VOCAB + 5))
  np.testing.assert_array_equal(forward(spoiled).logp, logp)


def test_a_batch_without_a_scored_token_is_zero():
  blank = pack(RAGGED.replace(mask=np.zeros_like(RAGGED.mask)))
  assert blank.layout.rows
  assert not learner.forward(tiny.policy(), tiny.params(), blank).logp.any()


def test_documents_of_one_row_stay_apart():
  one = batch([10, 3, 2, 2])
  two = one.replace(segment_ids=np.where(np.arange(LENGTH) > 4, 2, 1) * one.segment_ids)
  two = two.replace(mask=two.mask & (np.arange(LENGTH) != 5))
  forward = functools.partial(learner.forward, tiny.policy(), tiny.params())
  logp = forward(two).logp
  np.testing.assert_allclose(forward(pack(two)).logp, np.where(two.mask, logp, 0), atol=1e-5)
  assert not np.allclose(logp, forward(one).logp, atol=1e-2)


def test_the_work_is_that_of_the_packed_rows():
  rows = batch([16] * 8, length=128)
  policy, params = tiny.policy(num_layers=1, max_length=128), tiny.params(num_layers=1)

  def flops(batch):
    run = jax.jit(functools.partial(learner.forward, policy))
    return run.lower(params, batch).compile().cost_analysis()['flops']

  assert flops(pack(rows)) < 0.15 * flops(rows)  # one row of eight


class TestPlaces:
  def test_are_best_fit_decreasing(self):
    # 7, 6, 3, 2, 2 into rows of 10: 7+3 and 6+2+2 fill both; first come, first served would not.
    got = pack(batch([2, 3, 2, 6, 7], length=10, pack=5))
    assert got.offset.tolist() == [16, 7, 18, 10, 0]
    assert (got.layout.rows, got.layout.scored) == (2, 8)

  @pytest.mark.parametrize('seed', range(5))
  @pytest.mark.parametrize(
    ('parts', 'group', 'data_parallel_size'), [(1, 1, 1), (4, 1, 2), (2, 2, 4)]
  )
  def test_never_overlap_and_fit_the_rows_of_their_piece(
    self, seed, parts, group, data_parallel_size
  ):
    sizes = np.random.default_rng(seed).integers(0, LENGTH // 2, 32)
    rows = batch(sizes)
    got = pack(rows, parts=parts, rows_per_prompt=group, data_parallel_size=data_parallel_size)
    assert got.layout.rows % data_parallel_size == 0 and 0 < got.layout.rows < 32 / parts
    for piece in split(np.arange(32), parts, group):
      taken = np.zeros(got.layout.rows * LENGTH, int)
      scored = np.zeros(got.layout.rows, int)
      for row in piece[sizes[piece] > 0]:
        first, last = got.offset[row], got.offset[row] + sizes[row] - 1
        assert first // LENGTH == last // LENGTH
        taken[first : last + 1] += 1
        scored[first // LENGTH] += rows.mask[row].sum()
      assert taken.max() == 1 and taken.sum() == sizes[piece].sum()
      assert scored.max() <= got.layout.scored <= LENGTH

  def test_are_few_layouts_whatever_the_lengths(self):
    random = np.random.default_rng(0)
    layouts = {pack(batch(random.integers(1, 8, 16), pack=2)).layout for _ in range(50)}
    assert {x.rows for x in layouts} <= {0, 8} and len(layouts) <= 3

  def test_are_left_alone_where_nothing_is_gained(self):
    full = batch([LENGTH] * 4)
    assert pack(full) is full
    off = batch([1] * 4, pack=0)
    assert pack(off) is off

  def test_padding_within_a_row_is_an_error(self):
    hole = RAGGED.segment_ids.copy()
    hole[2, 4] = 0
    with pytest.raises(ValueError, match='row 2 has padding between its tokens'):
      pack(RAGGED.replace(segment_ids=hole))


def test_pieces_come_together_again():
  rows = np.arange(24).reshape(12, 2)
  for parts, group in ((3, 2), (2, 1), (1, 4)):
    np.testing.assert_array_equal(join(split(rows, parts, group), group), rows)
