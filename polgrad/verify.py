"""Replays the steps after a checkpoint, and compares all bits with the next checkpoint.

    python -m polgrad.verify --workdir=runs/quickstart --step=300

The configuration is config.json of the run. Nothing in the run's folder is changed. A difference means
that the run cannot be reproduced here: another machine, another version of a library, other data, or a
verifier or an environment that is not a function of its arguments.
"""

import os
import sys
import tempfile

import ml_collections

from polgrad import checkpoint, cli, jsons, paths, train
from polgrad.digests import digests
from polgrad.types import TrainState


class _Replayed(Exception):
  """The state of the next checkpoint has been reached."""

  def __init__(self, state: TrainState):
    super().__init__()
    self.state = state


def differences(workdir: str, step: int, folder: str = '') -> list[str]:
  """The arrays that differ after a replay from checkpoint `step` to the next one; [] if none does.

  Args:
    workdir: folder of the run.
    folder: folder of its checkpoints; '': `workdir`/checkpoints.

  Raises:
    FileNotFoundError: there is no checkpoint `step`, none after it, or no config.json.
    ValueError: the run is not the one of the checkpoint, or a checkpoint is damaged.
  """
  folder = folder or os.path.join(workdir, 'checkpoints')
  config = read_config(workdir)
  stored = checkpoint.manager(folder, keep=10**6)
  try:
    step = checkpoint.numbered(stored, folder, step)
    later = [s for s in sorted(stored.all_steps()) if s > step]
    if not later:
      raise FileNotFoundError(f'no checkpoint after {step} in {folder} to compare with')
    wanted = checkpoint.read_meta(stored, later[0])['digests']
  finally:
    stored.close()
  with tempfile.TemporaryDirectory() as place:
    own = paths.path(place) / 'checkpoints'
    source = paths.path(folder) / str(step)
    for file in paths.files(source):
      copied = own / str(step) / file.relative_to(source)
      copied.parent.mkdir(parents=True, exist_ok=True)
      copied.write_bytes(file.read_bytes())
    state = _replay(config, place, str(own), later[0])
  trees = {'params': state.params, 'rest': state.replace(params=None)}
  found = {f'{name}/{k}': x for name, tree in trees.items() for k, x in digests(tree).items()}
  wanted = {f'{name}/{k}': x for name, tree in wanted.items() for k, x in tree.items()}
  return sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))


def read_config(workdir: str) -> ml_collections.ConfigDict:
  """The configuration of a run, by the config.json of its folder.

  Raises:
    FileNotFoundError: there is no config.json.
    ValueError: it is malformed.
  """
  path = os.path.join(workdir, 'config.json')
  values = jsons.read_object(path)
  try:
    return ml_collections.ConfigDict(values)
  except (ValueError, TypeError, RecursionError) as error:  # a dot in a name, for example
    raise ValueError(f'{path}: {error}') from error


def _replay(config: ml_collections.ConfigDict, workdir: str, folder: str, until: int) -> TrainState:
  """The state after `until` updates of a run that resumes in `folder`."""

  config.checkpoint_every = 1  # the run may have saved at other steps
  config.trackers = ml_collections.ConfigDict()  # they belong to the run that is replayed

  def keep(state: TrainState) -> None:
    if int(state.step) >= until:
      raise _Replayed(state)

  with train.prepare(config, workdir, folder, step=-1, on_mismatch='stop') as session:
    try:
      train.run_phases(session, keep)
    except _Replayed as reached:
      return reached.state
  raise ValueError(f'the run made no checkpoint after {until} updates')


def main(argv: list[str]) -> None:
  cli.start(argv, needed=['workdir'])
  with cli.refusals():
    found = differences(cli.workdir(), cli.STEP.value, cli.checkpoint_folder())
  if found:
    print(f'{len(found)} arrays differ, such as {found[:5]}')
    sys.exit(1)
  print('every bit is the same')


if __name__ == '__main__':
  cli.run(main)
