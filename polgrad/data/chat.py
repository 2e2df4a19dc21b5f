"""Conversations as text: chat templates, and which tokens of a conversation the assistant said."""

import datetime
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence

import jinja2
import jinja2.sandbox
import numpy as np

MARK = '\ufdd0'  # Unicode keeps this code point for private marks; no text holds it

Chat = Callable[..., str]  # (messages, add_generation_prompt=True) -> text
Align = Callable[[str], tuple[list[int], list[tuple[int, int]]]]  # text -> ids, where each stands
Conversation = Callable[[Sequence[Mapping]], tuple[list[int], list[bool]]]


def plain_chat(messages: Sequence[Mapping], add_generation_prompt: bool = True) -> str:
  """`role: content` lines, for tokenizers that bring no template of their own."""
  text = ''.join(f'{m["role"]}: {m["content"]}\n' for m in messages)
  return text + 'assistant: ' if add_generation_prompt else text


def jinja_chat(source: str, special: Mapping[str, str], mark: str = '') -> Chat:
  """A chat template; what it writes within {% generation %} is put between two `mark`s.

  Templates come with downloaded weights, so they run in a sandbox that can change nothing.

  Args:
    source: the template.
    special: `bos_token`, `eos_token`, ... as text.

  Raises:
    ValueError: (of the function made) the template refuses the messages, or fails on them.
  """
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols']
  )
  # jinja's own tojson escapes HTML, which models have not seen.
  environment.filters['tojson'] = lambda x, **how: json.dumps(x, **{'ensure_ascii': False, **how})
  environment.filters['generation'] = lambda text: f'{mark}{text}{mark}'
  environment.globals['raise_exception'] = _raise_exception
  environment.globals['strftime_now'] = lambda form: datetime.datetime.now().strftime(form)
  source = re.sub(r'(\{%[-+]?\s*)generation(\s*[-+]?%\})', r'\1filter generation\2', source)
  source = re.sub(r'(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})', r'\1endfilter\2', source)
  template = environment.from_string(source)

  def chat(messages, add_generation_prompt=True):
    try:
      return template.render(
        messages=[dict(m) for m in messages],
        add_generation_prompt=add_generation_prompt,
        tools=None,
        documents=None,
        **special,
      )
    except (jinja2.TemplateError, TypeError) as error:
      raise ValueError(f'the chat template fails: {error}') from error

  return chat


def marks_generation(source: str) -> bool:
  """Whether a template says itself, by {% generation %}, what the assistant's words are."""
  return bool(re.search(r'\{%[-+]?\s*generation\s*[-+]?%\}', source))


def no_chat(path: str) -> Chat:
  """Stands in where a model has no template."""

  def chat(messages, add_generation_prompt=True):
    raise ValueError(
      f'{path}: no chat template; expected chat_template.jinja or chat_template in '
      'tokenizer_config.json, or records with a prompt in place of messages'
    )

  return chat


