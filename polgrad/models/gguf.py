"""Converts GGUF files to Hugging Face folders: Llama, Qwen2 and Qwen3 with a byte-level tokenizer.

A GGUF file holds settings, tokenizer and tensors, which are mostly quantised; see
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Tensors have the layout of Hugging Face, with
one exception: in files of `llama` the rows of a rotary pair are neighbours, not half a head apart."""

import json
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np

from polgrad import jsons
from polgrad.models import rotary
from polgrad.models.config import Config
from polgrad.models.families import FAMILIES, read_settings
from polgrad.models.hf import check, slots
from polgrad.models.tensors import Tensor, new_folder, write_folder
from polgrad.registry import AtLeastOne, check_range

SUPPORTED = ('llama', 'qwen2', 'qwen3')
NEIGHBOURS = ('llama',)  # architectures whose rotary pairs are neighbouring rows
# Names of tensors in a GGUF file -> names in a Hugging Face folder, outside the layers and in a layer.
TOP = {'token_embd': 'model.embed_tokens', 'output_norm': 'model.norm', 'output': 'lm_head'}
LAYER = {
  'attn_norm': 'input_layernorm',
  'attn_q': 'self_attn.q_proj',
  'attn_k': 'self_attn.k_proj',
  'attn_v': 'self_attn.v_proj',
  'attn_output': 'self_attn.o_proj',
  'attn_q_norm': 'self_attn.q_norm',
  'attn_k_norm': 'self_attn.k_norm',
  'ffn_norm': 'post_attention_layernorm',
  'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj',
  'ffn_down': 'mlp.down_proj',
}
FREQUENCIES = 'rope_freqs.weight'

KEYS = {  # key of config.json -> key of the file, after the name of the architecture
  'hidden_size': 'embedding_length',
  'intermediate_size': 'feed_forward_length',
  'num_hidden_layers': 'block_count',
  'num_attention_heads': 'attention.head_count',
  'num_key_value_heads': 'attention.head_count_kv',
  'max_position_embeddings': 'context_length',
  'rms_norm_eps': 'attention.layer_norm_rms_epsilon',
  'rope_theta': 'rope.freq_base',
}
# Three keys for the size of a head; the keys of context extension; and settings that have no effect.
HEAD_DIM = ('attention.key_length', 'attention.value_length', 'rope.dimension_count')
SCALING, FACTOR = 'rope.scaling.type', 'rope.scaling.factor'
WHOLE = (
  'embedding_length', 'feed_forward_length', 'block_count', 'attention.head_count',
  'attention.head_count_kv', 'context_length', *HEAD_DIM,
)  # fmt: skip
HARMLESS = (
  'vocab_size', 'tensor_data_layout', 'rope.scaling.original_context_length',
  'rope.scaling.finetuned',
)  # fmt: skip
# The context extension of Llama 3.1 and later. Their files hold only the factor of each frequency.
LLAMA3 = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)

# Types of tokens that a tokenizer finds in the text before it splits the rest.
CONTROL, USER_DEFINED = 3, 4
# Keys of config.json -> keys of the file.
IDS = {
  'bos_token_id': 'tokenizer.ggml.bos_token_id',
  'eos_token_id': 'tokenizer.ggml.eos_token_id',
  'pad_token_id': 'tokenizer.ggml.padding_token_id',
}
EOT = 'tokenizer.ggml.eot_token_id'  # ends a message
# What the keys of the tokenizer hold, of `jsons.KINDS`.
TOKENIZER = {
  'tokens': 'a list of texts', 'merges': 'a list of texts', 'token_type': 'a list of whole numbers',
  'add_bos_token': 'true or false',
}  # fmt: skip
# Steps of tokenizer.json that split text into words.
BYTES = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
DIGITS = {'type': 'Digits', 'individual_digits': True}


def _words(numbers: str) -> list[dict]:
  """The steps of Llama 3 and Qwen, which differ in how they split numbers (a regular expression)."""
  pattern = (
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}"
    r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
  )
  split = {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}
  return [split, BYTES | {'use_regex': False}]


class Cut(NamedTuple):
  """How a tokenizer splits text before it merges bytes; a GGUF file has only the name of it."""

  steps: list[dict]  # pre-tokenizers of tokenizer.json
  normalizer: dict | None = None  # of tokenizer.json
  ignore_merges: bool = False  # whether a word that is itself a token is never split
  bos: bool = False  # whether texts begin with the bos token; a file may override this


CUTS = {
  'gpt-2': Cut([BYTES]),
  'smollm': Cut([DIGITS, BYTES]),
  'llama-bpe': Cut(_words(r'\p{N}{1,3}'), ignore_merges=True, bos=True),
  'qwen2': Cut(_words(r'\p{N}'), normalizer={'type': 'NFC'}),
}


