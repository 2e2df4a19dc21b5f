"""The decoder against its equations in NumPy; what padding, packing and caches may change."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import models
from polgrad.models import attention, rotary, transformer
from polgrad.models.first_layers import first_layers
from polgrad.models.transformer import sampled
from polgrad.registry import bind, part
from polgrad.sharding import AXES, RULES
from tests.models import tiny

FULL = dict(qk_norm='head', attention_bias=True, tie_embeddings=False, value_head=True)
POLICY, PARAMS = tiny.policy(), tiny.params()


def numpy_hidden(params, config, tokens):
  """One unpadded row through the equations, one query head and one position at a time."""
  params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
  half, theta = config.head_dim // 2, config.rope_theta

  def norm(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_eps) * scale

  def rotate(x, position):
    out = np.empty_like(x)
    for i in range(half):
      angle = position * theta ** (-2 * i / config.head_dim)
      c, s = np.cos(angle), np.sin(angle)
      out[i], out[i + half] = x[i] * c - x[i + half] * s, x[i + half] * c + x[i] * s
    return out

  x = params['embedding'][tokens]
  for layer in range(config.num_layers):
    p = {name: w[layer] for name, w in params['layers'].items()}
    y = norm(x, p['attention_norm'])

    def head(name, h, y=y, p=p):
      z = y @ p[name][:, h]
      if config.attention_bias:
        z = z + p[f'{name}_bias'][h]
      if config.qk_norm == 'head' and name != 'value':
        z = norm(z, p[f'{name}_norm'])
      return z if name == 'value' else np.stack([rotate(row, t) for t, row in enumerate(z)])

    for h in range(config.num_heads):
      group = h // (config.num_heads // config.num_kv_heads)
      query, key, value = head('query', h), head('key', group), head('value', group)
      for t in range(len(tokens)):
        scores = key[: t + 1] @ query[t] / np.sqrt(config.head_dim)
        probs = np.exp(scores - scores.max())
        x[t] += (probs / probs.sum()) @ value[: t + 1] @ p['out'][h]
    y = norm(x, p['mlp_norm'])
    gate = y @ p['gate']
    x = x + (gate / (1 + np.exp(-gate)) * (y @ p['up'])) @ p['down']
  return norm(x, params['final_norm'])


@pytest.mark.parametrize('overrides', [{}, FULL], ids=['llama', 'qwen'])
def test_forward_is_the_equations(overrides):
  policy, params = tiny.policy(**overrides), tiny.params(**overrides)
  tokens = tiny.rows(1, 1, 7)
  hidden = policy.hidden(params, tokens, jnp.ones_like(tokens))
  expected = numpy_hidden(params, policy.config, tokens[0])
  np.testing.assert_allclose(hidden[0], expected, atol=2e-5)
  table = params['unembedding' if overrides else 'embedding']
  np.testing.assert_allclose(
    policy.unembed(params, hidden)[0], expected @ np.asarray(table, np.float64).T, atol=1e-4
  )
  if overrides:
    value = expected @ np.asarray(params['value_head'], np.float64)
    np.testing.assert_allclose(policy.value(params, hidden)[0], value, atol=2e-5)


def test_states_of_layers_are_those_of_a_model_that_ends_there():
  """The equations of a model that has only the first layer normalise what it leaves."""
  kinds = dict(num_layers=3, window=3, local_layers=(2,))
  policy, params = tiny.policy(**kinds), tiny.params(**kinds)
  rows = tiny.rows(4, 2, 7), jnp.array([[1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 2, 2, 0]])
  first, last = policy.states(params, *rows, layers=(1, 3))
  np.testing.assert_allclose(last, policy.hidden(params, *rows), atol=1e-5)
  normalised = transformer.rms_norm(first, params['final_norm'], eps=policy.config.norm_eps)
  expected = numpy_hidden(params, tiny.policy(num_layers=1).config, rows[0][0])
  np.testing.assert_allclose(normalised[0], expected, atol=2e-5)
  for wrong in ((), (0,), (4,), (2, 1), (1, 1)):
    with pytest.raises(ValueError, match='expected numbers from 1 to 3'):
      policy.states(params, *rows, layers=wrong)


def test_rotary_scores_depend_on_the_distance_alone():
  random = np.random.default_rng(0)
  query, key = (jnp.asarray(random.normal(size=(1, 1, 1, 6)), jnp.float32) for _ in range(2))

  def score(m, n):
    frequency = rotary.frequencies(6, 100.0)
    turn = lambda x, t: rotary.rotate(x, rotary.turns(jnp.array([[t]]), frequency))
    return float(jnp.sum(turn(query, m) * turn(key, n)))

  assert score(5, 2) == pytest.approx(score(13, 10), abs=1e-5)
  assert score(0, 0) == pytest.approx(float(jnp.sum(query * key)), abs=1e-5)
  assert abs(score(5, 2) - score(5, 3)) > 1e-3


def test_positions_and_mask_belong_to_the_segment():
  segments = jnp.array([[0, 0, 1, 1, 2, 2, 2, 0]])
  np.testing.assert_array_equal(attention.segment_positions(segments), [[0, 1, 0, 1, 0, 1, 2, 0]])
  mask = attention.segment_mask(segments)[0]
  assert mask[3].tolist() == [False, False, True, True, False, False, False, False]
  assert mask[6].tolist() == [False, False, False, False, True, True, True, False]
  assert bool(jnp.all(jnp.diag(mask)))  # every position sees something, so no softmax is empty


def test_a_later_token_changes_nothing_before_it():
  tokens = tiny.rows(2, 1, 8)
  other = tokens.at[0, 5].set((tokens[0, 5] + 1) % tiny.VOCAB)
  a, b = (POLICY.hidden(PARAMS, t, jnp.ones_like(t)) for t in (tokens, other))
  changed = jnp.any(a != b, axis=-1)[0]
  assert changed.tolist() == [False] * 5 + [True] * 3


def test_padding_on_either_side_changes_no_log_prob():
  tokens = tiny.rows(3, 1, 6)
  expected = tiny.logp(POLICY, PARAMS, tokens, jnp.ones_like(tokens))[:, 1:]
  pads = [(0, 4), (1, 3), (4, 0)]
  padded = jnp.concatenate([jnp.pad(tokens, ((0, 0), p), constant_values=7) for p in pads])
  segments = jnp.concatenate([jnp.pad(jnp.ones_like(tokens), ((0, 0), p)) for p in pads])
  logp = tiny.logp(POLICY, PARAMS, padded, segments)
  assert bool(jnp.all(jnp.isfinite(logp)))
  for row, (left, _) in enumerate(pads):
    np.testing.assert_allclose(logp[row : row + 1, left + 1 : left + 6], expected, atol=1e-5)


def test_packed_equals_unpacked_log_probs_and_gradients():
  a, b = tiny.rows(4, 1, 5), tiny.rows(5, 1, 4)
  packed = jnp.concatenate([a, b, jnp.zeros((1, 3), jnp.int32)], axis=1)
  packed_segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 3])
  apart = jnp.concatenate([a, jnp.pad(b, ((0, 0), (1, 0)))])
  apart_segments = jnp.array([[1] * 5, [0] + [1] * 4])

  @jax.jit
  def log_probs_and_gradients(tokens, segments):
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
    real = (segments > 0) & (segments == before)  # all but the first token of a segment

    def loss(params):
      logp = jnp.where(real, tiny.logp(POLICY, params, tokens, segments), 0)
      return jnp.sum(jnp.sin(3 * logp)), logp  # linear in nothing, so errors cannot cancel

    grads, logp = jax.grad(loss, has_aux=True)(PARAMS)
    return logp, real, grads

  logp, real, grads = log_probs_and_gradients(packed, packed_segments)
  expected, expected_real, expected_grads = log_probs_and_gradients(apart, apart_segments)
  assert int(jnp.sum(real)) == 7
  np.testing.assert_allclose(logp[real], expected[expected_real], atol=1e-5)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), grads, expected_grads)


@pytest.mark.parametrize('overrides', [{}, FULL], ids=['llama', 'qwen'])
def test_decoding_with_a_cache_equals_the_whole_forward_pass(overrides):
  policy, params = tiny.policy(**overrides), tiny.params(**overrides)
  decode = jax.jit(policy.decode)
  tokens = tiny.rows(6, 2, 8)
  segments = jnp.array([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
  expected = policy.hidden(params, tokens, segments)
  positions = attention.segment_positions(segments)
  unstacked, cache, found = policy.unstack(params), policy.init_cache(2, 10), []
  for start, stop in ((0, 4), (4, 8)):
    piece = slice(start, stop)
    hidden, cache = decode(
      unstacked, tokens[:, piece], positions[:, piece], segments[:, piece] > 0, cache, start
    )
    found.append(hidden)
  real = np.asarray(segments > 0)
  np.testing.assert_allclose(jnp.concatenate(found, axis=1)[real], expected[real], atol=1e-5)
  np.testing.assert_array_equal(policy.unembed(unstacked, hidden), policy.unembed(params, hidden))


def test_a_loop_over_layers_decodes_as_the_whole_forward_pass():
  settings = dict(num_layers=3, window=3, local_layers=(1,), qk_norm='head')
  policy, params = tiny.policy(**settings), tiny.params(**settings)
  tokens, ones = tiny.rows(6, 2, 7), jnp.ones((2, 7), jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
  one = sampled(policy, looped=True)

  @jax.jit
  def decode(params):
    weights, cache = one.unstack(params), one.init_cache(2, 5)
    read = lambda policy, cut, cache, index: policy.decode(
      weights, tokens[:, cut], positions[:, cut], ones[:, cut] > 0, cache, index
    )
    prompt, cache = read(one, slice(0, 4), cache, 0)
    # A second span, and a column for each row: of the second row in the second span.
    first, cache = read(one, slice(4, 5), one.widen(cache, 4), jnp.array([4, 6]))
    # A part of the layers changes no later one.
    _, part = read(first_layers(one, 2), slice(5, 7), cache, jnp.int32(7))
    last, cache = read(one, slice(5, 7), cache, jnp.int32(7))
    assert len(weights['layers']) == len(cache.spans[1].keys) == 1
    return jnp.concatenate([prompt, first, last], axis=1), part.spans[1].values[0], cache

  found, part, cache = decode(params)
  np.testing.assert_allclose(found, policy.hidden(params, tokens, ones), atol=1e-5)
  whole = np.asarray(cache.spans[1].values[0])  # [B, layers, kv_heads, length, head_dim]
  np.testing.assert_allclose(part[:, :2], whole[:, :2], atol=1e-6)
  assert np.all(whole[:, 2, :, 2:] != 0) and not np.any(part[:, 2, :, 2:])


def test_layers_of_one_kind_are_traced_once_and_calls_outside_of_programs_compile_nothing_anew(
  monkeypatch,
):
  traced, layers = [], transformer._over_layers
  note = lambda layer, local, carry: traced.append(local) or layers(layer, local, carry)
  monkeypatch.setattr(transformer, '_over_layers', note)
  policy = tiny.policy(num_layers=5, window=3, local_layers=(0, 1, 3))
  given = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
  decode = lambda params, cache: policy.decode(params, *given, cache, 0)
  params = jax.eval_shape(policy.unstack, policy.shapes())
  program = jax.make_jaxpr(decode)(params, jax.eval_shape(lambda: policy.init_cache(1, 4)))
  assert traced == [(True,), (False,)]
  assert 'name=through' not in str(program)  # the compiler sees all layers in one program
  compiled = []
  listen = lambda event, seconds, **_: compiled.append(event) if 'backend_compile' in event else 0
  policy, params = tiny.policy(num_layers=1), tiny.params(num_layers=1)
  params, cache = policy.unstack(params), policy.init_cache(1, 4)
  decode(params, cache)
  jax.monitoring.register_event_duration_secs_listener(listen)
  decode(params, cache)
  jax.monitoring.unregister_event_duration_listener(listen)
  assert not compiled


def test_padding_in_the_cache_is_finite():
  hidden, _ = POLICY.decode(
    POLICY.unstack(PARAMS),
    jnp.zeros((1, 2), jnp.int32),
    jnp.zeros((1, 2), jnp.int32),
    jnp.zeros((1, 2), bool),
    POLICY.init_cache(1, 4),
    0,
  )
  assert bool(jnp.all(jnp.isfinite(hidden)))


def test_remat_changes_no_gradient():
  tokens = tiny.rows(7, 2, 5)

  def gradient(remat):
    policy = tiny.policy(remat=remat)
    loss = lambda p: jnp.sum(policy.hidden(p, tokens, jnp.ones_like(tokens))[..., 0] ** 2)
    run = jax.jit(jax.grad(loss))
    # Inputs of layers go to the memory of the host with 'offload' alone. CPUs have no other memory, so
    # what moves is seen here in the traced program only.
    traced = str(run.trace(PARAMS).jaxpr)
    hosted = [shape for shape in re.findall(r':f32<host>\[([\d,]+)\]', traced)]
    assert ('2,5,16' in hosted) == (remat == 'offload') == ('2,2,5,16' in hosted)
    return run(PARAMS)

  expected = gradient('none')
  assert float(jnp.max(jnp.abs(expected['layers']['key']))) > 1e-3
  for remat in ('offload', 'dots'):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient(remat), expected
    )


def test_bfloat16_computes_in_bfloat16_and_scores_in_float32():
  policy = tiny.policy(dtype='bfloat16')
  tokens = tiny.rows(8, 2, 6)
  hidden = policy.hidden(PARAMS, tokens, jnp.ones_like(tokens))
  logits = policy.unembed(PARAMS, hidden)
  exact = POLICY.unembed(PARAMS, POLICY.hidden(PARAMS, tokens, jnp.ones_like(tokens)))
  assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
  held = lambda: jax.eval_shape(lambda: policy.init_cache(1, 3)).spans[0].keys[0].dtype
  tpu = jax.sharding.AbstractDevice('TPU v5', 1, platform='tpu')
  mesh = jax.sharding.AbstractMesh((1,) * len(AXES), AXES, abstract_device=tpu)
  with jax.sharding.use_abstract_mesh(mesh):
    assert held() == jnp.bfloat16
  assert held() == jnp.float32  # on a CPU, which would convert all of a cache to write a column
  np.testing.assert_allclose(logits, exact, atol=0.15 * float(jnp.std(exact)))
  assert float(jnp.max(jnp.abs(logits - logits.astype(jnp.bfloat16)))) > 0  # not rounded


def test_products_of_bfloat16_accumulate_in_float32():
  ones = jnp.ones((1, 512), jnp.bfloat16)
  total = attention.einsum('bd,d->b', ones, jnp.full(512, 1.0078125, jnp.bfloat16))
  assert total.dtype == jnp.float32 and float(total[0]) == 516.0


def test_fresh_parameters_have_plain_shapes_and_named_axes():
  policy = tiny.policy(**FULL)
  params = policy.init(jax.random.key(0))
  axes = policy.axes(params)
  jax.tree.map(lambda p, a: [RULES[name] for name in a[: p.ndim]], params, axes)
  ranks = jax.tree.map(lambda p, a: len(a) == p.ndim, params, axes)
  assert all(jax.tree.leaves(ranks))
  assert params['layers']['query'].shape == (2, 16, 4, 6)
  assert axes['layers']['query'] == ('layers', 'embed', 'heads', 'head_dim')
  assert set(params['layers']) == set(policy.config.layer)
  assert set(params) == {*policy.config.top, 'layers'}
  assert policy.shapes() == jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
  assert float(jnp.std(params['layers']['down'])) == pytest.approx(24**-0.5, rel=0.1)
  np.testing.assert_array_equal(params['value_head'], 0)
  first, second = params['layers']['up']
  assert float(jnp.max(jnp.abs(first - second))) > 0.1  # layers do not start equal


def test_a_token_outside_the_vocabulary_is_nan_not_another_token():
  x = transformer.Decoder(POLICY.config).apply(
    {'params': PARAMS}, jnp.array([[1, tiny.VOCAB]]), method='embed'
  )
  assert jnp.isnan(x).all(axis=-1).tolist() == [[False, True]]


def test_a_model_is_a_part():
  spec = part(models.decoder, **tiny.SHAPE)
  assert bind(spec, models.TABLE).config == POLICY.config


@pytest.mark.parametrize(
  'overrides, message',
  [
    (dict(num_kv_heads=3), '4 heads do not divide over 3'),
    (dict(head_dim=5), 'even head_dim, got 5'),
    (dict(remat='some'), "unknown remat 'some'; valid: .*'dots'"),
    (dict(dtype='float16'), "unknown dtype 'float16'"),
  ],
)
def test_a_shape_that_cannot_be_is_refused(overrides, message):
  with pytest.raises(ValueError, match=message):
    tiny.policy(**overrides)


def test_what_the_model_lacks_is_refused():
  with pytest.raises(ValueError, match='no value head'):
    POLICY.value(PARAMS, jnp.zeros((1, 16)))
  with pytest.raises(ValueError, match='65 tokens are more than max_length 64'):
    POLICY.init_cache(1, 65)
  with pytest.raises(ValueError, match='65 tokens'):
    POLICY.hidden(PARAMS, jnp.zeros((1, 65), jnp.int32), jnp.ones((1, 65), jnp.int32))


def test_a_span_that_is_not_read_changes_no_result():
  random = np.random.default_rng(9)
  normal = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
  query, lengths = normal(3, 2, 4, 8), (7, 5, 6)
  spans = [
    (normal(3, 2, 8, n), normal(3, 2, n, 8), random.random((3, 2, n)) < 0.5) for n in lengths
  ]
  for read in (3, 2, 1):
    masked = [(key, value, mask & (i < read)) for i, (key, value, mask) in enumerate(spans)]
    joined = [jnp.concatenate(x, axis) for x, axis in zip(zip(*masked), (3, 2, 2))]
    stacks = [(key[:, None], value[:, None], mask, 0) for key, value, mask in masked]
    np.testing.assert_allclose(
      attention.attend_to_spans(query, *stacks, several=True, scale=0.5),
      attention.attend(query, joined, scale=0.5),
      atol=1e-5,
    )
