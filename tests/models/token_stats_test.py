"""Statistics in chunks are those of the full logits, and speak about the right token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad.arrays import WIDE
from polgrad.losses import divergences, logit_stats
from polgrad.losses.logit_stats import hidden_norm, logp
from polgrad.models import token_stats
from polgrad.models.token_stats import Rows
from polgrad.registry import inputs

# Without those of a teacher, and those that read earlier tokens (supervised_hybrids_test.py).
OTHERS = {'teacher_logits', 'context', *WIDE}
STATS = {fn.__name__: fn for fn in logit_stats.TABLE.values() if not OTHERS & set(inputs(fn))}
ROWS, LENGTH, WIDTH, VOCAB = 3, 11, 4, 7
RANDOM = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(RANDOM.normal(size=shape), jnp.float32)
HIDDEN, TABLE, SHARED = normal(ROWS, LENGTH, WIDTH), normal(VOCAB, WIDTH), normal(ROWS, LENGTH)
TEACHER_HIDDEN, TEACHER_TABLE = normal(ROWS, LENGTH, 2), normal(VOCAB, 2)
TOKENS = jnp.asarray(RANDOM.integers(0, VOCAB, (ROWS, LENGTH)), jnp.int32)


def unembed(table):
  return lambda x: jnp.einsum('...d,vd->...v', x, table)


def full(hidden, table, temperature):
  """Log-prob and entropy from whole logits."""
  logits = jnp.einsum('btd,vd->btv', hidden[:, :-1], table) / temperature
  log_probs = jax.nn.log_softmax(logits)
  chosen = jnp.take_along_axis(log_probs, TOKENS[:, 1:, None], axis=-1)[..., 0]
  out = {'logp': chosen, 'entropy': -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)}
  return {k: jnp.pad(v, ((0, 0), (1, 0))) for k, v in out.items()}


def chunked(hidden, table, temperature, chunk=6):
  return token_stats(
    hidden, TOKENS, unembed(table), stats=STATS, temperature=temperature, chunk=chunk
  )


@pytest.mark.parametrize('chunk', [1, 6, 9, 30, 1000])
def test_any_chunk_gives_the_values_of_the_full_logits(chunk):
  found = chunked(HIDDEN, TABLE, 0.7, chunk)
  for name, expected in full(HIDDEN, TABLE, 0.7).items():
    np.testing.assert_allclose(found[name], expected, atol=1e-6)


@pytest.mark.parametrize('chunk', [6, 1000])
def test_gradients_are_those_of_the_full_logits(chunk):
  def loss(stats, hidden, table):
    out = stats(hidden, table)
    return jnp.sum(SHARED * out['logp'] + 0.3 * SHARED**2 * out['entropy'])

  found = jax.grad(lambda h, t: loss(lambda *a: chunked(*a, 0.7, chunk), h, t), argnums=(0, 1))
  with jax.enable_x64(True):
    exact = jax.grad(lambda h, t: loss(lambda *a: full(*a, 0.7), h, t), argnums=(0, 1))
    exact = exact(*(np.asarray(x, np.float64) for x in (HIDDEN, TABLE)))
  for a, b in zip(found(HIDDEN, TABLE), exact):
    np.testing.assert_allclose(a, b, atol=5e-6)


def test_a_hidden_state_moves_the_entry_of_the_next_token_only():
  before = chunked(HIDDEN, TABLE, 1.0)
  after = chunked(HIDDEN.at[1, 4].add(1.0), TABLE, 1.0)
  for name in STATS:
    assert np.argwhere(before[name] != after[name]).tolist() == [[1, 5]]


def test_a_label_moves_its_own_entry_only():
  other = TOKENS.at[2, 6].set((TOKENS[2, 6] + 1) % VOCAB)
  before, after = (
    token_stats(HIDDEN, t, unembed(TABLE), stats=STATS, chunk=6) for t in (TOKENS, other)
  )
  assert np.argwhere(before['logp'] != after['logp']).tolist() == [[2, 6]]
  np.testing.assert_array_equal(before['entropy'], after['entropy'])


@pytest.mark.parametrize('chunk', [6, 1000])
def test_only_tokens_that_are_asked_for_are_evaluated(chunk):
  where = jnp.asarray(RANDOM.random((ROWS, LENGTH)) < 0.4).at[:, 0].set(False).at[1].set(False)

  def loss(hidden, **only):
    found = token_stats(hidden, TOKENS, unembed(TABLE), stats=STATS, chunk=chunk, **only)
    return sum(jnp.sum(jnp.where(where, SHARED * x, 0)) for x in found.values()), found

  run = jax.value_and_grad(loss, has_aux=True)
  (_, every), gradient = run(HIDDEN)
  (_, some), own_gradient = run(HIDDEN, where=where, most=int(where.sum(axis=1).max()))
  for name, x in some.items():
    np.testing.assert_allclose(x, jnp.where(where, every[name], 0), atol=1e-6)
  np.testing.assert_allclose(own_gradient, gradient, atol=1e-6)


def test_the_first_token_has_no_past():
  for value in chunked(HIDDEN, TABLE, 1.0).values():
    assert value.shape == TOKENS.shape
    np.testing.assert_array_equal(value[:, 0], 0)


def all_sizes(jaxpr):
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      yield variable.aval.size
    for value in equation.params.values():
      for inner in value if isinstance(value, list | tuple) else [value]:
        if hasattr(inner, 'eqns') or hasattr(inner, 'jaxpr'):
          yield from all_sizes(getattr(inner, 'jaxpr', inner))


def test_forward_and_backward_pass_never_hold_all_logits():
  def loss(stats):
    return lambda h, t: jnp.sum(stats(h, t)['logp']) + jnp.sum(stats(h, t)['entropy'])

  wide = normal(500, WIDTH)
  largest = lambda stats: max(
    all_sizes(jax.make_jaxpr(jax.grad(loss(stats), argnums=(0, 1)))(HIDDEN, wide).jaxpr)
  )
  whole = ROWS * (LENGTH - 1) * 500
  assert largest(lambda h, t: full(h, t, 1.0)) >= whole
  assert largest(lambda h, t: chunked(h, t, 1.0)) == ROWS * 2 * 500


def reverse_kl(logits, teacher_logits):
  log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(teacher_logits)
  return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def test_a_statistic_reads_the_arrays_it_names_and_no_gradient_reaches_the_teacher():
  def divergence(table, teacher_table, chunk):
    return token_stats(
      HIDDEN,
      TOKENS,
      unembed(table),
      stats={'kl': reverse_kl, 'logp': logp},
      temperature=2.0,
      chunk=chunk,
      teacher_hidden=TEACHER_HIDDEN,
      teacher_unembed=unembed(teacher_table),
    )['kl']

  logits, teacher_logits = (
    jnp.einsum('btd,vd->btv', h[:, :-1], t) / 2.0
    for h, t in ((HIDDEN, TABLE), (TEACHER_HIDDEN, TEACHER_TABLE))
  )
  for chunk in (6, 1000):
    np.testing.assert_allclose(
      divergence(TABLE, TEACHER_TABLE, chunk)[:, 1:], reverse_kl(logits, teacher_logits), atol=1e-5
    )
  grads = jax.grad(lambda *t: jnp.sum(divergence(*t, 6)), argnums=(0, 1))(TABLE, TEACHER_TABLE)
  assert float(jnp.max(jnp.abs(grads[0]))) > 0.1
  np.testing.assert_array_equal(grads[1], 0)


def test_statistics_are_float32_whatever_the_model_computes_in():
  low = lambda x: unembed(TABLE.astype(jnp.bfloat16))(x)
  out = token_stats(HIDDEN.astype(jnp.bfloat16), TOKENS, low, stats=STATS, chunk=6)
  assert all(x.dtype == jnp.float32 for x in out.values())


@pytest.mark.parametrize('chunk', [6, 1000])
def test_a_statistic_of_the_hidden_state_reads_the_one_that_scores_the_token(chunk):
  norms = lambda hidden: token_stats(
    hidden, TOKENS, unembed(TABLE), stats={'norm': hidden_norm}, chunk=chunk
  )['norm']
  expected = np.sum(np.asarray(HIDDEN) ** 2, axis=-1)[:, :-1]
  np.testing.assert_allclose(norms(HIDDEN)[:, 1:], expected, rtol=1e-6)
  np.testing.assert_allclose(norms(HIDDEN.astype(jnp.bfloat16))[:, 1:], expected, rtol=2e-2)


def test_the_hidden_state_of_a_statistic_is_data():
  plain_norm = lambda hidden: jnp.sum(hidden**2, axis=-1)
  norms = lambda h: token_stats(h, TOKENS, unembed(TABLE), stats={'norm': plain_norm})['norm']
  np.testing.assert_array_equal(
    jax.grad(lambda h: jnp.sum(norms(h)))(HIDDEN), np.zeros(HIDDEN.shape)
  )


def test_nan_outside_the_mask_reaches_no_gradient_of_any_statistic():
  """States of padding may be NaN; 0 times the derivative of a statistic there would be NaN."""
  every = {fn.__name__: fn for fn in logit_stats.TABLE.values()}
  every |= {'kl': divergences.reverse_kl}
  mask = jnp.zeros(TOKENS.shape, bool).at[0, 3:7].set(True).at[2, 5].set(True)
  ones = jnp.ones(TOKENS.shape, jnp.int32)
  # The state of a column predicts the token of the next one.
  read = jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))[:, :, None]

  def loss(hidden, table, junk):
    spoilt = lambda x, where: jnp.where(where, x, junk)
    wide = {
      'early_tokens': jnp.tile(jnp.arange(2), (ROWS, LENGTH, 1)),
      'early_targets': spoilt(0.3 * jnp.ones((ROWS, LENGTH, 2)), mask[:, :, None]),
      'mixed_tokens': jnp.tile(jnp.arange(2), (ROWS, LENGTH, 1)),
      'mixed_weights': spoilt(0.5 * jnp.ones((ROWS, LENGTH, 2)), mask[:, :, None]),
    }
    found = token_stats(
      spoilt(hidden, read),
      TOKENS,
      unembed(table),
      stats=every,
      teacher_hidden=spoilt(TEACHER_HIDDEN, read),
      teacher_unembed=unembed(TEACHER_TABLE),
      whole=Rows(TOKENS, ones, mask),
      wide=wide,
    )
    return sum(jnp.sum(jnp.where(mask, SHARED * x, 0)) for x in found.values())

  run = jax.jit(jax.grad(loss, argnums=(0, 1)))
  clean = run(HIDDEN, TABLE, 0.0)
  assert all(np.abs(x).max() > 1e-3 for x in clean)
  for junk in (np.nan, np.inf):
    for found, expected in zip(run(HIDDEN, TABLE, junk), clean):
      np.testing.assert_allclose(found, expected, atol=1e-6)
  whole = jax.grad(loss, argnums=1)(HIDDEN.at[0, 2].set(np.nan), TABLE, 0.0)
  assert np.isnan(whole).any()  # a token that counts is not hidden
