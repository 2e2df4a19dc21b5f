"""Draws the curves of a run, or of several runs over each other.

    python -m polgrad.report runs/dapo                      # writes runs/dapo/report.png
    python -m polgrad.report runs/dapo runs/grpo --out=both.png

It reads metrics.jsonl alone, so it also draws a run that still trains or was killed. Each phase has its
own curves, over its own updates; which ones depends on what the phase learns from.
"""

import contextlib
import fnmatch
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from polgrad import cli, metrics, mirrors


class Panel(NamedTuple):
  """One plot."""

  title: str
  names: tuple[str, ...]  # patterns of the metrics that it shows


PROBLEMS = Panel(
  'held-out problems solved',
  ('evaluation/greedy', 'evaluation/pass@*', 'evaluation/maj@*', 'evaluation_*/greedy'),
)
LOSS = Panel('loss', ('loss', 'evaluation/*/loss'))
ENTROPY = Panel('entropy, nats', ('entropy',))
NORM = Panel('gradient norm', ('grad_norm',))
RATE = Panel('learning rate', ('learning_rate',))
# The plots of a phase, by what it learns from.
PANELS = {
  'preferences': (
    Panel('pairs ranked right', ('accuracy', 'evaluation/*/accuracy')),
    Panel('margin', ('margin', 'evaluation/*/margin')),
    Panel('implicit rewards', ('chosen_reward', 'rejected_reward')),
    *(LOSS, PROBLEMS, NORM),
  ),
  'rollouts': (
    *(PROBLEMS, Panel('reward', ('reward',)), Panel('length, tokens', ('length',)), ENTROPY),
    Panel('KL to the reference, nats', ('kl',)),
    Panel('KL to the sampler, nats', ('sampler_kl',)),
    Panel('effective sample size', ('effective_sample_size',)),
    Panel('tokens with a gradient', ('kept_positive', 'kept_negative')),
    *(LOSS, NORM),
  ),
  'completions': (LOSS, PROBLEMS, ENTROPY, NORM, RATE),
}
WIDTH = 14.0  # of the picture, in inches
STYLES = ('-', '--', ':', '-.')
DENSE = 60  # a curve of more points is drawn as a running mean, its points faint
Rows = list[dict[str, Any]]


def family(rows: Rows) -> str:
  """What a phase learns from, by its metrics."""
  names = {name for row in rows for name in row}
  if 'margin' in names:
    return 'preferences'
  return 'rollouts' if 'reward' in names else 'completions'


def phases(rows: Rows) -> dict[str, Rows]:
  """The rows of each phase in their order; `update` counts the updates of the phase."""
  found, start = {}, 0
  for name in dict.fromkeys(row['phase'] for row in rows):
    own = [row for row in rows if row['phase'] == name]
    found[name] = [{**row, 'update': row['step'] - start} for row in own]
    start = max(row['step'] for row in own)
  return found


