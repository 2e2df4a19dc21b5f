"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, trackio, MLflow.

A tracker is a part of the configuration, in the slot `trackers` of an experiment. Its library is
imported when a run begins, and only then. What a tracker must remember, such as the id of its run, is
kept in the folder of the run, so a resumed run continues the same run of the tracker.
"""

import abc
import dataclasses
import importlib.util
import json
import math
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from absl import logging

from polgrad.identity import leaves
from polgrad.registry import table
from polgrad.whole_files import writing

# Metrics that depend on the clock or the machine: two runs that are equal in all others are equal.
OF_THE_CLOCK = ('seconds', 'tokens_per_second', 'mfu', 'peak_memory')


class Board(abc.ABC):
  """An open run of a tracker."""

  # Whether a step that is written again replaces the one that was written before.
  rewrites = False

  @abc.abstractmethod
  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Adds the metrics after `step` updates; all values are finite."""

  @abc.abstractmethod
  def close(self) -> None:
    """Sends what is left."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opening:
  """What a tracker reads of a run when it opens.

  Attributes:
    workdir: folder of the run, whose last part is the default name of the tracker's run.
    step: updates that the run has made before.
    about: configuration, versions and commit, in values that JSON can hold.
    known: what the tracker returned when the run began; {} in a new run.
  """

  workdir: str
  step: int
  about: Mapping[str, Any]
  known: Mapping[str, str]

  @property
  def name(self) -> str:
    return os.path.basename(os.path.abspath(self.workdir))


class Tracker(abc.ABC):
  """A place for metrics. A subclass is a frozen dataclass whose fields are its settings."""

  module: ClassVar[str]  # the module that it imports
  extra: ClassVar[str]  # the extra of polgrad that installs it; '': polgrad itself does

  @abc.abstractmethod
  def open(self, opening: Opening) -> tuple[Board, dict[str, str]]:
    """An open run, and what to give to the next `open` as `known`."""

  def check(self, path: str) -> None:
    """Refuses a tracker whose library is missing.

    Raises:
      ImportError: names the extra that installs it.
    """
    if importlib.util.find_spec(self.module) is None:
      wanted = f'polgrad[{self.extra}]' if self.extra else 'polgrad'
      raise ImportError(f'{path} needs {self.module}, which is missing: pip install "{wanted}"')


@dataclasses.dataclass(frozen=True, kw_only=True)
class tensorboard(Tracker):
  """Event files for TensorBoard; look at them with `tensorboard --logdir FOLDER`.

  Attributes:
    folder: where the files go; '' is WORKDIR/tensorboard.
  """

  folder: str = ''
  module = 'tensorboardX'
  extra = ''

  def open(self, opening: Opening) -> tuple[Board, dict[str, str]]:
    SummaryWriter = _without_torch()
    folder = os.path.expanduser(self.folder) or os.path.join(opening.workdir, 'tensorboard')
    # TensorBoard drops events of an earlier process from `purge_step` on.
    # What it has written before stays, so that must be on the disk if this process is killed.
    writer = SummaryWriter(
      folder,
      purge_step=opening.step + 1,
      filename_suffix=f'.{opening.step}',
      flush_secs=1,
    )
    return _TensorBoard(writer), {}


def _without_torch() -> type:
  """tensorboardX's writer. It would import PyTorch, which takes seconds, only to convert tensors."""
  missing = 'torch' not in sys.modules
  if missing:  # None makes `import torch` raise ImportError, which tensorboardX expects
    sys.modules['torch'] = None
  try:
    from tensorboardX import SummaryWriter
  finally:
    if missing:
      del sys.modules['torch']
  return SummaryWriter


