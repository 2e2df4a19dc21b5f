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
  made.add_argument('--dry_run', action='store_true', help='print, and submit nothing')
  return made


def parse(made, argv):
  """The options, and the flags that follow --, for the run."""
  own, rest = argv, []
  if '--' in argv:
    own, rest = argv[: argv.index('--')], argv[argv.index('--') + 1 :]
  options = made.parse_args(own)
  for one in options.sweep:
    if not re.fullmatch(r'[\w.]+=.+', one):
      made.error(f'--sweep={one}: write FLAG=VALUE,VALUE,...')
  return options, rest


def runs(options, rest, folder):
  """(name, flags) of every run: its values end its name, and `folder`/name is its --workdir."""
  axes = []
  for one in options.sweep:
    flag, _, values = one.partition('=')
    axes.append([(flag, value) for value in values.split(',')])
  for point in itertools.product(*axes):
    name = '-'.join([options.name, *(re.sub(r'[^\w.]+', '_', value) for _, value in point)])
    flags = [*rest, *(f'--{flag}={value}' for flag, value in point)]
    if not any(flag.split('=')[0] in ('--workdir', '--model') for flag in rest):
      flags.append(f'--workdir={folder}/{name}')
    elif options.sweep:
      sys.exit('--sweep needs a folder for every run: leave --workdir out')
    yield name, flags


def submit(command, text, name):
  """Gives `text` to the command of the cluster; its refusal ends the sweep."""
  try:
    done = subprocess.run(command, input=text, text=True, cwd=ROOT)
  except FileNotFoundError:
    sys.exit(f'there is no {command[0]} here; --dry_run shows what would be submitted')
  if done.returncode:
    sys.exit(f'{command[0]} refused {name}')