class Contents(NamedTuple):
  """The contents of a GGUF file in the form of a Hugging Face folder.

  Attributes:
    config: content of config.json.
    tensors: tensors by their names in the folder, f32; each is de-quantised when it is read.
    companions: contents of other JSON files by their names without suffix.
  """

  config: dict
  tensors: dict[str, Tensor]
  companions: dict[str, dict]


def convert(path: str | pathlib.Path, folder: str | pathlib.Path) -> None:
  """Converts a GGUF file to a Hugging Face folder in float32. The folder appears when it is complete.

  Raises:
    FileExistsError: the folder is not empty.
    ImportError, FileNotFoundError, ValueError: see `read`.
  """
  contents = read(path)
  with new_folder(folder) as made:
    write_folder(made, contents.tensors)
    for name, content in {'config': contents.config, **contents.companions}.items():
      (made / f'{name}.json').write_text(json.dumps(content, ensure_ascii=False), encoding='utf-8')


def read(path: str | pathlib.Path) -> Contents:
  """Opens a GGUF file and reads all but its tensors, which are read on demand.

  Raises:
    ImportError: the package gguf is not installed.
    FileNotFoundError: the file is missing.
    ValueError: an incomplete file, or not a GGUF file; an architecture, setting or tokenizer that is
      not supported; tensors that are missing, unknown or of another shape.
  """
  try:
    from gguf import GGUFReader
  except ImportError as error:
    raise ImportError('gguf is missing; pip install "polgrad[gguf]"') from error
  path = pathlib.Path(path).expanduser()
  if not path.is_file():
    raise FileNotFoundError(f'{path}: expected a GGUF file')
  try:
    with np.errstate(all='ignore'):  # false sizes may overflow; such tensors fit no file
      reader = GGUFReader(path)
    said = {key: field.contents() for key, field in reader.fields.items()}
  except Exception as error:  # gguf raises errors of any type at a malformed file
    raise ValueError(
      f'{path} is not a whole GGUF file: {type(error).__name__}: {str(error)[:300]}'
    ) from error
  # Convert, and check the result as if it were a folder.
  try:
    _check_places(reader)
    _check_types(reader)
    contents = _contents(said, {tensor.name: tensor for tensor in reader.tensors})
    plain = dict(dtype='float32', param_dtype='float32', remat='none', value_head=False)
    shape = Config(**read_settings(contents.config), **plain, balance_rate=0.0)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error
  check(path, contents.tensors, slots(shape, contents.config['model_type']))
  return contents


def _check_places(reader: Any) -> None:
  """Refuses tensors of an odd size, outside the data of a file, or that overlap."""
  end, reached, before = len(reader.data), reader.data_offset, 'the header'
  for tensor in sorted(reader.tensors, key=lambda t: t.data_offset):
    shape = tensor.shape.tolist()
    if not shape or math.prod(shape) != tensor.n_elements or not tensor.n_elements:
      raise ValueError(f'{tensor.name} has shape {shape[::-1]}')
    begin = tensor.data_offset
    if begin < reached:
      raise ValueError(f'{tensor.name} begins at byte {begin}, within {before}')
    reached, before = begin + tensor.n_bytes, tensor.name
    if reached > end:
      raise ValueError(f'{tensor.name} ends at byte {reached}, and the file at {end}')


def _check_types(reader: Any) -> None:
  """Refuses tensors of a type that cannot be de-quantised, by trying one block of zeros."""
  from gguf.constants import GGML_QUANT_SIZES
  from gguf.quants import dequantize

  for kind, name in {tensor.tensor_type: tensor.name for tensor in reader.tensors}.items():
    block = np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8)
    try:
      dequantize(block, kind)
    except NotImplementedError as error:  # what `dequantize` of gguf raises at types that it lacks
      raise ValueError(f'{name} has type {kind.name}, which is not supported') from error


