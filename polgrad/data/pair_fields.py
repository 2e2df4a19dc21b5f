"""Numbers in records that losses read: of a record, or of the tokens of its completions."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polgrad.data.batching import Unusable, number
from polgrad.registry import suggest


def numbers(
  records: Sequence[Mapping],
  fields: Mapping[str, str],
  *,
  rows: int = 2,
  not_negative: Sequence[str] = (),
) -> dict[str, np.ndarray]:
  """Numbers of n records as arrays f32[rows * n], the same at all rows of a record.

  Args:
    records: n of them.
    fields: name of the array -> field of the record.
    rows: of a record.
    not_negative: names of arrays whose numbers must be at least 0.

  Raises:
    Unusable: a record lacks a field, or has no finite number there, or a negative one that must not be;
      the message names both.
  """
  found = {}
  for name, field in fields.items():
    values = [_number(r, r.get(field), field) for r in records]
    for record, value in zip(records, values):
      if name in not_negative and value < 0:
        raise Unusable(f'record {record["id"]}: {field} must be at least 0, got {value}')
    found[name] = np.repeat(values, rows).astype(np.float32)
  return found


def token_weights(records: Sequence[Mapping], mask: np.ndarray, *, cut: bool) -> np.ndarray:
  """`chosen_weights` and `rejected_weights` of the records at the tokens of their rows, f32[2 n, T].

  Each is a list with one number for each trained token, of which that of the stop token may be left out.
  Tokens without a number, and those of a record without the field, have the weight 1.

  Args:
    records: n of them.
    mask: bool[2 n, T], the trained tokens: rows 2i and 2i + 1 are the completions of record i.
    cut: rows may have lost their end.

  Raises:
    Unusable: a list of another length, or something that is no finite number.
  """
  weights = np.ones(mask.shape, np.float32)
  for row, trained in enumerate(mask):
    record, name = records[row // 2], ('chosen_weights', 'rejected_weights')[row % 2]
    found = [_number(record, x, name) for x in _list(record, name)]
    count = int(trained.sum())
    if found and not (len(found) in (count, count - 1) or (cut and len(found) > count)):
      raise Unusable(
        f'record {record["id"]}: {name} has {len(found)} numbers, but the completion has {count} '
        'tokens with the stop token'
      )
    places = np.flatnonzero(trained)[: len(found)]
    weights[row, places] = found[: len(places)]
  return weights


def _list(record: Mapping, name: str) -> list:
  found = record.get(name) or []
  if not isinstance(found, list):
    raise Unusable(f'record {record["id"]}: {name} must be a list of numbers, got {found!r}')
  return found


def _number(record: Mapping, x: Any, name: str) -> float:
  """A finite number of a field that the record must have."""
  if name not in record:
    raise Unusable(f'record {record["id"]}: there is no {name!r} here{suggest(name, record)}')
  return number(record, name, x, 'a finite number')
