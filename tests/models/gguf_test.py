"""GGUF files: the folder made of one says the same, and transformers reads both alike."""

import json
import sys

import gguf
import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from gguf.quants import quantize
from safetensors.numpy import load_file

from polgrad.models import hf
from polgrad.models.gguf import convert, read

torch.set_num_threads(1)
LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, INNER = 2, 32, 4, 2, 8, 64
ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
TEXTS = ['<|begin|>', '<|end|>', '<tool>', *ALPHABET, 'it', 'ab', 'abc']
MERGES = ['i t', 'a b']
KINDS = [3, 3, 4] + [1] * (len(TEXTS) - 3)
PARTS = {  # part of a name in GGUF -> at Hugging Face, outputs, inputs
  'attn_q': ('self_attn.q_proj', HEADS * HEAD_DIM, WIDTH),
  'attn_k': ('self_attn.k_proj', KV_HEADS * HEAD_DIM, WIDTH),
  'attn_v': ('self_attn.v_proj', KV_HEADS * HEAD_DIM, WIDTH),
  'attn_output': ('self_attn.o_proj', WIDTH, HEADS * HEAD_DIM),
  'ffn_gate': ('mlp.gate_proj', INNER, WIDTH),
  'ffn_up': ('mlp.up_proj', INNER, WIDTH),
  'ffn_down': ('mlp.down_proj', WIDTH, INNER),
}
NORMS = {'attn_norm': 'input_layernorm', 'ffn_norm': 'post_attention_layernorm'}
QWEN3 = {'attn_q_norm': 'self_attn.q_norm', 'attn_k_norm': 'self_attn.k_norm'}


def interleaved(x, heads):
  """The rows of a rotary pair next to each other, one pair at a time."""
  half = len(x) // heads // 2
  rows = [h * 2 * half + i + j * half for h in range(heads) for i in range(half) for j in range(2)]
  return x[rows]


def model(kind):
  """Random tensors in pairs: {name in GGUF: as stored there}, {name at Hugging Face: as there}."""
  random = np.random.default_rng(0)
  draw = lambda *shape: random.normal(size=shape, scale=0.3).astype(np.float32)
  theirs = {'token_embd.weight': draw(len(TEXTS), WIDTH), 'output_norm.weight': draw(WIDTH)}
  ours = {
    'model.embed_tokens.weight': theirs['token_embd.weight'],
    'model.norm.weight': theirs['output_norm.weight'],
  }
  for i in range(LAYERS):
    for part, (name, *shape) in PARTS.items():
      x = draw(*shape)
      ours[f'model.layers.{i}.{name}.weight'] = x
      heads = {'attn_q': HEADS, 'attn_k': KV_HEADS}.get(part) if kind == 'llama' else None
      theirs[f'blk.{i}.{part}.weight'] = interleaved(x, heads) if heads else x
      if kind == 'qwen2' and part in ('attn_q', 'attn_k', 'attn_v'):
        bias = draw(shape[0])
        ours[f'model.layers.{i}.{name}.bias'] = theirs[f'blk.{i}.{part}.bias'] = bias
    for part, name in (NORMS | QWEN3 if kind == 'qwen3' else NORMS).items():
      scale = 1 + draw(HEAD_DIM if part in QWEN3 else WIDTH)
      ours[f'model.layers.{i}.{name}.weight'] = theirs[f'blk.{i}.{part}.weight'] = scale
  if kind == 'qwen3':
    ours['lm_head.weight'] = theirs['output.weight'] = draw(len(TEXTS), WIDTH)
  return theirs, ours


