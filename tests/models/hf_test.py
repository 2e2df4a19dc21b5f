"""Hugging Face folders: what we read is what was written, and everything else is refused."""

import json
import os

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from polgrad.models import hf
from polgrad.sampling import make_sampler, roles
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
    dict(qk_norm=True, tie_embeddings=False),
  ),
}


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
  params = host(tiny.params(**overrides))
  policy = hf.pretrained(path=write(tmp_path, stored(params), **changes))
  assert policy.config == tiny.policy(**overrides).config
  assert_same(policy.init(jax.random.key(0)), params)


def test_shards_are_joined(tmp_path):
  params = host(tiny.params())
  tensors = stored(params)
  path = write(tmp_path, tensors)
  (tmp_path / 'model.safetensors').unlink()
  files = {name: f'model-{i % 2}.safetensors' for i, name in enumerate(tensors)}
  for file in set(files.values()):
    save_file({n: x for n, x in tensors.items() if files[n] == file}, tmp_path / file)
  index = tmp_path / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': files}))
  policy = hf.pretrained(path=path)
  assert_same(policy.init(jax.random.key(0)), params)
  (tmp_path / 'model-1.safetensors').unlink()
  with pytest.raises(FileNotFoundError, match=r'model-1.safetensors is missing'):
    policy.init(jax.random.key(0))


def test_bfloat16_files_are_read_and_a_value_head_is_added(tmp_path):
  params = host(tiny.params())
  low = {name: x.astype(ml_dtypes.bfloat16) for name, x in stored(params).items()}
  policy = hf.pretrained(path=write(tmp_path, low), value_head=True, max_length=9)
  assert policy.config.max_length == 9
  found = policy.init(jax.random.key(0))
  np.testing.assert_array_equal(found.pop('value_head'), np.zeros(16))
  rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), params)
  assert_same(found, rounded)


def test_missing_misshapen_and_unknown_tensors_are_named(tmp_path):
  tensors = stored(host(tiny.params()))
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
  params = host(tiny.params())
  tensors = stored(params)
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'].copy()
  tensors['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.ones(3, np.float32)
  policy = hf.pretrained(path=write(tmp_path, tensors))
  assert_same(policy.init(jax.random.key(0)), params)


@pytest.mark.parametrize(
  'changes, message',
  [
    (
      dict(model_type='gemma2'),
      r"'gemma2' is not supported; supported: \['llama', 'qwen2', 'qwen3'\]",
    ),
    (dict(rope_scaling=dict(rope_type='llama3', factor=8.0)), "rope type 'llama3'"),
    (dict(hidden_act='gelu'), "hidden_act 'gelu' is not supported, only 'silu'"),
    (dict(attention_bias=True), 'attention_bias True'),
    (dict(use_sliding_window=True), 'use_sliding_window True'),
  ],
)
def test_what_the_decoder_cannot_compute_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    hf.read_settings({**CONFIG, **changes})


def test_newer_files_keep_theta_with_the_rotary_parameters():
  old = {k: v for k, v in CONFIG.items() if k not in ('rope_theta', 'rope_scaling')}
  new = {**old, 'rope_parameters': dict(rope_type='default', rope_theta=5e5)}
  assert hf.read_settings(new)['rope_theta'] == 5e5


def test_a_missing_folder_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError):
    hf.pretrained(path=str(tmp_path / 'nowhere'))


@pytest.mark.skipif('POLGRAD_SMOLLM2' not in os.environ, reason='needs the weights of SmolLM2')
def test_smollm2_knows_the_capital_of_france():
  from tokenizers import Tokenizer

  path = os.environ['POLGRAD_SMOLLM2']
  tokenizer = Tokenizer.from_file(f'{path}/tokenizer.json')
  policy = hf.pretrained(path=path)
  tokens = np.array([tokenizer.encode('The capital of France is').ids])
  sample = make_sampler({'policy': policy}, role=roles.greedy, max_new_tokens=4)
  params = {'policy': policy.init(jax.random.key(0))}
  out = sample(params, tokens, np.ones(tokens.shape, bool), np.zeros(1, int), seed=0, step=0)
  assert 'Paris' in tokenizer.decode(np.asarray(out.tokens[0]).tolist())
