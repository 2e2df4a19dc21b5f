"""Shows the tokens of one row, in the shell and as an HTML file: what is trained, and how.

    python -m polgrad.inspect --config=experiments/quickstart.py --row=17
    python -m polgrad.inspect --config=experiments/quickstart.py --row=17 --workdir=runs/quickstart
    python -m polgrad.inspect --rollout=runs/quickstart/rollouts/train-000184.parquet --row=3

The first shows a record of the data as the run lays it out. The second adds what the policy of a
checkpoint thinks of each token. The third shows a row that a run has kept, with its ratio to the
checkpoint's policy, and which tokens the surrogate clips. `--out=row.html` writes a page as well.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table
from rich.text import Text

from polgrad import checkpoint, cli, evaluate, paths, row_files, sharding, train, verify
from polgrad.build import TABLE, Experiment, Phase, build
from polgrad.compiling import jit
from polgrad.learner import forward
from polgrad.models.policy import learned
from polgrad.objectives import PolicyGradient
from polgrad.progress import NEWEST
from polgrad.registry import suggest
from polgrad.types import Batch, Prompts, TrainState
from polgrad.view import page, runs, tokens

_ROW = flags.DEFINE_integer('row', 0, 'Number of the record, or of the row in the file.', 0)
_PHASE = flags.DEFINE_string('phase', '', 'Phase whose data are shown; default: the last.')
_ROLLOUT = flags.DEFINE_string('rollout', '', 'File of rows that a run has kept.')
_COLOR = flags.DEFINE_list(
  'color',
  [],
  f'What to colour tokens by in the shell, of {sorted(tokens.QUANTITIES)}; default: all.',
)
_NUMBERS = flags.DEFINE_bool('numbers', False, 'Also print a table of all numbers.')


class View(NamedTuple):
  """Rows to show: a record has one, and a pair of completions has two."""

  title: str
  note: str  # where the numbers come from
  rows: list[dict[str, Any]]  # as in files of rows, with further lists by token


def of_record(
  experiment: Experiment, name: str, row: int, folder: str = '', step: int = -1
) -> View:
  """A record of a phase's data, as the run lays it out.

  Args:
    experiment: the run.
    name: of the phase; '': the last one.
    row: number of the record.
    folder: folder of checkpoints; '': none is read.
    step: number of the checkpoint; -1 is the newest.

  Raises:
    ValueError: no such phase or record, or one that does not fit the lengths.
    FileNotFoundError: no such checkpoint.
  """
  name = name or experiment.order[-1]
  phase = _phase(experiment, name)
  if row >= len(phase.source):
    raise ValueError(f'--row={row}: the source of {name} has {len(phase.source)} records')
  collector = phase.collect
  laid = collector.lay_out(
    [{**phase.source[row], 'id': row}], tokenizer=experiment.tokenizer, cut=collector.cut
  )
  batch = _as_rows(laid) if isinstance(laid, Prompts) else laid
  found, note = {}, 'no checkpoint was read'
  if folder:
    params = evaluate.restore_params(experiment, folder, step)
    found = _scored(experiment, phase, params, batch)
    note = f'policy of a checkpoint in {folder}'
  rows = rows_of(experiment, name, batch, found)
  return View(f'{name}, record {row}', note, rows)


def of_rollout(
  experiment: Experiment, stored: row_files.Stored, row: int, folder: str = '', step: int = -1
) -> View:
  """A row that a run has kept, with the policy of a checkpoint, if `folder` is given.

  All rows of the file are forwarded, because objectives may compare them.

  Raises:
    ValueError: no such row or phase, or a checkpoint of another phase.
    FileNotFoundError: no such checkpoint.
  """
  batch = row_files.as_batch(stored)
  if row >= len(stored.rows):
    raise ValueError(f'--row={row}: {stored.path} has {len(stored.rows)} rows')
  phase = _phase(experiment, stored.phase)
  found, note = {}, 'no checkpoint was read'
  if folder:
    number, of = _newest(experiment, folder, step)
    note = f'checkpoint {number} is of the phase {of}, so its policy is not compared; see --step'
    if of == stored.phase:
      state = _restored(experiment, folder, number)
      found = judged(experiment, phase, state, batch)
      note = f'ratio, entropy and clipping under the policy of checkpoint {number}'
    elif step != NEWEST:
      raise ValueError(
        f'--step={number}: that checkpoint is of the phase {of}, not of {stored.phase}'
      )
  one = dict(stored.rows[row])
  span = slice(one['column'], one['column'] + len(one['tokens']))
  one |= {name: x[row, span].tolist() for name, x in found.items()}
  return View(f'{stored.phase}, update {stored.step}, row {row}', note, [one])


def judged(
  experiment: Experiment, phase: Phase, state: TrainState, batch: Batch
) -> dict[str, np.ndarray]:
  """What the objective makes of the tokens of a batch, [B, T] by name; NaN outside the mask.

  * `logp`, `entropy`: of the policy, nats.
  * `log_ratio`: logp - behavior_logp, nats, if the batch was sampled.
  * `push`: -d loss / d logp. Above 0, the update makes the token more likely.
  * `clipped`: tokens in the mask with an advantage whose surrogate has no gradient, for objectives that
    are a `PolicyGradient`.

  Args:
    state: parameters, anchors and the objective's state.
    batch: NumPy; its rows are taken as a minibatch.
  """
  learner = phase.learner(experiment.policy)

  def compute(state, batch):
    outputs = learner.outputs(state, learned(experiment.policy, state.params), batch)

    def loss(logp):
      terms, _ = learner.terms(state, outputs.replace(logp=logp), batch)
      return sum(t.value() for name, t in terms.items() if name not in phase.objective.probes)

    found = {
      'logp': outputs.logp,
      'entropy': outputs.entropy,
      'push': -jax.grad(loss)(outputs.logp),
    }
    if batch.behavior_logp is not None:
      found['log_ratio'] = outputs.logp - batch.behavior_logp
    found = {name: jnp.where(batch.mask, x, jnp.nan) for name, x in found.items()}
    if isinstance(phase.objective, PolicyGradient) and batch.advantages is not None:
      arguments = state.objective_state, state.update
      compared = phase.objective.compared(outputs, batch, *arguments)
      kept = phase.objective.kept(phase.objective.arrays(outputs, compared, *arguments))
      found['clipped'] = batch.mask & (batch.advantages != 0) & ~kept
    return found

  return sharding.to_host(jit(compute)(state, batch))


def _scored(
  experiment: Experiment, phase: Phase, params: Any, batch: Batch
) -> dict[str, np.ndarray]:
  """Log-prob and entropy of every token of a row that has tokens before it."""
  seen = batch.segment_ids > 0
  first = seen & (np.cumsum(seen, axis=1) == 1)
  rows = batch.replace(mask=seen & ~first)
  score = jit(
    lambda params, batch: forward(
      experiment.policy,
      params,
      batch,
      fields=frozenset({'entropy'}),
      temperature=phase.collect.temperature,
    )
  )
  outputs = sharding.to_host(score(params, rows))
  return {
    name: np.where(rows.mask, x, np.nan)
    for name, x in (('logp', outputs.logp), ('entropy', outputs.entropy))
  }


def rows_of(
  experiment: Experiment, name: str, batch: Batch, found: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
  """The rows of a batch as files have them, with further arrays [B, T]."""
  table = row_files.table_of(
    name, 0, batch.with_arrays(**found), len(batch.tokens), tokenizer=experiment.tokenizer
  )
  return table.to_pylist()


def _as_rows(prompts: Prompts) -> Batch:
  """Prompts as rows of which nothing is trained."""
  return Batch(
    tokens=prompts.tokens,
    segment_ids=prompts.mask.astype(np.int32),
    mask=np.zeros_like(prompts.mask),
    prompt_ids=prompts.ids,
  )


def _phase(experiment: Experiment, name: str) -> Phase:
  if name not in experiment.phases:
    raise ValueError(f'unknown phase {name!r}{suggest(name, experiment.phases)}')
  return experiment.phases[name]


def _newest(experiment: Experiment, folder: str, step: int) -> tuple[int, str]:
  """The number of a checkpoint, which is the newest if `step` is negative, and its phase."""
  checkpoints = checkpoint.manager(folder)
  try:
    number = checkpoint.numbered(checkpoints, folder, step)
    return number, experiment.order[checkpoint.read_meta(checkpoints, number)['phase']]
  finally:
    checkpoints.close()


def _restored(experiment: Experiment, folder: str, number: int) -> TrainState:
  """The whole state of a checkpoint: parameters, anchors and the objective's state."""
  checkpoints = checkpoint.manager(folder)
  try:
    return train.resume(experiment, checkpoints, number)
  finally:
    checkpoints.close()