def curve(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Updates and values of a metric, without those that are not finite."""
  points = [(row['update'], row[name]) for row in rows if row.get(name) is not None]
  return np.array(points, float).reshape(-1, 2).T


def running_mean(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The mean of every `n / 30` consecutive points, at the middle one; none for up to `DENSE` points.

  Args:
    x, y: f[n], the points of a curve.
  """
  if len(x) <= DENSE:
    return x[:0], y[:0]
  width = len(x) // 30
  smooth = np.convolve(y, np.ones(width) / width, 'valid')
  return x[(width - 1) // 2 :][: len(smooth)], smooth


def plots(runs: Sequence[Rows]) -> list[tuple[Panel, list[str]]]:
  """The panels of a phase that have curves, each with the metrics that it shows.

  Args:
    runs: the rows of the phase in each run.
  """
  names = sorted({k for rows in runs for row in rows for k in row if row[k] is not None})
  panels = dict.fromkeys(p for rows in runs for p in PANELS[family(rows)])
  shown = [(p, [n for m in p.names for n in fnmatch.filter(names, m)]) for p in panels]
  return [(panel, found) for panel, found in shown if found]


def draw(workdirs: Sequence[str], out: str = '') -> str:
  """Draws the curves of runs into one picture, and returns its path.

  Args:
    workdirs: folders of runs; the curves of several are drawn over each other.
    out: the file; '' is report.png, in the folder of a single run or else in the current folder.
  """
  from matplotlib.figure import Figure  # here, because it takes half a second

  runs = {
    label: phases(metrics.read(os.path.join(folder, 'metrics.jsonl')))
    for folder, label in zip(workdirs, labels(workdirs))
  }
  sections = {
    name: {label: run[name] for label, run in runs.items() if name in run}
    for name in dict.fromkeys(name for run in runs.values() for name in run)
  }
  shown = {name: plots([*section.values()]) for name, section in sections.items()}
  shown = {name: found for name, found in shown.items() if found}
  path = out or os.path.join(workdirs[0] if len(workdirs) == 1 else '.', 'report.png')
  if not shown:
    figure = Figure(figsize=(4, 1))
    figure.text(0.5, 0.5, 'no metrics yet', ha='center')
    figure.savefig(path, dpi=110)
    return path

  # One block of plots a phase, below each other.
  heights = [-(-len(found) // columns_of(len(found))) for found in shown.values()]
  size = (WIDTH, 2.6 * sum(heights) + 0.45 * len(shown))
  figure = Figure(figsize=size, layout='constrained')
  blocks = figure.subfigures(len(shown), 1, height_ratios=heights, squeeze=False)[:, 0]
  for block, (name, found) in zip(blocks, shown.items()):
    section = sections[name]
    kinds = ', '.join(dict.fromkeys(family(rows) for rows in section.values()))
    block.suptitle(f'{name}: learns from {kinds}', x=0.01, ha='left', fontsize=11, weight='bold')
    _draw_phase(block, found, section, several=len(runs) > 1, colors=[*runs])
  figure.savefig(path, dpi=110)
  return path


def columns_of(panels: int) -> int:
  """Three or four columns, whichever leaves fewer places empty."""
  return min((4, 3), key=lambda n: -panels % n)


def labels(workdirs: Sequence[str]) -> list[str]:
  """Names of runs: the last parts of their folders, as many as make them differ."""
  parts = [os.path.abspath(os.path.expanduser(folder)).split(os.sep) for folder in workdirs]
  for length in range(1, max(map(len, parts)) + 1):
    names = [os.sep.join(part[-length:]) for part in parts]
    if len(set(names)) == len(names):
      return names
  raise ValueError(f'the same folder twice: {list(workdirs)}')


def _draw_phase(
  block: Any, found: list, section: dict[str, Rows], *, several: bool, colors: list[str]
) -> None:
  """Draws the panels of a phase; of several runs each has a color, of one run each metric."""
  columns = columns_of(len(found))
  axes = block.subplots(-(-len(found) // columns), columns, squeeze=False)
  for axis, (panel, names) in zip(axes.flat, found):
    drawn = []
    for label, rows in section.items():
      for number, name in enumerate(names):
        color = f'C{colors.index(label) if several else number}'
        style = STYLES[number % 4] if several else '-'
        drawn.append(curve(rows, name))
        _draw_curve(axis, *drawn[-1], color=color, style=style)
    _limit(axis, [values for _, values in drawn])
    axis.set_title(panel.title, fontsize=10)
    axis.set_xlabel('update', fontsize=8)
    axis.tick_params(labelsize=8)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.25)
    axis.spines[['top', 'right']].set_visible(False)
    axis.margins(x=0.02)
    if len(names) > 1:
      _explain(axis, names, several=several)
  for axis in list(axes.flat)[len(found) :]:
    axis.axis('off')
  if several:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=f'C{colors.index(label)}', label=label) for label in section]
    block.legend(
      handles=lines, loc='outside upper right', ncols=len(lines), fontsize=9, frameon=False
    )


def _explain(axis: Any, names: list[str], *, several: bool) -> None:
  """The legend of a panel with several metrics."""
  from matplotlib.lines import Line2D

  look = lambda i: {'color': 'gray', 'linestyle': STYLES[i % 4]} if several else {'color': f'C{i}'}
  short = lambda name: name.replace('evaluation/', 'held-out ').replace('evaluation_', 'held-out ')
  lines = [Line2D([], [], label=short(name), **look(i)) for i, name in enumerate(names)]
  axis.legend(handles=lines, fontsize=7, frameon=False)


def _draw_curve(axis: Any, x: np.ndarray, y: np.ndarray, *, color: str, style: str) -> None:
  """One metric; of a long curve the running mean, and its points faintly."""
  if len(x) <= DENSE:
    axis.plot(x, y, color=color, linestyle=style, marker='.' if len(x) < 30 else '')
    return
  axis.plot(x, y, color=color, alpha=0.2, linewidth=0.8)
  axis.plot(*running_mean(x, y), color=color, linestyle=style)


def _limit(axis: Any, curves: Sequence[np.ndarray]) -> None:
  """Leaves out a few extreme points of long curves, which would hide all others."""
  if max(map(len, curves)) <= DENSE:
    return
  ends = [np.quantile(y, [0.005, 0.995]) if len(y) > DENSE else y for y in curves if len(y)]
  low, high = min(map(np.min, ends)), max(map(np.max, ends))
  room = 0.08 * (high - low) or 0.08 * abs(high) or 1.0
  axis.set_ylim(low - room, high + room)


def main(argv: list[str]) -> None:
  with cli.refusals():
    if len(argv) < 2:
      raise ValueError('name the folders of runs: python -m polgrad.report WORKDIR...')
    folders = argv[1:]
    with contextlib.ExitStack() as stack:
      here = [stack.enter_context(mirrors.reading(folder)) for folder in folders]
      for folder, copied in zip(folders, here):
        if not os.path.exists(os.path.join(copied, 'metrics.jsonl')):
          raise FileNotFoundError(f'{folder}: expected the folder of a run, with metrics.jsonl')
      path = draw(here, cli.OUT.value or '')
  print(f'wrote {path.replace(here[0], folders[0])}')


if __name__ == '__main__':
  cli.run(main)
