"""Hugging Face folders: what is read is what was written, and everything else is refused."""

import dataclasses
import functools
import itertools
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from polgrad.models import families, hf
from polgrad.sharding import make_mesh, param_shardings
from tests.models import tiny

CONFIG = dict(
  model_type='llama', vocab_size=tiny.VOCAB, hidden_size=16, intermediate_size=24,
  num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=6, hidden_act='silu',
  max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=10000.0, rope_scaling=None,
  tie_word_embeddings=True,
)  # fmt: skip
FAMILIES = {
  'llama': ({}, {}),
  'qwen2': (dict(model_type='qwen2'), dict(attention_bias=True)),
  'qwen3': (
    dict(model_type='qwen3', tie_word_embeddings=False),
    dict(qk_norm='head', tie_embeddings=False),
  ),
}
GEMMA = dict(
  norm_offset=1.0, post_norm=True, activation='gelu', embedding_scale=4.0, window=5, local_layers=(0,),
)  # fmt: skip


@functools.cache
def weights(**overrides):
  """Random parameters on the host."""
  random = np.random.default_rng(0)
  draw = lambda p: random.normal(size=p.shape).astype(p.dtype)
  return jax.tree.map(draw, tiny.policy(**overrides).shapes())


def stored(params):
  """Our parameters under the names and in the layout of Hugging Face, written out by hand."""
  out = {
    'model.embed_tokens.weight': params['embedding'],
    'model.norm.weight': params['final_norm'],
  }
  if 'unembedding' in params:
    out['lm_head.weight'] = params['unembedding']
  layers = params['layers']
  for i in range(2):
    at = f'model.layers.{i}.'
    out[at + 'input_layernorm.weight'] = layers['attention_norm'][i]
    out[at + 'post_attention_layernorm.weight'] = layers['mlp_norm'][i]
    for ours, theirs in (('query', 'q'), ('key', 'k'), ('value', 'v')):
      matrix = layers[ours][i]  # [width, heads, head_dim]
      out[at + f'self_attn.{theirs}_proj.weight'] = matrix.reshape(16, -1).T
      if f'{ours}_bias' in layers:
        out[at + f'self_attn.{theirs}_proj.bias'] = layers[f'{ours}_bias'][i].reshape(-1)
      if f'{ours}_norm' in layers:
        out[at + f'self_attn.{theirs}_norm.weight'] = layers[f'{ours}_norm'][i]
    out[at + 'self_attn.o_proj.weight'] = layers['out'][i].reshape(24, 16).T
    for name in ('gate', 'up', 'down'):
      out[at + f'mlp.{name}_proj.weight'] = layers[name][i].T
  return {name: np.ascontiguousarray(x) for name, x in out.items()}


def write(folder, tensors, **changes):
  (folder / 'config.json').write_text(json.dumps({**CONFIG, **changes}))
  save_file(tensors, folder / 'model.safetensors')
  return str(folder)


def host(params):
  return jax.tree.map(np.asarray, params)


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('family', FAMILIES)
def test_a_folder_gives_back_configuration_and_parameters(family, tmp_path):
  changes, overrides = FAMILIES[family]
  params = weights(**overrides)
  policy = hf.pretrained(path=write(tmp_path, stored(params), **changes))
  assert policy.config == tiny.policy(**overrides).config
  assert_same(policy.init(jax.random.key(0)), params)


def test_bfloat16_files_are_read_and_a_value_head_is_added(tmp_path):
  params = weights()
  low = {name: x.astype(ml_dtypes.bfloat16) for name, x in stored(params).items()}
  policy = hf.pretrained(path=write(tmp_path, low), value_head=True, max_length=9)
  assert policy.config.max_length == 9
  found = policy.init(jax.random.key(0))
  np.testing.assert_array_equal(found.pop('value_head'), np.zeros(16))
  rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), params)
  assert_same(found, rounded)


