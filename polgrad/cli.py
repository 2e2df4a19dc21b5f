"""Flags and start-up code that all mains share.

`--config.a.b=...` changes a value of the configuration; `polgrad/overrides.py` says how.
"""

import contextlib
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from polgrad import barriers, compiling, overrides
from polgrad.progress import BEST, NEWEST

CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'File of the experiment.', lock_config=True
)
WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run: metrics, checkpoints, report; also gs://...'
)
CHECKPOINTS = flags.DEFINE_string(
  'checkpoints', '', 'Folder of the checkpoints, also gs://...; default: WORKDIR/checkpoints.'
)


class _StepParser(flags.IntegerParser):
  """A number, or `best`."""

  def parse(self, argument: str | int) -> int:
    if argument == 'best':
      return BEST
    try:
      return super().parse(argument)
    except ValueError:
      raise ValueError(f'expected a number or best, got {argument!r}') from None


STEP = flags.DEFINE(
  _StepParser(),
  'step',
  NEWEST,
  'Number of the checkpoint to read or resume from; -1 is the newest, `best` that of config.keep_best.',
  serializer=flags.ArgumentSerializer(),
)
PARAMS = flags.DEFINE_string(
  'params', 'policy', 'Parameters to read: `policy`, or the name of an anchor such as `average`.'
)
OUT = flags.DEFINE_string(
  'out', '', 'File or folder to write; `convert` needs an empty or new one.'
)
CACHE = flags.DEFINE_string(
  'compilation_cache',
  os.path.expanduser('~/.cache/polgrad/xla'),
  'Folder of compiled programs; "": none are kept.',
)
CHANGES: dict[str, str] = {}  # texts of --config.a.b=..., by path from 'config' on
DISTRIBUTED = flags.DEFINE_bool(
  'distributed',
  False,
  'This process is one of several; on a TPU pod and under Slurm or Open MPI they find each other.',
)
COORDINATOR = flags.DEFINE_string(
  'coordinator',
  None,
  'HOST:PORT at which process 0 waits for the others, where JAX does not find it by itself.',
)
NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'Number of processes; goes with --coordinator.', lower_bound=1
)
PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Number of this process, from 0; goes with --coordinator.', lower_bound=0
)
LOST_AFTER = flags.DEFINE_integer(
  'lost_after',
  100,
  'Seconds without a sign of life after which a process counts as lost, which ends the others.',
  lower_bound=1,
)
WAIT_AT_MOST = flags.DEFINE_integer(
  'wait_at_most',
  1800,
  'Seconds that a process waits for the others at a barrier; then it ends, and with it the others.',
  lower_bound=1,
)
STUCK_AFTER = flags.DEFINE_integer(
  'stuck_after',
  7200,
  'Seconds without a barrier after which the processes of a training run end; 0: no limit. A step has '
  'several barriers; the longest rollout, update or compilation must take less time than this.',
  lower_bound=0,
)


# Errors of a computation that several processes share begin with a status, whatever their type.
_SHARED = re.compile('(ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL|UNAVAILABLE|UNKNOWN):')


