"""Rows of preference pairs beside other pairs of their user, or beside samples of a policy."""

from collections.abc import Mapping, Sequence

import numpy as np

from polgrad.data import batching
from polgrad.data.batching import Unusable
from polgrad.data.sources import user_of
from polgrad.data.tokenizers import Tokenizer
from polgrad.types import Batch


def with_context(
  records: Sequence[Mapping],
  tokenizer: Tokenizer,
  *,
  length: int,
  context: int,
  user: str = 'user',
  cut: bool = False,
) -> Batch:
  """2 + 2 context rows for each record: its chosen and rejected completion, then those of its context.

  Rows are made as in `batching.pairs`. The mask covers the completions of the record itself, so that no
  loss looks at its context. Where the context has fewer pairs, the rows of the others are empty.

  Args:
    records: with `chosen`, `rejected`, `context` and a user, see `sources.with_context`.
    tokenizer: tokenises prompts and completions.
    length: number of columns.
    context: pairs of a context; of a longer one the first ones.
    user: field with the user.
    cut: as in `batching.pairs`.

  Raises:
    TooLong, ValueError: as in `batching.pairs`.
    Unusable: as there, of the record or of one in its context; or it names no user, or the user has no
      other pair.
  """
  found, real = [], []
  for record in records:
    others = _context(record, user)[:context]
    found += [record, *({**one, 'id': record['id']} for one in others)]
    found += [found[-1]] * (context - len(others))  # only for the shape: they become empty
    real += [True] * (1 + len(others)) + [False] * (context - len(others))
  batch = batching.pairs(found, tokenizer, length=length, cut=cut)
  size = 2 + 2 * context
  own = np.arange(len(batch.tokens)) % size < 2
  there = np.repeat(real, 2)[:, None]
  return batch.replace(
    tokens=np.where(there, batch.tokens, tokenizer.pad_id),
    segment_ids=np.where(there, batch.segment_ids, 0),
    mask=batch.mask & own[:, None],
    group_ids=np.arange(len(batch.tokens), dtype=np.int32) // size,
  )


def _context(record: Mapping, user: str) -> list[dict]:
  name = user_of(record, user)
  if name is None:
    raise Unusable(f'record {record["id"]}: no {user!r}, only {sorted(record)}')
  others = record.get('context')
  if not others:
    raise Unusable(
      f'record {record["id"]}: the user {name!r} has no other pair, from which the taste could be known'
    )
  return others


def with_samples(
  records: Sequence[Mapping], tokenizer: Tokenizer, *, length: int, cut: bool = False
) -> Batch:
  """Four rows for each record: its chosen and rejected completion, then two samples of a policy.

  Rows are made as in `batching.pairs`. The mask covers chosen and rejected alone. Two samples may be
  equal.

  Args:
    records: with `chosen`, `rejected` and `samples`, a list of texts of which the first two are taken.
    tokenizer: tokenises prompts and completions.
    length: number of columns.
    cut: as in `batching.pairs`.

  Raises:
    TooLong, ValueError: as in `batching.pairs`.
    Unusable: as there; or `samples` is no list of at least two texts, or one of them is empty.
  """
  pairs = batching.pairs(records, tokenizer, length=length, cut=cut)
  samples = batching.supervised(
    [{**r, 'answer': text} for r in records for text in _samples(r)],
    tokenizer,
    length=length,
    cut=cut,
  )
  place = np.arange(2 * len(pairs.tokens)) % 4 < 2
  # Rows 0 and 1 of each four are those of the pair.
  merged = {}
  for name in ('tokens', 'segment_ids', 'mask'):
    rows = np.empty((len(place), length), getattr(pairs, name).dtype)
    rows[place], rows[~place] = getattr(pairs, name), getattr(samples, name)
    merged[name] = rows
  merged['mask'] &= place[:, None]
  ids = np.arange(len(place), dtype=np.int32)
  return Batch(**merged, group_ids=ids // 4, label=(1 - ids % 2).astype(np.float32))


def _samples(record: Mapping) -> list[str]:
  texts = record.get('samples')
  name = f'record {record["id"]}'
  if not isinstance(texts, list) or len(texts) < 2:
    raise Unusable(f"{name}: 'samples' must be a list of at least two texts, got {texts!r:.80}")
  for text in texts[:2]:
    if not isinstance(text, str) or not text.strip():
      raise Unusable(f"{name}: 'samples' must be texts that are not empty, got {text!r:.80}")
  return texts[:2]
