"""Where numbers go: metrics.jsonl, TensorBoard, the progress bar, tables of samples, report.png."""

import json
import os
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tensorboardX import SummaryWriter


class Writer:
  """Appends rows of numbers to `metrics.jsonl` and, if wanted, to TensorBoard.

  A resumed run drops the rows that came after its checkpoint, so the file holds one history:
  only rows of the phases in `past`, up to update `step`, stay.
  """

  def __init__(self, workdir: str, *, step: int, past: Sequence[str], tensorboard: bool):
    self.path = os.path.join(workdir, 'metrics.jsonl')
    kept = [r for r in read(self.path) if r['step'] <= step and r['phase'] in past]
    temporary = f'{self.path}.tmp'
    with open(temporary, 'w') as f:
      f.writelines(json.dumps(r) + '\n' for r in kept)
    os.replace(temporary, self.path)
    self._file = open(self.path, 'a', buffering=1)  # noqa: SIM115, it lives as long as the run
    folder = os.path.join(workdir, 'tensorboard')
    self._board = SummaryWriter(folder, purge_step=step + 1) if tensorboard else None

  def write(self, step: int, phase: str, values: Mapping[str, float]) -> None:
    row = {k: float(v) for k, v in values.items()}
    self._file.write(json.dumps({'step': step, 'phase': phase, **row}) + '\n')
    if self._board:
      for name, value in row.items():
        self._board.add_scalar(f'{phase}/{name}', value, step)

  def close(self) -> None:
    self._file.close()
    if self._board:
      self._board.close()


def read(path: str) -> list[dict]:
  """The rows of a metrics file; a last line that was cut off by a crash is dropped."""
  if not os.path.exists(path):
    return []
  rows = []
  with open(path) as f:
    for line in f:
      try:
        rows.append(json.loads(line))
      except json.JSONDecodeError:
        break
  return rows


def show_samples(title: str, rows: Sequence[tuple[str, str, float]]) -> None:
  """Prints (prompt, completion, reward) rows as a table."""
  table = Table('prompt', 'completion', 'reward', title=title, title_justify='left')
  for prompt, completion, reward in rows:
    clip = lambda s: Text(s if len(s) <= 400 else '…' + s[-400:])
    table.add_row(clip(prompt), clip(completion), f'{reward:.3g}')
  Console().print(table)


REPORTED = (
  'evaluation/greedy',
  'reward',
  'loss',
  'entropy',
  'kl',
  'sampler_kl',
  'effective_sample_size',
  'kept_positive',
  'kept_negative',
  'length',
  'grad_norm',
)


def report(workdir: str) -> str:
  """Draws the curves of `metrics.jsonl` into `report.png`; returns its path."""
  rows = read(os.path.join(workdir, 'metrics.jsonl'))
  names = [n for n in REPORTED if any(n in r for r in rows)] or ['loss']
  columns = min(len(names), 3)
  height = -(-len(names) // columns)
  figure, axes = plt.subplots(
    height, columns, figsize=(4.2 * columns, 2.8 * height), squeeze=False, layout='constrained'
  )
  phases = list(dict.fromkeys(r['phase'] for r in rows))
  for axis, name in zip(axes.flat, names):
    for number, phase in enumerate(phases):
      points = [(r['step'], r[name]) for r in rows if r['phase'] == phase and name in r]
      if not points:
        continue
      x, y = np.array(points, float).T
      color = f'C{number}'
      dense = len(x) > 60
      axis.plot(
        x,
        y,
        color=color,
        alpha=0.25 if dense else 1,
        label=None if dense else phase,
        marker='.' if len(x) < 30 else '',
      )
      if dense:
        width = max(len(x) // 30, 1)
        smooth = np.convolve(y, np.ones(width) / width, 'valid')
        axis.plot(x[width - 1 :], smooth, color=color, label=phase)
    axis.set_title(name)
    axis.set_xlabel('update')
    axis.grid(alpha=0.3)
  for axis in list(axes.flat)[len(names) :]:
    axis.axis('off')
  axes.flat[0].legend()
  path = os.path.join(workdir, 'report.png')
  figure.savefig(path, dpi=110)
  plt.close(figure)
  return path