def write(path, kind='llama', tensors=None, types=None, tokenizer='smollm', settings=None):
  """A file as llama.cpp's converter makes it; `settings` are added or changed, None leaves one out."""

  said = {
    f'{kind}.context_length': 64, f'{kind}.embedding_length': WIDTH, f'{kind}.block_count': LAYERS,
    f'{kind}.feed_forward_length': INNER, f'{kind}.attention.head_count': HEADS,
    f'{kind}.attention.head_count_kv': KV_HEADS, f'{kind}.rope.freq_base': 5000.0,
    f'{kind}.attention.layer_norm_rms_epsilon': 1e-5, f'{kind}.vocab_size': len(TEXTS),
    f'{kind}.attention.key_length': HEAD_DIM, f'{kind}.attention.value_length': HEAD_DIM,
  }  # fmt: skip
  if tokenizer:
    said |= {
      'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': tokenizer,
      'tokenizer.ggml.tokens': TEXTS, 'tokenizer.ggml.token_type': KINDS,
      'tokenizer.ggml.merges': MERGES, 'tokenizer.ggml.bos_token_id': 0,
      'tokenizer.ggml.eos_token_id': 1, 'tokenizer.chat_template': '{{ messages }}',
    }  # fmt: skip
  writer = gguf.GGUFWriter(path, kind)
  for key, value in (said | (settings or {})).items():
    if value is not None:
      add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
             bool: writer.add_bool, list: writer.add_array}[type(value)]  # fmt: skip
      add(key, value)
  for name, x in (model(kind)[0] if tensors is None else tensors).items():
    dtype = (types or {}).get(name)
    writer.add_tensor(name, quantize(x, dtype) if dtype else x, raw_dtype=dtype)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def content(folder, name):
  return json.loads((folder / f'{name}.json').read_text(encoding='utf-8'))


@pytest.mark.parametrize('kind', ['llama', 'qwen2', 'qwen3'])
def test_the_folder_has_the_tensors_of_the_file(kind, tmp_path):
  convert(write(tmp_path / 'm.gguf', kind), tmp_path / 'out')
  found, expected = load_file(tmp_path / 'out/model.safetensors'), model(kind)[1]
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_array_equal(found[name], x)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['m.gguf', 'out']
  assert len(list((tmp_path / 'out').iterdir())) == 5


@pytest.mark.parametrize('kind', ['llama', 'qwen2', 'qwen3'])
def test_logits_are_those_of_transformers_on_the_file_itself(kind, tmp_path):
  write(tmp_path / 'm.gguf', kind)
  # transformers does not take the head size of Qwen3 from the file.
  more = dict(head_dim=HEAD_DIM) if kind == 'qwen3' else {}
  load = transformers.AutoModelForCausalLM.from_pretrained
  theirs = load(tmp_path, gguf_file='m.gguf', **more).eval()
  convert(tmp_path / 'm.gguf', tmp_path / 'out')
  policy = hf.pretrained(path=str(tmp_path / 'out'))
  tokens = np.random.default_rng(1).integers(0, len(TEXTS), (2, 9))
  with torch.no_grad():
    expected = theirs(torch.tensor(tokens)).logits.numpy()
  params = policy.init(jax.random.key(0))
  logits = policy.unembed(params, policy.hidden(params, tokens, np.ones_like(tokens)))
  np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)


def test_lower_precision_is_widened_and_pairs_are_split_after_it(tmp_path):
  tensors, expected = model('llama')
  half, eight = 'blk.0.attn_k.weight', 'blk.1.attn_q.weight'
  tensors[half] = tensors[half].astype(np.float16)
  types = {eight: gguf.GGMLQuantizationType.Q8_0}
  convert(write(tmp_path / 'm.gguf', tensors=tensors, types=types), tmp_path / 'out')
  found = load_file(tmp_path / 'out/model.safetensors')
  key, query = (f'model.layers.{i}.self_attn.{m}_proj.weight' for i, m in ((0, 'k'), (1, 'q')))
  assert {x.dtype for x in found.values()} == {np.dtype('float32')}
  np.testing.assert_array_equal(found[key], expected[key].astype(np.float16))
  # Rows are single blocks of 32: a step is 1 / 127 of the largest element, kept as float16.
  step = np.abs(expected[query]).max(axis=1, keepdims=True) / 127
  error = np.abs(found[query] - expected[query])
  assert np.all(error <= 0.57 * step) and np.any(error)
  same = found.keys() - {key, query}
  assert all(np.array_equal(found[name], expected[name]) for name in same)


def test_tensors_are_read_one_at_a_time_and_in_parts(tmp_path):
  contents = read(write(tmp_path / 'm.gguf'))
  name = 'model.layers.1.self_attn.q_proj.weight'
  expected = model('llama')[1][name]
  assert contents.tensors[name].shape == expected.shape
  part = contents.tensors[name].read((slice(8, 24), slice(3, 5)))
  np.testing.assert_array_equal(part, expected[8:24, 3:5])


