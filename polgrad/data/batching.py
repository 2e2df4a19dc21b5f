"""Records to NumPy arrays of tokens.

One rule holds for all completions that data give, whether `answer`, `chosen`, `rejected` or the last
turn of `messages`: what is trained is what the chat template writes of the turn after the sampler's
prompt, through its stop token. So an empty block of thoughts that a template puts into the turn is
trained, and one that the generation prompt writes is not.

Some templates change the text of a turn, for example remove its thoughts. Then the text of `answer`,
`chosen` or `rejected` follows the prompt unchanged, except that its beginning is left out if the prompt
has written it already, such as `<think>`; a last turn of `messages` is refused. A `prompt` that is text
has no template: the completion follows it word for word.

If a record has `previous_steps`, a text, this follows the prompt word for word and is not trained, and
the completion follows it: one step of an answer is trained after the steps before it.

With a `prefix` of the tokenizer, which is put between the prompt and what is sampled, completions follow
that word for word, and lose it where they begin with it.

A prompt is tokenised once, and the ids of a completion are never decoded and tokenised again. A record
with too many tokens raises `TooLong`, which names it. With `cut`, a prompt to sample from loses its
beginning instead (but not bos), and a row with its completion loses its end. Masks are computed from
lengths, never from token ids, so the pad id may also be a stop id.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from polgrad.data.chat import plain_chat
from polgrad.data.tokenizers import Tokenizer
from polgrad.types import Batch, Prompts

PREVIOUS = 'previous_steps'  # field with the text that a completion continues: given, not trained
REQUEST = 'Reply with a better answer.'  # see `revision`
Overlong = Literal['error', 'drop', 'truncate']  # what is done with a record that is too long
OnUnusable = Literal['error', 'drop']  # what is done with one that `Unusable` is raised for


class TooLong(ValueError):
  """A record has more tokens than there is room for."""


class Unusable(ValueError):
  """A record holds nothing that could be learned, or a field of it is missing or makes no sense."""


class Reader(Protocol):
  """Who lays records out: a collector, or the evaluation. It may have `unusable: OnUnusable` too."""

  overlong: Overlong

  def lay_out(self, records: Sequence[dict], *, tokenizer: Tokenizer, cut: bool = False) -> object:
    """The arrays of the records; raises `TooLong` and `Unusable`."""


def fate(
  reader: Reader, record: Mapping, tokenizer: Tokenizer
) -> Literal['kept', 'cut', 'dropped', 'unusable']:
  """What becomes of a record: 'kept' whole, 'cut', or skipped: 'dropped' (too long) or 'unusable'.

  With overlong='truncate' a record is dropped if nothing of it would be left to train on.

  Args:
    reader: lays the record out; its settings say what is done with one that it cannot use.
    record: with `id`.

  Raises:
    TooLong: the record is too long, and `overlong` is 'error'.
    Unusable: the record is unusable, and `unusable` is not 'drop'.
  """
  for cut in (False, True) if reader.overlong == 'truncate' else (False,):
    try:
      reader.lay_out([record], tokenizer=tokenizer, cut=cut)
    except TooLong:
      if reader.overlong == 'error':
        raise
    except Unusable:
      if getattr(reader, 'unusable', 'error') == 'error':
        raise
      return 'unusable'
    else:
      return 'cut' if cut else 'kept'
  return 'dropped'


def drops(reader: Reader) -> bool:
  """Whether a reader skips or cuts some records instead of refusing them."""
  return reader.overlong != 'error' or getattr(reader, 'unusable', 'error') != 'error'


def prompts(
  records: Sequence[Mapping], tokenizer: Tokenizer, *, length: int, cut: bool = False
) -> Prompts:
  """Prompts for the sampler, left-padded to `length` tokens.

  Args:
    records: see `sources`; the field `id` is the row in the data set. A field `begun` holds the ids of
      tokens that the completion begins with; they belong to the prompt, so they are not trained.
    tokenizer: tokenises the prompts.
    length: number of columns.
    cut: a longer prompt loses its beginning.

  Raises:
    TooLong: a prompt longer than `length` tokens, without `cut`; the message names the record.
    ValueError: an empty prompt.
  """
  rows = [
    _end(r, _prompt(r, tokenizer) + list(r.get('begun', ())), tokenizer, length, cut)
    for r in records
  ]
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
  before: str = '',
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
    before: completion that a row has read before its own, with the prompt before each of them: 'other'
      is that of the pair's other row, another name is a field of the record, '' is none. The mask covers
      the row's own completion alone.
    cut: a prompt longer than `prompt_length` loses its beginning, a row longer than `length` its end.

  Raises:
    TooLong, ValueError: as in `supervised`; a prompt longer than `prompt_length`, unless that is 0.
    Unusable: a field is missing, a completion is empty, or both have the same tokens, perhaps because
      they were cut.
  """
  segments, starts = [], []
  for record in records:
    others = {'': ('', ''), 'other': ('rejected', 'chosen')}.get(before, (before, before))
    both = [
      _after(record, tokenizer, _completion(record, tokenizer, field), other)
      for field, other in zip(('chosen', 'rejected'), others)
    ]
    laid = [_place(record, *one, tokenizer, length, prompt_length, cut) for one in both]
    if both[0] == both[1]:
      raise Unusable(f'{_name(record)}: chosen and rejected have the same tokens')
    if laid[0] == laid[1]:
      raise Unusable(f'{_name(record)}: cut to {length} tokens, chosen and rejected are the same')
    segments += [segment for segment, _ in laid]
    starts += [start for _, start in laid]
  rows = np.arange(len(segments), dtype=np.int32)
  return _lay(segments, tokenizer, length, starts).replace(
    group_ids=rows // 2, label=(1 - rows % 2).astype(np.float32)
  )


