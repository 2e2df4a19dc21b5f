"""Text to token ids and back. A `Tokenizer` is a tuple of functions and ids."""

import collections
import contextlib
import functools
import hashlib
import itertools
import json
import re
import types
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import sentencepiece as spm
import tokenizers as hf
from sentencepiece import sentencepiece_model_pb2

from polgrad import jsons, paths
from polgrad.data import chat as chats
from polgrad.data import records
from polgrad.data.chat import make_conversation, plain_chat
from polgrad.registry import suggest, table


class Tokenizer(NamedTuple):
  """What polgrad needs of a tokenizer."""

  encode: Callable[[str], list[int]]  # text -> ids; adds no special tokens
  decode: Callable[[Sequence[int]], str]  # ids -> text; leaves stop, pad and bos tokens out
  chat: chats.Chat  # (messages, add_generation_prompt=True, tools=None) -> text to encode
  conversation: chats.Conversation  # messages -> (ids, for each whether it is the assistant's)
  vocab_size: int  # all ids are smaller
  pad_id: int  # may equal a stop id, because masks are never computed from token ids
  bos_id: int  # the token that begins a sequence, -1 for none
  stop_ids: tuple[int, ...]  # tokens that end a completion; the first ends completions we train on
  # What the generation prompt of `chat` writes of the assistant's turn, for example `<think>`.
  opening: str = ''
  name: Callable[[int], str] = str  # what the files call a special token, such as <|im_end|>
  # What a collector or an evaluation puts between the prompt and what is sampled; verifiers see it.
  prefix: str = ''
  stop_strings: tuple[str, ...] = ()  # texts that end a completion, besides the stop tokens
  # first -> the bytes that each id adds to a decoded text, as its `first` token or a later one; None if
  # they are unknown.
  pieces: Callable[[bool], list[bytes]] | None = None
  # Context of a text that nothing precedes, in standard evaluation: the bos token that the files name,
  # even if the tokenizer puts it before no text, else eos. -1: the first stop token.
  context_id: int = -1

  def sampling(self, prefix: str, stop_strings: Sequence[str]) -> 'Tokenizer':
    """The tokenizer of a collector or an evaluation with this prefix and these stop strings."""
    return self._replace(prefix=prefix, stop_strings=tuple(stop_strings))


def digest(tokenizer: Tokenizer) -> str:
  """A digest of what each id means: equal for two tokenizers whose ids can be exchanged."""
  pieces = tokenizer.pieces(False) if tokenizer.pieces else []
  texts = pieces or [tokenizer.decode([i]).encode() for i in range(tokenizer.vocab_size)]
  found = hashlib.sha256(repr((tokenizer.vocab_size, sorted(tokenizer.stop_ids))).encode())
  for text in texts:
    found.update(len(text).to_bytes(4, 'little') + text)
  return found.hexdigest()[:16]


def check_same(own: Tokenizer, folder: str, where: str) -> None:
  """Refuses a second model whose files have another tokenizer; a folder without one is not checked.

  Special tokens may differ: a stop token of one model may have no role in the other.

  Args:
    own: of the run.
    folder: of the model.
    where: what names the folder, for the error.

  Raises:
    ValueError: an id means another text.
  """
  place = paths.path(folder)
  if not any((place / name).is_file() for name in ('tokenizer.json', 'tokenizer.model')):
    return
  other = huggingface(path=str(place))
  of = lambda x: {*x.stop_ids, x.pad_id, x.bos_id}
  for i in sorted({*range(min(own.vocab_size, other.vocab_size))} - of(own) - of(other)):
    texts = [one.decode([i]) for one in (own, other)]
    if texts[0] != texts[1]:
      raise ValueError(
        f'{where}: {folder} has another tokenizer: its id {i} is {texts[1]!r}, here it is '
        f"{texts[0]!r}. Distributions over tokens cannot be compared; the model's text can: make it the "
        'data of method=sft'
      )