def _contents(said: dict, stored: dict) -> Contents:
  """Converts the settings (`said`) and tensors (`stored`) of a file, both by their names in the file."""
  kind = said.get('general.architecture')
  _require('general.architecture', kind, SUPPORTED)
  _require('split.count', said.get('split.count', 1), (0, 1))
  own = {k.removeprefix(f'{kind}.'): v for k, v in said.items() if k.startswith(f'{kind}.')}
  _check_ids(said)
  # config.json, with the context extension that some files state as a tensor.
  config = _config(kind, own)
  stretched = stored.pop(FREQUENCIES, None)
  if stretched is not None:
    config['rope_scaling'] = _llama3_scaling(_dequantized(stretched), config)
  # Tensors; in `llama`, rows of queries and keys are moved.
  heads = {'attn_q': config['num_attention_heads'], 'attn_k': config['num_key_value_heads']}
  heads = heads if kind in NEIGHBOURS else {}
  tensors = {_name(n): _tensor(x, heads.get(n.split('.')[-2:][0], 0)) for n, x in stored.items()}
  embedding = tensors.get('model.embed_tokens.weight')
  if embedding is None:
    raise ValueError('token_embd.weight is missing')
  # Settings that only the tensors and the tokenizer show: size of the vocabulary and special tokens.
  ids = {ours: said[theirs] for ours, theirs in IDS.items() if theirs in said}
  config |= {
    'vocab_size': embedding.shape[0],
    'tie_word_embeddings': 'lm_head.weight' not in tensors,
    **ids,
  }
  # Chat models have a second stop token; only generation_config.json can list several.
  stops = [said[k] for k in (IDS['eos_token_id'], EOT) if k in said]
  if len(set(stops)) > 1:
    ids = ids | {'eos_token_id': stops}
  companions = {'generation_config': ids}
  if 'tokenizer.ggml.model' in said:
    companions |= _tokenizer(said, config)
  return Contents(config, tensors, companions)


def _check_ids(said: dict) -> None:
  """Refuses a tokenizer whose lists are missing or of unequal length, and ids of no token."""
  prefix = 'tokenizer.ggml.'
  own = {k.removeprefix(prefix): v for k, v in said.items() if k.startswith(prefix)}
  jsons.check('tokenizer.ggml', own, TOKENIZER)
  if 'model' in own:
    missing = [f'{prefix}{key}' for key in ('tokens', 'merges', 'token_type') if key not in own]
    if missing:
      raise ValueError(f'{missing} are missing')
    if len(own['tokens']) != len(own['token_type']):
      sizes = len(own['tokens']), len(own['token_type'])
      raise ValueError(f'{prefix}tokens has {sizes[0]} entries and {prefix}token_type {sizes[1]}')
    odd = [m for m in own['merges'] if m.count(' ') != 1]
    if odd:
      raise ValueError(f'{prefix}merges holds {odd[0]!r}; expected two tokens with a space between')
  size = len(own.get('tokens', ())) or jsons.LARGEST_ID + 1
  for key in (*IDS.values(), EOT):
    jsons.check_id(key, said.get(key, 0), size)


def _require(key: str, found: Any, supported: tuple) -> None:
  if found not in supported:
    raise ValueError(f'{key} {found!r} is not supported; supported: {list(supported)}')


def _config(kind: str, own: dict) -> dict:
  """The part of config.json that follows from the settings of the architecture (`own`)."""
  heads = own.get('attention.head_count')
  own = {'attention.head_count_kv': heads, 'rope.freq_base': 10_000.0} | own
  missing = sorted(f'{kind}.{key}' for key in KEYS.values() if own.get(key) is None)
  if missing:
    raise ValueError(f'{missing} are missing')
  # Refuse settings that are not read, and those that differ from layer to layer.
  known = {*KEYS.values(), *HEAD_DIM, SCALING, FACTOR, *HARMLESS}
  odd = {f'{kind}.{key}': value for key, value in own.items() if value and key not in known}
  odd |= {f'{kind}.{key}': own[key] for key in KEYS.values() if isinstance(own[key], list)}
  if odd:
    raise ValueError(f'settings {odd} are not supported; layers are alike, dense and plain')
  # Refuse values of another type, and sizes of 0.
  numbers = dict.fromkeys((*KEYS.values(), FACTOR), 'a number')
  jsons.check(kind, own, numbers | dict.fromkeys(WHOLE, 'a whole number'))
  for key in WHOLE:
    check_range(own.get(key), AtLeastOne, f'{kind}.{key}')
  # The size of a head must be the same wherever the file states it.
  head_dim = own.get(HEAD_DIM[0]) or own['embedding_length'] // heads
  for key in HEAD_DIM:
    _require(f'{kind}.{key}', own.get(key, head_dim), (head_dim,))
  config = {
    'architectures': [f'{FAMILIES[kind].architecture}ForCausalLM'],
    'model_type': kind,
    'head_dim': head_dim,
    'hidden_act': 'silu',
    'torch_dtype': 'float32',
    **{ours: own[theirs] for ours, theirs in KEYS.items()},
  }
  config['rms_norm_eps'] = float(f'{config["rms_norm_eps"]:.6g}')  # undoes rounding to f32
  factor = own.get(FACTOR) or 1.0
  if factor != 1:
    _require(f'{kind}.{SCALING}', own.get(SCALING, 'linear'), ('linear',))
    config['rope_scaling'] = {'rope_type': 'linear', 'factor': factor}
  return config


