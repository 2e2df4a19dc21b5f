"""Text to token ids and back: a `Tokenizer` is a tuple of plain functions and ids.

`encode` adds no special token of its own accord. `stop_ids[0]` is the token that ends completions
we train on; the others end a completion too when the policy draws them. `bos_id` is the token that
opens a sequence, -1 where the tokenizer has none. The pad id may equal a stop id: nothing in
polgrad reads a mask off token ids.
"""

import collections
import contextlib
import datetime
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, NamedTuple

import jinja2
import jinja2.sandbox
import sentencepiece as spm
import tokenizers as hf

from polgrad.registry import table


class Tokenizer(NamedTuple):
  """What polgrad asks of a tokenizer."""

  encode: Callable[[str], list[int]]
  decode: Callable[[Sequence[int]], str]  # leaves special tokens out
  chat: Callable[..., str]  # (messages, add_generation_prompt=True) -> text to encode
  vocab_size: int
  pad_id: int
  bos_id: int
  stop_ids: tuple[int, ...]


def byte() -> Tokenizer:
  """UTF-8 bytes 0..255, then pad 256, bos 257 and eos 258; needs no file.

  Bytes that are not UTF-8 (half a code point, say) decode to U+FFFD.
  """
  return Tokenizer(
    encode=lambda text: list(text.encode('utf-8')),
    decode=lambda ids: bytes(int(i) for i in ids if i < 256).decode('utf-8', errors='replace'),
    chat=plain_chat,
    vocab_size=259,
    pad_id=256,
    bos_id=257,
    stop_ids=(258,),
  )


def characters(*, alphabet: str) -> Tokenizer:
  """One token a character: pad 0, eos 1, then the alphabet in its order.

  Raises:
    ValueError: a character stands twice in the alphabet, or (`encode`) is not in it.
  """
  ids = {c: i for i, c in enumerate(alphabet, start=2)}
  if len(ids) != len(alphabet):
    twice = [c for c, n in collections.Counter(alphabet).items() if n > 1]
    raise ValueError(f'the alphabet holds {twice} more than once')

  def encode(text):
    unknown = sorted(set(text) - set(ids))
    if unknown:
      raise ValueError(f'{unknown} in {text[:80]!r} is not in the alphabet {alphabet!r}')
    return [ids[c] for c in text]

  return Tokenizer(
    encode=encode,
    decode=lambda tokens: ''.join(alphabet[i - 2] for i in tokens if 2 <= i < len(ids) + 2),
    chat=plain_chat,
    vocab_size=len(alphabet) + 2,
    pad_id=0,
    bos_id=-1,
    stop_ids=(1,),
  )


def sentencepiece(*, path: str) -> Tokenizer:
  """A SentencePiece model file. Where the model has no pad token, eos pads.

  Raises:
    FileNotFoundError: `path` is not a file.
    ValueError: the model has no eos token, so that nothing could end a completion.
  """
  _need(pathlib.Path(path), 'a SentencePiece model file')
  model = spm.SentencePieceProcessor(model_file=path)
  eos, size = model.eos_id(), model.vocab_size()
  if eos < 0:
    raise ValueError(f'{path}: the model has no eos token')
  return Tokenizer(
    encode=lambda text: model.encode(text),
    decode=lambda ids: model.decode([int(i) for i in ids if i < size]),
    chat=plain_chat,
    vocab_size=size,
    pad_id=model.pad_id() if model.pad_id() >= 0 else eos,
    bos_id=model.bos_id(),
    stop_ids=(eos,),
  )


