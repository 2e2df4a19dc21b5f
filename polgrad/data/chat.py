"""Conversations as text: chat templates, and which tokens of a conversation are the assistant's."""

import datetime
import functools
import itertools
import json
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox
import jinja2.visitor
import numpy as np

MARK = '\ufdd0'  # a code point that Unicode reserves for internal use, so no text contains it

LARGEST = 20_000_000  # characters that a template may write, and numbers that its loops may count
# What a malformed template may raise.
REFUSED = (
  jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError,
  RecursionError,
)  # fmt: skip
# A tag that begins thoughts, such as <think> or [THINK].
THOUGHTS = re.compile(r'[<\[][\w:]*(?:think|thought|reason)\w*[>\]]', re.IGNORECASE)
# Names that a template gets from records, or that stand for functions.
GIVEN = (
  *('messages', 'documents', 'add_generation_prompt'),
  *('raise_exception', 'strftime_now'),
)
DATE = '2024-07-26'  # what Llama 3.2's template says where it is not told the date
Chat = Callable[..., str]  # (messages, add_generation_prompt=True, tools=None) -> text
Align = Callable[[str], tuple[list[int], list[tuple[int, int]]]]  # text -> ids, their spans in it
# (messages, tools=None, only_last=False) -> ids, and for each id whether it is trained
Conversation = Callable[..., tuple[list[int], list[bool]]]


def plain_chat(
  messages: Sequence[Mapping], add_generation_prompt: bool = True, tools: Sequence | None = None
) -> str:
  """One line `role: content` for each message, for tokenizers without a template.

  Raises:
    ValueError: there are tools.
  """
  if tools:
    raise ValueError('tools need a tokenizer with a chat template that reads them')
  text = ''.join(f'{m["role"]}: {m["content"]}\n' for m in messages)
  return text + 'assistant: ' if add_generation_prompt else text


def jinja_chat(
  source: str,
  special: Mapping[str, str],
  *,
  mark: str = '',
  date: str = DATE,
  options: Mapping[str, Any] = types.MappingProxyType({}),
  where: str = 'the chat template',
) -> Chat:
  """Makes a chat function of a Jinja template.

  Templates come with downloaded weights, so they run in a sandbox that cannot change anything.

  Args:
    source: text of the template.
    special: texts of special tokens by name: `bos_token`, `eos_token`, ...
    mark: put before and after every text that the template writes within {% generation %}.
    date: YYYY-MM-DD, what a template is told that asks for the date of today.
    options: further values that the template reads, by name, see `options_read`.
    where: file and key of the template, for errors.

  Raises:
    ValueError: the template cannot be read, or `date` is no date; or, from the function that is
      returned: the template refuses the messages or fails, or there are tools and it does not read them.
  """
  today = datetime.datetime.fromisoformat(date)
  environment = _environment()
  environment.filters['generation'] = lambda text: f'{mark}{text}{mark}'
  environment.globals['raise_exception'] = _raise_exception
  budget = _Budget()
  environment.globals['range'] = budget.range
  environment.filters['counted'] = budget.counted
  environment.globals['strftime_now'] = today.strftime
  try:
    read = environment.parse(_as_jinja(source))
    reads_tools = 'tools' in jinja2.meta.find_undeclared_variables(read)
    template = environment.from_string(_count(read))
  except REFUSED as error:
    raise ValueError(f'{where} cannot be read: {error}') from error

  def chat(messages, add_generation_prompt=True, tools=None):
    if tools and not reads_tools:
      raise ValueError('the record has tools, but the chat template does not read them')
    budget.reset()
    pieces = template.generate(
      messages=[dict(m) for m in messages],
      add_generation_prompt=add_generation_prompt,
      tools=tools or None,
      documents=None,
      **special,
      **options,
    )
    try:
      return ''.join(budget.write(piece) for piece in pieces)
    except REFUSED as error:
      raise ValueError(f'{where} fails: {error}') from error

  return chat


def options_read(source: str) -> set[str]:
  """Names of the values that may be set for a template that reads them, such as `enable_thinking`.

  Special tokens (`eos_token`, ...) are no options. A template that cannot be parsed has none.
  """
  environment = _environment()
  try:
    read = jinja2.meta.find_undeclared_variables(environment.parse(_as_jinja(source)))
  except REFUSED:
    return set()
  special = {name for name in read if name.endswith('_token')}
  return read - {*special, *GIVEN} - environment.globals.keys()


def _environment() -> '_Sandbox':
  """What templates are read in; its filter `generation` marks nothing."""
  made = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols'])
  made.filters['generation'] = str
  return made


