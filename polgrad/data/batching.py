"""Records to NumPy arrays of tokens.

One rule holds for all completions that data give, whether `answer`, `chosen`, `rejected` or the last
turn of `messages`: what is trained is what the chat template writes of the turn after the sampler's
prompt, through its stop token. So an empty block of thoughts that a template puts into the turn is
trained, and one that the generation prompt writes is not.

Some templates change the text of a turn, for example remove its thoughts. Then the text of `answer`,
`chosen` or `rejected` follows the prompt unchanged, except that its beginning is left out if the prompt
has written it already, such as `<think>`; a last turn of `messages` is refused. A `prompt` that is text
has no template: the completion follows it word for word.

With a `prefix` of the tokenizer, which is put between the prompt and what is sampled, completions follow
that word for word, and lose it where they begin with it.

A prompt is tokenised once, and the ids of a completion are never decoded and tokenised again. A record
with too many tokens raises `TooLong`, which names it. With `cut`, a prompt to sample from loses its
beginning instead (but not bos), and a row with its completion loses its end. Masks are computed from
lengths, never from token ids, so the pad id may also be a stop id.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from polgrad.data.chat import plain_chat
from polgrad.data.tokenizers import Tokenizer
from polgrad.types import Batch, Prompts

Overlong = Literal['error', 'drop', 'truncate']  # what is done with a record that is too long


class TooLong(ValueError):
  """A record has more tokens than there is room for."""


def fate(
  lay_out: Callable[..., object], record: Mapping, tokenizer: Tokenizer, overlong: Overlong
) -> Literal['kept', 'cut', 'dropped']:
  """Whether a record is used whole ('kept'), loses tokens ('cut') or is skipped ('dropped').

  Args:
    lay_out: `lay_out(records, tokenizer=..., cut=...)`, which raises `TooLong`.
    record: with `id`.
    overlong: what is done with a record that is too long: 'error', 'drop' or 'truncate'. With the last,
      a record is dropped if nothing of it would be left to train on.

  Raises:
    TooLong: the record is too long, and `overlong` is 'error'.
  """
  for cut in (False, True) if overlong == 'truncate' else (False,):
    try:
      lay_out([record], tokenizer=tokenizer, cut=cut)
    except TooLong:
      if overlong == 'error':
        raise
    else:
      return 'cut' if cut else 'kept'
  return 'dropped'


def prompts(
  records: Sequence[Mapping], tokenizer: Tokenizer, *, length: int, cut: bool = False
) -> Prompts:
  """Prompts for the sampler, left-padded to `length` tokens.

  Args:
    records: see `sources`; the field `id` is the row in the data set.
    tokenizer: tokenises the prompts.
    length: number of columns.
    cut: a longer prompt loses its beginning.

  Raises:
    TooLong: a prompt longer than `length` tokens, without `cut`; the message names the record.
    ValueError: an empty prompt.
  """
  rows = [_end(r, _prompt(r, tokenizer), tokenizer, length, cut) for r in records]
  tokens = np.full((len(rows), length), tokenizer.pad_id, np.int32)
  mask = np.zeros((len(rows), length), bool)
  for i, row in enumerate(rows):
    tokens[i, length - len(row) :] = row
    mask[i, length - len(row) :] = True
  ids = np.asarray([r['id'] for r in records], np.int32)
  return Prompts(tokens=tokens, mask=mask, ids=ids, records=tuple(records))


def supervised(
  records: Sequence[Mapping], tokenizer: Tokenizer, *, length: int, cut: bool = False
) -> Batch:
  """Rows for supervised training: prompt + answer + stop token, right-padded to `length` tokens.

  Each record is one row, whose mask covers the answer and the stop token. A record that has no `answer`
  and whose `messages` end with an assistant turn is a whole conversation: its mask covers every
  assistant turn with the stop token that ends it.

  Raises:
    TooLong: a row longer than `length` tokens; with `cut`, one of which nothing is left to train on.
    ValueError: an empty prompt, a stop token inside an answer, or a conversation whose text the chat
      template changes (see `chat.make_conversation`).
  """
  rows = [_begin(r, *_supervised(r, tokenizer), length, cut) for r in records]
  return _lay(rows, tokenizer, length)


def pairs(
  records: Sequence[Mapping],
  tokenizer: Tokenizer,
  *,
  length: int,
  prompt_length: int = 0,
  cut: bool = False,
) -> Batch:
  """Two rows for each record: prompt + chosen (label 1), then prompt + rejected (label 0).

  Rows are made as in `supervised`. `group_ids` are 0, 0, 1, 1, ...: a preference pair is a group of two
  rows.

  Args:
    records: with `chosen` and `rejected`.
    tokenizer: tokenises prompts and completions.
    length: number of columns.
    prompt_length: column at which all completions begin; prompts are left-padded to it. 0: rows begin
      at column 0, and completions directly after their prompt.
    cut: a prompt longer than `prompt_length` loses its beginning, a row longer than `length` its end.

  Raises:
    TooLong, ValueError: as in `supervised`; a prompt longer than `prompt_length`, unless that is 0.
  """
  segments, starts = [], []
  for record in records:
    for field in ('chosen', 'rejected'):
      ids, mask = _segment(record, tokenizer, field)
      prompt, start = mask.index(True), 0
      if prompt_length:  # the row moves to the right, so that its prompt ends at that column
        kept = _end(record, ids[:prompt], tokenizer, prompt_length, cut)
        ids, mask = kept + ids[prompt:], [False] * len(kept) + mask[prompt:]
        start = prompt_length - len(kept)
      segments.append(_begin(record, ids, mask, length, cut, start))
      starts.append(start)
  rows = np.arange(len(segments), dtype=np.int32)
  return _lay(segments, tokenizer, length, starts).replace(
    group_ids=rows // 2, label=(1 - rows % 2).astype(np.float32)
  )


class TokenRow(NamedTuple):
  """A row of a record with all its tokens, before it is cut or padded."""

  prompt: int  # number of tokens before the first one that is trained
  ids: list[int]
  trained: list[bool]  # for every token, whether a loss looks at it


def read(record: Mapping, tokenizer: Tokenizer, fields: Sequence[str] = ()) -> list[TokenRow]:
  """The rows of a record, however long they are; they raise the same errors as in a batch.

  Args:
    record: with `id`.
    tokenizer: tokenises it.
    fields: the completions that are read: `answer`, or `chosen` and `rejected`; () reads the prompt.

  Returns:
    One row for each field, or one for the prompt, of which nothing is trained.
  """
  if not fields:
    ids = _prompt(record, tokenizer)
    return [TokenRow(len(ids), ids, [False] * len(ids))]
  rows = []
  for field in fields:
    whole = field == 'answer'
    ids, mask = _supervised(record, tokenizer) if whole else _segment(record, tokenizer, field)
    rows.append(TokenRow(mask.index(True) if True in mask else len(ids), ids, mask))
  return rows


def completion(record: Mapping, tokenizer: Tokenizer, field: str = 'answer') -> list[int]:
  """The ids of a completion that follow the prompt, through its stop token."""
  ids, _ = _segment(record, tokenizer, field)
  return ids[len(_prompt(record, tokenizer)) :]


def prompt_text(record: Mapping, tokenizer: Tokenizer) -> str:
  """The text that is tokenised as the prompt of a record: with the chat template and the prefix.

  Raises:
    ValueError: the template refuses the messages, or nothing reads the tools.
  """
  tools = record.get('tools')
  if 'messages' in record:
    return tokenizer.chat(record['messages'], tools=tools) + tokenizer.prefix
  if tools:
    raise ValueError('a prompt that is text has no place for its tools')
  return record['prompt'] + tokenizer.prefix


def opening(record: Mapping, tokenizer: Tokenizer) -> str:
  """What the prompt of a record has written of the completion already."""
  return (tokenizer.opening if 'messages' in record else '') + tokenizer.prefix


def _prompt(record, tokenizer):
  """Token ids of the prompt, with bos where the tokenizer has one."""
  with _naming(record):
    ids = _bos(record, tokenizer, tokenizer.encode(prompt_text(record, tokenizer)))
  if not ids:
    raise ValueError(f'record {record["id"]}: the prompt has no tokens to condition on')
  return ids


def _bos(record, tokenizer, ids):
  """Puts bos before the ids, unless there is none, it is there already, or a chat template writes it."""
  writes_own = 'messages' in record and tokenizer.chat is not plain_chat
  if tokenizer.bos_id < 0 or writes_own or ids[:1] == [tokenizer.bos_id]:
    return ids
  return [tokenizer.bos_id, *ids]


def _supervised(record, tokenizer):
  """(ids, mask) of a prompt with its answer, or of a whole conversation."""
  if 'answer' in record or not _ends_with_assistant(record):
    return _segment(record, tokenizer, 'answer')
  with _naming(record):
    said, mask = tokenizer.conversation(record['messages'], tools=record.get('tools'))
  ids = _bos(record, tokenizer, said)
  return ids, [False] * (len(ids) - len(said)) + mask


def _segment(record, tokenizer, field):
  """(ids, mask) of a prompt with the completion in `field`, through its stop token."""
  if field not in record:
    raise ValueError(f'record {record["id"]}: no {field!r}, only {sorted(record)}')
  if _ends_with_assistant(record):
    raise ValueError(f'record {record["id"]}: {field!r} after messages that end with an assistant')
  prompt = _prompt(record, tokenizer)
  completion, trained = _turn(record, tokenizer, field) or _words(record, tokenizer, field)
  return prompt + completion, [False] * len(prompt) + trained


def _turn(record, tokenizer, field):
  """(ids, mask) of the completion as the template writes it after the prompt; None if it cannot."""
  if 'messages' not in record or tokenizer.prefix:
    return None
  asked, tools = record['messages'], record.get('tools')
  reply = {'role': 'assistant', 'content': record[field]}
  try:
    ids, mask = tokenizer.conversation([*asked, reply], tools=tools, only_last=True)
  except ValueError:  # the template changes the words, or they hold a stop token
    return None
  begin = len(tokenizer.encode(tokenizer.chat(asked, tools=tools)))
  return ids[begin:], mask[begin:]


def _words(record, tokenizer, field):
  """(ids, mask) of the completion word for word, and one stop token."""
  text = record[field]
  whole = opening(record, tokenizer)
  for opened in (whole, whole.strip(), tokenizer.prefix):
    if opened and text.startswith(opened):
      text = text.removeprefix(opened)
      break
  # The text may end with a stop token already; a stop token further inside would hide what follows it.
  with _naming(record):
    completion = list(tokenizer.encode(text))
  if completion and completion[-1] in tokenizer.stop_ids:
    completion.pop()
  if set(completion) & set(tokenizer.stop_ids):
    raise ValueError(f'record {record["id"]}: a stop token inside {field!r}')
  completion.append(tokenizer.stop_ids[0])
  return completion, [True] * len(completion)


@contextlib.contextmanager
def _naming(record):
  """Puts the record before the errors of a tokenizer or a template."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f'record {record["id"]}: {error}') from error


