"""What a run remembers besides its arrays; it is part of the text of every checkpoint."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass
class Progress:
  """Counts and marks of a run, changed in place.

  Attributes:
    tokens: tokens of all batches that updates have used, prompts included, padding not.
  """

  tokens: int = 0

  @classmethod
  def read(cls, meta: Mapping[str, Any] | None) -> 'Progress':
    """That of a checkpoint, by its text; a new one where there is none."""
    known = {field.name for field in dataclasses.fields(cls)}
    stored = (meta or {}).get('progress', {})
    return cls(**{k: v for k, v in stored.items() if k in known})

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)