def test_the_score_of_a_reward_model_is_the_value_head(tmp_path):
  score = np.arange(16, dtype=np.float32)
  tensors = stored(weights()) | {'score.weight': score[None]}
  kind = dict(architectures=['LlamaForSequenceClassification'], tie_word_embeddings=False)
  policy = hf.pretrained(path=write(tmp_path, tensors, **kind), value_head=True)
  params = policy.init(jax.random.key(0))
  np.testing.assert_array_equal(params['value_head'], score)
  assert 'unembedding' not in params
  write(tmp_path, tensors | {'score.weight': np.ones((2, 16), np.float32)}, **kind)
  with pytest.raises(ValueError, match=r'score.weight has shape \(2, 16\) instead of \(1, 16\)'):
    policy.init(jax.random.key(0))
  with pytest.raises(ValueError, match='reward model; it needs value_head=True'):
    hf.pretrained(path=str(tmp_path))


def test_missing_misshapen_and_unknown_tensors_are_named(tmp_path):
  tensors = stored(weights())
  del tensors['model.layers.1.mlp.up_proj.weight']
  tensors['model.norm.weight'] = np.ones(15, np.float32)
  tensors['model.layers.0.self_attn.q_proj.bias'] = np.ones(24, np.float32)
  policy = hf.pretrained(path=write(tmp_path, tensors))
  with pytest.raises(ValueError) as error:
    policy.init(jax.random.key(0))
  for problem in (
    'model.layers.1.mlp.up_proj.weight is missing',
    'model.norm.weight has shape (15,) instead of (16,)',
    'model.layers.0.self_attn.q_proj.bias is unknown',
  ):
    assert problem in str(error.value)


def test_copies_that_tied_or_old_files_carry_are_ignored(tmp_path):
  params = weights()
  tensors = stored(params)
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'].copy()
  tensors['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.ones(3, np.float32)
  policy = hf.pretrained(path=write(tmp_path, tensors))
  assert_same(policy.init(jax.random.key(0)), params)


@pytest.mark.parametrize(
  'changes, message',
  [
    (
      dict(model_type='gpt2'),
      r"'gpt2' is not supported; supported: \['gemma2', 'gemma3_text', 'll",
    ),
    (dict(model_type='gemma3', vision_config={}), "'gemma3' is a model of images too"),
    (
      dict(rope_scaling=dict(rope_type='yarn', factor=8.0)),
      "rope type 'yarn' is not supported, only",
    ),
    (dict(rope_scaling=dict(rope_type='llama3', factor=8.0)), r"lack \['high_freq_factor', 'low_"),
    (
      dict(rope_parameters=dict(rope_theta=1e4, partial_rotary_factor=0.5)),
      'partial_rotary_factor 0',
    ),
    (
      dict(hidden_act='gelu'),
      "hidden_act 'gelu' is not supported, only 'silu' or 'gelu_pytorch_tan",
    ),
    (dict(attention_bias=True), 'attention_bias True is not supported, only False'),
    (dict(mlp_bias=True), 'mlp_bias True'),
    (dict(quantization_config=dict(bits=4)), 'quantization_config'),
    (
      dict(model_type='gemma2', use_bidirectional_attention=True),
      'use_bidirectional_attention True',
    ),
    (dict(model_type='qwen3_moe', mlp_only_layers=[0]), r'mlp_only_layers \[0\]'),
    (dict(model_type='qwen3_moe', decoder_sparse_step=2), 'decoder_sparse_step 2'),
    (
      dict(model_type='mixtral'),
      r"config.json lacks \['num_experts_per_tok', 'num_local_experts'\]",
    ),
    (dict(hidden_size=None), r"config.json lacks \['hidden_size'\]"),
    (
      dict(model_type='mistral', rope_scaling=dict(type='linear', factor=2.0)),
      'rope factor with a sliding window 2.0',
    ),
    (
      dict(model_type='gemma2', layer_types=['full_attention', 'chunked_attention']),
      "layer_types .*'chunked_attention'.* is not supported, only one of",
    ),
  ],
)
def test_what_the_decoder_cannot_compute_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    families.read_settings({**CONFIG, **changes})


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(hidden_size=10**12), r'hidden_size: expected a number at least 1 and at most 1e\+07'),
    (
      dict(num_hidden_layers=10**12),
      'num_hidden_layers: expected a number at least 1 and at most 10000',
    ),
    (dict(vocab_size=10**400), 'vocab_size: expected a number'),
    (dict(vocab_size=10**7, hidden_size=10**7), 'make 1.0e.14 parameters, at most'),
    (dict(num_attention_heads=0), 'num_attention_heads: expected a number at least 1'),
    (dict(hidden_size=-16), 'hidden_size: expected a number at least 1'),
    (dict(hidden_size='16'), "hidden_size must be a whole number, got '16'"),
    (dict(hidden_size=True), 'hidden_size must be a whole number, got True'),
    (dict(rope_theta=float('nan')), 'rope_theta must be a number, got nan'),
    (dict(rope_scaling=[]), r'rope_scaling must be an object, got \[\]'),
    (dict(rope_scaling=dict(rope_type='linear', factor='2')), "factor must be a number, got '2'"),
    (dict(rope_scaling=dict(rope_type='linear', factor=0)), 'factor: expected a number above 0'),
    (dict(architectures=3), 'architectures must be a list of texts, got 3'),
    (dict(model_type=['llama']), r"model_type must be text, got \['llama'\]"),
    (
      dict(model_type='gemma3_text', sliding_window=4, sliding_window_pattern=0),
      'sliding_window_pattern: expected a number at least 1, got 0',
    ),
  ],
)
def test_absurd_values_are_refused_with_file_and_key_before_anything_is_made(
  changes, message, tmp_path
):
  (tmp_path / 'config.json').write_text(json.dumps({**CONFIG, **changes}))
  with pytest.raises(ValueError, match=message) as error:
    hf.pretrained(path=str(tmp_path))
  assert str(error.value).startswith(f'{tmp_path}')
  assert len(str(error.value)) < 1000