def test_settings_become_config_json(tmp_path):
  convert(write(tmp_path / 'm.gguf'), tmp_path / 'out')
  assert content(tmp_path / 'out', 'config') == dict(
    architectures=['LlamaForCausalLM'], model_type='llama', vocab_size=len(TEXTS), hidden_size=WIDTH,
    intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=HEADS, head_dim=HEAD_DIM,
    num_key_value_heads=KV_HEADS, hidden_act='silu', max_position_embeddings=64, rms_norm_eps=1e-5,
    rope_theta=5000.0, tie_word_embeddings=True, torch_dtype='float32', bos_token_id=0, eos_token_id=1,
  )  # fmt: skip
  assert content(tmp_path / 'out', 'generation_config') == dict(bos_token_id=0, eos_token_id=1)


def test_every_stop_token_is_kept(tmp_path):
  path = write(tmp_path / 'm.gguf', settings={'tokenizer.ggml.eot_token_id': 2})
  assert read(path).companions['generation_config']['eos_token_id'] == [1, 2]


def llama3_quotients(factor, head_dim, theta):
  """What llama.cpp's converter stores, one pair at a time."""
  out = []
  for i in range(0, head_dim, 2):
    wavelength = 2 * np.pi * theta ** (i / head_dim)
    if wavelength < 8192 / 4:
      out.append(1.0)
    elif wavelength > 8192:
      out.append(factor)
    else:
      smooth = (8192 / wavelength - 1) / 3
      out.append(1 / ((1 - smooth) / factor + smooth))
  return np.array(out, np.float32)


def test_longer_contexts_become_rope_scaling(tmp_path):
  theta = {'llama.rope.freq_base': 5e5}
  quotients = llama3_quotients(32.0, HEAD_DIM, 5e5)
  assert len(set(quotients.tolist())) == 3  # kept, mixed and slowed
  tensors = {**model('llama')[0], 'rope_freqs.weight': quotients}
  contents = read(write(tmp_path / 'a.gguf', tensors=tensors, settings=theta))
  assert contents.config['rope_scaling'] == dict(
    rope_type='llama3', factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=8192,
  )  # fmt: skip
  assert 'rope_freqs.weight' not in contents.tensors
  linear = {'llama.rope.scaling.type': 'linear', 'llama.rope.scaling.factor': 4.0}
  scaling = read(write(tmp_path / 'b.gguf', settings=linear)).config['rope_scaling']
  assert scaling == dict(rope_type='linear', factor=4.0)
  plain = {'llama.rope.scaling.type': 'none'}
  assert 'rope_scaling' not in read(write(tmp_path / 'c.gguf', settings=plain)).config
  tensors['rope_freqs.weight'] = quotients * np.float32(1.1)
  for changes in (dict(settings=theta), dict(settings=theta | linear)):
    with pytest.raises(
      ValueError, match=r'rope_freqs\.weight is not supported: only that of Llama 3'
    ):
      read(write(tmp_path / 'd.gguf', tensors=tensors, **changes))


CUTS = {
  'gpt-2': ['It', "'s", ' 1234', ' ', ' x', '\n', '\n', 'IT', "'", 'S'],
  'smollm': ['It', "'s", ' ', '1', '2', '3', '4', ' ', ' x', '\n', '\n', 'IT', "'", 'S'],
  'llama-bpe': ['It', "'s", ' ', '123', '4', ' ', ' x', '\n\n', 'IT', "'S"],
  'qwen2': ['It', "'s", ' ', '1', '2', '3', '4', ' ', ' x', '\n\n', 'IT', "'S"],
}


@pytest.mark.parametrize('cut', CUTS)
def test_text_is_cut_as_the_named_tokenizer_cuts_it(cut, tmp_path):
  convert(write(tmp_path / 'm.gguf', tokenizer=cut), tmp_path / 'out')
  made = tokenizers.Tokenizer.from_file(str(tmp_path / 'out/tokenizer.json'))
  text = "It's 1234  x\n\nIT'S"
  pieces = made.pre_tokenizer.pre_tokenize_str(text)
  assert [text[a:b] for _, (a, b) in pieces] == CUTS[cut]
  encode = lambda text: made.encode(text, add_special_tokens=False).tokens
  assert made.decode(made.encode(text).ids) == text
  assert encode('it<tool>ab<|end|>') == ['it', '<tool>', 'ab', '<|end|>']
  assert made.decode(made.encode('a<tool><|end|>').ids) == 'a<tool>'  # the stop token is special
  assert encode('abc') == (['abc'] if cut == 'llama-bpe' else ['ab', 'c'])
  assert len(encode('e\u0301')) == (2 if cut == 'qwen2' else 3)  # one letter of two bytes, or two
  assert made.encode('it').tokens == ['<|begin|>'] * (cut == 'llama-bpe') + ['it']