def revisions(
  records: Sequence[Mapping],
  tokenizer: Tokenizer,
  *,
  length: int,
  request: str = '',
  cut: bool = False,
) -> Batch:
  """Six rows for each record: its two completions, after three prompts.

  | rows | prompt | `shown_label` |
  |---|---|---|
  | 0, 1 | that of the record | -1 |
  | 2, 3 | the `revision` that shows `rejected` | 0 |
  | 4, 5 | the `revision` that shows `chosen` | 1 |

  After each prompt the first row has `chosen` (label 1) and the second `rejected` (label 0). Rows are
  made as in `supervised`, and begin at column 0. `group_ids` are equal for the rows of a record.

  Args:
    records: with `chosen` and `rejected`.
    tokenizer: tokenises prompts and completions.
    length: number of columns.
    request: what asks for a better completion, see `revision`.
    cut: a row longer than `length` loses its end.

  Raises:
    TooLong, ValueError: as in `supervised`.
    Unusable: as in `pairs`.
  """
  segments = []
  for record in records:
    asked = [record]
    for shown in ('rejected', 'chosen'):
      _completion(record, tokenizer, shown)  # refuses what is missing or empty
      said = record.get(PREVIOUS, '') + record[shown]
      asked.append(revision(record, said, request))
    rows = [_completion(one, tokenizer, name) for one in asked for name in ('chosen', 'rejected')]
    laid = [_begin(record, *row, length, cut) for row in rows]
    if rows[0] == rows[1]:
      raise Unusable(f'{_name(record)}: chosen and rejected have the same tokens')
    if any(laid[i] == laid[i + 1] for i in (0, 2, 4)):
      raise Unusable(f'{_name(record)}: cut to {length} tokens, chosen and rejected are the same')
    segments += laid
  pattern = lambda *row: np.tile(np.asarray(row, np.float32), len(records))
  batch = _lay(segments, tokenizer, length).replace(
    group_ids=np.arange(len(segments), dtype=np.int32) // 6, label=pattern(1, 0, 1, 0, 1, 0)
  )
  return batch.with_arrays(shown_label=pattern(-1, -1, 0, 0, 1, 1))


def revision(record: Mapping, completion: str, request: str = '') -> dict:
  """The record whose prompt shows a completion and asks for a better one.

  In a conversation the completion is the assistant's turn, and the request the next turn of the user.
  Behind a prompt that is text both follow word for word.

  Args:
    record: with `messages` or `prompt`; its other fields stay.
    completion: what the prompt shows.
    request: what asks for a better one; `{prompt}` in it is the prompt, if that is text. '' is
      `REQUEST` in a conversation, and elsewhere the prompt once more.

  >>> revision({'prompt': '1+1='}, '3')
  {'prompt': '1+1=31+1='}
  >>> revision({'prompt': '1+1='}, '3', ' Wrong! {prompt}')
  {'prompt': '1+1=3 Wrong! 1+1='}
  """
  if 'messages' in record:
    shown = {'role': 'assistant', 'content': completion}
    asked = {'role': 'user', 'content': request or REQUEST}
    return {**record, 'messages': [*record['messages'], shown, asked]}
  again = (request or '{prompt}').replace('{prompt}', record['prompt'])
  return {**record, 'prompt': record['prompt'] + completion + again}


