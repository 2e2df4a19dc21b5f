"""What a run remembers besides its arrays; it is part of the text of every checkpoint."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

# In the place of a checkpoint's number: the newest one, and that of the best metric.
NEWEST, BEST = -1, -2


@dataclasses.dataclass
class Progress:
  """Counts and marks of a run, changed in place.

  Attributes:
    tokens: tokens of all batches that updates have used, prompts included, padding not.
    metric: name of the metric whose best checkpoint is kept; '' for none.
    best: its best value so far; None: it was not measured, or never a number.
    best_step: number of the checkpoint with this value; -1 for none.
    waited: how often it was measured after that.
  """

  tokens: int = 0
  metric: str = ''
  best: float | None = None
  best_step: int = -1
  waited: int = 0

  def read(self, meta: Mapping[str, Any] | None) -> None:
    """Takes over what the text of a checkpoint holds; None and older texts hold nothing."""
    for field in dataclasses.fields(self):
      setattr(self, field.name, (meta or {}).get('progress', {}).get(field.name, field.default))

  def follow(self, metric: str, steps: Iterable[int]) -> None:
    """Starts or continues the search for the best value of a metric.

    Args:
      metric: its name; '' for none. For another metric than before, the search starts anew.
      steps: numbers of the checkpoints that exist. A best one that is not among them is forgotten.
    """
    if metric != self.metric:
      self.metric, self.best, self.best_step, self.waited = metric, None, -1, 0
    if self.best_step not in steps:
      self.best, self.best_step = None, -1

  def improved(self, value: float, step: int, *, largest: bool) -> bool:
    """Whether this value is the best so far, which is noted; NaN never is.

    Args:
      step: number of the checkpoint that holds the measured parameters.
      largest: the largest value is the best; otherwise the smallest.
    """
    before = self.best
    if math.isnan(value) or (
      before is not None and (value <= before if largest else value >= before)
    ):
      self.waited += 1
      return False
    self.best, self.best_step, self.waited = value, step, 0
    return True

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)
