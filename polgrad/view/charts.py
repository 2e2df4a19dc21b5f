"""Curves of metrics as numbers for SVG: one small chart a metric, with a curve a run."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from polgrad import report

WIDTH, HEIGHT = 320, 170  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 16, 20  # margins of the plot
POINTS = 300  # largest number of points of a curve; of more, neighbours are averaged
DOTS = 30  # points of a curve that show their numbers under the pointer

# Families of metrics, in the order of the page: the beginnings of their names.
FAMILIES = {
  'Reward': ('evaluation/', 'reward', 'accuracy', 'margin'),
  'Loss': ('loss', 'grad_norm', 'skipped', 'silent'),
  'Distance to the sampler and the reference': (
    *('kl', 'sampler_', 'effective_', 'ratio_', 'kept_', 'staleness'),
  ),
  'Completions': ('length', 'truncated', 'entropy', 'verifier_', 'records/'),
  'Turns': ('turns', 'environment'),
  'Speed': ('seconds', 'tokens_per_second', 'rows_forwarded'),
}
OTHER = 'Other'


class Curve(NamedTuple):
  """One run in a chart; points are texts of SVG."""

  run: int
  points: str
  smooth: str  # the running mean; '' where the points are few
  dots: list[tuple[float, float, str]]  # x, y, what the pointer shows
  last: str


class Chart(NamedTuple):
  """One metric."""

  name: str
  curves: list[Curve]
  x_ticks: list[tuple[float, str]]
  y_ticks: list[tuple[float, str]]
  phases: list[tuple[float, str]]  # where phases begin


def families(runs: Sequence[Sequence[Mapping]]) -> list[tuple[str, list[Chart]]]:
  """The charts of all metrics that change, by family; `runs` are their rows of metrics.jsonl."""
  found = {name: [] for name in (*FAMILIES, OTHER)}
  for name in metrics(runs):
    if name not in constants(runs):
      found[family(name)].append(chart(name, runs))
  return [(name, charts) for name, charts in found.items() if charts]


def metrics(runs: Sequence[Sequence[Mapping]]) -> list[str]:
  """The names of all metrics, sorted; those of the evaluation first."""
  names = {n for rows in runs for row in rows for n in row if n not in ('step', 'phase')}
  return sorted(names, key=lambda name: (not name.startswith('evaluation/'), name))


def constants(runs: Sequence[Sequence[Mapping]]) -> dict[str, str]:
  """The metrics with one value in all rows of all runs, or without a number."""
  found = {}
  for name in metrics(runs):
    values = {float(row[name]) for rows in runs for row in rows if finite(row.get(name))}
    if len(values) < 2:
      found[name] = number(values.pop()) if values else 'no number'
  return found


def family(name: str) -> str:
  return next((f for f, begins in FAMILIES.items() if name.startswith(begins)), OTHER)


def finite(x: object) -> bool:
  """Whether a value of a row is a number that can be drawn."""
  return isinstance(x, int | float) and math.isfinite(x) and abs(x) < 1e300


def number(x: float, digits: int = 4) -> str:
  """A number in at most `digits` digits, with a minus sign of its full width."""
  return f'{x:.{digits}g}'.replace('-', '\N{MINUS SIGN}')


def labels(ticks: Sequence[float]) -> list[str]:
  """The ticks as texts, with as many digits as it takes to tell them apart, at least four."""
  written = ([number(t, digits) for t in ticks] for digits in range(4, 18))
  return next(texts for texts in written if len(set(texts)) >= len(set(ticks)))


def chart(name: str, runs: Sequence[Sequence[Mapping]]) -> Chart:
  """The curves of one metric, on common axes."""
  data = [points(rows, name) for rows in runs]
  every = np.concatenate([x for x in data if len(x)])
  x_scale = scale(every[:, 0], LEFT, WIDTH - RIGHT, whole=True)
  y_scale = scale(every[:, 1], HEIGHT - BOTTOM, TOP)
  place = lambda x, y: (x_scale.place(x), y_scale.place(y))
  curves = []
  for run, values in enumerate(data):
    if not len(values):
      continue
    mean = np.stack(report.running_mean(*values.T), axis=1)
    line = mean if len(mean) else values
    dots = [
      (*place(x, y), f'update {number(x)}: {number(y)}') for x, y in line[:: -(-len(line) // DOTS)]
    ]
    texts = [
      ' '.join(f'{a:.1f},{b:.1f}' for a, b in (place(x, y) for x, y in curve))
      for curve in (values, mean)
    ]
    curves.append(Curve(run, *texts, dots, number(values[-1, 1])))
  ticks = [
    list(zip(map(s.place, s.ticks), labels(s.ticks), strict=True)) for s in (x_scale, y_scale)
  ]
  begins = sorted({begin for rows in runs for begin in phase_begins(rows)})
  inside = [(x_scale.place(x), phase) for x, phase in begins if x_scale.low <= x <= x_scale.high]
  return Chart(name, curves, *ticks, inside)


def points(rows: Sequence[Mapping], name: str) -> np.ndarray:
  """f[n, 2]: update and value of a metric where it is a number; of many, neighbours are averaged."""
  found = np.array(
    [(row['step'], row[name]) for row in rows if finite(row.get(name))], np.float64
  ).reshape(-1, 2)
  if len(found) <= POINTS:
    return found
  return np.stack([piece.mean(axis=0) for piece in np.array_split(found, POINTS)])


def phase_begins(rows: Sequence[Mapping]) -> list[tuple[int, str]]:
  """(update, name) of the first row of every phase but the first."""
  found = {}
  for row in rows:
    found.setdefault(row['phase'], row['step'])
  return [(step, phase) for phase, step in found.items()][1:]


class Scale(NamedTuple):
  """An axis: values from `low` to `high` lie between `start` and `stop`."""

  low: float
  high: float
  start: float
  stop: float
  ticks: list[float]

  def place(self, x: float) -> float:
    return round(self.start + (x - self.low) / (self.high - self.low) * (self.stop - self.start), 1)


def scale(values: np.ndarray, start: float, stop: float, *, whole: bool = False) -> Scale:
  """The axis of some finite values, with three to six round ticks; `whole`: ticks are integers."""
  low, high = float(values.min()), float(values.max())
  if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value, or too near for their digits
    room = max(abs(low), 1.0) / 2
    low, high = low - room, high + room
  rough = (high - low) / 4
  power = 10.0 ** math.floor(math.log10(rough))
  step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
  if whole:
    step = max(1.0, step)
  first = math.ceil(low / step - 1e-9)
  last = math.floor(high / step + 1e-9)
  return Scale(low, high, start, stop, [i * step for i in range(first, last + 1)])
