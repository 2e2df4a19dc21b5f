"""Gives polgrad broken inputs of every kind, and counts the outcomes.

    nice -n 10 python -m benchmarks.fuzz --inputs=10000

Each input must give a right result, or be refused: polgrad itself raises an error of a type in
`REFUSALS`, and the message names the file or the field. Anything else is a fault: an error of Python or
of a library, a wrong result, more time than the limit of the kind, or more memory than `MEMORY`.
Inputs are drawn by hypothesis from a seed. With --record the counts go to docs/robustness.json and the
table of docs/robustness.md. `tests/fuzz_test.py` runs a small part.
"""

import argparse
import collections
import contextlib
import copy
import functools
import gzip
import io
import json
import linecache
import math
import pathlib
import resource
import signal
import string
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from absl import logging
from array_record.python import array_record_module
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks import robustness
from polgrad import checkpoint, cli, methods, metrics, report, stored_rows, tasks, verify
from polgrad.build import TABLE, build, check_data
from polgrad.data import batching, sources, tokenizers
from polgrad.data import chat as chats
from polgrad.models import decoder, gguf, hf, lora, tensors
from polgrad.models.config import Config
from polgrad.models.families import read_settings
from polgrad.models.transformer import from_config
from polgrad.options import from_text
from polgrad.overrides import apply
from polgrad.rewards import scoring, verifiers
from tests.data import folders

ROOT = pathlib.Path(__file__).parents[1]
MEMORY = 6 * 2**30  # bytes of address space that one input may take
# Types of deliberate errors, without their subclasses: UnicodeDecodeError is a ValueError too.
REFUSALS = (
  *(ValueError, TypeError, FileNotFoundError, FileExistsError),
  *(batching.TooLong, batching.Unusable),
)


class Kind(NamedTuple):
  """A kind of input.

  Attributes:
    strategy: returns the hypothesis strategy that draws the inputs.
    act: (input, an empty folder) -> None, or the name of the outcome; raises if the result is wrong.
    named: (folder, input) -> texts, of which the message of a refusal must contain at least one.
    limit_s: seconds of the processor that one input may take.
  """

  strategy: Callable[[], st.SearchStrategy]
  act: Callable[[Any, pathlib.Path], Any]
  named: Callable[[pathlib.Path, Any], tuple[str, ...]]
  limit_s: float = 5.0


class Fault(NamedTuple):
  """What went wrong with an input."""

  kind: str
  what: str  # type and place of the error: equal faults are counted as one
  error: str
  example: str


class Hang(BaseException):
  """More time than the limit. It is not an `Exception`, so the code under test does not catch it."""


# Values of JSON, among them unusual ones: huge numbers, NaN, a lone surrogate.
SCALARS = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(-3, 300),
  st.sampled_from([2**31, 2**63, -(2**40), 10**12, 10**30, 10**400, -1, 0]),
  st.floats(),
  st.text(max_size=8),
  st.sampled_from(['', 'a', '0', '-1', 'nan', '../x', '\ud800', '\x00', '{{', 'é' * 50, 'name']),
)
VALUES = st.recursive(
  SCALARS,
  lambda x: st.one_of(st.lists(x, max_size=4), st.dictionaries(st.text(max_size=6), x, max_size=3)),
  max_leaves=6,
)
DEEP = st.sampled_from(['[' * 100_000, '{"a":' * 100_000, '1' * 5000, '', '\ufeff{}', '{}x'])


def places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
  """The paths (tuples of keys) of all values within a JSON value.

  Of lists and dicts with 20 or more entries only the first two and the last two are visited.
  """
  items = list(tree.items() if isinstance(tree, dict) else enumerate(tree))
  for key, value in items if len(items) < 20 else [*items[:2], *items[-2:]]:
    yield (*path, key)
    if isinstance(value, dict | list):
      yield from places(value, (*path, key))


@st.composite
def changed(draw, base: Any, most: int = 3) -> Any:
  """A JSON value in which some values are replaced, deleted or added."""
  tree = json.loads(json.dumps(base))
  for _ in range(draw(st.integers(1, most))):
    path = draw(st.sampled_from(list(places(base))))
    *outer, key = path
    inside = tree
    with contextlib.suppress(KeyError, IndexError, TypeError):  # an earlier change took the place
      for step in outer:
        inside = inside[step]
      how = draw(st.sampled_from(['replace', 'replace', 'swap', 'delete', 'add']))
      if how == 'delete':
        del inside[key]
      elif how == 'add' and isinstance(inside, dict):
        inside[draw(st.text(max_size=8))] = draw(VALUES)
      elif how == 'swap':  # another value of the same file
        other = draw(st.sampled_from(list(places(base))))
        inside[key] = copy.deepcopy(functools.reduce(lambda x, k: x[k], other, base))
      else:
        inside[key] = draw(VALUES)
  return tree


def utf8(text: str) -> bytes:
  """The bytes of a text, in which lone surrogates may occur."""
  return text.encode('utf-8', 'surrogatepass')


def as_text(base: Any) -> st.SearchStrategy[str]:
  """Texts of a JSON file: mostly `base` with changes, sometimes other JSON or none at all."""
  often = changed(base, most=2).map(json.dumps)
  return st.one_of(
    often, often, often, changed(base, most=6).map(json.dumps), VALUES.map(json.dumps), DEEP
  )


