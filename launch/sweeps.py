"""What the launchers of clusters share: their options, what follows --, and the runs of a sweep."""

import argparse
import itertools
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def parser(doc):
  """A parser with the options of all clusters."""
  made = argparse.ArgumentParser(description=doc.splitlines()[0], allow_abbrev=False)
  made.add_argument('--name', required=True, help='of the job and of the folder of its run')
  made.add_argument('--module', default='polgrad.train', help='what runs')
  made.add_argument('--sweep', action='append', default=[], help='FLAG=VALUE,VALUE,...')
  made.add_argument('--warn', type=int, default=300, help='seconds from SIGTERM to the end')
  made.add_argument('--dry_run', action='store_true', help='print, and submit nothing')
  return made


def parse(made, argv):
  """The options, and the flags that follow --, for the run."""
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
  if options.warn < 0:
    made.error('--warn must be at least 0')
  for one in options.sweep:
    flag, _, values = one.partition('=')
    if not re.fullmatch(r'[\w.]+', flag) or not all(values.split(',')):
      made.error(f'--sweep={one}: write FLAG=VALUE,VALUE,...')
    if flag == 'config':
      made.error('--sweep=config: commas separate the values; submit one job for every --config')
  if options.sweep and given & {'--workdir', '--model'}:
    made.error('--sweep needs a folder for every run: leave --workdir and --model out')
  return options, rest


def runs(options, rest, folder, known=str):
  """(name, flags) of every run: its values end its name, and `folder`/name is its --workdir.

  Args:
    known: the cluster's name of a run; two runs of one name are refused.
  """
  axes, taken, made = [], {}, []
  for one in options.sweep:
    flag, _, values = one.partition('=')
    axes.append([(flag, value) for value in values.split(',')])
  for point in itertools.product(*axes):
    name = '-'.join([options.name, *(re.sub(r'[^\w.]+', '_', value) for _, value in point)])
    flags = [*rest, *(f'--{flag}={value}' for flag, value in point)]
    if not any(flag.split('=')[0] in ('--workdir', '--model') for flag in rest):
      flags.append(f'--workdir={folder}/{name}')
    values = ' '.join(f'--{flag}={value}' for flag, value in point)
    if (other := taken.setdefault(known(name), values)) is not values:
      sys.exit(f'--sweep: {other} and {values} would both be called {known(name)!r}')
    made.append((name, flags))
  return made


def submit(command, text, name):
  """Gives `text` to the command of the cluster; its refusal ends the sweep."""
  try:
    done = subprocess.run(command, input=text, text=True, cwd=ROOT)
  except FileNotFoundError:
    sys.exit(f'there is no {command[0]} here; --dry_run shows what would be submitted')
  if done.returncode:
    sys.exit(f'{command[0]} refused {name}')
