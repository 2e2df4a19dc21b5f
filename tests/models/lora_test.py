"""Adapters: what they compute, what they train, and that PEFT and we read each other's files."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from polgrad import models
from polgrad.models import hf
from polgrad.models.config import ATTENTION, MLP
from polgrad.models.lora import lora, merge, read_adapter, read_settings, save_adapter
from polgrad.models.policy import labelled, overlay
from polgrad.models.transformer import from_config
from polgrad.registry import bind, part
from polgrad.sharding import make_mesh, param_shardings
from tests.models import tiny

torch.set_num_threads(1)
KEY = jax.random.key(0)
SOME = ('query', 'out', 'down')
TOKENS = tiny.rows(1, 2, 7)
SEGMENTS = jnp.ones_like(TOKENS)
FAMILIES = {
  'llama': (transformers.LlamaConfig, {}, {}),
  'qwen3': (
    transformers.Qwen3Config,
    dict(tie_word_embeddings=False),
    dict(qk_norm='head', tie_embeddings=False),
  ),
}


def updated(policy, params):
  return labelled(policy, params, 'train', 'balance')


@functools.cache
def with_adapter(*, rank=4, alpha=8.0, targets=ATTENTION + MLP, **overrides):
  """A tiny model and random parameters for all of it, B included."""
  policy = lora(base=tiny.policy(**overrides), rank=rank, alpha=alpha, targets=targets)
  random = np.random.default_rng(3)
  noise = lambda p: jnp.asarray(0.3 * random.normal(size=p.shape), p.dtype)
  factors = jax.tree.map(noise, updated(policy, policy.shapes()))
  return policy, overlay(tiny.params(**overrides), factors)


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_near(found, expected):
  """Equal to 2e-6 of the largest value."""
  np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * float(np.abs(expected).max()))


def names(tree):
  return sorted(jax.tree_util.keystr(path, simple=True, separator='/')
                for path, _ in jax.tree_util.tree_leaves_with_path(tree))  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def hidden(policy, params):
  return policy.hidden(params, TOKENS, SEGMENTS)


@functools.partial(jax.jit, static_argnums=0)
def logits(policy, params):
  return policy.unembed(params, hidden(policy, params))


@functools.partial(jax.jit, static_argnums=0)
def decoded(policy, params):
  """Hidden states as the sampler makes them: a prefill of most tokens, then one at a time."""
  tokens = TOKENS
  cache = policy.init_cache(*tokens.shape)
  params, outs = policy.unstack(params), []
  for start, stop in [(0, 5), (5, 6), (6, 7)]:
    now = tokens[:, start:stop]
    at = jnp.broadcast_to(jnp.arange(start, stop)[None], now.shape)
    out, cache = policy.decode(params, now, at, jnp.ones_like(now, bool), cache, start)
    outs.append(out)
  return jnp.concatenate(outs, axis=1)


def torch_model(family, policy, params):
  """The model of transformers with our base parameters, named and laid out by hand."""
  make, theirs, _ = FAMILIES[family]
  c = policy.config
  config = make(
    vocab_size=c.vocab_size, hidden_size=c.width, intermediate_size=c.mlp_width,
    num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, head_dim=c.head_dim,
    num_key_value_heads=c.num_kv_heads, max_position_embeddings=c.max_length, rms_norm_eps=c.norm_eps,
    attn_implementation='eager', **{'tie_word_embeddings': True, **theirs},
  )  # fmt: skip
  weights = {
    'model.embed_tokens.weight': params['embedding'],
    'model.norm.weight': params['final_norm'],
    'lm_head.weight': params.get('unembedding', params['embedding']),
  }
  layers, width = params['layers'], c.width
  norms = dict(attention_norm='input_layernorm', mlp_norm='post_attention_layernorm')
  norms |= dict(query_norm='self_attn.q_norm', key_norm='self_attn.k_norm')
  for i in range(c.num_layers):
    at = f'model.layers.{i}.'
    for ours, stored in norms.items():
      if ours in layers:
        weights[f'{at}{stored}.weight'] = layers[ours][i]
    for letter, ours in zip('qkv', ('query', 'key', 'value')):
      weights[f'{at}self_attn.{letter}_proj.weight'] = layers[ours][i].reshape(width, -1).T
    weights[f'{at}self_attn.o_proj.weight'] = layers['out'][i].reshape(-1, width).T
    for ours in MLP:
      weights[f'{at}mlp.{ours}_proj.weight'] = layers[ours][i].T
  model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation='eager')
  model.load_state_dict({n: torch.tensor(np.array(x)) for n, x in weights.items()})
  return model.eval()


def torch_logits(model):
  with torch.no_grad():
    return model(torch.tensor(np.asarray(TOKENS)).long()).logits.numpy()


def peft_adapter(folder, family, policy, params, **settings):
  """A random adapter by PEFT, saved; returns the adapted model."""
  config = peft.LoraConfig(
    r=4, lora_alpha=8, init_lora_weights=False, task_type='CAUSAL_LM', **settings
  )
  torch.manual_seed(0)
  model = peft.get_peft_model(torch_model(family, policy, params), config)
  model.save_pretrained(folder)
  return model.eval()


def test_a_new_adapter_computes_the_base_exactly():
  base = tiny.policy()
  policy = lora(base=base)
  params = policy.init(KEY)
  frozen = base.init(KEY)
  assert_same({**params, 'layers': {n: params['layers'][n] for n in frozen['layers']}}, frozen)
  np.testing.assert_array_equal(logits(policy, params), logits(base, frozen))
  shapes = jax.tree.map(lambda p: (p.shape, p.dtype), policy.shapes())
  assert shapes == jax.tree.map(lambda p: (p.shape, p.dtype), params)


def test_factors_begin_random_and_zero():
  policy = lora(base=tiny.policy(width=64, num_heads=16), rank=16, targets=('query', 'out'))
  layers, other = (policy.init(jax.random.key(i))['layers'] for i in range(2))
  for name, inputs in (('query', 64), ('out', 16 * 6)):
    a = layers[f'{name}_lora_a']
    # Uniform within +-1 / sqrt(inputs), whose variance is a third of the squared bound, as in PEFT.
    assert a.shape[-1] == 16 and np.std(a) == pytest.approx((3 * inputs) ** -0.5, rel=0.05)
    assert 0.98 * inputs**-0.5 < np.abs(a).max() <= inputs**-0.5
    assert not np.any(layers[f'{name}_lora_b'])
    assert np.all(a[0] != a[1]) and np.all(a != other[f'{name}_lora_a'])


@pytest.mark.parametrize('stabilized, scale', [(False, 16 / 4), (True, 16 / 2)])
def test_the_adapter_counts_once(stabilized, scale):
  targets = ('query', 'out', 'gate')
  policy = lora(base=tiny.policy(), rank=4, alpha=16.0, targets=targets, rank_stabilized=stabilized)
  params = with_adapter(targets=targets)[1]
  layers = dict(params['layers'])
  spec = dict(query='lir,lrnh->linh', out='lnhr,lro->lnho', gate='lir,lro->lio')
  for name in targets:
    a, b = (layers.pop(f'{name}_lora_{half}') for half in 'ab')
    layers[name] = layers[name] + scale * np.einsum(spec[name], a, b)
  added = {**params, 'layers': layers}
  expected = hidden(tiny.policy(), added)
  for found in (
    hidden(policy, params),
    decoded(policy, params),
    hidden(tiny.policy(), merge(policy.config, params)[1]),
  ):
    assert_near(found, expected)
  assert np.abs(expected - hidden(tiny.policy(), params)).max() > 0.1


@pytest.mark.parametrize(
  'overrides', [{}, dict(num_experts=4, value_head=True)], ids=['dense', 'moe']
)
def test_merged_equals_adapter_beside_base(overrides):
  targets = ATTENTION if overrides else ATTENTION + MLP
  policy, params = with_adapter(targets=targets, **overrides)
  config, merged = merge(policy.config, params)
  assert config == tiny.policy(**overrides).config
  assert names(merged) == names(tiny.params(**overrides))
  plain = from_config(config)
  expected = hidden(policy, params)
  assert_near(hidden(plain, merged), expected)
  assert_near(decoded(policy, params), expected)
  assert_near(decoded(plain, merged), expected)


def test_merging_keeps_the_type_of_the_matrices():
  policy, params = with_adapter(param_dtype='bfloat16')
  params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
  _, merged = merge(policy.config, params)
  assert {p.dtype for p in jax.tree.leaves(merged)} == {jnp.dtype('bfloat16')}
  a, b, w = (np.float32(params['layers'][n]) for n in ('gate_lora_a', 'gate_lora_b', 'gate'))
  expected = jnp.asarray(w + 2.0 * a @ b, jnp.bfloat16)
  np.testing.assert_array_equal(merged['layers']['gate'], expected)


@pytest.mark.parametrize('value_head', [False, True])
def test_only_the_adapter_and_a_value_head_are_updated(value_head):
  policy, params = with_adapter(targets=SOME, value_head=value_head)
  part_of = updated(policy, params)
  factors = [f'layers/{n}_lora_{half}' for n in SOME for half in 'ab']
  assert names(part_of) == sorted(factors + ['value_head'] * value_head)

  def loss(part_of):
    now = overlay(params, part_of)
    last = hidden(policy, now)
    values = policy.value(now, last) if value_head else 0.0
    return jnp.mean(policy.unembed(now, last) ** 2) + jnp.mean((values - 1.0) ** 2)

  slope = jax.jit(jax.value_and_grad(loss))
  before, gradient = slope(part_of)
  assert all(np.any(g) for g in jax.tree.leaves(gradient))
  moved = jax.tree.map(lambda p, g: p - 0.1 * g, part_of, gradient)
  after = overlay(params, moved)
  assert names(after) == names(params) and slope(moved)[0] < before
  assert_same(updated(policy, after), moved)
  assert_same(merge(policy.config, overlay(after, part_of)), merge(policy.config, params))


@pytest.mark.parametrize('family', FAMILIES)
def test_peft_reads_what_we_write(family, tmp_path):
  policy, params = with_adapter(**FAMILIES[family][2])
  save_adapter(tmp_path / 'adapter', policy.config, params, base_model='some/base')
  said = peft.LoraConfig.from_pretrained(tmp_path / 'adapter')
  assert (said.r, said.lora_alpha, said.base_model_name_or_path) == (4, 8.0, 'some/base')
  model = peft.PeftModel.from_pretrained(torch_model(family, policy, params), tmp_path / 'adapter')
  expected = torch_logits(model)
  np.testing.assert_allclose(logits(policy, params), expected, atol=1e-5, rtol=1e-5)
  with model.disable_adapter():
    assert np.abs(torch_logits(model) - expected).max() > 0.1


@pytest.mark.parametrize('settings', [
  dict(target_modules=['q_proj', 'v_proj', 'down_proj']),
  dict(target_modules=['self_attn.o_proj', 'k_proj'], use_rslora=True),
  dict(target_modules='all-linear', lora_dropout=0.3),
], ids=['some', 'rslora', 'all-linear'])  # fmt: skip
@pytest.mark.parametrize('family', FAMILIES)
def test_we_read_what_peft_writes(family, settings, tmp_path):
  overrides = FAMILIES[family][2]
  base, frozen = tiny.policy(**overrides), tiny.params(**overrides)
  model = peft_adapter(tmp_path, family, base, frozen, **settings)
  base = base._replace(init=lambda key, shardings=None: frozen)
  policy = lora(base=base, adapter=str(tmp_path), rank=99)  # the folder says the rank
  assert policy.config.lora_rank == 4
  assert policy.config.lora_scale == (4.0 if settings.get('use_rslora') else 2.0)
  params = policy.init(KEY)
  np.testing.assert_allclose(logits(policy, params), torch_logits(model), atol=1e-5, rtol=1e-5)
  assert np.abs(logits(policy, params) - logits(base, frozen)).max() > 0.1


@pytest.mark.parametrize('param_dtype', ['float32', 'bfloat16'])
def test_an_adapter_comes_back_bit_for_bit(param_dtype, tmp_path):
  policy, params = with_adapter(targets=SOME, param_dtype=param_dtype)
  params = jax.tree.map(lambda p: p.astype(param_dtype), params)
  save_adapter(tmp_path / 'a', policy.config, params)
  again = lora(base=tiny.policy(param_dtype=param_dtype), adapter=str(tmp_path / 'a'))
  assert again.config == policy.config
  assert_same(updated(again, again.init(KEY)), updated(policy, params))
  with pytest.raises(FileExistsError, match='is not empty'):
    save_adapter(tmp_path / 'a', policy.config, params)
  assert [p.name for p in tmp_path.iterdir()] == ['a']


def test_a_save_that_fails_leaves_nothing(tmp_path):
  policy, params = with_adapter(targets=SOME)
  broken = {
    'layers': {**params['layers'], 'down_lora_b': params['layers']['down_lora_b'].astype(complex)}
  }
  with pytest.raises(Exception, match='complex64'):
    save_adapter(tmp_path / 'a', policy.config, broken)
  assert list(tmp_path.iterdir()) == []


def test_a_mesh_changes_nothing(tmp_path):
  base = tiny.policy()
  fresh, trained = lora(base=base), with_adapter()[1]
  save_adapter(tmp_path / 'a', with_adapter()[0].config, trained)
  read = lora(base=base, adapter=str(tmp_path / 'a'))
  mesh = make_mesh(fsdp=2, tensor=2)
  for policy in (fresh, read):
    shardings = param_shardings(mesh, policy.axes(policy.shapes()), policy.shapes())
    params, placed = policy.init(KEY), policy.init(KEY, shardings)
    assert jax.tree.map(lambda p: p.sharding, placed) == shardings
    assert len(placed['layers']['query_lora_b'].sharding.device_set) == 4
    assert_same(placed, params)
  with jax.set_mesh(mesh):
    found = jax.jit(read.hidden)(placed, TOKENS, SEGMENTS)
    merged = merge(read.config, placed)
  assert_near(found, hidden(read, params))
  for a, b in zip(jax.tree.leaves(merged[1]), jax.tree.leaves(merge(read.config, params)[1])):
    np.testing.assert_allclose(a, b, atol=1e-6)
  save_adapter(tmp_path / 'b', read.config, placed)
  one, two = (load_file(tmp_path / n / 'adapter_model.safetensors') for n in 'ab')
  assert_same(one, two)


def test_a_folder_of_the_merged_model_has_the_adapter_once(tmp_path):
  policy, params = with_adapter()
  save_adapter(tmp_path / 'adapter', policy.config, params)
  hf.save(tmp_path / 'base', tiny.policy().config, tiny.params())
  base = hf.pretrained(path=str(tmp_path / 'base'), max_length=64)
  policy = lora(base=base, adapter=str(tmp_path / 'adapter'))
  shapes, mesh = policy.shapes(), make_mesh(fsdp=2, tensor=2)
  read = policy.init(KEY, param_shardings(mesh, policy.axes(shapes), shapes))
  assert_same(read, params)
  hf.save(tmp_path / 'merged', *merge(policy.config, read))
  plain = hf.pretrained(path=str(tmp_path / 'merged'))
  expected = hidden(policy, params)
  assert_near(hidden(plain, plain.init(KEY)), expected)
  assert np.abs(hidden(base, base.init(KEY)) - expected).max() > 0.1


def test_a_configuration_names_the_base():
  spec = part(lora, base=part(models.decoder, **tiny.SHAPE), rank=2, targets=('key',))
  policy = bind(json.loads(spec.to_json()), models.TABLE)
  assert policy.config == lora(base=tiny.policy(), rank=2, targets=('key',)).config
  with pytest.raises(
    ValueError, match=r"unknown 'models\.lora'.*'models\.decoder', 'models\.pretrained'"
  ):
    bind(part(lora, base=part(lora, base=part(models.decoder, **tiny.SHAPE))), models.TABLE)


@pytest.mark.parametrize('knobs, message', [
  (dict(rank=0), 'rank 0'),
  (dict(targets=()), r'on \(\)'),
  (dict(targets=('key', 'key')), "'key', 'key'"),
  (dict(targets=('key', 'embedding')), r"'embedding'\); valid: \('query', 'key', .*'down'\)"),
  (dict(base=tiny.policy(num_experts=4)), r"valid: \('query', 'key', 'value', 'out'\)"),
  (dict(base=with_adapter()[0]), 'base has an adapter already; merge it first'),
])  # fmt: skip
def test_adapters_that_cannot_be_are_refused(knobs, message):
  with pytest.raises(ValueError, match=message):
    lora(**{'base': tiny.policy(), **knobs})


@pytest.mark.parametrize('changes, message', [
  (dict(peft_type='LOHA'), r"peft_type 'LOHA' is not supported; supported: \('LORA',\)"),
  (dict(bias='all'), "bias 'all'"),
  (dict(init_lora_weights='pissa'), "init_lora_weights 'pissa'"),
  (dict(use_dora=True), 'use_dora True is not supported; it must not be set'),
  (dict(modules_to_save=['lm_head']), r"modules_to_save \['lm_head'\]"),
  (dict(rank_pattern={'q_proj': 2}), 'rank_pattern'),
  (dict(layers_to_transform=[0]), r'layers_to_transform \[0\]'),
  (dict(target_modules='.*_proj'), r"target_modules '\.\*_proj' is not supported, only a list"),
  (dict(target_modules=['q_proj', 'embed_tokens']), r"\['embed_tokens'\] .* valid: \['down_proj'"),
  (dict(target_modules=[]), r'on \(\)'),
])  # fmt: skip
def test_what_an_adapter_file_asks_beyond_factors_is_refused(changes, message, tmp_path):
  peft.LoraConfig(r=4, target_modules=['q_proj']).save_pretrained(tmp_path)
  path = tmp_path / 'adapter_config.json'
  assert read_settings(tmp_path)['lora_targets'] == ('query',)
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
  with pytest.raises(ValueError, match=message) as error:
    lora(base=tiny.policy(), adapter=str(tmp_path))
  assert str(path) in str(error.value) or not changes['target_modules']


def test_missing_misshapen_and_unknown_factors_are_named(tmp_path):
  policy, params = with_adapter(targets=SOME)
  save_adapter(tmp_path / 'a', policy.config, params)
  path = tmp_path / 'a/adapter_model.safetensors'
  tensors = load_file(path)
  at = 'base_model.model.model.layers.'
  del tensors[f'{at}1.mlp.down_proj.lora_B.weight']
  tensors[f'{at}0.self_attn.q_proj.lora_A.weight'] = np.zeros((4, 15), np.float32)
  tensors[f'{at}2.self_attn.q_proj.lora_A.weight'] = np.zeros((4, 16), np.float32)
  save_file(tensors, path)
  with pytest.raises(ValueError) as error:
    read_adapter(tmp_path / 'a', policy.config)
  for problem in (
    f'{at}1.mlp.down_proj.lora_B.weight is missing',
    f'{at}0.self_attn.q_proj.lora_A.weight has shape (4, 15) instead of (4, 16)',
    f'{at}2.self_attn.q_proj.lora_A.weight is unknown',
  ):
    assert problem in str(error.value)
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(ValueError, match=r'adapter_model.safetensors has \d+ bytes instead of'):
    read_adapter(tmp_path / 'a', policy.config)


def test_a_missing_folder_and_a_model_without_adapter_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'adapter_config\.json'):
    lora(base=tiny.policy(), adapter=str(tmp_path))
  with pytest.raises(ValueError, match='no adapter'):
    save_adapter(tmp_path / 'a', tiny.policy().config, tiny.params())


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(r='8'), "r must be a whole number, got '8'"),
    (dict(r=0), 'an adapter of rank 0'),
    (dict(lora_alpha=[8]), r'lora_alpha must be a number, got \[8\]'),
    (dict(use_rslora='yes'), "use_rslora must be true or false, got 'yes'"),
    (dict(target_modules=[1]), r'target_modules \[1\] is not supported'),
    (dict(target_modules=[]), 'an adapter of rank 8'),
  ],
)
def test_a_malformed_adapter_is_refused_with_file_and_key(changes, message, tmp_path):
  settings = {'peft_type': 'LORA', 'target_modules': ['q_proj'], **changes}
  (tmp_path / 'adapter_config.json').write_text(json.dumps(settings))
  with pytest.raises(ValueError, match=rf'adapter_config\.json: .*{message}'):
    read_settings(tmp_path)