def byte() -> Tokenizer:
  """UTF-8 bytes as ids 0 to 255, then pad 256, bos 257 and eos 258; needs no file.

  Bytes that are not valid UTF-8, such as half a code point, decode to U+FFFD.
  """

  def align(text):
    sizes = [len(c.encode('utf-8')) for c in text]
    places = [(i, i + 1) for i, size in enumerate(sizes) for _ in range(size)]
    return list(text.encode('utf-8')), places

  return Tokenizer(
    encode=lambda text: list(text.encode('utf-8')),
    decode=lambda ids: bytes(int(i) for i in ids if i < 256).decode('utf-8', errors='replace'),
    chat=plain_chat,
    conversation=make_conversation(align, plain_chat, stop_id=258),
    vocab_size=259,
    pad_id=256,
    bos_id=257,
    stop_ids=(258,),
    name={256: 'pad', 257: 'bos', 258: 'eos'}.get,
    pieces=lambda first: [bytes([i]) for i in range(256)],
  )


def characters(*, alphabet: str) -> Tokenizer:
  """One token for each character: pad 0, eos 1, then the characters of the alphabet in order.

  Args:
    alphabet: all characters that prompts and completions may have, each once.

  Raises:
    ValueError: the alphabet has a character twice; from `encode`, a character is not in the alphabet.
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

  def align(text):
    return encode(text), [(i, i + 1) for i in range(len(text))]

  return Tokenizer(
    encode=encode,
    decode=lambda tokens: ''.join(alphabet[i - 2] for i in tokens if 2 <= i < len(ids) + 2),
    chat=plain_chat,
    conversation=make_conversation(align, plain_chat, stop_id=1),
    vocab_size=len(alphabet) + 2,
    pad_id=0,
    bos_id=-1,
    stop_ids=(1,),
    name={0: 'pad', 1: 'eos'}.get,
    pieces=lambda first: [b'', b'', *(c.encode() for c in alphabet)],
  )


def sentencepiece(*, path: str) -> Tokenizer:
  """A SentencePiece model file. The pad token is eos if the model has none.

  Use `huggingface` for a folder that has special tokens and a chat template beside the model file.

  Raises:
    FileNotFoundError: `path` is not a file.
    ValueError: no SentencePiece model, or one that has no eos token, so nothing could end a completion.
  """
  model = _open_sentencepiece(paths.path(path))
  eos, size = model.eos_id(), model.vocab_size()
  if eos < 0:
    raise ValueError(f'{path}: the model has no eos token')
  pad = model.pad_id() if model.pad_id() >= 0 else eos
  names = dict(enumerate(map(model.id_to_piece, range(size))))
  return Tokenizer(
    encode=lambda text: model.encode(text),
    decode=_make_decode(
      model,
      _without_prefix(model),
      names,
      whole={i for i in names if model.is_control(i)},
      hidden={eos, pad, model.bos_id()},
    ),
    chat=plain_chat,
    conversation=make_conversation(functools.partial(_align, model), plain_chat, stop_id=eos),
    vocab_size=size,
    pad_id=pad,
    bos_id=model.bos_id(),
    stop_ids=(eos,),
    name=names.get,
  )


def huggingface(
  *,
  path: str,
  date: str = chats.DATE,
  template_options: dict = {},  # noqa: B006
) -> Tokenizer:
  """The tokenizer of a Hugging Face folder: tokenizer.json and the files beside it.

  * Without tokenizer.json, tokenizer.model (SentencePiece) is read, and the special tokens of the other
    files become single ids.
  * The chat template is chat_template.jinja, else `chat_template` of tokenizer_config.json. A record
    with tools is written by the template `tool_use`, if there is one of that name.
  * Stop tokens are the token with which the template ends an assistant turn, the eos token of
    tokenizer_config.json (else special_tokens_map.json) and all those of generation_config.json. The
    first one ends completions we train on: that of the template, or eos if the template writes none.
  * A decoded text lacks the stop tokens, pad and bos. It keeps all other special tokens, for example
    `<think>`, which is a special token in some models.
  * `bos_id` is the bos token only if the tokenizer puts it before a plain text, else -1. Some models
    name a bos token that never preceded text in their training.

  Args:
    path: the folder.
    date: what a template is told that asks for the date of today, as YYYY-MM-DD. It is part of the
      configuration, so prompts are the same on every day.
    template_options: values that the chat template reads, by name, for example `enable_thinking`. They
      hold for every prompt and every conversation that is trained; `tools`, a list or its JSON, for
      those of records that have none.

  Raises:
    FileNotFoundError: `path` has neither tokenizer.json nor tokenizer.model.
    ValueError: a file is malformed (the message names file and key); no file names a stop token, an id
      is not in the vocabulary, `date` is no date, or no template reads a template option; from `chat`,
      there is no template, or it refuses the messages; from `conversation`, see
      `chat.make_conversation`.
  """
  folder = paths.path(path)
  config = _read_json(folder / 'tokenizer_config.json', SETTINGS)
  special = _special_tokens(folder, config)
  # The vocabulary knows special tokens that the other files do not name.
  if not (folder / 'tokenizer.json').is_file() and (folder / 'tokenizer.model').is_file():
    vocabulary = _read_sentencepiece(folder, config, special)
  else:
    vocabulary = _read_fast(folder, special)
  align, ids, special = vocabulary.align, vocabulary.ids, vocabulary.special

  # The template, if there is one, says how a turn ends, and may open one.
  size = max(ids.values()) + 1
  templates = _templates(folder, config)
  _check_options(path, templates, template_options)
  chat, marked = _chats(path, templates, special, date, template_options)
  ends = [i for i in align(chats.ending(chat))[0] if i in vocabulary.added]
  stops = _stop_ids(folder, [*ends[:1], ids.get(special.get('eos_token'))], size)
  pad = ids.get(special.get('pad_token'), stops[0])
  texts = [token for token, i in ids.items() if i in stops]
  hidden = {*stops, pad, ids.get(special.get('bos_token'))}
  return Tokenizer(
    encode=lambda text: align(text)[0],
    decode=vocabulary.make_decode(hidden),
    chat=chat,
    conversation=make_conversation(align, chat, stop_id=stops[0], stops=texts, marked=marked),
    vocab_size=size,
    pad_id=pad,
    bos_id=ids[special['bos_token']] if vocabulary.opens else -1,
    stop_ids=tuple(stops),
    pieces=vocabulary.pieces and (lambda first: vocabulary.pieces(hidden, first)),
    opening=chats.opening(chat),
    name={i: token for token, i in ids.items()}.__getitem__,
    context_id=ids.get(special.get('bos_token'), ids.get(special.get('eos_token'), stops[0])),
  )


def _check_options(path, templates, options):
  """Refuses options that no template reads."""
  read = set().union(*(chats.options_read(text) for text, _ in templates.values()))
  for name in sorted(options.keys() - read):
    raise ValueError(
      f'template_options.{name}: the chat template of {path} does not read it{suggest(name, read)}'
    )


def _chats(path, templates, special, date, options):
  """The chat function of the templates, and one that marks the assistant's words, or None."""
  options = dict(options)
  usual = records.tools_of(options.pop('tools', []))
  make = lambda mark: {
    name: chats.jinja_chat(text, special, mark=mark, date=date, options=options, where=where)
    for name, (text, where) in templates.items()
  }

  def choose(made):
    def chat(messages, add_generation_prompt=True, tools=None):
      tools = tools or usual
      name = 'tool_use' if tools and 'tool_use' in made else 'default'
      return made[name](messages, add_generation_prompt, tools)

    return chat

  if 'default' not in templates:
    return chats.no_chat(path), None
  marks = all(chats.marks_generation(text) for text, _ in templates.values())
  return choose(make('')), choose(make(chats.MARK)) if marks else None