@pytest.mark.parametrize('says, tokens', [(True, ['<|begin|>', 'it']), (False, ['it'])])
def test_a_file_says_whether_texts_begin_with_a_token(says, tokens, tmp_path):
  path = write(
    tmp_path / 'm.gguf', tokenizer='llama-bpe', settings={'tokenizer.ggml.add_bos_token': says}
  )
  made = tokenizers.Tokenizer.from_str(json.dumps(read(path).companions['tokenizer']))
  assert made.encode('it').tokens == tokens


def test_the_tokenizer_settings_are_those_of_the_file(tmp_path):
  convert(write(tmp_path / 'm.gguf'), tmp_path / 'out')
  assert content(tmp_path / 'out', 'tokenizer_config') == dict(
    tokenizer_class='PreTrainedTokenizerFast', model_max_length=64, bos_token='<|begin|>',
    eos_token='<|end|>', chat_template='{{ messages }}',
  )  # fmt: skip
  assert read(write(tmp_path / 'n.gguf', tokenizer='')).companions == {'generation_config': {}}


REFUSED = {
  'architecture': (dict(kind='gemma2'), r"architecture 'gemma2' .*\['llama', 'qwen2', 'qwen3'\]"),
  'experts': (dict(settings={'llama.expert_count': 8}), r"\{'llama\.expert_count': 8\} are not"),
  'missing': (dict(settings={'llama.block_count': None}), r"\['llama\.block_count'\] are missing"),
  'by layer': (dict(settings={'llama.attention.head_count_kv': [2, 1]}), r'head_count_kv.: \[2, 1\]'),
  'partial': (dict(settings={'llama.rope.dimension_count': 4}), r'rope\.dimension_count 4 .*\[8\]'),
  'yarn': (
    dict(settings={'llama.rope.scaling.type': 'yarn', 'llama.rope.scaling.factor': 4.0}),
    r"llama\.rope\.scaling\.type 'yarn' is not supported; supported: \['linear'\]",
  ),
  'yarn knobs': (dict(settings={'llama.rope.scaling.yarn_log_multiplier': 0.1}), 'yarn_log_multiplier'),
  'split': (dict(settings={'split.count': 3}), r'split\.count 3'),
  'pieces': (dict(settings={'tokenizer.ggml.model': 'llama'}), r"model 'llama' .*\['gpt2'\]"),
  'no tokens': (dict(settings={'tokenizer.ggml.tokens': None}), r"\['tokenizer\.ggml\.tokens'\] are"),
  'kinds': (dict(settings={'tokenizer.ggml.token_type': [1]}), 'token_type 1'),
  'merge': (dict(settings={'tokenizer.ggml.merges': ['ab']}), "merges holds 'ab'"),
  'bos': (dict(settings={'tokenizer.ggml.bos_token_id': 9999}), 'bos_token_id must be .* got 9999'),
  'eot': (dict(settings={'tokenizer.ggml.eot_token_id': 'x'}), "eot_token_id must be .* got 'x'"),
  'template': (dict(settings={'tokenizer.chat_template': 3}), 'chat_template must be text'),
  'heads': (dict(settings={'llama.attention.head_count': 0}), 'head_count: expected a number at'),
  'words': (dict(settings={'llama.block_count': 'two'}), "block_count must be .* got 'two'"),
  'layers': (dict(settings={'llama.block_count': 4_000_000_000}), 'num_hidden_layers: expected'),
  'theta': (dict(settings={'llama.rope.freq_base': float('nan')}), 'freq_base must be a number'),
  'cut': (dict(tokenizer='tekken'), r"pre 'tekken' is not supported; supported: \['gpt-2', 'smollm'"),
}  # fmt: skip


@pytest.mark.parametrize('case', REFUSED)
def test_what_a_folder_cannot_say_is_refused(case, tmp_path):
  changes, message = REFUSED[case]
  path = write(tmp_path / 'm.gguf', **changes)
  with pytest.raises(ValueError, match=message) as error:
    convert(path, tmp_path / 'out')
  assert str(error.value).startswith(f'{path}: ')
  assert not (tmp_path / 'out').exists()