@st.composite
def damaged(draw, data: bytes) -> bytes:
  """The bytes with one to four changes: flipped, cut off, overwritten, inserted or deleted ones."""
  data = bytearray(data)
  for _ in range(draw(st.integers(1, 4))):
    # Headers are at the beginning, so half of the places are near it.
    near = draw(st.booleans())
    place = draw(st.integers(0, max(min(len(data), 600 if near else len(data)) - 1, 0)))
    match draw(st.sampled_from(['flip', 'cut', 'number', 'insert', 'delete'])):
      case 'flip' if data:
        data[place] ^= 1 << draw(st.integers(0, 7))
      case 'cut':
        del data[place:]
      case 'number':
        data[place : place + 8] = draw(
          st.sampled_from([0, 1, 2**31, 2**32, 2**62, 2**64 - 1, 2**64 - 32])
        ).to_bytes(8, 'little')
      case 'insert':
        data[place:place] = draw(st.binary(max_size=12))
      case 'delete':
        del data[place : place + draw(st.integers(1, 12))]
  return bytes(data)


@st.composite
def tree_of_files(draw, base: dict[str, Any], most: int = 2) -> dict[str, bytes | None]:
  """Changes of one to `most` files of a folder: new contents by name, None for a deleted file."""
  found = {}
  for name in draw(st.lists(st.sampled_from(sorted(base)), min_size=1, max_size=most, unique=True)):
    data = base[name]
    how = draw(st.sampled_from(['change', 'change', 'change', 'damage', 'delete']))
    if how == 'delete':
      found[name] = None
    elif how == 'change' and name.endswith('.json'):
      found[name] = utf8(draw(as_text(json.loads(data))))
    else:
      found[name] = draw(damaged(data))
  return found


def write(folder: pathlib.Path, base: dict[str, bytes], changes: dict[str, bytes | None]) -> None:
  """Writes the files of `base` with `changes`, see `tree_of_files`, into the folder."""
  for name, data in {**base, **changes}.items():
    if data is not None:
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      (folder / name).write_bytes(data)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  """The files below a folder by their paths in it."""
  files = sorted(f for f in folder.rglob('*') if f.is_file())
  return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def made(make: Callable[[pathlib.Path], Any]) -> dict[str, bytes]:
  """The files that a function writes."""
  with tempfile.TemporaryDirectory() as place:
    make(pathlib.Path(place))
    return contents(pathlib.Path(place))


# ---- Configurations ----

RUN = 'method=grpo,task=addition,model=tiny,smoke'
CHOICES = {
  'method': ['grpo', 'dpo', 'sft', 'ppo', 'x'],
  'task': ['addition', 'choices', 'chain_sum', 'jsonl', 'tfds', 'x'],
  'model': ['tiny', 'hf', 'smollm2', 'x'],
}
WORDS = (
  'seed', 'steps', 'digits', 'lora', 'smoke', 'eps_high', 'eps_low', 'samples_per_prompt', 'path',
  'prompts', 'max_new_tokens', 'prompt_length', 'operator', 'holdout', 'data', 'reward',
  'letters', 'warm_start', 'min_terms', 'max_terms', 'reward.tolerance', 'beta', 'minibatches',
  'temperature',
)  # fmt: skip
NUMBERS = ('0', '1', '-1', '3', '0.5', '1e9', '10000000000000', 'nan', 'inf', '1' * 400, '1_0', '٣')
OPTION_VALUES = st.one_of(
  st.sampled_from(NUMBERS), st.text(max_size=6), st.sampled_from(['true', '+', ''])
)


@st.composite
def option_texts(draw) -> str:
  items = [f'{name}={draw(st.sampled_from(valid))}' for name, valid in CHOICES.items()]
  if draw(st.integers(0, 5)):  # five of six texts name a method, task and model that exist
    items = [
      'method=' + draw(st.sampled_from(sorted(methods.TABLE))),
      'task=addition',
      'model=tiny',
    ]
  for _ in range(draw(st.integers(0, 3))):
    name = draw(
      st.one_of(st.sampled_from(WORDS), st.text(string.ascii_lowercase + '._', max_size=6))
    )
    items.append(draw(st.one_of(OPTION_VALUES.map(lambda v, n=name: f'{n}={v}'), st.just(name))))
  return ','.join(draw(st.permutations(items)))


def read_options(text: str, folder: pathlib.Path) -> None:
  build(from_text(text))


@functools.cache
def complete() -> dict:
  """The complete configuration of `RUN`, as JSON."""
  return json.loads(from_text(RUN).to_json_best_effort())


def read_config(values: Any, folder: pathlib.Path) -> None:
  (folder / 'config.json').write_text(json.dumps(values))
  check_data(build(verify.read_config(str(folder))))


@st.composite
def overrides(draw) -> list[str]:
  paths = [p for p in places(complete()) if all(isinstance(k, str) for k in p)]
  found = []
  for _ in range(draw(st.integers(1, 3))):
    keys = draw(st.sampled_from(paths))
    path, now = '.'.join(keys), functools.reduce(lambda x, k: x[k], keys, complete())
    if draw(st.booleans()) and not isinstance(now, dict | list | str):  # of the right type
      near = {bool: st.booleans(), int: st.integers(-1, 40), float: st.floats(-1, 3)}[type(now)]
      found.append(f'--config.{path}={draw(near)}')
      continue
    path = draw(st.one_of(st.just(path), st.just(path), st.just(path + '.x'), st.text(max_size=8)))
    value = draw(
      st.one_of(OPTION_VALUES, st.sampled_from(['[1]', '(1,)', '{"a": 1}', "'x'", 'None']))
    )
    found.append(f'--config.{path}={value}')
  return found