def _as_jinja(source: str) -> str:
  """The template without {% generation %}, which Jinja lacks; a filter of this name does the same."""
  source = re.sub(r'(\{%[-+]?\s*)generation(\s*[-+]?%\})', r'\1filter generation\2', source)
  return re.sub(r'(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})', r'\1endfilter\2', source)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
  """A sandbox that refuses an expression with more than `LARGEST` characters or items.

  Otherwise 'a' * 10**12, a text that a loop doubles, or x.center(10**12) would fill the memory. What
  repetitions, widths and replacements would write is refused before it is made, all else after it.
  """

  intercepted_binops = frozenset(('*', '**', '+', '%'))

  def __init__(self, **settings):
    super().__init__(**settings)
    self.filters['tojson'] = _tojson
    self.filters = {name: _limited(name, fn) for name, fn in self.filters.items()}
    self.filters['joined'] = lambda texts: _small(''.join(map(str, texts)))

  def call_binop(self, context, operator, left, right):
    sized = [x for x in (left, right) if hasattr(x, '__len__')]
    counts = [x for x in (left, right) if isinstance(x, int)]
    if operator == '*' and sized and counts:
      _check_size(len(sized[0]) * counts[0])
    if operator == '**' and any(abs(x) > 1000 for x in counts):
      raise ValueError('it computes a power of large numbers')
    if operator == '%' and isinstance(left, str):
      _check_format(left)
    return _small(super().call_binop(context, operator, left, right))

  def call(self, context, function, *args, **kwargs):
    # A method of a text, such as 'a'.center, reads that text too. (Jinja wraps format and format_map.)
    owner = getattr(getattr(function, '__wrapped__', function), '__self__', None)
    name = getattr(function, '__name__', '')
    _check_arguments(name, [owner, *args] if isinstance(owner, str) else args, kwargs)
    return _small(super().call(context, function, *args, **kwargs))


def _limited(name: str, fn: Callable) -> Callable:
  """The filter `fn`, which then refuses what would make too large a text."""

  @functools.wraps(fn)
  def limited(*args, **kwargs):
    args = [_summed(x) if isinstance(x, Iterator) else x for x in args]
    _check_arguments(name, args, kwargs)
    return _small(fn(*args, **kwargs))

  return limited


def _tojson(value: Any, **how: Any) -> str:
  """JSON, without the escapes of HTML that Jinja's own filter writes: models are not trained on them."""
  indent = how.get('indent') or 0
  if (len(indent) if isinstance(indent, str) else indent) > 100:
    raise ValueError(f'tojson indents by more than 100: {indent!r:.20}')
  return json.dumps(value, **{'ensure_ascii': False, **how})


def _check_arguments(name: str, args: Sequence, kwargs: Mapping) -> None:
  """Refuses widths and repetitions that a function would turn into a huge text."""
  values = [*args, *kwargs.values()]
  numbers = [abs(x) for x in values if isinstance(x, int)]
  texts = [x for x in values if isinstance(x, str)]
  _check_size(max(numbers, default=0))
  inserted = max([*numbers, *map(len, texts[1:])], default=0)
  if name in ('format', 'format_map') and texts:
    _check_format(texts[0])
  if name == 'replace' and len(texts) == 3:
    _check_size(texts[0].count(texts[1]) * inserted)
  if name == 'indent' and texts:
    _check_size(len(texts[0].splitlines()) * inserted)
  if name == 'wordwrap' and texts:
    _check_size(len(texts[0]) * max(map(len, texts[1:]), default=1))
  if name == 'expandtabs' and texts:
    _check_size(texts[0].count('\t') * inserted)
  if name == 'join':
    separator = max(map(len, texts), default=0)
    for items in (x for x in values if isinstance(x, list | tuple)):
      _check_size(sum(separator + len(x) for x in items if isinstance(x, str)))


def _summed(items: Iterator) -> Iterator:
  """The items of a filter that makes one after the other, as long as all are not too large."""
  size = 0
  for item in items:
    size += len(item) if isinstance(item, str) else 1
    _check_size(size)
    yield item


def _check_format(text: str) -> None:
  if re.search(r'\d{8}', text):  # a width
    raise ValueError(f'it writes or counts more than {LARGEST}')


def _small(value: Any) -> Any:
  """The value, unless it is a text or a list that is too long."""
  if isinstance(value, str | list | tuple):
    _check_size(len(value))
  return value


def _check_size(size: int) -> None:
  if size > LARGEST:
    raise ValueError(f'it writes or counts more than {LARGEST}')


