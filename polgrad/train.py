"""Trains: the main that runs all phases of an experiment, with logs and checkpoints.

    python -m polgrad.train --config=experiments/quickstart.py --workdir=runs/quickstart

The same command with the same workdir resumes from the last complete checkpoint, and gives bit for
bit the numbers of a run without interruption. Every process of a pod runs this same command. At SIGTERM
the run saves after its step, and ends with exit code 75 (`preemption.CODE`).
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
from absl import flags, logging

from polgrad import (
  barriers,
  checkpoint,
  cli,
  identity,
  metrics,
  preemption,
  report,
  row_files,
  speed,
  trackers,
  workdirs,
)
from polgrad.build import TABLE, Experiment, build, check_data, fingerprints
from polgrad.checks import stops
from polgrad.phases import Logs, begin, ends_early, run_phase
from polgrad.progress import Progress
from polgrad.types import TrainState

_ON_MISMATCH = flags.DEFINE_enum(
  'on_mismatch',
  'stop',
  ['stop', 'continue'],
  'What to do if the checkpoint is of another configuration, other data or another version.',
)

_PROFILE = flags.DEFINE_string(
  'profile_steps',
  '',
  'Steps of the last phase to trace, as FIRST:END, into WORKDIR/profile; the first step is 0.',
)


def main(argv: list[str]) -> None:
  cli.start(argv)
  with preemption.heeded(), contextlib.ExitStack() as stack:
    with cli.refusals():
      session = stack.enter_context(
        prepare(
          cli.config(TABLE),
          cli.workdir(),
          cli.checkpoint_folder(),
          step=cli.STEP.value,
          on_mismatch=_ON_MISMATCH.value,
          profile_steps=_PROFILE.value,
        )
      )
    with cli.ending_together():
      run_phases(session)


class Session(NamedTuple):
  """A run that can begin: nothing of it is refused any more."""

  experiment: Experiment
  identity: dict  # goes into checkpoints
  folder: workdirs.Folder
  checkpoints: Any
  state: TrainState
  logs: Logs  # the profiler is that of the last phase


def run(
  config: ml_collections.ConfigDict,
  workdir: str,
  folder: str = '',
  *,
  step: int = -1,
  on_mismatch: str = 'stop',
) -> TrainState:
  """Trains to the end of the last phase, from the last checkpoint if there is one.

  Args:
    workdir: folder for config.json, metrics and the report, also gs://...; only the first process writes
      it.
    folder: folder of the checkpoints, which all processes must reach; '': `workdir`/checkpoints.
    step: number of the checkpoint to resume from, after which later ones are deleted; -1: the last.
    on_mismatch: 'stop' or 'continue', if the checkpoint is of another run (see `identity`).

  Returns:
    The state after the last step.

  Raises:
    ValueError, TypeError, FileNotFoundError: the configuration is refused, see `build`; or the
      checkpoint is of another run, other phases or other arrays, or damaged.
    RuntimeError: another process trains in `workdir`.
    FloatingPointError: `max_skipped` consecutive updates were skipped, or parameters are not finite.
    SystemExit: with `preemption.CODE`, after the run was asked to stop and has saved; with a text that
      says what was saved, if the metrics cannot be written.
  """
  with (
    preemption.heeded(),
    prepare(config, workdir, folder, step=step, on_mismatch=on_mismatch) as session,
  ):
    return run_phases(session)


@contextlib.contextmanager
def prepare(
  config: ml_collections.ConfigDict,
  workdir: str,
  folder: str,
  *,
  step: int,
  on_mismatch: str,
  profile_steps: str = '',
) -> Iterator[Session]:
  """Does everything that can refuse a run, and then opens its files; see `run`."""
  # Build everything, and refuse what cannot run.
  experiment = build(config)
  trackers.check(experiment.trackers)
  for line in check_data(experiment):
    logging.warning('%s', line)
  own = identity.describe(config, fingerprints(experiment))
  chief = jax.process_index() == 0
  folder = folder or os.path.join(workdir, 'checkpoints')
  with contextlib.ExitStack() as stack:
    own_folder = stack.enter_context(workdirs.opened(workdir, chief=chief))
    workdir = own_folder.path
    progress = Progress()  # read from the checkpoint below
    checkpoints = checkpoint.manager(
      folder, keep=experiment.keep_checkpoints, best=lambda: progress.best_step
    )
    stack.callback(checkpoints.close)  # waits for a save that has not finished
    stack.enter_context(jax.set_mesh(experiment.mesh))

    # Resume or begin, and only then leave the configuration with the run.
    before = workdirs.select(checkpoints, step, folder)
    meta = None if before is None else checkpoint.read_meta(checkpoints, before)
    if meta is not None:
      workdirs.check_identity(meta, own, on_mismatch)
      check_records(experiment, meta, own)
    state = resume(experiment, checkpoints, before)
    bad = stops.untrained(experiment.policy, state.params, experiment.tokenizer.stop_ids)
    for one in stops.findings(experiment.tokenizer, bad):
      logging.warning('%s', one)
    steps = speed.parse_steps(profile_steps, *steps_left(experiment, state))
    own_folder.take()
    if before is not None:
      workdirs.drop_later(checkpoints, before)
    progress.read(meta)
    progress.follow(experiment.keep_best, experiment.best_is, checkpoints.all_steps())
    writer = store = None
    if chief:
      workdirs.write_config(workdir, own['config'], int(state.step))
      writer = open_writer(experiment, state, workdir, own)
      stack.callback(writer.close)
      store = open_store(experiment, state, workdir)
      tell_what_is_left(experiment, state, progress)
    profiler = speed.Profiler(os.path.join(workdir, 'profile'), steps)
    logs = Logs(writer=writer, store=store, progress=progress, profiler=profiler)
    own_folder.send()
    yield Session(experiment, own, own_folder, checkpoints, state, logs)


def check_records(experiment: Experiment, meta: dict, own: dict) -> None:
  """Refuses other data than those of the checkpoint if its phase remembers records by their numbers.

  Args:
    meta: of the checkpoint, with the identity of the run that saved it.
    own: the identity of this run.

  Raises:
    ValueError: the data differ, so the numbers belong to other records.
  """
  name = meta['order'][meta['phase']]
  if name not in experiment.phases or 'identity' not in meta:
    return
  if not experiment.phases[name].collect.remembers_numbers:
    return
  found = identity.other_data(meta['identity'], own, name)
  if found:
    listed = '\n  '.join(found)
    raise ValueError(
      f'config.phases.{name}.collect: the checkpoint remembers records by their numbers, which '
      f'belong to other records now:\n  {listed}\nresume with the data of the checkpoint, or use '
      'another --workdir'
    )


def run_phases(session: Session, keep: Callable[[TrainState], None] | None = None) -> TrainState:
  """Runs the phases that are left, and draws the report.

  Args:
    keep: is called with the state where a checkpoint is due; None saves one.
  """
  with barriers.watched():
    state = _run_phases(session, keep or functools.partial(save_all, session))
  if session.logs.writer:
    report.draw([session.folder.path])
    print(f'metrics, checkpoints and curves are in {session.folder.name}; see its report.png')
  return state


def _run_phases(session: Session, keep: Callable[[TrainState], None]) -> TrainState:
  """The state after the phases that are left."""
  experiment, state = session.experiment, session.state
  for index in range(int(state.phase), len(experiment.order)):
    if index > int(state.phase):
      state = begin(experiment, index, state)
    logs = session.logs
    if index < len(experiment.order) - 1:
      logs = dataclasses.replace(logs, profiler=speed.Profiler())
    try:
      state = run_phase(experiment, state, keep, logs)
    except metrics.NotWrittenError as error:
      raise SystemExit(f'{error}: the run ends. {saved(session)}') from error
  return state


def saved(session: Session) -> str:
  """Says which checkpoint a run that ends now resumes from."""
  checkpoints = session.checkpoints
  with contextlib.suppress(Exception):  # a save that fails too is none of the whole ones
    checkpoints.wait_until_finished()
  step = checkpoints.latest_step()
  if step is None:
    return f'There is no whole checkpoint in {checkpoints.directory}'
  return f'The same command resumes from checkpoint {step}, the last in {checkpoints.directory}'


def save_all(session: Session, state: TrainState) -> None:
  """Saves the state; before that, the files of the run are brought to where a resumed run finds them."""
  session.folder.send()
  save(
    session.experiment,
    session.checkpoints,
    session.identity,
    state,
    progress=session.logs.progress,
  )


def steps_left(experiment: Experiment, state: TrainState) -> tuple[int, int]:
  """The first step that the last phase makes from this state on, and the end of its steps."""
  last = len(experiment.order) - 1
  begun = int(state.phase_step) if int(state.phase) == last else 0
  return begun, experiment.phases[experiment.order[last]].steps


def tell_what_is_left(experiment: Experiment, state: TrainState, progress: Progress) -> None:
  """Says if a run is finished already, or will leave no checkpoint."""
  last = len(experiment.order) - 1
  name = experiment.order[last]
  if int(state.phase) == last and int(state.phase_step) >= experiment.phases[name].steps:
    print(
      f'this run is finished: {name} has made its {int(state.phase_step)} steps; for more of them use '
      f'--config.phases.{name}.steps=..., for a new run another --workdir'
    )
  elif int(state.phase) == last and (said := ends_early(experiment, name, progress)):
    knob = (
      f'phases.{name}.plateau'
      if progress.on_plateau(name, experiment.phases[name].plateau)
      else 'patience'
    )
    print(f'this run is finished: {said}; it continues with a larger --config.{knob}, or with 0')
  if not experiment.checkpoint_every:
    logging.warning(
      'config.checkpoint_every is 0: this run leaves no checkpoint unless it is asked to stop'
    )


def open_writer(
  experiment: Experiment, state: TrainState, workdir: str, own: dict
) -> metrics.Writer:
  """A writer that keeps the metrics up to this state, and drops those of later steps."""
  step = int(state.step)
  track = lambda dropped: trackers.Tracking(
    experiment.trackers,
    workdir=workdir,
    step=step,
    about=trackers.describe(own),
    earlier=dropped,
  )
  return metrics.Writer(workdir, step=step, past=begun(experiment, state), track=track)


def open_store(experiment: Experiment, state: TrainState, workdir: str) -> row_files.Store | None:
  """What keeps rows up to this state and drops those of later steps; None if none are to be kept."""
  kept = experiment.rollouts
  if not kept.every:
    return None
  limit = int(kept.limit_mib * 2**20)
  return row_files.Store(workdir, step=int(state.step), past=begun(experiment, state), limit=limit)


def begun(experiment: Experiment, state: TrainState) -> tuple[str, ...]:
  """The names of the phases that have made a step."""
  return experiment.order[: int(state.phase) + (int(state.phase_step) > 0)]


def resume(experiment: Experiment, checkpoints: Any, step: int | None) -> TrainState:
  """The state of checkpoint number `step`, or the initial state if that is None.

  Raises:
    ValueError: the checkpoint is of a run with other phases, holds other arrays, or is damaged.
  """
  state = begin(experiment, 0, None)
  if step is None:
    return state

  # The checkpoint is read into the shapes and shardings of the state at the start of its phase.
  meta = checkpoint.read_meta(checkpoints, step)
  if tuple(meta['order']) != experiment.order:
    raise ValueError(f'the checkpoint ran phases {meta["order"]}, not {experiment.order}')
  if meta['phase']:
    state = begin(experiment, meta['phase'], state)
  print(f'resuming from checkpoint {step}, in phase {experiment.order[meta["phase"]]}')

  # Parameters are stored apart from the rest of the state, see `checkpoint.TREES`.
  restore = functools.partial(checkpoint.restore, checkpoints, step)
  try:
    rest = restore('rest', state.replace(params=None))
  except ValueError as error:
    if 'curriculum_state' not in str(error):
      raise
    name = experiment.order[meta['phase']]
    raise ValueError(
      f'{error}; config.phases.{name}.curriculum remembers the rows of config.phases.{name}.source, so '
      'both must be those of the checkpoint: the same curriculum, and the same number of rows'
    ) from error
  return rest.replace(params=restore('params', state.params))


def save(
  experiment: Experiment,
  checkpoints: Any,
  own: dict,
  state: TrainState,
  *,
  progress: Progress | None = None,
) -> None:
  """Starts writing a checkpoint, numbered by the updates of all phases."""
  meta = {
    'order': list(experiment.order),
    'phase': int(state.phase),
    'identity': own,
    'progress': (progress or Progress()).to_json(),
  }
  trees = {'params': state.params, 'rest': state.replace(params=None)}
  checkpoint.save(checkpoints, int(state.step), trees, meta)


if __name__ == '__main__':
  cli.run(main)