@pytest.mark.parametrize('text', ['', '{', '[]', '\x00', '[' * 50_000, '1' * 5000])
def test_a_malformed_config_is_refused(text, tmp_path):
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(ValueError, match=r'config\.json'):
    hf.pretrained(path=str(tmp_path))


def test_newer_files_keep_theta_with_the_rotary_parameters():
  old = {k: v for k, v in CONFIG.items() if k not in ('rope_theta', 'rope_scaling')}
  new = {**old, 'rope_parameters': dict(rope_type='default', rope_theta=5e5)}
  assert families.read_settings(new)['rope_theta'] == 5e5


@pytest.mark.parametrize(
  'changes, window, local',
  [
    (dict(), 0, ()),
    (dict(sliding_window=5), 0, ()),  # Llama has no windows, whatever its file says
    (dict(model_type='mistral'), 4096, (0, 1, 2, 3)),
    (dict(model_type='mistral', sliding_window=None), 0, ()),
    (dict(model_type='qwen2', sliding_window=5, max_window_layers=2), 0, ()),
    (
      dict(model_type='qwen2', sliding_window=5, max_window_layers=3, use_sliding_window=True),
      5,
      (3,),
    ),
    (dict(model_type='gemma2', sliding_window=5), 5, (0, 2)),
    (dict(model_type='gemma3_text', sliding_window=5, sliding_window_pattern=3), 5, (0, 1, 3)),
    (
      dict(
        model_type='gemma3_text',
        sliding_window=5,
        layer_types=['full_attention', 'sliding_attention'] * 2,
      ),
      5,
      (1, 3),
    ),
  ],
)
def test_files_say_in_their_own_way_which_layers_are_local(changes, window, local):
  gemma = dict(hidden_activation='gelu_pytorch_tanh')
  found = families.read_settings({**CONFIG, **gemma, 'num_hidden_layers': 4, **changes})
  assert (found['window'], found['local_layers']) == (window, local)


