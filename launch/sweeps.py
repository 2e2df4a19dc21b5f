"""What the launchers share: options, what follows --, and the runs of a sweep."""

import argparse
import itertools
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def add_sweep(made):
  """Adds the option --sweep."""
  made.add_argument('--sweep', action='append', default=[], help='FLAG=VALUE,VALUE,...')


def parser(doc):
  """A parser with the options of all clusters."""
  made = argparse.ArgumentParser(description=doc.splitlines()[0], allow_abbrev=False)
  made.add_argument('--name', required=True, help='of the job and of the folder of its run')
  made.add_argument('--module', default='polgrad.train', help='what runs')
  add_sweep(made)
  made.add_argument('--warn', type=int, default=300, help='seconds from SIGTERM to the end')
  made.add_argument('--dry_run', action='store_true', help='print, and submit nothing')
  return made


def parse(made, argv):
  """The options, and the flags that follow --, for the run."""
  options, rest = split(made, argv)
  if options.warn < 0:
    made.error('--warn must be at least 0')
  return options, rest


def split(made, argv):
  """`parse` without the option --warn: refuses a bad name or sweep, and a run without --config."""
  own, rest = argv, []
  if '--' in argv:
    own, rest = argv[: argv.index('--')], argv[argv.index('--') + 1 :]
  options = made.parse_args(own)
  if not re.fullmatch(r'\w[\w.-]*', options.name):
    made.error(
      f'--name={options.name}: letters, digits, ".", "_" and "-" only, the first no "." or "-"'
    )
  given = {flag.split('=')[0] for flag in rest}
  if options.module == 'polgrad.train' and '--config' not in given:
    made.error('need --config=... after --')
  check_sweep(made, options, rest)
  return options, rest


def check_sweep(made, options, rest):
  """Refuses a sweep that cannot be; `rest` are the flags of the run."""
  given = {flag.split('=')[0] for flag in rest}
  for one in options.sweep:
    flag, _, values = one.partition('=')
    if not re.fullmatch(r'[\w.]+', flag) or not all(values.split(',')):
      made.error(f'--sweep={one}: write FLAG=VALUE,VALUE,...')
    if flag == 'config':
      made.error('--sweep=config: commas separate the values; submit one job for every --config')
  if options.sweep and given & {'--workdir', '--model'}:
    made.error('--sweep needs a folder for every run: leave --workdir and --model out')


def job_set_parser(doc):
  """A parser with the options of all clusters whose runs are JobSets of TPU slices."""
  made = parser(doc)
  made.add_argument('--slices', type=int, default=1, help='number of slices')
  made.add_argument('--image', required=True, help='with polgrad in its working directory')
  made.add_argument('--bucket', required=True, help='gs://... for the folders of runs')
  made.add_argument('--spot', action='store_true', help='nodes that may be preempted')
  made.add_argument('--restarts', type=int, default=100, help='how often all hosts begin again')
  made.add_argument('--env', action='append', default=[], help='NAME=VALUE of the run')
  return made


def parse_job_set(made, argv):
  """`parse`, of such a parser."""
  options, rest = parse(made, argv)
  if options.slices < 1 or options.restarts < 0:
    made.error('--slices must be at least 1, and --restarts at least 0')
  if not re.fullmatch(r'gs://[^/\s]\S*', options.bucket):
    made.error(f'--bucket={options.bucket}: hosts share no disk, so it must be gs://...')
  if not re.fullmatch(r'[^-\s]\S*', options.image):
    made.error(f'--image={options.image}: must name an image, such as REGISTRY/NAME:TAG')
  for one in options.env:
    if not re.fullmatch(r'[A-Za-z_]\w*=.*', one, re.DOTALL):
      made.error(f'--env={one}: write NAME=VALUE')
  return options, rest


def check_names(made, options, flags, also='', needed=()):
  """Refuses options that cannot be names of Kubernetes or Google Cloud; '' is none.

  Args:
    also: characters that are allowed besides lower case, digits, '.' and '-'.
    needed: flags that must not be ''.
  """
  for flag in flags:
    given = getattr(options, flag)
    if not re.fullmatch(f'[a-z0-9]([a-z0-9.{also}-]*[a-z0-9])?', given) and (
      given or flag in needed
    ):
      made.error(f'--{flag}={given}: lower case, digits, ".{also}" and "-" only')


def kubernetes_name(name):
  """`name` as Kubernetes allows it: lower case, digits and '-'."""
  made = re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')
  # JobSet appends "-slice-N-N" and five letters, and a pod's name has at most 63.
  if not re.match('[a-z]', made) or len(made) > 40:
    sys.exit(
      f'--name: {name!r} would be called {made!r}, but the name of a JobSet begins with a letter and '
      f'has at most 40 characters, with the values of --sweep; this one has {len(made)}'
    )
  return made


def points(options, known=str):
  """(name, flags) of every combination of values; without --sweep of the one run.

  Args:
    known: the cluster's name of a run; two runs of one name are refused.
  """
  axes, taken, made = [], {}, []
  for one in options.sweep:
    flag, _, values = one.partition('=')
    axes.append([(flag, value) for value in values.split(',')])
  for point in itertools.product(*axes):
    name = '-'.join([options.name, *(re.sub(r'[^\w.]+', '_', value) for _, value in point)])
    flags = [f'--{flag}={value}' for flag, value in point]
    values = ' '.join(flags)
    if (other := taken.setdefault(known(name), values)) is not values:
      sys.exit(f'--sweep: {other} and {values} would both be called {known(name)!r}')
    made.append((name, flags))
  return made


def runs(options, rest, folder, known=str):
  """(name, flags) of every run: its values end its name, and `folder`/name is its --workdir."""
  given = any(flag.split('=')[0] in ('--workdir', '--model') for flag in rest)
  own = lambda name: [] if given else [f'--workdir={folder}/{name}']
  return [(name, [*rest, *flags, *own(name)]) for name, flags in points(options, known)]


def submit(command, text, name):
  """Gives `text` to the command of the cluster; its refusal ends the sweep."""
  try:
    done = subprocess.run(command, input=text, text=True, cwd=ROOT)
  except FileNotFoundError:
    sys.exit(f'there is no {command[0]} here; --dry_run shows what would be submitted')
  if done.returncode:
    sys.exit(f'{command[0]} refused {name}')