def feedback(
  records: Sequence[Mapping],
  tokenizer: Tokenizer,
  *,
  length: int,
  cut: bool = False,
  mismatched: bool = False,
) -> Batch:
  """One row for each record: prompt + answer, and its `label`, 1 desirable, 0 not, or a probability.

  Rows are made as in `supervised`, but of a conversation only the last assistant turn is trained.

  Args:
    records: with `label`, and `answer` or messages that end with an assistant turn.
    tokenizer: tokenises prompts and completions.
    length: number of columns.
    cut: a row longer than `length` loses its end.
    mismatched: also lay out each prompt with the completion of the next record that has another prompt,
      as the features `mismatched_tokens`, `mismatched_segment_ids` and `mismatched_mask`, [B, T]. Such a
      row is cut where it is too long. It is empty if nothing of the completion is left, or if there is
      no other prompt.

  Raises:
    TooLong, ValueError: as in `supervised`.
    Unusable: a field is missing, the completion is empty, or the label is none.
  """
  rows = [_completion(record, tokenizer, 'completion') for record in records]
  labels = [label(record) for record in records]
  segments = [_begin(record, *row, length, cut) for record, row in zip(records, rows)]
  batch = _lay(segments, tokenizer, length).replace(label=np.asarray(labels, np.float32))
  if not mismatched:
    return batch
  split = [(mask.index(True), ids, mask) for ids, mask in rows]
  others = [_mismatch(i, split, length) for i in range(len(split))]
  other = _lay(others, tokenizer, length)
  return batch.with_arrays(
    **{f'mismatched_{name}': getattr(other, name) for name in ('tokens', 'segment_ids', 'mask')}
  )


def lists(
  records: Sequence[Mapping],
  tokenizer: Tokenizer,
  *,
  length: int,
  size: int,
  prompt_length: int = 0,
  cut: bool = False,
) -> Batch:
  """`size` rows for each record: prompt + each of its `completions`, with their `rewards`.

  Rows are made as in `pairs`. `group_ids` are equal for the rows of a record. A record with fewer
  completions fills its group up with empty rows, which are not valid.

  Args:
    records: with `completions`, a list of texts, and `rewards`, a list of as many numbers.
    tokenizer: tokenises prompts and completions.
    length: number of columns.
    size: rows of a record.
    prompt_length: as in `pairs`.
    cut: as in `pairs`.

  Raises:
    TooLong, ValueError: as in `pairs`.
    Unusable: a field is missing or of another form, there are fewer than two completions or more than
      `size`, one of them is empty, a reward is no number, or all completions have the same tokens.
  """
  segments, starts, rewards = [], [], []
  for record in records:
    texts, values = _listed(record, size)
    each = [{**record, 'answer': text} for text in texts]
    rows = [_completion(one, tokenizer, 'completions', 'answer') for one in each]
    laid = [_place(record, *row, tokenizer, length, prompt_length, cut) for row in rows]
    if all(one == laid[0] for one in laid):
      why = f'cut to {length} tokens, ' if any(row != rows[0] for row in rows) else ''
      raise Unusable(f'{_name(record)}: {why}all completions have the same tokens')
    missing = size - len(laid)
    segments += [segment for segment, _ in laid] + [([], [])] * missing
    starts += [start for _, start in laid] + [0] * missing
    rewards += values + [0.0] * missing
  batch = _lay(segments, tokenizer, length, starts)
  return batch.replace(
    group_ids=np.arange(len(segments), dtype=np.int32) // size,
    rewards=np.asarray(rewards, np.float32),
    valid=batch.mask.any(axis=1),
  )