def read_overrides(given: list[str], folder: pathlib.Path) -> None:
  _, changes = cli.split_changes(given)
  check_data(build(apply(from_text(RUN), changes, TABLE)))


# ---- Data ----

MESSAGES = [
  {'role': 'system', 'content': 'Be short.'},
  {'role': 'user', 'content': [{'type': 'text', 'text': 'Hello'}]},
  {'role': 'assistant', 'content': '', 'tool_calls': [{'name': 'add', 'arguments': {}}]},
  {'role': 'tool', 'content': '3'},
  {'from': 'gpt', 'value': 'It is 3.'},
]
RECORDS = (
  {'prompt': '1+2=', 'answer': '3'},
  {'question': '1+2=', 'completion': 3, 'id': 7},
  {'messages': MESSAGES},
  {'prompt': MESSAGES[:2], 'completion': MESSAGES[2:3]},
  {'prompt': 'a', 'chosen': 'b', 'rejected': 'c'},
  {'chosen': MESSAGES, 'rejected': [*MESSAGES[:4], {'role': 'assistant', 'content': 'no'}]},
)


@st.composite
def record_files(draw) -> bytes:
  lines = [draw(st.sampled_from(RECORDS).map(json.dumps)) for _ in range(draw(st.integers(0, 2)))]
  odd = st.sampled_from(RECORDS).flatmap(as_text)
  lines.insert(draw(st.integers(0, len(lines))), draw(odd))
  data = utf8('\n'.join(lines))
  return draw(st.one_of(st.just(data), st.just(data), damaged(data), st.binary(max_size=20)))


@functools.cache
def parquet() -> bytes:
  """A parquet file of numbers, texts and lists."""
  rows = [{'prompt': 'a' * i, 'answer': i, 'other': [{'a': i}]} for i in range(20)]
  file = io.BytesIO()
  pa.parquet.write_table(pa.Table.from_pylist(rows), file)
  return file.getvalue()


@st.composite
def table_files(draw) -> tuple[str, bytes]:
  """The ending of a file, and its bytes."""
  whole = {
    '.parquet': parquet(),
    '.csv': b'prompt,answer\n"a, b",1\n"c ""d""\nx",2\n',
    '.json': json.dumps(RECORDS).encode(),
    '.jsonl.gz': gzip.compress(b'\n'.join(json.dumps(r).encode() for r in RECORDS), mtime=0),
  }
  ending = draw(st.sampled_from(sorted(whole)))
  return ending, draw(st.one_of(damaged(whole[ending]), st.binary(max_size=20)))


def read_table(given: tuple[str, bytes], folder: pathlib.Path) -> None:
  path = folder / f'data{given[0]}'
  path.write_bytes(given[1])
  for record in sources.hub(path=str(path)):
    json.dumps(record, default=str)


@functools.cache
def chatml() -> tokenizers.Tokenizer:
  with tempfile.TemporaryDirectory() as place:
    return tokenizers.huggingface(path=str(folders.chatml(pathlib.Path(place))))


def read_records(data: bytes, folder: pathlib.Path) -> None:
  """Lays out every record as prompt, demonstration and pair, with two tokenizers.

  Each layout may be refused. The whole file counts as refused if all layouts of all records are.
  """
  path = folder / 'data.jsonl'
  path.write_bytes(data)
  source = sources.jsonl(path=str(path))
  refused = []
  for row in range(len(source)):
    record = {**source[row], 'id': row}
    for tokenizer in (tokenizers.byte(), chatml()):
      for lay in (batching.prompts, batching.supervised, pairs):
        try:
          lay([record], tokenizer, length=512)
        except ValueError as error:
          deliberate(error, (f'record {row}',))
          refused.append(error)
  if len(refused) == 6 * len(source):
    raise refused[0]


def pairs(records: list, tokenizer: tokenizers.Tokenizer, *, length: int) -> None:
  batching.pairs(records, tokenizer, length=length, prompt_length=256)


PIECES = (
  '{%', '%}', '{{', '}}', '-%}', ' for m in messages ', ' endfor ', ' if ', ' endif ', ' else ',
  'm', '.role', '.content', "['content']", ' messages ', ' | tojson ', ' | trim ', ' | length ',
  ' generation ', ' endgeneration ', 'bos_token', 'eos_token', '[0]', '[-1:]', ' * 10000000 ',
  ' ** 99999 ', ' + ', "'a'", ' set x = ', ' x ', ' range(10**9) ', ' macro f() ', ' endmacro ',
  ' | list ', ' for i in x recursive ',
  '{% for a in x %}{% for b in x %}{% endfor %}{% endfor %}', ' f() ', ' raise_exception("no") ',
  ' strftime_now("%d") ', '()', '.__class__', ' is string ', ' | join ', ' | center(10**9) ',
  ' "%1000000000d" % 1 ', ' break ', ' include "x" ', '\n', ' not ',
  " | replace('a', 'aaaaaaaaaa') ", ' namespace(a=1) ', ' | int ', ' / 0 ', ' tools ',
  ' | indent ',
)  # fmt: skip