def _llama3_scaling(quotients: np.ndarray, config: dict) -> dict:
  """The `rope_scaling` that divides each frequency by its quotient.

  Raises:
    ValueError: the quotients are not those of Llama 3.1 and later, or positions are scaled twice.
  """
  refusal = ValueError(
    f'{FREQUENCIES} is not supported: only that of Llama 3.1 and later, which follows from {LLAMA3}'
  )
  if quotients.shape != (config['head_dim'] // 2,) or not np.isfinite(quotients).all():
    raise refusal
  factor = float(quotients.max())
  frequency = rotary.frequencies(config['head_dim'], config['rope_theta'])
  low, high, length = LLAMA3.values()
  slowed = rotary.stretch(frequency, factor=factor, low=low, high=high, original_length=length)
  expected = np.asarray(frequency / slowed)
  if not np.allclose(quotients, expected, rtol=1e-3) or 'rope_scaling' in config:
    raise refusal
  return {'rope_type': 'llama3', 'factor': factor, **LLAMA3}


def _name(stored: str) -> str:
  """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; unknown names are kept."""
  match stored.split('.'):
    case [part, suffix] if part in TOP:
      return f'{TOP[part]}.{suffix}'
    case ['blk', layer, part, suffix] if part in LAYER:
      return f'model.layers.{layer}.{LAYER[part]}.{suffix}'
  return stored


def _tensor(stored: Any, heads: int) -> Tensor:
  """A tensor that is de-quantised when it is read.

  Args:
    stored: the tensor of the file.
    heads: number of heads if the rows of its rotary pairs must be moved apart, else 0.
  """

  def take(index):
    x = _dequantized(stored)
    return (_split_rotary_pairs(x, heads) if heads else x)[index]

  return Tensor(_shape(stored), np.dtype(np.float32), take)


def _shape(stored: Any) -> tuple[int, ...]:
  """Sizes of the axes, which GGUF lists from the last to the first."""
  return tuple(stored.shape[::-1].tolist())


def _dequantized(stored: Any) -> np.ndarray:
  from gguf.quants import dequantize

  x = dequantize(stored.data, stored.tensor_type)
  return x.astype(np.float32, copy=False).reshape(_shape(stored))


def _split_rotary_pairs(x: np.ndarray, heads: int) -> np.ndarray:
  """Puts rows 0, 2, 4, ... of every head before its rows 1, 3, 5, ..."""
  pairs = x.reshape(heads, x.shape[0] // heads // 2, 2, -1)
  return pairs.swapaxes(1, 2).reshape(x.shape)


def _tokenizer(said: dict, config: dict) -> dict[str, dict]:
  """The contents of tokenizer.json and tokenizer_config.json."""
  get = lambda key: said.get(f'tokenizer.ggml.{key}')
  _require('tokenizer.ggml.model', get('model'), ('gpt2',))
  _require('tokenizer.ggml.pre', get('pre'), tuple(CUTS))
  cut, texts = CUTS[get('pre')], get('tokens')
  # Tokens that are found in the text before the rest is split.
  added = [
    dict(id=i, content=t, single_word=False, lstrip=False, rstrip=False, normalized=False,
         special=kind == CONTROL)
    for i, (t, kind) in enumerate(zip(texts, get('token_type')))
    if kind in (CONTROL, USER_DEFINED)
  ]  # fmt: skip
  # Whether a text begins with the bos token: the file decides, else the kind of tokenizer.
  begins = cut.bos if get('add_bos_token') is None else get('add_bos_token')
  prefixed = begins and 'bos_token_id' in config
  tokenizer = {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': added,
    'normalizer': cut.normalizer,
    'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': cut.steps},
    'post_processor': _prefix(texts, config['bos_token_id']) if prefixed else None,
    'decoder': BYTES,
    'model': {
      'type': 'BPE',
      'vocab': {t: i for i, t in enumerate(texts)},
      'merges': [merge.split(' ') for merge in get('merges')],
      **({'ignore_merges': True} if cut.ignore_merges else {}),
    },
  }
  template = said.get('tokenizer.chat_template')
  jsons.check(
    'the file', {'tokenizer.chat_template': template}, {'tokenizer.chat_template': 'text'}
  )
  settings = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'model_max_length': config['max_position_embeddings'],
    **({'chat_template': template} if template else {}),
    **{key.removesuffix('_id'): texts[config[key]] for key in IDS if key in config},
  }
  return {'tokenizer': tokenizer, 'tokenizer_config': settings}


def _prefix(texts: list[str], bos: int) -> dict:
  """A post-processor of tokenizer.json that puts the bos token before every text."""
  token = {'SpecialToken': {'id': texts[bos], 'type_id': 0}}
  first, second = ({'Sequence': {'id': name, 'type_id': i}} for i, name in enumerate('AB'))
  return {
    'type': 'TemplateProcessing',
    'single': [token, first],
    'pair': [token, first, token, second],
    'special_tokens': {texts[bos]: {'id': texts[bos], 'ids': [bos], 'tokens': [texts[bos]]}},
  }