# What the keys of the files hold, of `jsons.KINDS`. Others are not read.
SETTINGS = {
  'added_tokens_decoder': 'an object', 'add_bos_token': 'true or false', 'legacy': 'true or false',
}  # fmt: skip
FLAGS = {
  'content': 'text', 'special': 'true or false', 'lstrip': 'true or false', 'rstrip': 'true or false',
}  # fmt: skip


def _special_tokens(folder, config):
  """Texts of the special tokens that the files name: bos_token, eos_token, ..."""
  map_file, config_file = folder / 'special_tokens_map.json', folder / 'tokenizer_config.json'
  special = {}
  for file, named in ((map_file, _read_json(map_file)), (config_file, config)):
    for key, token in named.items():
      # Keys such as add_bos_token end alike, but hold true or false.
      if key.endswith('_token') and token and not isinstance(token, bool):
        special[key] = _content(f'{file}: {key}', token)
  return special


def _content(where, token):
  """Text of a special token, which files write as a string or as an object with `content`."""
  text = token.get('content') if isinstance(token, dict) else token
  if not isinstance(text, str):
    raise ValueError(f'{where} must be text, or an object with content, got {jsons.shown(token)}')
  return text


def _stop_ids(folder, found, size):
  """The ids in `found` that are not None, and the stop ids of generation_config.json below `size`."""
  file = folder / 'generation_config.json'
  more = _read_json(file).get('eos_token_id')
  more = more if isinstance(more, list) else [] if more is None else [more]
  for i in more:
    jsons.check_id(f'{file}: eos_token_id', i, size)
  stops = list(dict.fromkeys(i for i in [*found, *more] if i is not None))
  if not stops:
    raise ValueError(
      f'{folder}: no stop token; expected eos_token in tokenizer_config.json '
      'or eos_token_id in generation_config.json'
    )
  return stops


