"""Records to arrays, in NumPy; whoever owns the mesh puts them on devices.

A prompt is tokenised once, as it stands, and a completion is token ids from then on. Nothing is cut
to fit: a row that is too long is an error that names its record. Masks come from lengths, never
from token ids, so the pad id may be a stop id.
"""

from collections.abc import Mapping, Sequence

import numpy as np

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

  Raises:
    ValueError: a row longer than `length` tokens, an empty prompt, a stop token inside an answer.
  """
  segments = [_segment(r, tokenizer, 'answer', length) for r in records]
  return _pack([[s] for s in segments], tokenizer, length)


def pairs(records: Sequence[Mapping], tokenizer: Tokenizer, *, length: int) -> Batch:
  """Two rows a record, chosen (label 1) then rejected (label 0), as in `supervised`.

  `group_ids` are 0, 0, 1, 1, ...: a preference pair is a group of two.

  Raises:
    ValueError: as `supervised`.
  """
  segments = [
    _segment(r, tokenizer, field, length) for r in records for field in ('chosen', 'rejected')
  ]
  rows = np.arange(len(segments), dtype=np.int32)
  return _pack([[s] for s in segments], tokenizer, length).replace(
    group_ids=rows // 2, label=(1 - rows % 2).astype(np.float32)
  )


def pack_supervised(
  records: Sequence[Mapping], tokenizer: Tokenizer, *, length: int, rows: int
) -> Batch:
  """As `supervised`, with several records a row: best-fit decreasing into `rows` rows.

  The longest record is placed first, each into the fullest row that still has room. Records of one
  row have segment ids 1, 2, ... and do not see each other.

  Raises:
    ValueError: as `supervised`, or the records do not fit into `rows` rows.
  """
  segments = [_segment(r, tokenizer, 'answer', length) for r in records]
  packed = [[] for _ in range(rows)]
  room = np.full(rows, length)
  for segment in sorted(segments, key=_size, reverse=True):
    fitting = np.flatnonzero(room >= _size(segment))
    if not fitting.size:
      total = sum(map(_size, segments))
      raise ValueError(f'{len(segments)} records of {total} tokens do not fit {rows}x{length}')
    row = fitting[np.argmin(room[fitting])]
    packed[row].append(segment)
    room[row] -= _size(segment)
  return _pack(packed, tokenizer, length)


def _prompt(record, tokenizer):
  """The prompt's ids. Where the tokenizer has a bos, it opens the sequence, once."""
  text = tokenizer.chat(record['messages']) if 'messages' in record else record['prompt']
  ids = list(tokenizer.encode(text))
  if tokenizer.bos_id >= 0 and ids[:1] != [tokenizer.bos_id]:
    ids = [tokenizer.bos_id, *ids]
  if not ids:
    raise ValueError(f'record {record["id"]}: the prompt has no tokens to condition on')
  return ids


def _segment(record, tokenizer, field, length):
  """(prompt ids, completion ids): the completion ends with the stop token, exactly once."""
  if field not in record:
    raise ValueError(f'record {record["id"]}: no {field!r}, only {sorted(record)}')
  prompt = _prompt(record, tokenizer)
  completion = list(tokenizer.encode(record[field]))
  if completion and completion[-1] in tokenizer.stop_ids:
    completion.pop()
  if set(completion) & set(tokenizer.stop_ids):
    raise ValueError(f'record {record["id"]}: a stop token inside {field!r}')
  completion.append(tokenizer.stop_ids[0])
  _check_length(record, len(prompt) + len(completion), length)
  return prompt, completion


def _size(segment):
  prompt, completion = segment
  return len(prompt) + len(completion)


def _pack(rows, tokenizer, length):
  """Lists of segments to a Batch, one list a row, from the left."""
  tokens = np.full((len(rows), length), tokenizer.pad_id, np.int32)
  segment_ids = np.zeros((len(rows), length), np.int32)
  mask = np.zeros((len(rows), length), bool)
  for i, segments in enumerate(rows):
    start = 0
    for number, (prompt, completion) in enumerate(segments, start=1):
      middle, end = start + len(prompt), start + len(prompt) + len(completion)
      tokens[i, start:end] = prompt + completion
      segment_ids[i, start:end] = number
      mask[i, middle:end] = True
      start = end
  return Batch(tokens=tokens, segment_ids=segment_ids, mask=mask)


def _check_length(record, size, length):
  if size > length:
    raise ValueError(f'record {record["id"]}: {size} tokens, longer than the limit of {length}')
