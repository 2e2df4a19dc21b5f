"""Records to arrays, in NumPy; whoever owns the mesh puts them on devices.

A prompt is tokenised once, as it stands, and a completion is token ids from then on. Nothing is cut
to fit: a row that is too long is an error that names its record. Masks come from lengths, never
from token ids, so the pad id may be a stop id.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from polgrad.data.chat import plain_chat
from polgrad.data.tokenizers import Tokenizer
from polgrad.types import Batch, Prompts


def prompts(records: Sequence[Mapping], tokenizer: Tokenizer, *, length: int) -> Prompts:
  """Prompts for the sampler, left-padded to `length`; `id` of a record is its data set row.

  Raises:
    ValueError: a prompt that is empty or longer than `length` tokens, by record id.
  """
  rows = [_prompt(r, tokenizer) for r in records]
  for record, row in zip(records, rows):
    _check_length(record, len(row), length)
  tokens = np.full((len(rows), length), tokenizer.pad_id, np.int32)
  mask = np.zeros((len(rows), length), bool)
  for i, row in enumerate(rows):
    tokens[i, length - len(row) :] = row
    mask[i, length - len(row) :] = True
  ids = np.asarray([r['id'] for r in records], np.int32)
  return Prompts(tokens=tokens, mask=mask, ids=ids, records=tuple(records))


def supervised(records: Sequence[Mapping], tokenizer: Tokenizer, *, length: int) -> Batch:
  """prompt + answer + stop token, one record a row, right-padded; the mask is answer and stop.

  A record without `answer`, whose `messages` end with an assistant turn, is a whole conversation:
  the mask is every assistant turn, each with the stop token that ends it.

  Raises:
    ValueError: a row longer than `length` tokens, an empty prompt, a stop token inside an answer, a
      conversation that the chat template does not keep as it is.
  """
  return _lay([_supervised(r, tokenizer, length) for r in records], tokenizer, length)


def pairs(
  records: Sequence[Mapping], tokenizer: Tokenizer, *, length: int, prompt_length: int = 0
) -> Batch:
  """Two rows a record, chosen (label 1) then rejected (label 0), as in `supervised`.

  `group_ids` are 0, 0, 1, 1, ...: a preference pair is a group of two. With a `prompt_length`,
  completions begin at that column, and prompts are left-padded to it.

  Raises:
    ValueError: as `supervised`; a prompt longer than `prompt_length`, if there is one.
  """
  named = [(r, field) for r in records for field in ('chosen', 'rejected')]
  segments = [_segment(r, tokenizer, field, length) for r, field in named]
  starts = [0] * len(segments)
  if prompt_length:
    for i, ((record, _), (ids, mask)) in enumerate(zip(named, segments)):
      _check_length(record, mask.index(True), prompt_length)
      starts[i] = prompt_length - mask.index(True)
      _check_length(record, starts[i] + len(ids), length)
  rows = np.arange(len(segments), dtype=np.int32)
  return _lay(segments, tokenizer, length, starts).replace(
    group_ids=rows // 2, label=(1 - rows % 2).astype(np.float32)
  )


def _prompt(record, tokenizer):
  """The prompt's ids."""
  text = tokenizer.chat(record['messages']) if 'messages' in record else record['prompt']
  ids = _bos(record, tokenizer, tokenizer.encode(text))
  if not ids:
    raise ValueError(f'record {record["id"]}: the prompt has no tokens to condition on')
  return ids


def _bos(record, tokenizer, ids):
  """Opens a sequence with bos, once, where the tokenizer has one; a template writes its own."""
  writes_own = 'messages' in record and tokenizer.chat is not plain_chat
  if tokenizer.bos_id < 0 or writes_own or ids[:1] == [tokenizer.bos_id]:
    return ids
  return [tokenizer.bos_id, *ids]


def _supervised(record, tokenizer, length):
  """(ids, mask) of a prompt with its answer, or of a whole conversation."""
  if 'answer' in record or not _ends_with_assistant(record):
    return _segment(record, tokenizer, 'answer', length)
  try:
    said, mask = tokenizer.conversation(record['messages'])
  except ValueError as error:
    raise ValueError(f'record {record["id"]}: {error}') from error
  ids = _bos(record, tokenizer, said)
  _check_length(record, len(ids), length)
  return ids, [False] * (len(ids) - len(said)) + mask


def _segment(record, tokenizer, field, length):
  """(ids, mask): the completion, alone in the mask, ends with the stop token, exactly once."""
  if field not in record:
    raise ValueError(f'record {record["id"]}: no {field!r}, only {sorted(record)}')
  if _ends_with_assistant(record):
    raise ValueError(f'record {record["id"]}: {field!r} after messages that end with an assistant')
  prompt = _prompt(record, tokenizer)
  completion = list(tokenizer.encode(record[field]))
  if completion and completion[-1] in tokenizer.stop_ids:
    completion.pop()
  if set(completion) & set(tokenizer.stop_ids):
    raise ValueError(f'record {record["id"]}: a stop token inside {field!r}')
  completion.append(tokenizer.stop_ids[0])
  _check_length(record, len(prompt) + len(completion), length)
  return prompt + completion, [False] * len(prompt) + [True] * len(completion)


def _ends_with_assistant(record):
  return 'messages' in record and record['messages'][-1]['role'] == 'assistant'


def _lay(segments, tokenizer, length, starts=None):
  """Segments to a Batch, one a row, each from its start, or from the left."""
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


def _check_length(record, size, length):
  if size > length:
    raise ValueError(f'record {record["id"]}: {size} tokens, longer than the limit of {length}')