VARIANTS = {
  'llama': {},
  'llama, linear': dict(rope_factor=4.0),
  'llama, llama3': dict(rope_factor=8.0, rope_low=2.0, rope_original_length=32, rope_theta=5e5),
  'mistral': dict(window=5, local_layers=(0, 1)),
  'qwen2': dict(attention_bias=True, window=5, local_layers=(1,)),
  'qwen3': dict(qk_norm='head', tie_embeddings=False),
  'gemma2': GEMMA | dict(attention_softcap=50.0, logit_softcap=30.0, query_scale=24**-0.5),
  'gemma3_text': GEMMA | dict(qk_norm='head', local_rope_theta=123.0, rope_factor=8.0, window=0,
                              local_layers=()),
  'gemma3_text, windows': GEMMA | dict(qk_norm='head', local_rope_theta=123.0, rope_factor=8.0),
  'olmo2': dict(pre_norm=False, post_norm=True, qk_norm='all'),
  'qwen3_moe': dict(qk_norm='head', num_experts=4, normalize_experts=False),
  'mixtral': dict(num_experts=4, experts_per_token=3, window=5, local_layers=(0, 1)),
}  # fmt: skip


@pytest.mark.parametrize('variant', VARIANTS)
def test_a_saved_model_comes_back_with_its_family(variant, tmp_path):
  overrides = {'tie_embeddings': False, **VARIANTS[variant]}
  config, params = tiny.policy(**overrides).config, weights(**overrides)
  hf.save(tmp_path / 'out', config, params)
  stated = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert stated['model_type'] == variant.split(',')[0]
  policy = hf.pretrained(path=str(tmp_path / 'out'))
  explicit = lambda c: dataclasses.replace(c, query_scale=c.query_scale or c.head_dim**-0.5)
  assert explicit(policy.config) == explicit(config)
  assert_same(policy.init(jax.random.key(0)), params)


@pytest.mark.parametrize(
  'overrides, message',
  [
    (dict(norm_offset=0.5), "nearest is '.*norm_offset 0.5 instead of 0.0"),
    (dict(logit_softcap=3.0), 'logit_softcap 3.0 instead of 0.0'),
    (dict(num_experts=4, post_norm=True), 'post_norm True instead of False'),
    (
      dict(window=5, local_layers=(1,)),
      r"nearest is 'mistral', but for local_layers \(1,\) instead of \(0, 1\)",
    ),
  ],
)
def test_a_model_of_no_family_is_not_saved(overrides, message, tmp_path):
  policy = tiny.policy(**overrides)
  with pytest.raises(ValueError, match=message):
    hf.save(tmp_path / 'out', policy.config, weights(**overrides))
  assert not list(tmp_path.iterdir())


def test_what_a_folder_has_no_place_for_is_not_saved(tmp_path):
  save = functools.partial(hf.save, tmp_path / 'out')
  mixture = dict(num_experts=4, balance_rate=0.1)
  config, params = tiny.policy(**mixture).config, weights(**mixture)
  with pytest.raises(ValueError, match='router_bias is not zero'):
    save(config, params)
  with pytest.raises(ValueError, match='adapter of rank 2 must be merged'):
    save(dataclasses.replace(config, lora_rank=2), params)
  with pytest.raises(ValueError, match='needs value_head=True'):
    save(config, params, reward_model=True)
  plain = tiny.policy().config
  with pytest.raises(ValueError, match=r"params have \[\('value_head',\)\] too many"):
    save(plain, weights(value_head=True))
  assert not list(tmp_path.iterdir())
  params = {**params, 'layers': {**params['layers'], 'router_bias': np.zeros((2, 4), np.float32)}}
  save(config, params)
  again = hf.pretrained(path=str(tmp_path / 'out'), balance_rate=0.1)
  assert_same(again.init(jax.random.key(0)), params)
  with pytest.raises(FileExistsError, match='not empty'):
    save(config, params)


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
  fetched = []

  def fetch(x):
    fetched.append(x)
    if len(fetched) > 3:
      raise RuntimeError('lost')
    return np.asarray(x)

  monkeypatch.setattr(hf, 'to_host', fetch)
  with pytest.raises(RuntimeError, match='lost'):
    hf.save(tmp_path / 'out', tiny.policy().config, weights())
  assert not list(tmp_path.iterdir())


