"""Scores of parts of completions, from characters to tokens.

The function in `Phase.spans` scores parts of the text that verifiers see. `mark_rows` says which tokens
these are: the features `span_ids` and `span_scores`.
"""

import codecs
import collections
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from polgrad import exchanges
from polgrad.collect.base import Context
from polgrad.collect.scored import also_read, completions, failures_of
from polgrad.data import batching
from polgrad.data.tokenizers import Tokenizer
from polgrad.rewards.worker import Part
from polgrad.types import Batch

ARRAYS = {'span_ids': np.int32, 'span_scores': np.float32}


class _Placed(NamedTuple):
  """Scores of parts of the n rows that a process has asked about."""

  ids: np.ndarray  # i32[n, T], numbers of parts; -1 where a token is in none
  scores: np.ndarray  # f32[n, T]
  failed: np.ndarray  # bool[n]
  errors: dict[str, int]
  messages: list[str]


def mark_rows(
  batch: Batch, records: Sequence[dict], context: Context
) -> tuple[Batch, dict[str, int], list[str]]:
  """Fills in `span_ids` i32[B, T] and `span_scores` f32[B, T]; a row that failed is not `valid`.

  A token belongs to the first part that has one of its characters, so a part ends with a token and never
  within one. A part whose tokens all belong to the part before is left out.

  Args:
    batch: scored rows of one turn, NumPy.
    records: of the prompts, in the order of the rows.

  Returns:
    The batch, the number of failures by 'spans/kind', and the first of them in words.
  """
  tokenizer, rows_per_prompt = context.tokenizer, len(batch.tokens) // len(records)
  texts, lengths = completions(batch, records, tokenizer), batch.mask.sum(axis=1)
  # Each process scores the parts of some rows; rows that are not valid are not asked about.
  asked = np.flatnonzero(batch.valid)
  own = exchanges.strided(asked).tolist()
  owners = [records[i // rows_per_prompt] for i in own]

  def placed() -> _Placed:
    marked = context.mark(
      [texts[i] for i in own],
      owners,
      [int(lengths[i]) for i in own],
      [float(batch.rewards[i]) for i in own],
      also_read(batch, own, context.opened(owners), tokenizer),
    )
    ids = np.full((len(own), batch.tokens.shape[1]), -1, np.int32)
    scores, failed = np.zeros(ids.shape, np.float32), np.zeros(len(own), bool)
    for k, (row, record, parts) in enumerate(zip(own, owners, marked.parts)):
      failed[k] = parts is None
      mask = batch.mask[row]
      tokens = batch.tokens[row][mask]
      shown = characters(tokens, tokenizer, before=len(batching.opening(record, tokenizer)))
      ids[k, mask], scores[k, mask] = at_tokens(parts or [], shown)
    return _Placed(ids, scores, failed, marked.errors, marked.messages)

  # To the rows that were asked about, from all processes.
  found = exchanges.every(placed, 'scores of parts')
  of_all = lambda name: exchanges.interleaved([getattr(one, name) for one in found])
  spread = lambda name, fill: _spread(of_all(name), asked, batch.tokens.shape, fill)
  valid = batch.valid.copy()
  valid[asked] = ~of_all('failed')
  batch = batch.with_arrays(
    span_ids=spread('ids', -1).astype(np.int32),
    span_scores=spread('scores', 0).astype(np.float32),
    valid=valid,
  )
  return batch, *failures_of(found)


def metrics(batch: Batch) -> dict[str, float]:
  """The mean number of parts of a valid row, and the mean score of a part (nan without any)."""
  ids, scores = batch['span_ids'], batch['span_scores']
  begins = (ids >= 0) & (ids != np.pad(ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1))
  begins &= batch.valid[:, None]
  score = float(scores[begins].mean()) if begins.any() else float('nan')
  return {'spans': float(begins.sum() / max(batch.valid.sum(), 1)), 'span_score': score}


def _spread(found: np.ndarray, rows: np.ndarray, shape: tuple[int, int], fill: float) -> np.ndarray:
  """An array of this shape with rows that were found, and `fill` elsewhere."""
  out = np.full(shape, fill, found.dtype)
  out[rows] = found
  return out


def at_tokens(
  parts: Sequence[Part], shown: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
  """The number of the part of each token, i32[n], and its score f32[n]; -1 and 0 where there is none.

  Args:
    parts: (start, end, score) in characters, in the order of the text and without overlaps.
    shown: the characters [start, end) of each of the n tokens.

  >>> ids, scores = at_tokens([(0, 3, 1.0), (3, 4, -1.0)], [(0, 2), (2, 4), (4, 4)])
  >>> ids.tolist(), scores.tolist()
  ([0, 0, -1], [1.0, 1.0, 0.0])
  """
  ids, scores = np.full(len(shown), -1, np.int32), np.zeros(len(shown), np.float32)
  taken, number = collections.deque(parts), -1
  current = None  # the part that the last token belongs to
  for i, (start, end) in enumerate(shown):
    while taken and taken[0][1] <= start:
      taken.popleft()
    if taken and taken[0][0] < end and start < end:
      number += taken[0] is not current
      current = taken[0]
      ids[i], scores[i] = number, current[2]
  return ids, scores


def characters(
  tokens: Sequence[int], tokenizer: Tokenizer, *, before: int = 0
) -> list[tuple[int, int]]:
  """The characters [start, end) of a decoded text that each token shows.

  A character whose bytes are in several tokens belongs to each of them; a stop token shows none.

  Args:
    tokens: ids of the completion.
    before: characters of the text that precede what is decoded, such as the opening of a turn.
  """
  ids = [int(i) for i in tokens]
  text = tokenizer.decode(ids)
  found = _by_bytes(ids, tokenizer, text) or _by_prefixes(ids, tokenizer)
  return [(start + before, end + before) for start, end in found]


def _by_bytes(ids: list[int], tokenizer: Tokenizer, text: str) -> list[tuple[int, int]] | None:
  """`characters` by the bytes of each token; None where these do not give the text."""
  if tokenizer.pieces is None or not ids:
    return None
  table = tokenizer.pieces(False)
  piece = lambda i: table[i] if i < len(table) else b''
  opening = tokenizer.pieces(True)
  first = opening[ids[0]] if ids[0] < len(opening) else b''
  decoder = codecs.getincrementaldecoder('utf-8')('replace')
  found, made, number = [], '', 0  # number: characters that are complete
  for added in [first, *map(piece, ids[1:])]:
    start = number
    made += decoder.decode(added)
    number = len(made)
    pending = bool(decoder.getstate()[0])
    found.append((start, number + pending if added else start))
  return found if made + decoder.decode(b'', final=True) == text else None


def _by_prefixes(ids: list[int], tokenizer: Tokenizer) -> list[tuple[int, int]]:
  """`characters` by decoding each prefix, for tokenizers whose tokens have no bytes that are known."""
  ends = [len(tokenizer.decode(ids[:i])) for i in range(len(ids) + 1)]
  ends = list(itertools.accumulate(ends, max))  # half a character may be shown as more of them
  return [(a, min(b, ends[-1])) for a, b in itertools.pairwise(ends)]