# Colours of levels in the shell, from weak to strong.
PLUS, MINUS = (
  ('#1d3557', '#1f4f8f', '#2563c9', '#4a8bff'),
  ('#57351d', '#8f4f1f', '#c9630c', '#ff9a3c'),
)
ONE = ('#33294f', '#4b3a7c', '#6048be', '#8a6cff')


def show(view: View, console: Console, colors: Sequence[str], numbers: bool) -> None:
  """Prints rows, once for each quantity that they have, or for those in `colors`.

  Raises:
    ValueError: a color that the rows do not have.
  """
  for row in view.rows:
    found = tokens.levels(row)
    for name in colors:
      if name not in found:
        raise ValueError(f'--color: the row has no {name!r}{suggest(name, found)}')
    said = ', '.join(f'{name} {value}' for name, value in runs.facts(row))
    console.print(Text(f'{view.title}: {said}', style='bold'))
    console.print(Text(view.note, style='dim'))
    for name in colors or found:
      quantity = tokens.QUANTITIES[name]
      console.print(
        Text(f'\n{quantity.label}', style='bold').append(f'  {quantity.meaning}', 'dim')
      )
      console.print(painted(row, found[name]))
    if numbers:
      table = numbers_of(row, list(found))
      # A narrow terminal wraps lines, and loses nothing.
      wide = max(console.width, 10 * len(table.columns))
      Console(file=console.file, width=wide).print(table)


