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
    best_is: 'max' or 'min', which of its values is the best.
    best: its best value so far; None: it was not measured, or never a number.
    best_step: number of the checkpoint with this value; -1 for none.
    waited: how often it was measured after that.
    phase: name of the phase of `recent`.
    recent: the last values of the metric by which a phase sees that it is on a plateau.
  """

  tokens: int = 0
  metric: str = ''
  best_is: str = 'max'
  best: float | None = None
  best_step: int = -1
  waited: int = 0
  phase: str = ''
  recent: tuple[float, ...] = ()

  def read(self, meta: Mapping[str, Any] | None) -> None:
    """Takes over what the text of a checkpoint holds; None and older texts hold nothing."""
    for field in dataclasses.fields(self):
      setattr(self, field.name, (meta or {}).get('progress', {}).get(field.name, field.default))
    self.recent = tuple(self.recent)

  @property
  def measured(self) -> bool:
    """Whether there is such a metric for sure."""
    return self.best is not None or self.waited > 0

  def follow(self, metric: str, best_is: str, steps: Iterable[int]) -> None:
    """Starts or continues the search for the best value of a metric.

    Args:
      metric: its name; '' for none. For another metric than before, the search starts anew.
      best_is: 'max' or 'min'; for the other one than before, the search starts anew.
      steps: numbers of the checkpoints that exist. A best one that is not among them is forgotten.
    """
    if (metric, best_is) != (self.metric, self.best_is):
      self.metric, self.best_is = metric, best_is
      self.best, self.best_step, self.waited = None, -1, 0
    if self.best_step not in steps:
      self.best, self.best_step = None, -1

  def improved(self, value: float, step: int) -> bool:
    """Whether this value is the best so far, which is noted; NaN and infinity never are.

    Args:
      step: number of the checkpoint that holds the measured parameters.
    """
    before = self.best
    better = before is None or (value > before if self.best_is == 'max' else value < before)
    if not math.isfinite(value) or not better:
      self.waited += 1
      return False
    self.best, self.best_step, self.waited = value, step, 0
    return True

  def note(self, phase: str, value: float, most: int) -> None:
    """Notes a value of a phase, of whose values the last `most` are kept; NaN is not noted."""
    before = self.recent if phase == self.phase else ()
    noted = (*before, float(value)) if math.isfinite(value) else before
    self.phase, self.recent = phase, noted[-most:]

  def on_plateau(self, phase: str, window: int) -> bool:
    """Whether the last `window` values of a phase have no larger mean than the `window` before them."""
    if not window or phase != self.phase or len(self.recent) < 2 * window:
      return False
    values = self.recent[-2 * window :]
    return sum(values[window:]) <= sum(values[:window])

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)