def judged(
  record: Mapping, tokenizer: Tokenizer, text: str, *, first: str | None = None
) -> list[int]:
  """The ids of a row that a reward model scores: the prompt and a completion, through its stop token.

  Args:
    record: with `id`; its prompt is read, and none of its completions.
    tokenizer: of the reward model.
    text: the completion.
    first: a completion that is read before, see `pairs`.

  Raises:
    ValueError: an empty prompt, or a stop token inside a completion.
  """
  asked = {k: v for k, v in record.items() if k in ('id', 'prompt', 'messages', 'tools')}
  texts = {'chosen': text} if first is None else {'chosen': text, 'first': first}
  row = _segment(asked | texts, tokenizer, 'chosen')
  return _after(asked | texts, tokenizer, row, '' if first is None else 'first')[0]


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
    fields: the completions that are read: `answer`; `completion`, which is the answer or the last turn
      of a conversation; `chosen` and `rejected`; or `completions`, a list. () reads the prompt.

  Returns:
    One row for each completion, or one for the prompt, of which nothing is trained.
  """
  if not fields:
    ids = _prompt(record, tokenizer)
    return [TokenRow(len(ids), ids, [False] * len(ids))]
  rows = []
  for field in fields:
    if field == 'answer':
      rows.append(_supervised(record, tokenizer))
    elif field == 'completions':
      texts, _ = _listed(record)
      each = [{**record, 'answer': text} for text in texts]
      rows += [_completion(one, tokenizer, field, 'answer') for one in each]
    else:
      rows.append(_completion(record, tokenizer, field))
  return [TokenRow(mask.index(True) if True in mask else len(ids), ids, mask) for ids, mask in rows]


def number(record: Mapping, field: str, value: Any, expected: str = 'a number') -> float:
  """A number that is finite as a float32; a text may hold it, as in CSV.

  Raises:
    Unusable: it is none; the message names the record, the field and what was `expected`.
  """
  try:
    found = float(value)
  except (TypeError, ValueError, OverflowError):
    found = math.nan
  if not abs(found) <= float(np.finfo(np.float32).max):
    raise Unusable(f'{_name(record)}: {field} must be {expected}, got {value!r:.80}')
  return found


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


def asking(record: Mapping, text: str) -> dict:
  """The record with another text in the place of its prompt, or of its last turn."""
  if 'messages' not in record:
    return {**record, 'prompt': text}
  *before, last = record['messages']
  return {**record, 'messages': [*before, {**last, 'content': text}]}


def header(record: Mapping, tokenizer: Tokenizer) -> int:
  """Tokens of a prompt before its text: bos, and what a chat template writes before the last turn."""
  if 'messages' not in record:
    return len(_bos(record, tokenizer, []))
  one, other = (_prompt(asking(record, text), tokenizer) for text in '01')
  return next((i for i, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), 0)


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


def _completion(record, tokenizer, name, field=''):
  """(ids, mask) of a prompt with a completion that must not be empty.

  Args:
    name: what the completion is called in errors: its field in the data. `completion` is the answer, or
      the last turn of a conversation.
    field: where it is in the record, if not under that name.
  """
  field = field or ('answer' if name == 'completion' else name)
  if name == 'completion' and field not in record and _ends_with_assistant(record):
    turn = record['messages'][-1]
    if not turn['content'].strip() and not turn.get('tool_calls'):
      raise Unusable(f'{_name(record)}: the last turn is empty')
    with _naming(record):
      said, mask = tokenizer.conversation(
        record['messages'], tools=record.get('tools'), only_last=True
      )
    ids = _bos(record, tokenizer, said)
    return ids, [False] * (len(ids) - len(said)) + mask
  if field not in record:
    raise Unusable(f'{_name(record)}: no {name!r}, only {sorted(record)}')
  if not record[field].strip():
    raise Unusable(f'{_name(record)}: {name!r} is empty')
  return _segment(record, tokenizer, field)


def label(record: Mapping) -> float:
  """The label of a record as a number from 0 to 1; true and false are 1 and 0.

  Raises:
    Unusable: there is none, or it is something else.
  """
  if 'label' not in record:
    raise Unusable(f"{_name(record)}: no 'label', only {sorted(record)}")
  given = record['label']
  if isinstance(given, str) and given.strip().lower() in ('true', 'false'):  # as CSV has them
    given = given.strip().lower() == 'true'
  value = number(record, 'label', given, 'true, false or a probability')
  if not 0 <= value <= 1:
    raise Unusable(f'{_name(record)}: label must be true, false or a probability, got {given!r}')
  return value


def _listed(record, size=0):
  """The completions of a record and their rewards; at most `size` of them, if that is not 0."""
  texts, values = record.get('completions'), record.get('rewards')
  for name, found in (('completions', texts), ('rewards', values)):
    if not isinstance(found, list):
      said = f'got {found!r}' if name in record else f'there is only {sorted(record)}'
      raise Unusable(f'{_name(record)}: {name} must be a list, {said}')
  if len(texts) != len(values) or len(texts) < 2:
    raise Unusable(
      f'{_name(record)}: {len(texts)} completions and {len(values)} rewards; expected as many of both, '
      'and at least two'
    )
  if size and len(texts) > size:
    raise Unusable(f'{_name(record)}: {len(texts)} completions, but the lists have room for {size}')
  for text in texts:
    if not isinstance(text, str):
      raise Unusable(f'{_name(record)}: completions must be texts, got {text!r}')
  return texts, [number(record, 'rewards', value) for value in values]


def _mismatch(row, rows, length):
  """(ids, mask) of the prompt of a row with the completion of the next row that has another prompt.

  Args:
    rows: (tokens of the prompt, ids, mask) of every record of the batch.
    length: most tokens of the result; ([], []) if no token to score fits.
  """
  begin, ids, _ = rows[row]
  prompt = ids[:begin]
  for other in [*rows[row + 1 :], *rows[:row]]:
    start, theirs, trained = other
    if theirs[:start] != prompt:
      mask = [False] * begin + trained[start:]
      if not any(mask[:length]):
        break
      return (prompt + theirs[start:])[:length], mask[:length]
  return [], []


def _name(record):
  return f'record {record["id"]}'


def _segment(record, tokenizer, field):
  """(ids, mask) of a prompt with the completion in `field`, through its stop token."""
  if field not in record:
    raise Unusable(f'{_name(record)}: no {field!r}, only {sorted(record)}')
  if _ends_with_assistant(record):
    raise ValueError(f'record {record["id"]}: {field!r} after messages that end with an assistant')
  prompt = _prompt(record, tokenizer)
  if PREVIOUS in record:  # the completion continues a turn that the template has no end for
    steps = _previous(record, tokenizer)
    completion, trained = _words(record, tokenizer, field)
    return prompt + steps + completion, [False] * len(prompt + steps) + trained
  completion, trained = _turn(record, tokenizer, field) or _words(record, tokenizer, field)
  return prompt + completion, [False] * len(prompt) + trained


def _after(record, tokenizer, row, other):
  """A row (ids, mask) behind the prompt with the completion in the field `other`; see `pairs`."""
  if not other:
    return row
  first, _ = _segment(record, tokenizer, other)
  ids, mask = row
  return first + ids, [False] * len(first) + mask


def _previous(record, tokenizer):
  """The ids of what the model has said before the completion."""
  if not isinstance(record[PREVIOUS], str):
    raise ValueError(f'record {record["id"]}: {PREVIOUS} must be text, got {record[PREVIOUS]!r}')
  with _naming(record):
    return list(tokenizer.encode(record[PREVIOUS]))


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


def _place(record, ids, mask, tokenizer, length, prompt_length, cut):
  """((ids, mask), column) of a row whose prompt ends at column `prompt_length`, or begins at 0."""
  start = 0
  if prompt_length:  # the row moves to the right
    prompt = mask.index(True)
    kept = _end(record, ids[:prompt], tokenizer, prompt_length, cut)
    ids, mask = kept + ids[prompt:], [False] * len(kept) + mask[prompt:]
    start = prompt_length - len(kept)
  return _begin(record, ids, mask, length, cut, start), start


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


def widened(prompts: Prompts, columns: int, pad_id: int) -> Prompts:
  """The prompts (NumPy) with that many further columns of padding in front."""
  widen = lambda x, fill: np.pad(x, ((0, 0), (columns, 0)), constant_values=fill)
  return prompts.replace(tokens=widen(prompts.tokens, pad_id), mask=widen(prompts.mask, False))


def check_text(field: str, text: str, tokenizer: Tokenizer) -> None:
  """Refuses the text of a setting that has characters without a token.

  Raises:
    ValueError: the message begins with `field`.
  """
  try:
    tokenizer.encode(text)
  except ValueError as error:
    raise ValueError(f'{field}: {error}') from error


def check_label(ids: Sequence[int], most: int) -> None:
  """Refuses a label of more than `most` tokens.

  Raises:
    ValueError: the message begins with `label`.
  """
  if len(ids) > most:
    raise ValueError(f'label: a label has {len(ids)} tokens, but label_length is {most}')


def places(seen: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
  """The columns bool[B, T] before the first one that is seen in each row: `sizes` of them."""
  first = np.argmax(seen, axis=1)[:, None]
  column = np.arange(seen.shape[1])[None, :]
  return (column >= first - np.asarray(sizes)[:, None]) & (column < first)


def behind(prompts: Prompts, label: Sequence[int]) -> Prompts:
  """The prompts behind one label."""
  where = places(prompts.mask, [len(label)] * len(prompts.mask))
  tokens = prompts.tokens.copy()
  tokens[where] = np.tile(label, len(tokens))
  return prompts.replace(tokens=tokens, mask=prompts.mask | where)