def painted(row: Mapping[str, Any], levels: Sequence[int]) -> Text:
  """The tokens of a row as text with colours."""
  text = Text()
  signed = any(x < 0 for x in levels)
  heads = heads_of(row)
  for i, (piece, x, inside) in enumerate(zip(row['pieces'], levels, row['mask'])):
    if i in heads:
      text.append(f'\n{heads[i]}\n', 'italic')
    scale = MINUS if x < 0 else PLUS if signed else ONE
    paint = f'#ffffff on {scale[abs(x) - 1]}' if x else '' if inside else 'dim'
    text.append(tokens.visible(piece), paint)
  return text


def heads_of(row: Mapping[str, Any]) -> dict[int, str]:
  """What is printed before some tokens of an episode: who says what follows, and its reward."""
  found, turn = {}, 0
  for part in row.get('turns') or ():
    turn += part['who'] == 'policy'
    said = [f'{name} {x:.4g}' for name, x in json.loads(part['metrics']).items()]
    if part['who'] == 'policy':
      said = [f'turn {turn}: reward {part["reward"]:.4g}', *said]
      found[part['begin']] = f'[{", ".join(said)}]'
    else:
      found[part['begin']] = '[read]'
  return found


def numbers_of(row: Mapping[str, Any], names: Sequence[str]) -> Table:
  """A table with a line for each token."""
  table = Table('column', 'id', 'token', 'segment', box=None, header_style='dim')
  for name in names:
    table.add_column(tokens.QUANTITIES[name].label.replace(' ', '\n'), justify='right')
  for i, piece in enumerate(row['pieces']):
    place = [str(row['column'] + i), str(row['tokens'][i])]
    said = [tokens.value(row, name, i) for name in names]
    table.add_row(*place, Text(tokens.visible(piece)), str(row['segment_ids'][i]), *said)
  return table


def html(view: View) -> str:
  """The page of some rows."""
  names = [name for name in tokens.QUANTITIES if any(row.get(name) for row in view.rows)]
  rows = [
    {
      'facts': runs.facts(row),
      'said': runs.said(row),
      'numbers': [
        [tokens.value(row, name, i) for name in names] for i in range(len(row['pieces']))
      ],
      'row': row,
    }
    for row in view.rows
  ]
  quantities = [tokens.QUANTITIES[name] for name in names]
  return page.render(
    'row.html', quantities, title=view.title, note=view.note, rows=rows, visible=tokens.visible
  )


def main(argv: list[str]) -> None:
  cli.start(argv, needed=[])
  rollout, workdir = os.path.expanduser(_ROLLOUT.value), cli.WORKDIR.value and cli.workdir()
  if rollout and not workdir:  # WORKDIR/rollouts/FILE
    whole = rollout if paths.REMOTE in rollout else os.path.abspath(rollout)
    workdir = os.path.dirname(os.path.dirname(whole))
  if cli.CONFIG.value is None and not workdir:
    raise app.UsageError('--config is needed, or --workdir of a run, or --rollout')
  with cli.refusals():
    stored = row_files.read(rollout) if rollout else None
    experiment = build(
      verify.read_config(workdir) if cli.CONFIG.value is None else cli.config(TABLE)
    )
    folder = cli.checkpoint_folder() if cli.CHECKPOINTS.value else _checkpoints(workdir)
    if cli.STEP.value != NEWEST and not folder:
      raise ValueError(f'--step: there are no checkpoints in {workdir or "no folder"}')
    with jax.set_mesh(experiment.mesh):
      if stored:
        view = of_rollout(experiment, stored, _ROW.value, folder, cli.STEP.value)
      else:
        view = of_record(experiment, _PHASE.value, _ROW.value, folder, cli.STEP.value)
    show(view, Console(), _COLOR.value, _NUMBERS.value)
    if cli.OUT.value:
      page.write(os.path.expanduser(cli.OUT.value), html(view))
      print(f'{cli.OUT.value}: open it in a browser')


def _checkpoints(workdir: str | None) -> str:
  """The folder of a run's checkpoints, '' if it has none."""
  folder = paths.path(os.path.join(workdir, 'checkpoints')) if workdir else None
  whole = folder and folder.is_dir() and any(place.name.isdecimal() for place in folder.iterdir())
  return str(folder) if whole else ''


if __name__ == '__main__':
  cli.run(main)