@st.composite
def templates(draw) -> str:
  """Chat templates: pieces of Jinja joined at random, or a model's template with one piece replaced."""
  if draw(st.booleans()):
    return ''.join(draw(st.lists(st.sampled_from(PIECES), max_size=12)))
  base = draw(st.sampled_from([folders.CHATML, folders.MARKED, folders.LLAMA3, folders.LLAMA2]))
  place = draw(st.integers(0, len(base)))
  size = draw(st.integers(0, 12))
  return base[:place] + draw(st.sampled_from(PIECES)) + base[place + size :]


def read_template(source: str, folder: pathlib.Path) -> None:
  chat = chats.jinja_chat(source, {'bos_token': '<s>', 'eos_token': '</s>'})
  text = chat([{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}])
  if not isinstance(text, str):
    raise AssertionError(f'not a text: {text!r}')


# ---- Folders of models ----


@functools.cache
def tokenizer_folders() -> dict[str, dict[str, bytes]]:
  make = {n: getattr(folders, n) for n in ('chatml', 'llama3', 'gemma', 'llama2')}
  found = {name: made(function) for name, function in make.items()}
  found['llama2'] = {
    k: v for k, v in found['llama2'].items() if 'tokenizer' in k and 'vocab' not in k
  }
  found['llama2'] |= {
    'added_tokens.json': b'{"<more>": 500}',
    'generation_config.json': b'{"eos_token_id": 2}',
  }
  found['chatml'] |= {'special_tokens_map.json': b'{"eos_token": {"content": "<|im_end|>"}}'}
  found['chatml'] |= {'generation_config.json': b'{"eos_token_id": [1, 2]}'}
  return found


def tokenizer_inputs() -> st.SearchStrategy:
  names = st.sampled_from(['chatml', 'llama3', 'gemma', 'llama2'])
  return names.flatmap(lambda n: st.tuples(st.just(n), tree_of_files(tokenizer_folders()[n])))


def read_tokenizer(given: tuple[str, dict], folder: pathlib.Path) -> None:
  """Opens the folder; ids of texts and of special tokens must lie in the vocabulary."""
  write(folder, tokenizer_folders()[given[0]], given[1])
  one = tokenizers.huggingface(path=str(folder))
  ids = one.encode('Hello 12 naïve')
  one.decode(ids)
  special = [i for i in (*one.stop_ids, one.pad_id, one.bos_id) if i != -1]
  if not all(0 <= i < one.vocab_size for i in [*ids, *special]):
    raise AssertionError(f'ids {ids} and {special} of {one.vocab_size}')
  with contextlib.suppress(ValueError):  # a changed template may refuse the messages
    one.conversation([{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}])


CONFIG = dict(
  model_type='llama', vocab_size=13, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
  num_attention_heads=2, num_key_value_heads=1, head_dim=4, hidden_act='silu',
  max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=10000.0,
  rope_scaling=dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                    original_max_position_embeddings=32),
  tie_word_embeddings=True, architectures=['LlamaForCausalLM'],
)  # fmt: skip
OTHERS = (
  dict(model_type='qwen2', use_sliding_window=True, sliding_window=4, max_window_layers=1),
  dict(model_type='gemma3_text', sliding_window=4, sliding_window_pattern=2, query_pre_attn_scalar=4,
       rope_local_base_freq=1e4, hidden_activation='gelu_pytorch_tanh'),
  dict(model_type='qwen3_moe', num_experts=2, num_experts_per_tok=1, moe_intermediate_size=6),
  dict(model_type='mistral', sliding_window=4),
)  # fmt: skip


@functools.cache
def model_folder() -> dict[str, bytes]:
  def make(folder):
    (folder / 'config.json').write_text(json.dumps(CONFIG))
    policy = from_settings(folder)
    hf.save(str(folder / 'whole'), policy.config, policy.init(jax.random.key(0)))
    params = policy.init(jax.random.key(0))
    hf.save(str(folder / 'shards'), policy.config, params, max_shard_bytes=1500)

  files = made(make)
  return {k.partition('/')[2]: v for k, v in files.items() if k.startswith('shards/')}


def from_settings(folder: pathlib.Path) -> Any:
  plain = dict(dtype='float32', param_dtype='float32', remat='none', value_head=False)
  settings = read_settings(json.loads((folder / 'config.json').read_text()))
  return from_config(Config(**settings, **plain, balance_rate=0.0))


def model_inputs() -> st.SearchStrategy:
  files = {k: v for k, v in model_folder().items() if k.endswith(('.json', '.safetensors'))}
  configs = st.sampled_from([CONFIG, *({**CONFIG, 'rope_scaling': None, **o} for o in OTHERS)])
  settings = configs.flatmap(as_text).map(lambda text: {'config.json': utf8(text)})
  return st.one_of(settings, settings, tree_of_files(files))


def read_model(changes: dict, folder: pathlib.Path) -> None:
  """Opens the folder, and reads all parameters."""
  write(folder, model_folder(), changes)
  policy = hf.pretrained(path=str(folder))
  policy.init(jax.random.key(0))