def _count(tree: jinja2.nodes.Template) -> jinja2.nodes.Template:
  """The template, in which filters count what loops run over and what `~` joins."""
  for loop in list(tree.find_all(jinja2.nodes.For)):
    loop.iter = _filtered(loop.iter, 'counted')
  return _Joined().visit(tree).set_environment(tree.environment)


def _filtered(node: jinja2.nodes.Expr, name: str) -> jinja2.nodes.Filter:
  return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Joined(jinja2.visitor.NodeTransformer):
  """Puts the filter `joined` in the place of the operator `~`."""

  def visit_Concat(self, node):
    self.generic_visit(node)
    return _filtered(jinja2.nodes.List(node.nodes, lineno=node.lineno), 'joined')


class _Budget:
  """How much a template may write and count in one rendering."""

  def reset(self):
    self._spent = 0

  def write(self, piece: str) -> str:
    self._spend(len(piece))
    return piece

  def range(self, *bounds: int) -> range:
    numbers = range(*bounds)
    self._spend(len(numbers))
    return numbers

  def counted(self, items: Iterable) -> Iterable:
    if hasattr(items, '__len__'):
      self._spend(len(items))
      return items
    return (self._passed(item) for item in items)

  def _passed(self, item: Any) -> Any:
    self._spend(1)
    return item

  def _spend(self, amount: int) -> None:
    self._spent += amount
    _check_size(self._spent)


def marks_generation(source: str) -> bool:
  """Whether a template marks the assistant's words with {% generation %}."""
  return bool(re.search(r'\{%[-+]?\s*generation\s*[-+]?%\}', source))


def no_chat(path: str) -> Chat:
  """A chat function that raises ValueError, for a model without a template."""

  def chat(messages, add_generation_prompt=True, tools=None):
    raise ValueError(
      f'{path}: no chat template; expected chat_template.jinja or chat_template in '
      'tokenizer_config.json, or records with a prompt in place of messages'
    )

  return chat


def check_written(chat: Chat, where: str) -> None:
  """Refuses a template that writes the same whatever the user says.

  Raises:
    ValueError: names the template.
  """
  asked = lambda text: chat([{'role': 'user', 'content': text}])
  try:
    same = asked('a') == asked('b')
  except ValueError:  # a template may refuse these messages
    return
  if same:
    raise ValueError(f'{where}: the chat template writes nothing of what a user turn says')


def reads_date(source: str) -> bool:
  """Whether a template asks for the date of today."""
  return 'strftime_now' in source


def opening(chat: Chat) -> str:
  """What a generation prompt writes of the assistant's turn itself, such as `<think>` and a newline.

  It begins where the generation prompt departs from how the template writes an assistant turn that is
  given, or at a tag that begins thoughts, if that is earlier; '' if nothing but space is left.
  """
  user, reply = {'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': MARK}
  try:
    prompt, before = chat([user]), chat([user], add_generation_prompt=False)
    given = [chat(m, add_generation_prompt=False) for m in ([user, reply], [user, reply, user])]
  except ValueError:  # a template may refuse these messages
    return ''
  cut = max(_common(prompt, text) for text in given)
  for tag in re.finditer(r'<[^<>\s]*>', prompt):  # <think> and </think> have a letter in common
    cut = tag.start() if tag.start() < cut < tag.end() else cut
  thoughts = THOUGHTS.search(prompt, len(before) if prompt.startswith(before) else cut)
  text = prompt[min(cut, thoughts.start()) if thoughts else cut :]
  return text if text.strip() else ''


def ending(chat: Chat) -> str:
  """What a template writes after the words of a last assistant turn; '' if it cannot be told."""
  turns = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': MARK}]
  try:
    return chat(turns, add_generation_prompt=False).partition(MARK)[2]
  except ValueError:  # a template may refuse these messages
    return ''


def _common(a: str, b: str) -> int:
  """How many characters two texts have in common at their beginning."""
  return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def make_conversation(
  align: Align,
  chat: Chat,
  *,
  stop_id: int,
  stops: Sequence[str] = (),
  marked: Chat | None = None,
) -> Conversation:
  """Makes `conversation(messages, tools=None, only_last=False) -> (ids, trained)`.

  The messages end with an assistant turn.

  `trained` is True for every assistant turn and the stop token that ends it. A turn is the text between
  the prompt that a sampler would get for it and the end of its stop token. Text after the last turn,
  such as a newline, is dropped. If the template writes no stop token after a turn, only the words are
  trained, and `stop_id` is added after the last turn. With `only_last`, earlier turns are not trained.

  The whole text is tokenised at once, except that no token crosses the start of the last turn, so that
  the ids before it are exactly those of the sampler's prompt. A token that crosses the start of an
  earlier turn is trained if its first letter is in the turn.

  Args:
    align: text to token ids, and the span of characters of each token.
    chat: the template.
    stop_id: id that is added if the template writes no stop token.
    stops: texts of the stop tokens that the template may write.
    marked: the template with a `MARK` before and after the assistant's words, if the template marks
      them. Then the marked words are trained, with a stop token that directly follows them.

  Raises:
    ValueError: from `conversation`: the messages do not end with an assistant turn, or begin with one;
      the template changes earlier text when turns are added (some remove thoughts), so that no mask
      would be right; a turn ends with text that is no stop token.
  """
  stops = tuple(stops)

  def conversation(messages, tools=None, only_last=False):
    write = functools.partial(chat, tools=tools)
    mark = functools.partial(marked, tools=tools) if marked else None
    text, cut, spans = _spans(write, mark, messages, stops, only_last)
    ids, trained = _tokens(align, text, cut, spans)
    if not text.endswith(stops):
      ids, trained = [*ids, stop_id], [*trained, True]
    return ids, trained

  return conversation