def _ends_with_assistant(record):
  return 'messages' in record and record['messages'][-1]['role'] == 'assistant'


def _lay(segments, tokenizer, length, starts=None):
  """A Batch with one segment (ids, mask) in each row, at the column that `starts` says (default 0)."""
  shape = len(segments), length
  tokens = np.full(shape, tokenizer.pad_id, np.int32)
  segment_ids = np.zeros(shape, np.int32)
  mask = np.zeros(shape, bool)
  for i, ((ids, trained), start) in enumerate(zip(segments, starts or [0] * len(segments))):
    where = slice(start, start + len(ids))
    tokens[i, where] = ids
    segment_ids[i, where] = 1
    mask[i, where] = trained
  return Batch(tokens=tokens, segment_ids=segment_ids, mask=mask)


def _end(record, ids, tokenizer, length, cut):
  """The ids; with `cut`, of too many ids the bos token (if any) and the last ones that fit after it."""
  if not cut or len(ids) <= length:
    _check_length(record, len(ids), length)
    return ids
  bos = ids[:1] if ids[0] == tokenizer.bos_id else []
  return bos + ids[len(ids) - length + len(bos) :]


def _begin(record, ids, mask, length, cut, start=0):
  """(ids, mask) of a row that begins at column `start`; with `cut`, as much of its beginning as fits."""
  if not cut:
    _check_length(record, start + len(ids), length)
  room = length - start
  if not any(mask[:room]):
    raise TooLong(f'record {record["id"]}: nothing to train on is left in {length} tokens')
  return ids[:room], mask[:room]


def _check_length(record, size, length):
  if size > length:
    raise TooLong(f'record {record["id"]}: {size} tokens, longer than the limit of {length}')
