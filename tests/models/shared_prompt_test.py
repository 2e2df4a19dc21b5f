"""A prompt that is forwarded once for its group: the same numbers and gradients, for less work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import learner
from polgrad.data import batching, tokenizers
from polgrad.models import attention
from polgrad.types import Batch, Layout
from tests.models import tiny

GROUP, PROMPTS, WIDTH, NEW = 3, 2, 5, 4
MODELS = {
  'llama': {},
  'qwen, values': dict(qk_norm='head', attention_bias=True, tie_embeddings=False, value_head=True),
  'gemma, recomputed': dict(window=3, local_layers=(0,), attention_softcap=5.0, remat='offload'),
  'recomputed but products': dict(remat='dots'),
}


def rows() -> tuple[jax.Array, jax.Array, jax.Array]:
  """Tokens, segments and mask of groups whose prompts have padding and whose completions differ."""
  tokens = tiny.rows(3, PROMPTS * GROUP, WIDTH + NEW)
  tokens = tokens.at[:, :WIDTH].set(jnp.repeat(tokens[::GROUP, :WIDTH], GROUP, axis=0))
  segments = jnp.ones_like(tokens).at[:GROUP, :2].set(0).at[1, 7:].set(0)
  return tokens, segments, (segments > 0) & (jnp.arange(WIDTH + NEW) >= WIDTH)[None]


TOKENS, SEGMENTS, MASK = rows()


@pytest.mark.parametrize('name', MODELS)
def test_all_outputs_and_gradients_are_those_of_the_plain_forward_pass(name):
  policy, params = tiny.policy(**MODELS[name]), tiny.params(**MODELS[name])
  values = {'values', 'values_after'} if policy.config.value_head else set()
  fields = frozenset({'entropy'} | values)
  weights = np.random.default_rng(0).normal(size=(4, *TOKENS.shape))

  def read(params, layout):
    batch = Batch(tokens=TOKENS, segment_ids=SEGMENTS, mask=MASK, layout=layout)
    out = learner.forward(policy, params, batch, fields=fields)
    found = [out.logp, out.entropy, out.values, out.values_after]
    found = [jnp.where(MASK, x, 0) for x in found if x is not None]
    return sum(jnp.sum(w * x) for w, x in zip(weights, found)), found

  run = jax.jit(jax.value_and_grad(read, has_aux=True), static_argnums=1)
  (_, expected), expected_grads = run(params, Layout())
  for layout in (Layout(WIDTH, GROUP), Layout(WIDTH, 1))[: 2 if name == 'llama' else 1]:
    (_, got), grads = run(params, layout)
    for a, b in zip(got, expected):
      np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), grads, expected_grads
    )


def test_sources_merge_to_one_softmax():
  random = np.random.default_rng(1)
  query, key, value = (
    jnp.asarray(random.normal(size=size) * 3, jnp.float32)
    for size in ((2, 3, 4, 6), (2, 2, 6, 3), (2, 2, 3, 6))
  )
  mask = jnp.asarray(random.random((2, 3, 3)) < 0.7).at[:, :, 1].set(True)
  whole = attention.attend(query, (key, value, mask), scale=0.5, cap=4.0)
  cuts = [(key[..., s], value[:, :, s], mask[:, :, s]) for s in (slice(0, 2), slice(2, 3))]
  merged = attention.attend(query, *cuts, scale=0.5, cap=4.0)
  np.testing.assert_allclose(merged, whole, rtol=1e-5, atol=1e-6)


def test_the_work_for_a_long_prompt_is_done_once():
  policy = tiny.policy(num_layers=1, max_length=160)
  tokens = jnp.zeros((8, 136), jnp.int32)

  def flops(layout):
    batch = Batch(tokens=tokens, segment_ids=tokens + 1, mask=tokens == 0, layout=layout)
    run = jax.jit(functools.partial(learner.forward, policy))
    compiled = run.lower(tiny.params(num_layers=1), batch).compile()
    return compiled.cost_analysis()['flops']

  # Tokens: 8 x 136 against 128 + 8 x 8.
  assert flops(Layout(128, 8)) < 0.3 * flops(Layout())


def test_pairs_of_preferences_share_their_prompts():
  records = [
    {'id': i, 'prompt': 'abc'[: i + 1], 'chosen': 'de', 'rejected': 'f' * (3 - i)} for i in range(3)
  ]
  policy, params = tiny.policy(vocab_size=260), tiny.params(vocab_size=260)

  def sums(prompt_length, layout):
    batch = batching.pairs(records, tokenizers.byte(), length=9, prompt_length=prompt_length)
    out = learner.forward(policy, params, batch.replace(layout=layout))
    return jnp.sum(jnp.where(batch.mask, out.logp, 0), axis=1)

  np.testing.assert_allclose(sums(5, Layout(5, 2)), sums(0, Layout()), atol=1e-4)