def _spans(chat, marked, messages, stops, only_last):
  """(text, cut, spans): the text through the last turn, the start of that turn, and what is trained."""
  turns = [i for i, m in enumerate(messages) if m['role'] == 'assistant']
  if not turns or turns[-1] != len(messages) - 1:
    raise ValueError('a conversation to train on ends with an assistant turn')
  text = chat(messages, add_generation_prompt=False)
  cut = _start(chat, text, messages, turns[-1])
  turns = turns[-1:] if only_last else turns
  if marked:
    spans = _marked_spans(marked(messages, add_generation_prompt=False), text, cut, stops)
    spans = [(a, b) for a, b in spans if b > cut] if only_last else spans
  else:
    # Each turn reaches at most to the start of the next one.
    starts = [_start(chat, text, messages, i) for i in turns[:-1]] + [cut]
    spans = [
      _turn_span(text, start, limit, i, messages[i], stops)
      for start, limit, i in zip(starts, [*starts[1:], len(text)], turns)
    ]
  return text[: spans[-1][1]], cut, spans


def _tokens(align, text, cut, spans):
  """(ids, trained) of a text, of which the spans are trained; no token crosses `cut`."""
  prompt, before = align(text[:cut])
  ids, offsets = align(text)
  n = len(prompt)
  if ids[:n] == prompt:
    turn, after = ids[n:], offsets[n:]
  else:  # a token crosses the cut, which no sampler could draw: tokenise the last turn separately
    turn, after = align(text[cut:])
    after = [(cut + start, cut + end) for start, end in after]
  # A token is trained if its first letter is in a span. (The last place is for empty tokens at the end.)
  inside = np.zeros(len(text) + 1, bool)
  for start, end in spans:
    inside[start:end] = True
  places = [_first_letter(text, *o) for o in before]
  places += [max(cut, _first_letter(text, *o)) for o in after]
  return prompt + turn, inside[places].tolist()


def _start(chat, text, messages, i):
  """Place in the text where turn `i` begins: the end of the prompt that a sampler would get for it."""
  if i == 0:
    raise ValueError('a conversation cannot begin with the assistant: there is no prompt')
  prompt = chat(messages[:i])
  if not text.startswith(prompt):
    raise ValueError(
      f'message {i}: the prompt for this turn does not begin the conversation as the chat template '
      'writes it; give the turn as the answer of a separate record'
    )
  return len(prompt)


def _turn_span(text, start, limit, i, message, stops):
  """The span of a turn in text[start:limit], including its stop token if there is one."""
  content = message.get('content') or ''
  if not isinstance(content, str):
    raise ValueError(f'message {i}: content must be text, got {content!r}')
  # With a stop token, what precedes it must end with the content, whose beginning the prompt may have
  # written. (With tool calls it must only contain the content, because the calls are written after it.)
  found = re.compile('|'.join(map(re.escape, stops))).search(text, start, limit) if stops else None
  if found:
    said, words = text[: found.start()].rstrip(), content.strip()
    if words in said[start:] if message.get('tool_calls') else said.endswith(words):
      return start, found.end()
    raise ValueError(
      f'message {i}: the chat template does not write the content as it is before {found[0]!r}'
    )
  # Without one, the turn must begin with the content, and only white space may follow the last turn.
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
  """Spans of the marked words, each ending with the stop token that is in it or directly after it."""
  # The marks alternate between the start and the end of marked words.
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
  """Place of the first character of a token that is not white space, or its start if there is none."""
  piece = text[start:end]
  return start + len(piece) - len(piece.lstrip()) if piece.strip() else start


def _raise_exception(message):
  raise ValueError(f'the chat template refuses: {message}')