def huggingface(*, path: str) -> Tokenizer:
  """A Hugging Face directory: tokenizer.json, and beside it what a model release carries.

  * The chat template is chat_template.jinja, else `chat_template` of tokenizer_config.json.
  * Stop tokens are the eos of tokenizer_config.json and all of generation_config.json. The one that
    the template writes after an assistant's turn comes first: it ends what we train on.
  * `bos_id` is the bos token if the tokenizer itself opens a plain text with it, else -1: some
    models name a bos token that they never saw in front of text.

  Raises:
    FileNotFoundError: no tokenizer.json in `path`.
    ValueError: no stop token is named anywhere; (`chat`) there is no template, or it refuses.
  """
  folder = pathlib.Path(path)
  _need(folder / 'tokenizer.json', 'a Hugging Face tokenizer')
  model = hf.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  model.no_truncation()  # the file may ask for either, and would be obeyed in silence
  model.no_padding()
  config = _read_json(folder / 'tokenizer_config.json')
  generation = _read_json(folder / 'generation_config.json')

  special = {k: _text(v) for k, v in config.items() if k.endswith('_token') and v}
  special = {k: v for k, v in special.items() if isinstance(v, str)}
  eos = model.token_to_id(special['eos_token']) if 'eos_token' in special else None
  more = generation.get('eos_token_id', [])
  more = [more] if isinstance(more, int) else more or []
  stops = list(dict.fromkeys(i for i in [eos, *more] if i is not None))
  if not stops:
    raise ValueError(
      f'{path}: no stop token; expected eos_token in tokenizer_config.json '
      'or eos_token_id in generation_config.json'
    )

  def encode(text):
    return model.encode(text, add_special_tokens=False).ids

  chat = _no_chat(path)
  template = _template(folder, config)
  if template:
    chat = _jinja_chat(template, special)
    with contextlib.suppress(jinja2.TemplateError, ValueError):
      turns = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
      written = [i for i in encode(chat(turns, add_generation_prompt=False)) if i in stops]
      stops = list(dict.fromkeys(written[-1:] + stops))

  bos = model.token_to_id(special['bos_token']) if 'bos_token' in special else None
  opens = config.get('add_bos_token') or bos in model.encode('a').ids[:1]
  pad = model.token_to_id(special['pad_token']) if 'pad_token' in special else None
  return Tokenizer(
    encode=encode,
    decode=lambda ids: model.decode([int(i) for i in ids], skip_special_tokens=True),
    chat=chat,
    vocab_size=max(model.get_vocab(with_added_tokens=True).values()) + 1,
    pad_id=stops[0] if pad is None else pad,
    bos_id=bos if bos is not None and opens else -1,
    stop_ids=tuple(stops),
  )


def plain_chat(messages: Sequence[Mapping], add_generation_prompt: bool = True) -> str:
  """`role: content` lines, for tokenizers that bring no template of their own."""
  text = ''.join(f'{m["role"]}: {m["content"]}\n' for m in messages)
  return text + 'assistant: ' if add_generation_prompt else text


def _no_chat(path):
  def chat(messages, add_generation_prompt=True):
    raise ValueError(
      f'{path}: no chat template; expected chat_template.jinja or chat_template in '
      'tokenizer_config.json, or records with a prompt in place of messages'
    )

  return chat


def _template(folder, config):
  """The template's source, '' if there is none; of several named ones, the default."""
  if (folder / 'chat_template.jinja').is_file():
    return (folder / 'chat_template.jinja').read_text(encoding='utf-8')
  template = config.get('chat_template') or ''
  if isinstance(template, list):
    template = {t['name']: t['template'] for t in template}.get('default', '')
  return template


def _jinja_chat(source, special):
  """Templates come with downloaded weights, so they run in a sandbox that can change nothing."""
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols']
  )
  # jinja's own tojson escapes HTML, which models have not seen.
  environment.filters['tojson'] = lambda x, **how: json.dumps(x, **{'ensure_ascii': False, **how})
  environment.globals['raise_exception'] = _raise_exception
  environment.globals['strftime_now'] = lambda form: datetime.datetime.now().strftime(form)
  # Some templates mark the assistant's words with {% generation %}; the text is the same without.
  source = re.sub(r'(\{%[-+]?\s*)generation(\s*[-+]?%\})', r'\1if true\2', source)
  source = re.sub(r'(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})', r'\1endif\2', source)
  template = environment.from_string(source)

  def chat(messages, add_generation_prompt=True):
    messages = [dict(m) for m in messages]
    return template.render(
      messages=messages,
      add_generation_prompt=add_generation_prompt,
      tools=None,
      documents=None,
      **special,
    )

  return chat


def _raise_exception(message):
  raise ValueError(f'the chat template refuses: {message}')


def _text(token):
  """A special token is written as a string or as an object with its content."""
  return token['content'] if isinstance(token, dict) else token


def _read_json(path):
  return json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}


def _need(path, what):
  if not path.is_file():
    raise FileNotFoundError(f'{path}: expected {what}')


TABLE = table(byte, characters, sentencepiece, huggingface)
Part = Annotated[Callable, TABLE]