class _Vocabulary(NamedTuple):
  """What `huggingface` needs of tokenizer.json or tokenizer.model."""

  align: chats.Align
  # ids of tokens to leave out -> the function from ids to text
  make_decode: Callable[[set[int]], Callable[[Sequence[int]], str]]
  ids: dict[str, int]  # ids by token, including added tokens
  added: frozenset[int]  # special tokens, and others that are found in a text before it is split
  special: dict[str, str]  # texts of bos_token, eos_token, ...
  opens: bool  # whether the tokenizer puts bos before a plain text
  # (ids to leave out, first) -> see `Tokenizer.pieces`
  pieces: Callable[[set[int], bool], list[bytes]] | None = None


def _read_fast(folder, special):
  """Reads tokenizer.json. Only its post-processor decides whether bos begins a text."""
  file = folder / 'tokenizer.json'
  _need(file, 'a Hugging Face tokenizer')
  with _reading(file):
    model = hf.Tokenizer.from_buffer(file.read_bytes())
    # The file may turn on truncation and padding, which would change texts without notice.
    model.no_truncation()
    model.no_padding()
    opens = special.get('bos_token') in model.encode('a').tokens[:1]
    model.post_processor = None  # it may remove spaces from the offsets
    ids = model.get_vocab(with_added_tokens=True)
  if not ids:
    raise ValueError(f'{file}: its vocabulary is empty')

  def align(text):
    encoding = model.encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets

  def make_decode(hidden):
    return lambda ids: model.decode(
      [int(i) for i in ids if int(i) not in hidden], skip_special_tokens=False
    )

  return _Vocabulary(
    align=align,
    make_decode=make_decode,
    ids=ids,
    added=frozenset(model.get_added_tokens_decoder()),
    special=special,
    opens=opens and special['bos_token'] in ids,
    pieces=_pieces_of(json.loads(model.decoder.__getstate__()) if model.decoder else None, ids),
  )


def _pieces_of(decoder, ids):
  """The function from (ids to leave out, first) to the bytes of each token, or None.

  Args:
    decoder: what tokenizer.json says of decoding. Known are bytes as letters (`ByteLevel`), and words
      that begin with U+2581, with single bytes as `<0x0A>` and perhaps without the first space.
    ids: ids by token.
  """
  steps = {
    step['type']: step for step in (decoder or {}).get('decoders', [decoder or {'type': ''}])
  }
  space = steps.get('Replace', {'pattern': {'String': '▁'}, 'content': ' '})
  strip = steps.get('Strip', {'content': ' ', 'start': 0, 'stop': 0})
  if steps.keys() == {'ByteLevel'}:
    letters = _byte_letters()
    read = lambda t: bytes(letters[c] for c in t) if letters.keys() >= set(t) else t.encode()
  elif (
    {'Replace', 'Metaspace'} & steps.keys()
    and steps.keys() <= {'Replace', 'Metaspace', 'ByteFallback', 'Fuse', 'Strip'}
    and (space['pattern'], space['content']) == ({'String': '▁'}, ' ')
    and (strip['content'], strip['stop']) == (' ', 0)
    and strip['start'] <= 1
  ):
    single = re.compile('<0x([0-9A-F]{2})>')

    def read(token):
      found = single.fullmatch(token) if 'ByteFallback' in steps else None
      return bytes([int(found[1], 16)]) if found else token.replace('▁', ' ').encode()

  else:
    return None
  lost = strip['start'] or steps.get('Metaspace', {}).get('prepend_scheme', 'never') != 'never'

  def pieces(hidden, first):
    out = [b''] * (max(ids.values()) + 1)
    for token, i in ids.items():
      out[i] = b'' if i in hidden else read(token)
    return [piece.removeprefix(b' ') for piece in out] if first and lost else out

  return pieces


