"""Hugging Face folders for tests: what config.json of real models says, and small ones of a family."""

import json
import pathlib

import jax
import numpy as np

from polgrad import build, convert, loading
from polgrad.models import families, hf
from polgrad.models.config import Config
from polgrad.models.transformer import from_config
from tests.data import folders

LLAMA3_ROPE = dict(
  rope_type='llama3', factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
  original_max_position_embeddings=8192,
)  # fmt: skip
# As published beside the weights.
PUBLISHED = {
  'qwen3': dict(  # Qwen/Qwen3-0.6B
    model_type='qwen3', hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
    num_attention_heads=16, num_key_value_heads=8, head_dim=128, vocab_size=151936,
    max_position_embeddings=40960, rope_theta=1000000, rope_scaling=None, rms_norm_eps=1e-6,
    tie_word_embeddings=True, attention_bias=False, hidden_act='silu', use_sliding_window=False,
    sliding_window=None, max_window_layers=28,
  ),
  'llama3': dict(  # meta-llama/Llama-3.2-1B-Instruct
    model_type='llama', hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
    num_attention_heads=32, num_key_value_heads=8, head_dim=64, vocab_size=128256,
    max_position_embeddings=131072, rope_theta=500000.0, rope_scaling=LLAMA3_ROPE,
    rms_norm_eps=1e-5, tie_word_embeddings=True, attention_bias=False, mlp_bias=False,
    hidden_act='silu', pretraining_tp=1,
  ),
  'gemma3': dict(  # google/gemma-3-1b-it
    model_type='gemma3_text', hidden_size=1152, intermediate_size=6912, num_hidden_layers=26,
    num_attention_heads=4, num_key_value_heads=1, head_dim=256, vocab_size=262144,
    max_position_embeddings=32768, rope_theta=1000000, rope_local_base_freq=10000,
    rope_scaling=None, rms_norm_eps=1e-6, attention_bias=False, query_pre_attn_scalar=256,
    hidden_activation='gelu_pytorch_tanh', sliding_window=512, sliding_window_pattern=6,
    attn_logit_softcapping=None, final_logit_softcapping=None,
  ),
}  # fmt: skip
SIZES = {'qwen3': 596_049_920, 'llama3': 1_235_814_400, 'gemma3': 999_885_952}
SMALL = dict(
  hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
  num_key_value_heads=2, head_dim=8, vocab_size=640, max_position_embeddings=256,
)  # fmt: skip
TOKENIZER = {'qwen3': folders.chatml, 'llama3': folders.llama3, 'gemma3': folders.gemma}


def published(name: str, folder: pathlib.Path) -> str:
  """A folder without weights, with the shape of the real model."""
  (folder / 'config.json').write_text(json.dumps(PUBLISHED[name]))
  TOKENIZER[name](folder)
  return str(folder)


def small(name: str, folder: pathlib.Path, *, tokenizer: str = '', **sizes: int) -> str:
  """A folder with small random weights and a config.json like the real model's.

  Args:
    tokenizer: family whose tokenizer it has; '' is its own.
    sizes: other settings of config.json than `SMALL`.
  """
  source = folder / 'source'
  source.mkdir(parents=True)
  TOKENIZER[tokenizer or name](source)
  settings = {**PUBLISHED[name], **SMALL, **sizes}
  if name == 'gemma3':
    settings.update(num_hidden_layers=3, sliding_window_pattern=3, sliding_window=16)
  (source / 'config.json').write_text(json.dumps(settings))
  given = dict(dtype='float32', param_dtype='float32', remat='none', value_head=False)
  config = Config(**{'balance_rate': 0.0, **families.read_settings(settings), **given})
  params = from_config(config).init(jax.random.key(0))
  hf.save(str(folder / name), config, params, source=str(source))
  return str(folder / name)


def reward_model(folder: pathlib.Path, seed: int) -> str:
  """A small reward model with random parameters, and a tokenizer whose pad token is its stop token."""
  source = folder / f'source{seed}'
  source.mkdir(parents=True)
  folders.chatml(source)
  file = source / 'tokenizer_config.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | {'pad_token': '<|im_end|>'}))
  settings = {**PUBLISHED['qwen3'], **SMALL}
  (source / 'config.json').write_text(json.dumps(settings))
  given = dict(dtype='float32', param_dtype='float32', remat='none', value_head=True)
  config = Config(**{'balance_rate': 0.0, **families.read_settings(settings), **given})
  random = np.random.default_rng(seed)
  draw = lambda x: (random.normal(size=x.shape) / np.sqrt(x.shape[0])).astype(x.dtype)
  params = jax.tree.map(draw, from_config(config).shapes())
  hf.save(str(source / 'first'), config, params, source=str(source))
  out = str(folder / f'reward{seed}')
  # As polgrad.convert does: the tokenizer of the run decides about the padding.
  bare = loading.bare(str(source / 'first'))
  bare.model.value_head = True
  experiment = build.build(bare)
  convert.export(experiment, params, out, source=str(source), reward_model=True)
  return out