def test_the_source_lends_its_settings_and_tokenizer(tmp_path):
  (tmp_path / 'source').mkdir()
  source = write(tmp_path / 'source', stored(weights()), eos_token_id=7, dtype='float16')
  (tmp_path / 'source' / 'tokenizer.json').write_text('{}')
  policy = hf.pretrained(path=source, max_length=9, value_head=True, param_dtype='bfloat16')
  params = policy.init(jax.random.key(0))
  hf.save(tmp_path / 'out', policy.config, params, source=source)
  names = {path.name for path in (tmp_path / 'out').iterdir()}
  assert names == {'config.json', 'model.safetensors', 'tokenizer.json'}
  assert json.loads((tmp_path / 'out' / 'config.json').read_text()) == CONFIG | dict(
    eos_token_id=7, architectures=['LlamaForCausalLM'], torch_dtype='bfloat16'
  )
  other = tiny.policy(attention_bias=True)
  with pytest.raises(ValueError, match='another model: attention_bias True instead of False'):
    hf.save(tmp_path / 'more', other.config, weights(attention_bias=True), source=source)


@pytest.mark.parametrize(
  'overrides',
  [
    dict(qk_norm='head', tie_embeddings=False),
    dict(num_experts=4, tie_embeddings=False),
    dict(pre_norm=False, post_norm=True, qk_norm='all', num_kv_heads=4),
    dict(attention_bias=True, value_head=True, vocab_size=24),
  ],
)
def test_parts_on_a_mesh_are_those_of_the_whole(overrides, tmp_path):
  params = weights(**overrides)
  config = tiny.policy(**overrides).config
  hf.save(tmp_path / 'out', config, params, reward_model=config.value_head)
  policy = hf.pretrained(path=str(tmp_path / 'out'), value_head=config.value_head)
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  shapes = policy.shapes()
  shardings = param_shardings(mesh, policy.axes(shapes), shapes)
  placed = policy.init(jax.random.key(0), shardings)
  assert jax.tree.map(lambda x: x.sharding, placed) == shardings
  cut = placed['layers']['query'].addressable_shards[0].data
  assert cut.shape == (2, 8, 2, 6)  # a half of the width and of the heads
  assert_same(host(placed), params)
  hf.save(tmp_path / 'again', config, placed, reward_model=config.value_head)
  for name in ('model.safetensors', 'config.json'):
    assert (tmp_path / 'again' / name).read_bytes() == (tmp_path / 'out' / name).read_bytes()


def test_a_mesh_reads_only_the_parts_it_holds(tmp_path, monkeypatch):
  policy = hf.pretrained(path=write(tmp_path, stored(weights())))
  shapes = policy.shapes()
  shardings = param_shardings(make_mesh(fsdp=2, tensor=2), policy.axes(shapes), shapes)
  asked = []
  opened = hf.open_folder(tmp_path)

  def watch(name, tensor):
    def read(index):
      asked.append((name, index))
      return tensor.read(index)

    return tensor._replace(read=read)

  monkeypatch.setattr(hf, 'open_folder', lambda _: {n: watch(n, t) for n, t in opened.items()})
  policy.init(jax.random.key(0), shardings)
  gate = [index for name, index in asked if name == 'model.layers.1.mlp.gate_proj.weight']
  halves = lambda size: (slice(0, size // 2), slice(size // 2, size))
  assert sorted(gate, key=str) == sorted(itertools.product(halves(24), halves(16)), key=str)


def test_shapes_need_no_weights(tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(CONFIG))
  shapes = hf.pretrained(path=str(tmp_path)).shapes()
  assert shapes['layers']['query'].shape == (2, 16, 4, 6)


def test_a_missing_folder_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError):
    hf.pretrained(path=str(tmp_path / 'nowhere'))