def make_conversation(
  align: Align,
  chat: Chat,
  *,
  stop_id: int,
  stops: Sequence[str] = (),
  marked: Chat | None = None,
) -> Conversation:
  """Makes `conversation(messages) -> (ids, trained)`, for messages that end with an assistant turn.

  Trained is every assistant turn with the stop token that ends it: what stands in the text between
  the prompt that a sampler would be given for that turn and the end of that token. Text after the
  last turn (a newline, mostly) is left out. The ids are those of the whole text at once, but no
  token reaches over the start of the last turn: before it stand exactly the sampler's prompt ids. A
  token that reaches over the start of an earlier turn belongs to where its first letter stands.

  Where the template writes no stop token after a turn, only the words are trained, and `stop_id`
  follows the last ones.

  Args:
    align: text to token ids and the span of characters that each stands for.
    chat: the template.
    stop_id: what ends the row if the template writes no stop token.
    stops: stop tokens as the template may write them.
    marked: the template with `MARK`s around the assistant's words, if it knows them; they are then
      trained as marked, with a stop token that follows them directly.

  Raises:
    ValueError: (of the function made) the messages do not end with an assistant turn or begin with
      one; the template changes earlier text or words as turns are added (some strip thoughts), so
      that no mask would be right; it ends a turn with something that is no stop token.
  """
  stops = tuple(stops)

  def conversation(messages):
    turns = [i for i, m in enumerate(messages) if m['role'] == 'assistant']
    if not turns or turns[-1] != len(messages) - 1:
      raise ValueError('a conversation to train on ends with an assistant turn')
    text = chat(messages, add_generation_prompt=False)
    cut = _start(chat, text, messages, turns[-1])
    if marked:
      spans = _marked_spans(marked(messages, add_generation_prompt=False), text, cut, stops)
    else:
      starts = [_start(chat, text, messages, i) for i in turns[:-1]] + [cut]
      spans = [
        _turn_span(text, start, limit, i, messages[i], stops)
        for start, limit, i in zip(starts, [*starts[1:], len(text)], turns)
      ]
    return tokens(text[: spans[-1][1]], cut, spans)

  def tokens(text, cut, spans):
    prompt, before = align(text[:cut])
    ids, offsets = align(text)
    n = len(prompt)
    if ids[:n] == prompt:
      turn, after = ids[n:], offsets[n:]
    else:  # a token reaches over the cut, where a sampler cannot draw one
      turn, after = align(text[cut:])
      after = [(cut + start, cut + end) for start, end in after]
    inside = np.zeros(len(text) + 1, bool)
    for start, end in spans:
      inside[start:end] = True
    places = [_first_letter(text, *o) for o in before]
    places += [max(cut, _first_letter(text, *o)) for o in after]
    ids, trained = prompt + turn, inside[places].tolist()
    if not text.endswith(stops):
      ids, trained = [*ids, stop_id], [*trained, True]
    return ids, trained

  return conversation


def _start(chat, text, messages, i):
  """Where turn `i` begins: at the end of the prompt that a sampler is given for it."""
  if i == 0:
    raise ValueError('a conversation cannot begin with the assistant: there is no prompt')
  prompt = chat(messages[:i])
  if not text.startswith(prompt):
    raise ValueError(
      f'message {i}: the prompt for this turn does not begin the conversation as the chat template '
      'writes it; give the turn as answer of a record of its own'
    )
  return len(prompt)


def _turn_span(text, start, limit, i, message, stops):
  """The turn in text[start:limit], through its stop token if there is one."""
  content = message.get('content') or ''
  if not isinstance(content, str):
    raise ValueError(f'message {i}: content must be text, got {content!r}')
  found = re.compile('|'.join(map(re.escape, stops))).search(text, start, limit) if stops else None
  if found:
    said = text[start : found.start()].rstrip()
    if content.strip() in said if message.get('tool_calls') else said.endswith(content.strip()):
      return start, found.end()
    raise ValueError(
      f'message {i}: the chat template does not write the content as it is before {found[0]!r}'
    )
  words = f'{re.escape(content)}|{re.escape(content.strip())}'
  bare = re.compile(rf'\s*?(?:{words})').match(text, start, limit)
  if not bare:
    raise ValueError(f'message {i}: the chat template does not write the content as it is')
  rest = text[bare.end() :].strip()
  if rest and limit == len(text):
    raise ValueError(
      f'message {i}: the chat template ends the turn with {rest!r}, which is none of the stop '
      f'tokens {list(stops)}; name it in eos_token_id of generation_config.json'
    )
  return start, bare.end()


def _marked_spans(marked, text, cut, stops):
  """Spans of the marked words: without space after their stop token, with one that follows."""
  pieces = marked.split(MARK)
  if ''.join(pieces) != text:
    raise ValueError(f'the messages hold {MARK!r}, a code point that is no character')
  ends = list(itertools.accumulate(map(len, pieces)))
  spans = []
  for start, end in zip(ends[0::2], ends[1::2]):
    said = text[start:end].rstrip()
    if said.endswith(stops):
      end = start + len(said)
    else:
      end += next((len(s) for s in stops if text.startswith(s, end)), 0)
    spans.append((start, end))
  if not spans or spans[-1][1] <= cut:
    raise ValueError('the chat template marks nothing of the last turn as generated')
  return spans


def _first_letter(text, start, end):
  """Where a token's text begins, spaces left out: ' word' stands where the word does."""
  piece = text[start:end]
  return start + len(piece) - len(piece.lstrip()) if piece.strip() else start


def _raise_exception(message):
  raise ValueError(f'the chat template refuses: {message}')