def safetensors_inputs() -> st.SearchStrategy:
  header = {
    '__metadata__': {'format': 'pt'},
    'a': {'dtype': 'F32', 'shape': [2, 3], 'data_offsets': [0, 24]},
    'b': {'dtype': 'BF16', 'shape': [4], 'data_offsets': [24, 32]},
  }

  def file(text):
    data = utf8(text)
    return len(data).to_bytes(8, 'little') + data + bytes(range(32))

  return st.one_of(
    as_text(header).map(file), damaged(file(json.dumps(header))), st.binary(max_size=40)
  )


def read_safetensors(data: bytes, folder: pathlib.Path) -> None:
  (folder / 'x.safetensors').write_bytes(data)
  for name, tensor in tensors.open_file(folder / 'x.safetensors').items():
    if tensor.all().shape != tensor.shape:
      raise AssertionError(f'{name} has another shape')


ADAPTER = {
  'peft_type': 'LORA',
  'r': 2,
  'lora_alpha': 4,
  'target_modules': ['q_proj'],
  'bias': 'none',
}


def read_adapter(text: str, folder: pathlib.Path) -> None:
  (folder / 'adapter_config.json').write_bytes(utf8(text))
  lora(base=base_policy(), adapter=str(folder))


@functools.cache
def base_policy() -> Any:
  return decoder(vocab_size=13, width=8, head_dim=4, num_heads=2, num_kv_heads=1, mlp_width=12)