def _byte_letters():
  """The bytes that letters of `ByteLevel` stand for: printable ones are themselves."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [i for i in range(256) if i not in printable]
  return {chr(i): i for i in printable} | {chr(256 + n): i for n, i in enumerate(others)}


def _read_sentencepiece(folder, config, special):
  """Reads tokenizer.model, and the special tokens of the files beside it.

  SentencePiece never recognises a control token such as </s> in a text, so special tokens are found with
  a regular expression, and only the text between them is given to SentencePiece.
  """
  model = _open_sentencepiece(folder / 'tokenizer.model')
  bare = _without_prefix(model)
  names, added, special = _pieces(folder, config, model, special)
  ids = {token: i for i, token in names.items()}
  added |= {token: {'special': True} for token in special.values() if token in ids.keys() - added}
  whole = {ids[token] for token in added if token in ids}
  # Longer tokens come first, so that a token is preferred to its own beginning.
  split = re.compile('|'.join(_pattern(t, added[t]) for t in sorted(added, key=len, reverse=True)))
  legacy = bool(config.get('legacy'))
  return _Vocabulary(
    align=lambda text: _align_between(text, split, ids, model, bare, legacy),
    make_decode=lambda hidden: _make_decode(model, bare, names, whole=whole, hidden=hidden),
    ids=ids,
    added=frozenset(whole),
    special=special,
    opens=special.get('bos_token') in ids and config.get('add_bos_token', True),
  )


def _without_prefix(model):
  """The same model, but it puts no space before a text: it reads what follows a special token."""
  proto = sentencepiece_model_pb2.ModelProto.FromString(model.serialized_model_proto())
  proto.normalizer_spec.add_dummy_prefix = False
  return spm.SentencePieceProcessor(model_proto=proto.SerializeToString())


def _make_decode(model, bare, names, *, whole, hidden):
  """Makes the function from ids to text of a SentencePiece model.

  Args:
    model, bare: with and without a space before the text; the first reads what begins the text.
    names: tokens by id; other ids are left out.
    whole: ids of tokens whose text is their name.
    hidden: ids that are left out.
  """

  def decode(ids):
    kept = [int(i) for i in ids if int(i) in names and int(i) not in hidden]
    text = ''
    for named, run in itertools.groupby(kept, key=whole.__contains__):
      pieces = [names[i] for i in run]
      text += ''.join(pieces) if named else (bare if text else model).decode_pieces(pieces)
    return text

  return decode


def _pieces(folder, config, model, special):
  """The tokens of a SentencePiece model and of the files beside it.

  Returns:
    names: tokens by id.
    added: flags of special and added tokens, which are found in a text before the rest is split.
    special: texts of bos_token, eos_token, ...
  """
  names = dict(enumerate(map(model.id_to_piece, range(model.vocab_size()))))
  own = {f'{k}_token': names.get(getattr(model, f'{k}_id')()) for k in ('bos', 'eos', 'unk', 'pad')}
  special = {k: v for k, v in own.items() if v} | special
  added = {names[i]: {'special': True} for i in names if model.is_control(i)}
  # Older models list added tokens in a file, newer ones in tokenizer_config.json.
  file = folder / 'added_tokens.json'
  for token, i in _read_json(file).items():
    jsons.check_id(f'{file}: {token}', i)
    _add(names, i, token, file)
    added[token] = {'special': True}
  for i, token in (config.get('added_tokens_decoder') or {}).items():
    where = f'{folder / "tokenizer_config.json"}: added_tokens_decoder'
    jsons.check_id(where, int(i) if i.isdecimal() and len(i) < 20 else i)
    jsons.check(where, {i: token}, {i: 'an object'})
    jsons.check(f'{where}.{i}', token or {}, FLAGS)
    text = _content(f'{where}.{i}', token)
    _add(names, int(i), text, where)
    added[text] = token
  return names, added, special


def _add(names, i, token, where):
  """Names the token with id `i`, which no other token may have."""
  if names.setdefault(i, token) != token:
    raise ValueError(f'{where}: {token!r} has the id {i} of {names[i]!r}')


def _align_between(text, split, ids, model, bare, legacy):
  """Ids and spans of a text: `split` finds special tokens, SentencePiece reads the text between them.

  `model` puts a space before the text, `bare` does not. `model` reads the beginning of the text, and
  `bare` reads what follows a special token. With `legacy`, `model` reads that too, unless it begins with
  a space.
  """
  tokens, offsets, end = [], [], 0

  def plain(start, end):
    piece = text[start:end]
    opens = start == 0 or (legacy and not piece.startswith(' '))
    found, places = _align(model if opens else bare, piece)
    tokens.extend(found)
    offsets.extend((start + a, start + b) for a, b in places)

  for match in split.finditer(text):
    plain(end, match.start())
    tokens.append(ids[match[match.lastindex]])
    offsets.append(match.span())
    end = match.end()
  plain(end, len(text))
  return tokens, offsets


def _pattern(token, flags):
  """A regular expression for a special token, in a group, and the white space that it absorbs."""
  before, after = (r'\s*' if flags.get(side) else '' for side in ('lstrip', 'rstrip'))
  return f'{before}({re.escape(token)}){after}'


def _align(model, text):
  """Ids of a text by a SentencePiece model, and the span of characters of each."""
  found = model.encode(text, return_type='offset_mapping')
  return found['ids'], found['offsets']


def templates(path: str) -> list[str]:
  """The chat templates of a Hugging Face folder, as texts; [] if there are none."""
  folder = paths.path(path)
  found = _templates(folder, _read_json(folder / 'tokenizer_config.json', SETTINGS))
  return [text for text, _ in found.values()]


def _templates(folder, config):
  """The templates `default` (it may have no name) and `tool_use` that exist: name -> (text, place)."""
  where = str(folder / 'tokenizer_config.json')
  template = config.get('chat_template') or ''
  if isinstance(template, list):
    named = [t for t in template if isinstance(t, dict) and {'name', 'template'} <= t.keys()]
    found = {t['name']: t['template'] for t in named if isinstance(t['name'], str)}
  else:
    found = template if isinstance(template, dict) else {'default': template}
  for name in found.keys() & TEMPLATES.keys():
    jsons.check(where, {'chat_template': found[name]}, {'chat_template': 'text'})
  found = {name: (text, f'{where}: chat_template') for name, text in found.items()}
  for name, place in TEMPLATES.items():
    file = folder / place
    if file.is_file():
      try:
        found[name] = file.read_text(encoding='utf-8'), str(file)
      except ValueError as error:
        raise ValueError(f'{file} is no text in UTF-8: {error}') from error
  return {name: found[name] for name in TEMPLATES if found.get(name, ('', ''))[0]}


# Files of the chat templates that are used.
TEMPLATES = {
  'default': 'chat_template.jinja',
  'tool_use': 'additional_chat_templates/tool_use.jinja',
}


def _read_json(path, kinds=types.MappingProxyType({})):
  """Content of a JSON file, {} if it does not exist; `kinds` are those of `jsons.check`."""
  content = jsons.read_object(path) if path.is_file() else {}
  jsons.check(str(path), content, kinds)
  return content


def _open_sentencepiece(path):
  _need(path, 'a SentencePiece model file')
  with _reading(path):
    model = spm.SentencePieceProcessor()
    model.LoadFromSerializedProto(path.read_bytes())
    return model


@contextlib.contextmanager
def _reading(path):
  """Turns what a library raises at a malformed file into a ValueError that names the file."""
  try:
    yield
  except Exception as error:  # tokenizers raises Exception itself
    raise ValueError(f'{path} is no tokenizer: {str(error)[:300]}') from error


def _need(path, what):
  if not path.is_file():
    raise FileNotFoundError(f'{path}: expected {what}')


TABLE = table('tokenizers', byte, characters, sentencepiece, huggingface)
Part = Annotated[Tokenizer, TABLE]