def test_missing_misshapen_and_unknown_tensors_are_named(tmp_path):
  tensors = model('llama')[0]
  del tensors['blk.1.ffn_up.weight']
  tensors['blk.0.attn_k.weight'] = np.zeros((WIDTH, WIDTH), np.float32)
  tensors['blk.0.ffn_gate_inp.weight'] = np.zeros((4, WIDTH), np.float32)
  with pytest.raises(ValueError) as error:
    read(write(tmp_path / 'm.gguf', tensors=tensors))
  for problem in (
    'model.layers.1.mlp.up_proj.weight is missing',
    'model.layers.0.self_attn.k_proj.weight has shape (32, 32) instead of (16, 32)',
    'blk.0.ffn_gate_inp.weight is unknown',
  ):
    assert problem in str(error.value)
  del tensors['token_embd.weight']
  with pytest.raises(ValueError, match=r'token_embd\.weight is missing'):
    read(write(tmp_path / 'n.gguf', tensors=tensors))


def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path):
  whole = write(tmp_path / 'm.gguf').read_bytes()
  cut = tmp_path / 'cut.gguf'
  for size in (0, 3, 4, 21, *range(100, len(whole) - 40, len(whole) // 40), len(whole) - 40):
    cut.write_bytes(whole[:size])
    with pytest.raises(ValueError, match=r'cut\.gguf is not a whole GGUF file'):
      read(cut)
  cut.write_bytes(b'PK' + whole[2:])
  with pytest.raises(ValueError, match='magic'):
    read(cut)
  with pytest.raises(FileNotFoundError):
    read(tmp_path / 'nowhere.gguf')


def header(count=2, kind=0, offsets=(0, 32), shape=(8,), name=b'a', values=b'', keys=0):
  """A file with tensors of 32 bytes, whose header may say otherwise."""
  u32, u64 = (lambda x, n=n: x.to_bytes(n, 'little') for n in (4, 8))
  data = b'GGUF' + u32(3) + u64(count) + u64(keys) + values
  for i, offset in enumerate(offsets):
    data += (
      u64(len(name) + 1) + name + bytes([97 + i]) + u32(len(shape)) + b''.join(map(u64, shape))
    )
    data += u32(kind) + u64(offset)
  return data + bytes(-len(data) % 32) + bytes(64)


LIES = {
  'overlap': (header(offsets=(0, 16)), 'ab begins at byte .*, within aa'),
  'before the data': (header(offsets=(0, 2**64 - 32)), 'ab begins at byte .*, within the header'),
  'outside': (header(offsets=(0, 10**9)), 'not a whole GGUF file'),
  'shape': (header(shape=(2**32, 2**32)), 'not a whole GGUF file'),
  'no elements': (header(shape=(0,)), r'aa has shape \[0\]'),
  'type': (header(kind=4000), 'not a whole GGUF file: .*4000'),
  'type not read': (header(kind=24, shape=(32,)), 'ab has type I8, which is not supported'),
  'count': (header(count=2**60), 'not a whole GGUF file'),
  'keys': (header(keys=2**60), 'not a whole GGUF file'),
  'text': (header(keys=1, values=(2**62).to_bytes(8, 'little')), 'not a whole GGUF file'),
}  # fmt: skip


@pytest.mark.parametrize('case', LIES)
def test_a_header_that_lies_is_refused(case, tmp_path):
  data, message = LIES[case]
  (tmp_path / 'm.gguf').write_bytes(data)
  with pytest.raises(ValueError, match=message) as error:
    read(tmp_path / 'm.gguf')
  assert str(error.value).startswith(f'{tmp_path / "m.gguf"}')


def test_a_folder_that_is_there_stays(tmp_path):
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out/mine').write_text('mine')
  with pytest.raises(FileExistsError, match='not empty'):
    convert(write(tmp_path / 'm.gguf'), tmp_path / 'out')
  assert [p.name for p in (tmp_path / 'out').iterdir()] == ['mine']


def test_the_missing_package_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'gguf', None)
  with pytest.raises(ImportError, match=r'polgrad\[gguf\]'):
    read(tmp_path / 'm.gguf')