def gguf_parts() -> dict:
  """A GGUF file as JSON, for `changed`: settings, and name, shape, type and offset of each tensor."""
  shapes = {'token_embd': [5, 8], 'output_norm': [8], 'blk.0.attn_norm': [8], 'blk.0.ffn_norm': [8]}
  shapes |= {f'blk.0.{n}': [8, 8] for n in ('attn_q', 'attn_output')}
  shapes |= {f'blk.0.{n}': [4, 8] for n in ('attn_k', 'attn_v')}
  shapes |= {f'blk.0.{n}': [12, 8] for n in ('ffn_gate', 'ffn_up')} | {'blk.0.ffn_down': [8, 12]}
  listed, end = [], 0
  for name, shape in shapes.items():
    listed.append({'name': f'{name}.weight', 'shape': shape[::-1], 'type': 0, 'offset': end})
    end += -(-4 * math.prod(shape) // 32) * 32
  own = {
    'context_length': 64, 'embedding_length': 8, 'block_count': 1, 'feed_forward_length': 12,
    'attention.head_count': 2, 'attention.head_count_kv': 1, 'rope.freq_base': 5000.0,
    'attention.layer_norm_rms_epsilon': 1e-5, 'rope.scaling.type': 'linear', 'rope.scaling.factor': 2.0,
  }  # fmt: skip
  tokenizer = {
    'model': 'gpt2', 'pre': 'smollm', 'tokens': ['<s>', '</s>', 'a', 'b', 'ab'], 'merges': ['a b'],
    'token_type': [3, 3, 1, 1, 1], 'bos_token_id': 0, 'eos_token_id': 1, 'eot_token_id': 1,
    'padding_token_id': 0, 'add_bos_token': True,
  }  # fmt: skip
  settings = {f'llama.{k}': v for k, v in own.items()} | {
    'tokenizer.chat_template': '{{ messages }}'
  }
  settings |= {f'tokenizer.ggml.{k}': v for k, v in tokenizer.items()}
  return {
    'version': 3, 'tensors': listed, 'settings': {'general.architecture': 'llama', **settings},
    'size': end, 'counts': [len(listed), len(settings) + 1],
  }  # fmt: skip


def gguf_bytes(parts: Any) -> bytes:
  """The file with these parts, see `gguf_parts`; values of a type that the format lacks are left out."""
  number = lambda x, n: (int(x) if isinstance(x, int | bool) else 0).to_bytes(
    n + 64, 'little', signed=True
  )[:n]
  text = lambda x: number(len(str(x)), 8) + utf8(str(x))

  def value(x) -> tuple[int, bytes]:
    if isinstance(x, bool):
      return 7, number(x, 1)
    if isinstance(x, int):
      return (4, number(x, 4)) if 0 <= x < 2**32 else (11, number(min(max(x, -(2**62)), 2**62), 8))
    if isinstance(x, float):
      return 12, np.float64(x).tobytes()
    if isinstance(x, list):
      inner = [value(i) for i in x]
      return 9, number(inner[0][0] if inner else 4, 4) + number(len(x), 8) + b''.join(
        d for _, d in inner
      )
    return 8, text(x)

  table = lambda x: x if isinstance(x, dict) else {}
  entries = lambda x: x if isinstance(x, list) else []
  parts = table(parts)
  counts = [*entries(parts.get('counts')), 0, 0]
  data = b'GGUF' + number(parts.get('version'), 4) + number(counts[0], 8) + number(counts[1], 8)
  for key, x in table(parts.get('settings')).items():
    kind, content = value(x)
    data += text(key) + number(kind, 4) + content
  for one in map(table, entries(parts.get('tensors'))):
    shape = entries(one.get('shape'))
    data += (
      text(one.get('name', '')) + number(len(shape), 4) + b''.join(number(n, 8) for n in shape)
    )
    data += number(one.get('type'), 4) + number(one.get('offset'), 8)
  size = parts.get('size')
  size = size if isinstance(size, int) and 0 <= size < 10**5 else 64
  return data + bytes(-len(data) % 32) + np.ones(size // 4, np.float32).tobytes()


def gguf_inputs() -> st.SearchStrategy:
  whole = gguf_bytes(gguf_parts())
  odd = changed(gguf_parts(), most=2).map(gguf_bytes)
  return st.one_of(odd, odd, odd, damaged(whole), st.binary(max_size=40))


def read_gguf(data: bytes, folder: pathlib.Path) -> None:
  (folder / 'm.gguf').write_bytes(data)
  gguf.convert(folder / 'm.gguf', folder / 'out')
  hf.pretrained(path=str(folder / 'out')).init(jax.random.key(0))


# ---- Folders of runs ----

ROW = {'step': 3, 'phase': 'train', 'reward': 0.5, 'loss': None, 'evaluation/greedy': 1.0}


@st.composite
def metric_files(draw) -> bytes:
  lines = [json.dumps({**ROW, 'step': i}) for i in range(draw(st.integers(0, 3)))]
  lines.insert(draw(st.integers(0, len(lines))), draw(as_text(ROW)))
  data = utf8('\n'.join(lines) + '\n')
  return draw(st.one_of(st.just(data), damaged(data), st.binary(max_size=30)))


def read_metrics(data: bytes, folder: pathlib.Path) -> None:
  """A run resumes whatever the file holds: readable rows are kept, and a copy of a damaged file."""
  (folder / 'metrics.jsonl').write_bytes(data)
  writer = metrics.Writer(str(folder), step=10, past=['train'])
  writer.write(11, 'train', {'reward': 1.0})
  writer.close()
  rows, damaged_lines = metrics.parse(str(folder / 'metrics.jsonl'))
  if damaged_lines or rows[-1]['step'] != 11:
    raise AssertionError(f'{damaged_lines} and {rows[-1:]}')
  if len(data) % 8 == 0:  # only then, because drawing takes a third of a second
    report.draw([str(folder)])


HEAD_OF_ROWS = {
  **{'format': stored_rows.FORMAT, 'tokenizer': 'abc', 'samples_per_prompt': 2, 'prefix': ''},
  **{'max_new_tokens': 4, 'temperature': 1.0, 'top_k': 0, 'top_p': 1.0, 'stop_strings': []},
  **{'vocab_size': 9, 'rows': [5]},
}
ROW_OF_ROWS = {
  **{'id': 5, 'prompt': 'abc', 'finished': [True, False], 'tokens': [[1, 8, 2], [3]]},
  **{'behavior_logp': [[-1.0, -0.5, -2.0], [-3.0]], 'teacher_logp': [[-1.5, 0.0, -2.0], [-1.0]]},
}


def file_of_rows(texts: Sequence[str]) -> bytes:
  def make(folder):
    writer = array_record_module.ArrayRecordWriter(str(folder / 'x'), 'group_size:1')
    for text in texts:
      writer.write(utf8(text))
    writer.close()

  return made(make)['x']


def stored_inputs() -> st.SearchStrategy:
  both = [json.dumps(HEAD_OF_ROWS), json.dumps(ROW_OF_ROWS)]
  return st.one_of(
    as_text(HEAD_OF_ROWS).map(lambda text: file_of_rows([text, both[1]])),
    as_text(ROW_OF_ROWS).map(lambda text: file_of_rows([both[0], text])),
    st.builds(lambda: file_of_rows(both)).flatmap(damaged),
    st.binary(max_size=40),
  )


def read_stored(data: bytes, folder: pathlib.Path) -> None:
  (folder / f'00000000{stored_rows.ENDING}').write_bytes(data)
  rows = stored_rows.Rows(str(folder))
  rows.check({'temperature': 1.0})
  found = rows.read(5, 'abc')
  for name in stored_rows.OF_TOKENS:
    if [len(x) for x in getattr(found, name)] != [len(x) for x in found.tokens]:
      raise AssertionError(f'{name} has other lengths than tokens')


def trees() -> dict[str, Any]:
  params = {'layers': {'gate': jnp.arange(12.0).reshape(3, 4)}, 'norm': jnp.ones(5)}
  return {'params': params, 'rest': {'step': jnp.int32(2), 'opt_state': jnp.arange(7.0)}}


@functools.cache
def checkpoint_folder() -> dict[str, bytes]:
  def make(folder):
    stored = checkpoint.manager(str(folder / 'c'))
    for step in (1, 2):
      checkpoint.save(stored, step, trees(), {'order': ['train'], 'phase': 0})
    stored.close()

  return made(make)


def checkpoint_inputs() -> st.SearchStrategy:
  newest = {k: v for k, v in checkpoint_folder().items() if k.startswith('c/2/')}
  return tree_of_files(newest, most=3)


def read_checkpoint(changes: dict, folder: pathlib.Path) -> None:
  """What is restored must have the bits that were saved."""
  write(folder, checkpoint_folder(), changes)
  stored = checkpoint.manager(str(folder / 'c'))
  try:
    step = checkpoint.numbered(stored, str(folder / 'c'))
    meta = checkpoint.read_meta(stored, step)
    for name, tree in trees().items():
      found = checkpoint.restore(stored, step, name, tree)
      same = jax.tree.map(np.array_equal, found, tree)
      if not jax.tree.all(same):
        raise AssertionError(f'{name} of {step} has other bits')
    if meta.get('order') != ['train']:
      raise AssertionError(f'meta of {step} is {meta}')
  finally:
    stored.close()


# ---- Completions ----

ANSWERS = st.one_of(
  st.text(max_size=40),
  st.text('0123456789+-*/()., eE^_{}\\x[]', max_size=30),
  st.sampled_from([
    '9**9**9**9', '(' * 5000, '[' * 3000, '1e999999999', '\\boxed{' * 2000, '<answer>' * 3000, '1/0',
    '-' * 4000, '1' * 6000, '__import__("os").system("true")', '{"a": ' * 2000, 'answer: ' * 3000,
    '\x00', '\ud800', '٣', '[[1, 2], [3', "'a' * 10**10", '10**10**10', 'x' * 100_000, '1,' * 2000,
    '0x' + 'f' * 4000, 'sqrt(' * 300, '1 2 3 4', 'A', 'true', '²', 'NaN', 'inf',
  ]),
)  # fmt: skip
OWN = {
  'exact_match': {}, 'numeric_answer': {}, 'choice_letter': {}, 'soft_overlong': {},
  'count_matches': {'pattern': '<answer>.*?</answer>', 'most': 1},
  'regex_format': {'pattern': r'<think>.*</think>\s*<answer>.*</answer>'},
}  # fmt: skip


def own_inputs() -> st.SearchStrategy:
  return st.tuples(st.sampled_from(sorted(OWN)), ANSWERS)


def judge_own(given: tuple[str, str], folder: pathlib.Path) -> None:
  """polgrad's own verifiers judge every text, in this process."""
  name, completion = given
  record = {'answer': 'B' if name == 'choice_letter' else '12'}
  row = {'completion': completion, 'record': record, 'length': len(completion)}
  function = getattr(verifiers, name)
  value = scoring.registry.call(functools.partial(function, **OWN[name]), row)
  if not (isinstance(value, float) and -1 <= value <= 1):
    raise AssertionError(f'{name} returned {value!r}')


@functools.cache
def gym_records() -> dict[str, list[dict]]:
  """Two problems of each task of reasoning-gym, without tasks that fail or take more than 3 s."""
  found = {}
  for name in sorted(tasks.gym_names()):
    with contextlib.suppress(Exception, Hang), limited(3.0):
      source = sources.reasoning_gym(task=name, size=2, seed=0)
      found[name] = [source[0], source[1]]
  return found


@functools.cache
def gym_scorer() -> Callable:
  terms = {'gym': verifiers.reasoning_gym_score}
  return scoring.make_scorer(terms, timeout_s=2.0, workers=1)


def gym_inputs() -> st.SearchStrategy:
  # reasoning-gym uses random numbers when it makes problems, and hypothesis controls Python's generator
  # while it draws an example. So the problems are made before.
  gym_records()
  return _gym_inputs()


@st.composite
def _gym_inputs(draw) -> tuple[str, int, str]:
  """(task, number of the problem, completion): right answers, nearly right ones, and any text."""
  name = draw(st.sampled_from(sorted(gym_records())))
  row = draw(st.integers(0, 1))
  right = str(gym_records()[name][row].get('answer', ''))
  near = st.one_of(st.just(right), st.just(right[: len(right) // 2]), st.just(right + ' '), ANSWERS)
  text = draw(st.one_of(ANSWERS, near))
  return (
    name,
    row,
    draw(st.sampled_from(['<answer>{}</answer>', '{}', 'so <answer>{}'])).replace('{}', text),
  )


def judge_gym(given: tuple[str, int, str], folder: pathlib.Path) -> str:
  """The score must lie in [0, 1]; 'contained' if the scorer failed, with an error and an invalid row."""
  name, row, completion = given
  scores = gym_scorer()([completion], [gym_records()[name][row]], [len(completion)])
  value = scores.components['gym'][0]
  if np.isnan(value):
    if not scores.errors or scores.valid[0]:
      raise AssertionError(f'{name}: NaN without an error')
    return 'contained'
  if not -1e-6 <= value <= 1 + 1e-6:
    raise AssertionError(f'{name}: score {value}')
  return 'right'


# ---- The table ----

path_of = lambda folder, given: (str(folder),)


def of_config(folder: pathlib.Path, given: Any) -> tuple[str, ...]:
  """What a refusal of a configuration may name: its file, a path in it, or an option of the input."""
  options = [item.partition('=')[0].strip() for item in str(given).split(',')]
  return (str(folder), 'config', 'option', 'task=', 'model=', *filter(None, options))


records_of = lambda folder, given: (str(folder), 'record ')
template_of = lambda folder, given: ('the chat template',)


KINDS = {
  'options': Kind(option_texts, read_options, of_config),
  'overrides': Kind(overrides, read_overrides, of_config),
  'configurations': Kind(lambda: changed(complete()), read_config, of_config),
  'records': Kind(record_files, read_records, records_of),
  'tables': Kind(table_files, read_table, path_of),
  'chat templates': Kind(templates, read_template, template_of),
  'tokenizer folders': Kind(tokenizer_inputs, read_tokenizer, path_of),
  'model folders': Kind(model_inputs, read_model, path_of),
  'adapter folders': Kind(lambda: as_text(ADAPTER), read_adapter, path_of),
  'safetensors': Kind(safetensors_inputs, read_safetensors, path_of),
  'GGUF': Kind(gguf_inputs, read_gguf, path_of),
  'metrics': Kind(metric_files, read_metrics, path_of, 10.0),
  'stored completions': Kind(stored_inputs, read_stored, path_of),
  'checkpoints': Kind(checkpoint_inputs, read_checkpoint, path_of, 20.0),
  'verifiers': Kind(own_inputs, judge_own, path_of),
  'reasoning-gym scorers': Kind(gym_inputs, judge_gym, path_of, 15.0),
}


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
  """Raises `Hang` after `seconds` of processor time, or 20 times as many of wall time."""

  def late(*_):
    raise Hang(f'more than {seconds} s')

  timers = {signal.SIGPROF: (signal.ITIMER_PROF, 1), signal.SIGALRM: (signal.ITIMER_REAL, 20)}
  before = {number: signal.signal(number, late) for number in timers}
  for timer, times in timers.values():
    signal.setitimer(timer, times * seconds)
  try:
    yield
  finally:
    for number, (timer, _) in timers.items():
      signal.setitimer(timer, 0)
      signal.signal(number, before[number])


@contextlib.contextmanager
def bounded() -> Iterator[None]:
  """Lets allocations fail (MemoryError) that need more than `MEMORY` beyond the present use."""
  with open('/proc/self/statm') as f:
    now = int(f.read().split()[0]) * resource.getpagesize()
  before = resource.getrlimit(resource.RLIMIT_AS)
  resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_AS, before)


class NotNamed(AssertionError):
  """A refusal whose message does not say what it refuses."""


def deliberate(error: BaseException, named: tuple[str, ...]) -> None:
  """Returns if polgrad raised the error on purpose, and its message contains one of `named`.

  On purpose means: the type is in `REFUSALS`, and the line that raised it is a `raise` of polgrad; or a
  file could not be opened, where the error of Python names the file.

  Raises:
    NotNamed: the message contains none of them.
    BaseException: `error` itself, if it was not raised on purpose.
  """
  frame = traceback.extract_tb(error.__traceback__)[-1]
  line = linecache.getline(frame.filename, frame.lineno).strip()
  ours = f'{ROOT}/polgrad/' in frame.filename or frame.filename == __file__
  opened = isinstance(error, OSError) and error.filename is not None
  if type(error) not in REFUSALS or not (opened or (ours and line.startswith('raise'))):
    raise error
  message = str(error)
  if not any(name in message for name in named):
    raise NotNamed(f'{type(error).__name__}: {message[:300]}') from error


def outcome(kind: Kind, given: Any) -> str:
  """The outcome of one input: 'refused', what `act` returns, or 'right' if it returns None.

  Raises:
    BaseException: a fault, see the docstring of the module.
  """
  with tempfile.TemporaryDirectory(dir='/dev/shm') as place:
    folder = pathlib.Path(place)
    try:
      with limited(kind.limit_s), bounded(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return kind.act(given, folder) or 'right'
    except Exception as error:
      deliberate(error, kind.named(folder, given))
      return 'refused'


def campaign(name: str, count: int, number: int) -> tuple[collections.Counter, list[Fault], float]:
  """Runs `count` inputs of one kind, drawn from the seed `number`.

  Returns:
    The counts of the outcomes; each fault with its shortest example; the processor time of the slowest
    input in seconds.
  """
  kind, counts, faults = KINDS[name], collections.Counter(), {}
  slowest = 0.0  # seconds of the processor

  @seed(number)
  @settings(
    max_examples=count, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck), print_blob=False,
  )  # fmt: skip
  @given(kind.strategy())
  def one(example):
    nonlocal slowest
    begun = time.process_time()
    try:
      counts[outcome(kind, example)] += 1
    except (Exception, Hang) as error:
      counts['fault'] += 1
      frame = traceback.extract_tb(error.__traceback__)[-1]
      what = f'{type(error).__name__} at {pathlib.Path(frame.filename).name}:{frame.lineno}'
      if type(error) is NotNamed:
        what = f'NotNamed: {str(error)[:60]}'
      shown = repr(example)
      if what not in faults or len(shown) < len(faults[what].example):
        faults[what] = Fault(name, what, str(error)[:300], shown)
    slowest = max(slowest, time.process_time() - begun)

  one()
  return counts, sorted(faults.values()), slowest


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--inputs', type=int, default=10_000, help='in all')
  parser.add_argument('--kinds', nargs='*', default=[], help='names of kinds; none: all')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--record', action='store_true', help='keep the results in docs/')
  args = parser.parse_args()
  logging.set_verbosity(logging.FATAL)  # Orbax logs every damaged file
  names = args.kinds or list(KINDS)
  each = -(-args.inputs // len(names))
  rows, faults = {}, []
  for name in names:
    begun = time.monotonic()
    counts, found, slowest = campaign(name, each, args.seed)
    seconds = time.monotonic() - begun
    rows[name] = {
      'seed': args.seed,
      **counts,
      'seconds': round(seconds, 1),
      'slowest': round(slowest, 2),
    }
    faults += found
    print(f'{name}: {dict(counts)} in {seconds:.0f} s, slowest {slowest:.2f} s', flush=True)
    for fault in found:
      print(f'  {fault.what}: {fault.error}\n    {fault.example[:600]}', flush=True)
    if args.record:
      robustness.record('fuzz', {name: rows[name]})
  raise SystemExit(f'{len(faults)} faults' if faults else 0)


if __name__ == '__main__':
  main()
