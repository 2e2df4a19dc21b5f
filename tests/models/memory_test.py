"""What training holds in memory and computes, by the compiler's own accounting: nothing is run."""

import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest

from polgrad import learner, methods, models
from polgrad.losses import divergences, logit_stats
from polgrad.models import token_stats
from polgrad.types import Batch, TrainState


def compiled(fn, *shapes):
  return jax.jit(fn).lower(*shapes).compile()


def temporary(fn, *shapes) -> int:
  """Bytes of what is neither argument nor result."""
  return compiled(fn, *shapes).memory_analysis().temp_size_in_bytes


def test_the_loss_head_never_holds_the_logits():
  """The vocabulary of Qwen3, 8192 tokens: log-prob, entropy and the KL to a reference in one pass."""
  rows, length, width, vocabulary = 8, 1024, 1024, 151_936
  stats = {
    'logp': logit_stats.logp,
    'entropy': logit_stats.entropy,
    'kl': divergences.reverse_kl,
  }
  shape = jax.ShapeDtypeStruct
  hidden = shape((rows, length, width), jnp.float32)
  weight = shape((vocabulary, width), jnp.float32)

  def head(chunk):
    def loss(hidden, weight, other_hidden, other_weight, tokens):
      found = token_stats(
        hidden,
        tokens,
        lambda h: h @ weight.T,
        stats=stats,
        chunk=chunk,
        teacher_hidden=other_hidden,
        teacher_unembed=lambda h: h @ other_weight.T,
      )
      return sum(jnp.sum(x) for x in found.values())

    tokens = shape((rows, length), jnp.int32)
    return temporary(jax.grad(loss, (0, 1)), hidden, weight, hidden, weight, tokens)

  chunked, whole = head(None), head(rows * length)
  assert whole > 2 * 4 * rows * length * vocabulary  # both sets of logits, at least
  assert chunked < 0.1 * whole


SHAPE = dict(
  vocab_size=512, width=128, num_heads=4, num_kv_heads=2, head_dim=32, mlp_width=384,
)  # fmt: skip
ROWS, LENGTH = 8, 64


def gradient(length: int = LENGTH, **settings):
  """The gradient of all log-probs and its arguments' shapes."""
  policy = models.decoder(**{**SHAPE, **settings})
  tokens = jax.ShapeDtypeStruct((ROWS, length), jnp.int32)

  def loss(params, tokens, segments):
    batch = Batch(tokens=tokens, segment_ids=segments, mask=segments > 0)
    return jnp.sum(learner.forward(policy, params, batch).logp)

  return jax.grad(loss), (policy.shapes(), tokens, tokens)


def test_the_gradient_costs_six_flops_a_parameter_and_token():
  fn, shapes = gradient(num_layers=1)
  matrices = sum(p.size for p in jax.tree.leaves(shapes[0]) if p.ndim > 1)
  tokens, heads, head_dim = ROWS * LENGTH, SHAPE['num_heads'], SHAPE['head_dim']
  attention = 12 * heads * head_dim * LENGTH * tokens
  flops = compiled(fn, *shapes).cost_analysis()['flops']
  assert 0.95 < flops / (6 * matrices * tokens + attention) < 1.1


@pytest.mark.parametrize('remat', ['full', 'none'])
def test_a_layer_keeps_its_input_and_its_gradient_alone_if_it_is_recomputed(remat):
  few, many = (temporary(*_flat(gradient(num_layers=n, remat=remat, length=256))) for n in (4, 12))
  stream = ROWS * 256 * SHAPE['width'] * 4
  kept = (many - few) / 8 / stream
  if remat == 'full':
    assert 1 <= kept < 1.1
  else:
    assert kept > 8


def _flat(made):
  fn, shapes = made
  return fn, *shapes


def test_an_update_holds_the_gradient_and_the_inputs_of_the_layers():
  """Within a tenth of them, in a model so deep that one layer and the head are small beside it.

  By SGD: of Adam's moments XLA's CPU backend holds a copy; `benchmarks/tpu.py` counts what TPUs hold.
  """
  layers = 96
  policy = models.decoder(**SHAPE, num_layers=layers, remat='full')
  objective, optimizer = methods.sft().bound()[1], optax.sgd(1e-3)
  shape = lambda *size, dtype=jnp.int32: jax.ShapeDtypeStruct(size, dtype)
  numbers = ('step', 'phase', 'phase_step', 'update', 'cursor', 'skipped')
  state = TrainState(
    **dict.fromkeys(numbers, shape()),
    params=policy.shapes(),
    opt_state=jax.eval_shape(optimizer.init, policy.shapes()),
    anchors={},
    collect_state=(),
    credit_state=(),
    objective_state=jax.eval_shape(objective.init),
  )
  rows = shape(ROWS, LENGTH)
  batch = Batch(tokens=rows, segment_ids=rows, mask=shape(ROWS, LENGTH, dtype=bool))
  update = jax.jit(learner.Learner(policy, objective, optimizer).update, donate_argnums=0)
  held = update.lower(state, batch).compile().memory_analysis().temp_size_in_bytes
  gradient = 4 * sum(p.size for p in jax.tree.leaves(state.params))
  floor = gradient + 4 * layers * ROWS * LENGTH * SHAPE['width']
  assert floor < held < 1.1 * floor


def test_a_decoding_loop_writes_its_cache_in_place():
  policy = models.decoder(**SHAPE, num_layers=3, max_length=1024)
  cache = jax.eval_shape(lambda: policy.init_cache(ROWS, 1024))

  def loop(params, cache, tokens):
    params = policy.unstack(params)

    def step(i, state):
      tokens, cache = state
      at, ones = jnp.full(tokens.shape, i), jnp.ones(tokens.shape, bool)
      hidden, cache = policy.decode(params, tokens, at, ones, cache, i)
      return jnp.argmax(policy.unembed(params, hidden), axis=-1).astype(jnp.int32), cache

    return jax.lax.fori_loop(0, 1024, step, (tokens, cache))

  tokens = jax.ShapeDtypeStruct((ROWS, 1), jnp.int32)
  memory = jax.jit(loop, donate_argnums=1).lower(policy.shapes(), cache, tokens).compile()
  held, weights = memory.memory_analysis().temp_size_in_bytes, jax.tree.leaves(policy.shapes())
  copied = 4 * sum(p.size for p in weights)  # the weights of all layers, cut from their stacks
  assert held - copied < 0.1 * sum(4 * x.size for x in jax.tree.leaves(cache))


def test_bfloat16_parameters_are_never_copied_to_float32():
  fn, shapes = gradient(num_layers=3, dtype='bfloat16', param_dtype='bfloat16')
  text = jax.jit(fn).lower(*shapes).as_text()
  found = re.findall(r'stablehlo.convert .*: \(tensor<(.*)xbf16>\) -> tensor<\1xf32>', text)
  sizes = {'x'.join(map(str, p.shape)) for p in jax.tree.leaves(shapes[0]) if p.ndim > 2}
  sizes |= {'x'.join(map(str, p.shape[1:])) for p in jax.tree.leaves(shapes[0]['layers'])}
  matrices = {s for s in sizes if math.prod(map(int, s.split('x'))) > SHAPE['width']}
  assert found and matrices and not matrices & set(found)