def run(main: Callable[[list[str]], None]) -> None:
  """Runs a main; its config file can import what lies beside it."""
  app.run(compiling.in_one_chunk(main), flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
  """Reads the flags, after the folder of the config file was made importable.

  Changes of the configuration are put into `CHANGES`: the type of a value depends on the parts that the
  configuration names, so they are read only when it is there (see `config`).
  """
  argv, changes = split_changes(argv)
  CHANGES.update(changes)
  sys.argv = argv  # where config_flags would look for changes
  for flag, value in zip(argv, [*argv[1:], '']):
    name, equals, given = flag.lstrip('-').partition('=')
    if name == 'config' and flag.startswith('-'):
      file = os.path.expanduser(given if equals else value).partition(':')[0]
      sys.path.append(os.path.dirname(os.path.abspath(file)))
      with refusals():
        if not os.path.isfile(file):
          raise FileNotFoundError(f'--config: there is no file {file!r}')
  with refusals():
    try:
      return flags.FLAGS(argv)
    except flags.Error as error:
      # ml_collections wraps what a config file raises, with its traceback as text, and so does absl.
      wrapped = error.__cause__ or error.__context__
      if 'parsing config file' in str(wrapped):
        raise wrapped.__context__ from None
    return app.parse_flags_with_usage(argv)  # says what is wrong with the flags, and ends


def split_changes(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
  """Separates --config.a.b=text, or --config.a.b text, from the other arguments.

  Returns:
    The other arguments, and the texts by path (`config.a.b`). A path without a text is 'true', and
    `--noconfig.a.b` is 'false'. Of a path that is given twice, the last text counts.
  """
  rest, changes, arguments = [], {}, list(argv)
  while arguments:
    argument = arguments.pop(0)
    found = re.fullmatch(r'--?(no)?(config\.[^=]*)(?:=(.*))?', argument, re.DOTALL)
    if not found:
      rest.append(argument)
      continue
    no, path, text = found.groups()
    if text is None and not no and arguments and not arguments[0].startswith('-'):
      text = arguments.pop(0)
    changes[path] = text if text is not None else 'false' if no else 'true'
  return rest, changes


def config(choices: Mapping[str, Callable]) -> ConfigDict:
  """The configuration with the changes of the command line; `choices` has its outermost part.

  Raises:
    ValueError: a change that does not fit, see `overrides.apply`.
  """
  return overrides.apply(CONFIG.value, CHANGES, choices)


def start(argv: list[str], *, needed: Sequence[str] = ('config', 'workdir')) -> None:
  """Checks the flags, then sets up logging, the processes of a pod and the compilation cache.

  Raises:
    app.UsageError: there are arguments that are no flags, or a flag that is needed is missing.
  """
  compiling.prepare()
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}; flags begin with --')
  if CHANGES and not {'config', 'model'} & set(needed):
    raise app.UsageError(f'{sorted(CHANGES)}: this main reads no configuration of the command line')
  for name in needed:
    if flags.FLAGS[name].value is None:
      raise app.UsageError(f'--{name} is needed')
  if 'config' in needed:
    with refusals():
      try:
        CONFIG.value.keys()
      except (
        OSError
      ) as error:  # of ml_collections, around what a file that cannot be read has raised
        raise error.__cause__ or error from None
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # otherwise Orbax logs every step of a save
  join()
  if CACHE.value:
    jax.config.update('jax_compilation_cache_dir', CACHE.value)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def join() -> None:
  """Connects this process to the others of the run, if the flags say that there are others.

  Raises:
    app.UsageError: some of --coordinator, --num_processes and --process_id are missing, or do not fit
      each other.
  """
  by_hand = (COORDINATOR, NUM_PROCESSES, PROCESS_ID)
  given = [flag for flag in by_hand if flag.value is not None]
  if not given and not DISTRIBUTED.value:
    return
  if given and len(given) < len(by_hand):
    missing = [f'--{flag.name}' for flag in by_hand if flag.value is None]
    raise app.UsageError(f'--{given[0].name} needs {" and ".join(missing)} beside it')
  if given and PROCESS_ID.value >= NUM_PROCESSES.value:
    raise app.UsageError(
      f'--process_id={PROCESS_ID.value}: the {NUM_PROCESSES.value} processes are 0 to '
      f'{NUM_PROCESSES.value - 1}'
    )
  if given and not re.fullmatch(r'.+:\d+', COORDINATOR.value):
    raise app.UsageError(f'--coordinator={COORDINATOR.value}: expected HOST:PORT')
  barriers.WAIT_AT_MOST = float(WAIT_AT_MOST.value)
  barriers.STUCK_AFTER = float(STUCK_AFTER.value)
  jax.distributed.initialize(
    COORDINATOR.value,
    NUM_PROCESSES.value,
    PROCESS_ID.value,
    heartbeat_timeout_seconds=LOST_AFTER.value,
  )


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
  """Ends this process of several at an error, without waiting at barriers for processes that are lost.

  The process that has failed shows its error and ends, so the others lose it. Those show the error of
  the computation that they shared with it, wait until JAX has missed the signs of life of a process,
  which ends them with its number, and end in any case after `--lost_after` seconds and a few more. A
  checkpoint that was still being written is then absent.
  """
  try:
    yield
  except Exception as error:
    if jax.process_count() == 1:
      raise
    traceback.print_exc()
    if _SHARED.match(str(error)):
      print(
        f'process {jax.process_index()} of {jax.process_count()} ends: it or another one has failed. '
        f'Within {LOST_AFTER.value} seconds JAX says which one is lost ("tasks are unhealthy"). '
        'The same commands resume the run from its last whole checkpoint.',
        file=sys.stderr,
        flush=True,
      )
      # During this time JAX ends the process, with a message that has the number of the lost one.
      time.sleep(LOST_AFTER.value + 5)
    sys.stderr.flush()
    os._exit(1)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
  """Ends the process with one line where the user's configuration, data or folder is at fault.

  The traceback is shown with --verbosity=1.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError:  # of devices or other processes, not of the user
    raise
  except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
    if logging.get_verbosity() >= logging.DEBUG:
      raise
    print(f'{type(error).__name__}: {error}', file=sys.stderr)
    sys.exit(2)


def chosen_of_a_run() -> list[flags.FlagHolder]:
  """The flags that choose among the parameters of a run, as far as they do not have their default."""
  return [flag for flag in (STEP, PARAMS) if flag.value != flag.default]


def workdir() -> str:
  """The folder of the run, by the flags."""
  return _folder(WORKDIR)


def checkpoint_folder() -> str:
  """The folder of the run's checkpoints, by the flags."""
  return _folder(CHECKPOINTS) or os.path.join(workdir(), 'checkpoints')


def _folder(flag: flags.FlagHolder) -> str:
  """The folder that a flag names.

  Raises:
    ValueError: the name of a bucket that lacks a slash, which would be a folder of this machine.
  """
  if found := re.match(r'(gs|s3):/*', flag.value):
    right = f'{found[1]}://'
    if found[0] != right:
      given, rest = flag.value, flag.value[found.end() :]
      raise ValueError(f'--{flag.name}={given}: a bucket is written as {right}{rest}')
  return os.path.expanduser(flag.value)
