"""Flags and start-up that the mains share."""

import os

import jax
from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file('config', None, 'The experiment.', lock_config=True)
WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run: metrics, checkpoints, report.')
CHECKPOINTS = flags.DEFINE_string(
  'checkpoints', '', 'Folder of the checkpoints, perhaps gs://...; default: in the workdir.'
)
STEP = flags.DEFINE_integer('step', -1, 'Which checkpoint to read; -1 is the newest.')
CACHE = flags.DEFINE_string(
  'compilation_cache', os.path.expanduser('~/.cache/polgrad/xla'), 'Compiled programs; "" for none.'
)
DISTRIBUTED = flags.DEFINE_bool('distributed', False, 'Join the other processes of a pod first.')


def start(argv: list[str]) -> None:
  """Joins the pod if asked to, turns the compilation cache on and quiet libraries down."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}; flags begin with --')
  for flag in (CONFIG, WORKDIR):
    if flag.value is None:
      raise app.UsageError(f'--{flag.name} is needed')
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step of a save otherwise
  if DISTRIBUTED.value:
    jax.distributed.initialize()
  if CACHE.value:
    jax.config.update('jax_compilation_cache_dir', CACHE.value)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def checkpoint_folder() -> str:
  return CHECKPOINTS.value or os.path.join(WORKDIR.value, 'checkpoints')