class _TensorBoard(Board):
  rewrites = True

  def __init__(self, writer: Any):
    self._writer = writer

  def write(self, step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
      self._writer.add_scalar(name, value, step)

  def close(self) -> None:
    self._writer.close()


@dataclasses.dataclass(frozen=True, kw_only=True)
class wandb(Tracker):
  """Weights & Biases. Metrics are drawn over `update`, the number of updates of the run.

  Attributes:
    project: name of the project.
    run_name: name of the run; '' is the name of the run's folder.
    entity: user or team; '' is the account's default.
    group: runs of one group are shown together.
    mode: 'online', or 'offline': files in WORKDIR/wandb, which `wandb sync FOLDER` sends later.
  """

  project: str = 'polgrad'
  run_name: str = ''
  entity: str = ''
  group: str = ''
  mode: Literal['online', 'offline'] = 'online'
  module = 'wandb'
  extra = 'track'

  def open(self, opening: Opening) -> tuple[Board, dict[str, str]]:
    import wandb as library

    run_id = opening.known.get('id') or secrets.token_hex(4)
    run = library.init(
      project=self.project,
      name=self.run_name or opening.name,
      entity=self.entity or None,
      group=self.group or None,
      mode=self.mode,
      dir=opening.workdir,
      id=run_id,
      resume='allow',
      config=dict(opening.about),
      settings=library.Settings(silent=True),
    )
    if self.mode == 'online':
      print(f'wandb: {run.url}')
    run.define_metric('*', step_metric='update')
    return _Wandb(run), {'id': run_id}


class _Wandb(Board):
  def __init__(self, run: Any):
    self._run = run

  def write(self, step: int, values: Mapping[str, float]) -> None:
    self._run.log({'update': step, **values})

  def close(self) -> None:
    self._run.finish()


@dataclasses.dataclass(frozen=True, kw_only=True)
class trackio(Tracker):
  """trackio, whose data base is local; look at it with `trackio show --project PROJECT`.

  Attributes:
    project: name of the project.
    run_name: name of the run; '' is the name of the run's folder and the time when it began.
    group: runs of one group are shown together.
    space_id: a Space of Hugging Face, as user/name, that gets the metrics; '' keeps them local.
  """

  project: str = 'polgrad'
  run_name: str = ''
  group: str = ''
  space_id: str = ''
  module = 'trackio'
  extra = 'track'

  def open(self, opening: Opening) -> tuple[Board, dict[str, str]]:
    import trackio as library

    # trackio resumes by name, so two folders of the same name must not share one.
    begun = time.strftime('%Y%m%d-%H%M%S')
    name = opening.known.get('name') or self.run_name or f'{opening.name}-{begun}'
    run = library.init(
      project=self.project,
      name=name,
      group=self.group or None,
      space_id=self.space_id or None,
      config=dict(opening.about),
      resume='allow',
      embed=False,
      auto_log_gpu=False,
      auto_log_cpu=False,
    )
    return _Trackio(run), {'name': name}


class _Trackio(Board):
  def __init__(self, run: Any):
    self._run = run

  def write(self, step: int, values: Mapping[str, float]) -> None:
    self._run.log(dict(values), step=step)

  def close(self) -> None:
    self._run.finish()


@dataclasses.dataclass(frozen=True, kw_only=True)
class mlflow(Tracker):
  """MLflow.

  Attributes:
    uri: of the tracking server, `http://...`, a folder, or a data base such as `sqlite:///runs.db`,
      which needs the package mlflow, not only mlflow-skinny; '' is what the variable
      MLFLOW_TRACKING_URI names, and without it the folder WORKDIR/mlruns.
    experiment: name of the experiment.
    run_name: name of the run; '' is the name of the run's folder.
  """

  uri: str = ''
  experiment: str = 'polgrad'
  run_name: str = ''
  module = 'mlflow'
  extra = 'track'

  def open(self, opening: Opening) -> tuple[Board, dict[str, str]]:
    import mlflow as library
    from mlflow.entities import Param

    own = os.environ.get('MLFLOW_TRACKING_URI', '') or os.path.join(opening.workdir, 'mlruns')
    uri = self.uri or own
    if '://' not in uri:  # a folder, which newer versions of MLflow write only if asked to
      uri = os.path.abspath(os.path.expanduser(uri.removeprefix('file:')))
      os.environ.setdefault('MLFLOW_ALLOW_FILE_STORE', 'true')
    client = library.MlflowClient(tracking_uri=uri)
    run_id = opening.known.get('id', '')
    if run_id:
      client.update_run(run_id, status='RUNNING')
    else:
      found = client.get_experiment_by_name(self.experiment)
      home = found.experiment_id if found else client.create_experiment(self.experiment)
      run_id = client.create_run(home, run_name=self.run_name or opening.name).info.run_id
      # MLflow takes texts of at most 6000 characters, a hundred of them at once.
      texts = [Param(_mlflow_name(k), str(v)[:6000]) for k, v in leaves(opening.about)]
      for i in range(0, len(texts), 100):
        client.log_batch(run_id, params=texts[i : i + 100])
    return _MLflow(client, run_id), {'id': run_id}


class _MLflow(Board):
  def __init__(self, client: Any, run_id: str):
    self._client, self._run_id = client, run_id

  def write(self, step: int, values: Mapping[str, float]) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    metrics = [Metric(_mlflow_metric(k), v, now, step) for k, v in values.items()]
    self._client.log_batch(self._run_id, metrics=metrics)

  def close(self) -> None:
    self._client.set_terminated(self._run_id)


def _mlflow_metric(name: str) -> str:
  """`train/loss/nll` becomes `train/loss.nll`: a store of files cannot have `loss` as a folder too."""
  phase, slash, rest = name.partition('/')
  return _mlflow_name(phase + slash + rest.replace('/', '.'))


def _mlflow_name(name: str) -> str:
  """The name with characters that MLflow allows: `pass@8` becomes `pass_at_8`."""
  kept = name.replace('@', '_at_')
  return ''.join(c if c.isalnum() or c in '_-. /' else '_' for c in kept)


TABLE = table('trackers', tensorboard, wandb, trackio, mlflow)
Part = Annotated[Tracker, TABLE]


def check(trackers: Mapping[str, Tracker]) -> None:
  """Refuses trackers whose libraries are missing.

  Raises:
    ImportError: names the field and the extra that installs the library.
  """
  for name, tracker in trackers.items():
    tracker.check(f'config.trackers.{name}')


class Tracking:
  """The open trackers of a run. One that fails later is named in a warning, once, and left out then."""

  def __init__(
    self,
    trackers: Mapping[str, Tracker],
    *,
    workdir: str,
    step: int,
    about: Mapping[str, Any],
    earlier: Mapping[tuple[str, int], Mapping] = {},
  ):
    """Opens the trackers.

    Args:
      trackers: by name.
      workdir: folder of the run.
      step: updates that the run has made before.
      about: configuration, versions and commit.
      earlier: rows, by phase and step, of later steps, which an interrupted run has written. They are
        not sent a second time to a tracker that would show both.

    Raises:
      RuntimeError: a tracker of a new run cannot be opened. In a resumed run this is only a warning.
    """
    self._boards: dict[str, tuple[Board, bool]] = {}  # with whether it has the earlier rows
    self._earlier, self._start = earlier, step
    for name, tracker in trackers.items():
      file = os.path.join(workdir, 'trackers', f'{name}.json')
      known = _read(file)
      opening = Opening(workdir=workdir, step=step, about=about, known=known or {})
      try:
        board, kept = tracker.open(opening)
        _write(file, kept)
      except Exception as error:
        text = f'config.trackers.{name}: {type(error).__name__}: {error}'
        if known is None:
          raise RuntimeError(f'{text}; correct it, or leave this tracker out') from error
        logging.warning('%s; this run continues without it', text)
      else:
        self._boards[name] = (board, known is not None)

  def write(self, step: int, phase: str, row: Mapping[str, float]) -> None:
    """Sends the finite values of a row, under names that begin with the phase."""
    values = {f'{phase}/{k}': v for k, v in row.items() if math.isfinite(v)}
    again = _same(self._earlier.get((phase, step)), row)
    for name, (board, has_earlier) in list(self._boards.items()):
      # A board that rewrites drops the rows after the step at which the run resumes, and no others.
      if not (again and has_earlier and (step <= self._start or not board.rewrites)):
        self._guarded(name, board.write, step, values)

  def close(self) -> None:
    for name, (board, _) in list(self._boards.items()):
      self._guarded(name, board.close)

  def _guarded(self, name: str, call: Any, *arguments: Any) -> None:
    try:
      call(*arguments)
    except Exception as error:
      del self._boards[name]
      logging.warning(
        'config.trackers.%s: %s: %s; the run continues without it, and its metrics are in metrics.jsonl',
        name, type(error).__name__, error,
      )  # fmt: skip


def _same(before: Mapping | None, row: Mapping[str, float]) -> bool:
  """Whether two rows are equal but for the clock; `before` has null for values that are not finite."""
  if before is None:
    return False
  own = {k: v if math.isfinite(v) else None for k, v in row.items()}
  left_out = ('step', 'phase', *OF_THE_CLOCK)
  counted = lambda values: {k: v for k, v in values.items() if k.partition('/')[0] not in left_out}
  return counted(before) == counted(own)


def _read(path: str) -> dict | None:
  """What a tracker left here, or None if it was never opened."""
  try:
    with open(path, encoding='utf-8') as f:
      found = json.load(f)
  except (OSError, ValueError):
    return None
  return found if isinstance(found, dict) else None


def _write(path: str, values: Mapping[str, str]) -> None:
  os.makedirs(os.path.dirname(path), exist_ok=True)
  with writing(path, encoding='utf-8') as f:
    json.dump(values, f)


def describe(identity: Mapping[str, Any]) -> dict[str, Any]:
  """What trackers show of a run: its configuration, versions, and the commit of the current folder."""
  versions = {'polgrad': identity['version'], **identity['libraries']}
  return {'config': identity['config'], 'versions': versions, 'git': git()}


def git(folder: str = '.') -> dict[str, Any]:
  """The commit of a folder, and whether tracked files have changed since; {} where there is none."""
  ask = lambda *words: subprocess.run(
    ['git', '-C', folder, *words], capture_output=True, text=True, timeout=10, check=True
  ).stdout.strip()
  try:
    return {
      'commit': ask('rev-parse', 'HEAD'),
      'changed': bool(ask('status', '--porcelain', '--untracked-files=no')),
    }
  except (OSError, subprocess.SubprocessError):
    return {}
