"""Prompts that occur more than once, within a source or in two of them.

Two prompts are the same if their texts are equal after Unicode's compatibility form (NFKC), without
regard to case and to the amount of white space.
"""

import hashlib
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from polgrad.checks.findings import Finding, some, source_field


def normalised(text: str) -> str:
  """The text in which two prompts are compared."""
  return ' '.join(unicodedata.normalize('NFKC', text).casefold().split())


def asked_text(record: Mapping) -> str:
  """The text that a record asks: its prompt, or its messages before a last assistant turn."""
  if 'messages' not in record:
    return record['prompt']
  turns = list(record['messages'])
  if turns[-1]['role'] == 'assistant':
    turns = turns[:-1]
  return '\n'.join(f'{turn["role"]}: {turn["content"]}' for turn in turns)


def asked(record: Mapping) -> bytes:
  """A digest of what a record asks."""
  return _digest(asked_text(record))


def answered(record: Mapping) -> bytes:
  """A digest of the answer of a record, or of the completion that it prefers; b'' without one."""
  text = record.get('answer', record.get('chosen'))
  return b'' if text is None else _digest(str(text))


def _digest(text: str) -> bytes:
  data = normalised(text).encode('utf-8', 'surrogatepass')
  return hashlib.blake2b(data, digest_size=16).digest()


class Repeated(NamedTuple):
  """Rows that repeat an earlier prompt of their source."""

  rows: tuple[int, ...]  # without the first occurrence of each prompt
  first: tuple[int, ...]  # for each of them, the row that it repeats
  contradicting: tuple[int, ...]  # of these rows, those with another answer


def repeated(rows: Sequence[int], asked: Sequence[bytes], answered: Sequence[bytes]) -> Repeated:
  """The rows that ask what an earlier one asks; digests of `asked` and `answered` for each row."""
  seen, found = {}, []
  for row, question, answer in zip(rows, asked, answered):
    if question in seen:
      first, before = seen[question]
      found.append((row, first, answer != before))
    else:
      seen[question] = row, answer
  return Repeated(
    tuple(row for row, _, _ in found),
    tuple(first for _, first, _ in found),
    tuple(row for row, _, other in found if other),
  )


def shared(
  train: Sequence[tuple[int, bytes]], held_out: Sequence[tuple[int, bytes]]
) -> list[tuple[int, int]]:
  """(held-out row, training row) of held-out prompts that occur in the training data."""
  places = {}
  for row, digest in train:
    places.setdefault(digest, row)
  return [(row, places[digest]) for row, digest in held_out if digest in places]


def findings(
  path: str, found: Repeated, records: int, place: Callable[[int], str]
) -> list[Finding]:
  """Warnings of repeated prompts in the source of a section."""
  if not found.rows:
    return []
  row, first = found.rows[0], found.first[0]
  text = f'{len(found.rows)} of {records} records repeat the prompt of an earlier one'
  wrong = [Finding(source_field(path), f'{text} ({place(row)} that of {place(first)}, ...)')]
  if found.contradicting:
    rows = found.contradicting
    text = f'{len(rows)} of these have another answer ({some(rows, place)})'
    wrong.append(Finding(source_field(path), text, 'one of the answers may be wrong'))
  return wrong


def leaks(
  path: str,
  found: Sequence[tuple[int, int]],
  held_out: int,
  train: str,
  places: tuple[Callable[[int], str], Callable[[int], str]],
) -> list[Finding]:
  """A warning of held-out prompts that are trained on.

  Args:
    path, train: the sections of the evaluation, and of the phase that has these prompts too.
    found: of `shared`.
    held_out: number of held-out prompts that were compared.
    places: what a person calls a row of either.
  """
  if not found:
    return []
  count = len({row for row, _ in found})
  row, other = found[0]
  text = f'{count} of {held_out} held-out prompts also occur in {source_field(train)}'
  mend = 'their accuracy says nothing of unseen problems'
  return [
    Finding(source_field(path), f'{text} ({places[0](row)} is {places[1](other)}, ...)', mend)
  ]
