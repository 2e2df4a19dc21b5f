#!/usr/bin/env python3
"""Runs a polgrad command on every worker of a TPU slice, and begins again when that is preempted.

  launch/tpu_vm.py --name=grpo --zone=us-central2-b --type=v4-32 --bucket=gs://mine/runs --spot -- \\
    --config=experiments/run.py:method=grpo,task=addition,model=tiny
  launch/tpu_vm.py --name=grpo --zone=us-central2-b --follow      # or --logs, --stop, --delete, ...

Steps: create the slice (or reuse it), copy this repository (uncommitted changes too), install it, run,
and follow the log. What follows -- goes to `python -m MODULE`; --workdir=~/runs/NAME,
--checkpoints=BUCKET/NAME and --distributed are added (only --distributed if there is a --model, or a
--workdir of yours, such as gs://BUCKET/NAME). The run
is detached: it outlives this shell, and the same command resumes it from its last checkpoint.

--sweep=FLAG=VALUE,VALUE,..., which may be repeated, makes a run for every combination of values on that
slice, one after another, called NAME-VALUE; this shell begins the next one when one has ended.

While this shell follows it, a run also begins again by itself:
  * if the slice is preempted or gone, it is deleted, created and set up again;
  * if the run ends with exit code 75 (it was asked to stop, and has saved), it is started again.
With any other exit code but 0 the launch ends with that code, after the last lines of all workers' logs.
A run that was ended by --stop stays ended.

It needs Python 3.8 or newer, git, tar and gcloud, and nothing of polgrad.
"""

import argparse
import contextlib
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
import time

import sweeps

# States of a queued resource that has no slice any more.
GONE = ('FAILED', 'SUSPENDING', 'SUSPENDED')
ROOT = pathlib.Path(__file__).resolve().parent.parent
STOPPED = -1  # in place of an exit code: --stop has ended the run
SAVED = 75  # exit code of a run that was asked to stop and has saved
# Runtime version for JAX by the beginning of the accelerator type, from
# https://cloud.google.com/tpu/docs/runtimes; --version takes another one.
VERSIONS = {
  'v2-': 'tpu-ubuntu2204-base',
  'v3-': 'tpu-ubuntu2204-base',
  'v4-': 'tpu-ubuntu2204-base',
  'v5litepod-': 'v2-alpha-tpuv5-lite',
  'v5p-': 'v2-alpha-tpuv5',
  'v6e-': 'v2-alpha-tpuv6e',
}
# The working tree as git sees it, uncommitted changes included: what runs is what you have here. git
# also lists files that were deleted since; tar passes over them.
ARCHIVE = """cd "$1" && git ls-files -z --cached --others --exclude-standard |
  tar --null --ignore-failed-read --files-from=- --create --gzip --file="$2" """
UNPACK = 'rm -rf polgrad && mkdir polgrad && tar -xzf polgrad.tar.gz -C polgrad'
INSTALL = """set -e
command -v python3.11 > /dev/null || {{
  sudo apt-get update -q
  sudo apt-get install -qy software-properties-common
  sudo add-apt-repository -y ppa:deadsnakes/ppa
  sudo apt-get install -qy python3.11 python3.11-venv
}}
test -x venv/bin/python || python3.11 -m venv venv
venv/bin/pip install -q -e {package}"""
# setsid and nohup: the run belongs to no shell, so losing one does not end it. The shell around the
# command leaves its exit code in run.code.
RUN = """cd polgrad
{command} > ../run.log 2>&1 < /dev/null &
echo $! > ../run.pid
wait $!
echo $? > ../run.code"""
START = """rm -f run.code run.stopped run.log
setsid nohup bash -c {run} > /dev/null 2>&1 < /dev/null & echo started"""
# Waits until the old run has saved and is gone: two cannot hold the TPU. run.pid may be of a run that
# ended before the machine was restarted, so the process is looked at first.
STOP = """touch run.stopped
pid=$(cat run.pid 2> /dev/null) || exit 0
runs() {{ grep -qs venv/bin/python "/proc/$pid/cmdline"; }}
runs || exit 0
kill -TERM "$pid"
for _ in $(seq {grace}); do
  runs || exit 0
  sleep 1
done
kill -KILL "$pid" || true"""
# Ends when the run has ended, or the connection.
FOLLOW = """until [ -e run.log ]; do sleep 1; done
tail -n 100 -F run.log & tail=$!
until [ -e run.code ]; do sleep 2; done
sleep 1
kill $tail"""
ENDED = 'cat run.code && if [ -e run.stopped ]; then echo stopped; fi'


def parser() -> argparse.ArgumentParser:
  """The options; --help shows them with the text above."""
  made = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = made.add_argument
  add('--name', required=True, type=name, help='name of the slice and of the run')
  add('--zone', required=True, help='such as us-central2-b')
  add('--project', help="Google Cloud project [gcloud's default]")

  act = made.add_argument_group('what to do, in place of a launch').add_mutually_exclusive_group()
  act.add_argument('--follow', action='store_true', help='follow the log of worker 0')
  act.add_argument('--logs', action='store_true', help='print the end of the logs of all workers')
  act.add_argument('--stop', action='store_true', help='stop the run, which saves first')
  act.add_argument('--fetch', metavar='FOLDER', help="copy the run's folder (worker 0) to FOLDER")
  act.add_argument('--delete', action='store_true', help='delete the slice')

  add = made.add_argument_group('the slice').add_argument
  add('--type', help='accelerator type: v4-8, v5litepod-16, v5p-8, v6e-64, ...')
  add('--version', help='runtime version [by the type]')
  add('--spot', action='store_true', help='a slice that may be preempted')
  add('--reserved', action='store_true', help='a slice of a reservation')
  add('--queued', action='store_true', help='ask by a queued resource, and wait for it')
  add('--network', help='network of the slice')
  add('--subnetwork', help='subnetwork of the slice')
  add('--internal-ip', '--internal_ip', action='store_true', help='no external addresses')

  add = made.add_argument_group('the run').add_argument
  add('--bucket', help='folder of the checkpoints, which all workers reach (gs:// on a pod)')
  add('--module', default='polgrad.train', help='what to run [polgrad.train]')
  sweeps.add_sweep(made)
  add('--env', metavar='NAME=VALUE', action='append', default=[], type=variable,
      help='environment variable of the run; repeat it for more')  # fmt: skip
  add('--setup', metavar='COMMAND', help="shell command on all workers, in polgrad's folder")
  add('--extras', default='tpu,tasks', help='extras that pip installs [tpu,tasks]')
  add('--grace', type=count, default=30, help='seconds until a stop kills the run [30]')
  add('--restarts', type=count, default=100, help='how often to begin again [100]')
  add('--poll', type=float, default=30, help='seconds between two looks at the slice [30]')
  add('--dry_run', action='store_true', help='print the commands instead of running them')
  return made


def name(text: str) -> str:
  """A name of a slice, which is also that of folders."""
  if not re.fullmatch(r'[A-Za-z0-9][\w-]*', text, re.ASCII):
    raise argparse.ArgumentTypeError(f'expected letters, digits and hyphens, got {text!r}')
  return text


def count(text: str) -> int:
  """A number that is not negative."""
  if not text.isdecimal():
    raise argparse.ArgumentTypeError(f'expected a number of at least 0, got {text!r}')
  return int(text)


def variable(text: str) -> str:
  """A part of the command, NAME='VALUE'."""
  name, equals, value = text.partition('=')
  if not equals or not re.fullmatch(r'[A-Za-z_]\w*', name):
    raise argparse.ArgumentTypeError(f'expected NAME=VALUE, got {text!r}')
  return f'{name}={shlex.quote(value)}'


class Failed(Exception):
  """A command of gcloud failed; it has said why."""


class Slice:
  """A TPU slice, by the options, and what can be done with it."""

  def __init__(self, options: argparse.Namespace):
    self.o = options
    self.where = [f'--zone={options.zone}']
    self.where += [f'--project={options.project}'] if options.project else []
    self.inside = ['--internal-ip'] if options.internal_ip else []

  # gcloud

  def run(self, *command: str) -> None:
    """Prints a command so that it can be pasted back, and runs it unless this is a dry run."""
    print('+', shlex.join(command), file=sys.stderr, flush=True)
    if not self.o.dry_run and subprocess.run(command, check=False).returncode:
      raise Failed(command[0])

  def ask(self, *command: str) -> str:
    """The output of a command; '' if it fails, and in a dry run."""
    if self.o.dry_run:
      return ''
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ''

  def gcloud(self, *command: str, queued: bool = False) -> list:
    kind = 'queued-resources' if queued else 'tpu-vm'
    return ['gcloud', 'compute', 'tpus', kind, *command, *self.where]

  def ssh(self, workers: str, command: str) -> list:
    """A command on 'all' workers, or on one."""
    to = [f'--worker={workers}', f'--command={command}', *self.inside]
    return self.gcloud('ssh', self.o.name, *to)

  def state(self) -> str:
    """READY, CREATING, PREEMPTED, ...; '' if there is no slice."""
    return self.ask(*self.gcloud('describe', self.o.name, '--format=value(state)'))

  # Steps of a launch

  def provide(self) -> None:
    """Makes the slice ready: reuses it, or creates it in place of one that was preempted."""
    state, queued = self.state(), self.queue_state()
    if state == 'READY':
      print(f'reusing {self.o.name}', file=sys.stderr)
    elif queued and queued not in GONE:
      self.wait_in_queue()
    else:
      if state or queued:
        print(f'{self.o.name} is {state or queued}: creating it again', file=sys.stderr)
        self.delete()
      self.create()

  def create(self) -> None:
    o = self.o
    version = o.version or next(v for kind, v in VERSIONS.items() if o.type.startswith(kind))
    options = [f'--accelerator-type={o.type}']
    options += ['--spot'] if o.spot else []
    options += ['--reserved'] if o.reserved else []
    options += [f'--network={o.network}'] if o.network else []
    options += [f'--subnetwork={o.subnetwork}'] if o.subnetwork else []
    options += ['--internal-ips'] if o.internal_ip else []
    if not o.queued:
      self.run(*self.gcloud('create', o.name, *options, f'--version={version}'))
      return
    options += [f'--node-id={o.name}', f'--runtime-version={version}']
    self.run(*self.gcloud('create', o.name, *options, queued=True))
    self.wait_in_queue()

  def queue_state(self) -> str:
    """State of the queued resource: ACTIVE, ...; '' if there is none, or none is asked for."""
    if not self.o.queued:
      return ''
    return self.ask(
      *self.gcloud('describe', self.o.name, '--format=value(state.state)', queued=True)
    )

  def wait_in_queue(self) -> None:
    seen = ''
    while not self.o.dry_run:
      state = self.queue_state()
      if state != seen:
        print(f'queued resource {self.o.name}: {state}', file=sys.stderr, flush=True)
      if state == 'ACTIVE':
        return
      if state in GONE:
        raise Failed(f'queued resource {self.o.name} is {state}')
      seen = state
      time.sleep(self.o.poll)

  def delete(self) -> None:
    """Deletes the slice, with its queued resource if it was asked for by one."""
    if self.o.queued:
      self.run(*self.gcloud('delete', self.o.name, '--force', '--quiet', queued=True))
    else:
      self.run(*self.gcloud('delete', self.o.name, '--quiet'))

  def copy(self) -> None:
    with tempfile.TemporaryDirectory() as folder:
      archive = os.path.join(folder, 'polgrad.tar.gz')
      if self.o.dry_run:  # for pasting, a folder that stays
        archive = os.path.join(tempfile.gettempdir(), 'polgrad.tar.gz')
      self.run('bash', '-c', ARCHIVE, 'bash', str(ROOT), archive)
      to = ['--worker=all', *self.inside]
      self.run(*self.gcloud('scp', archive, f'{self.o.name}:polgrad.tar.gz', *to))
    self.run(*self.ssh('all', UNPACK))

  def install(self) -> None:
    package = shlex.quote(f'./polgrad[{self.o.extras}]')
    self.run(*self.ssh('all', INSTALL.format(package=package)))
    if self.o.setup:
      self.run(*self.ssh('all', f'cd polgrad && {{ {self.o.setup}\n}}'))

  def start(self, name: str, flags: list) -> None:
    """Starts the run of that name; the old one is stopped first."""
    flags = [*flags]
    if not names(flags, '--model', '--workdir'):
      flags += [f'--workdir=../runs/{name}']
      flags += [f'--checkpoints={self.o.bucket.rstrip("/")}/{name}']
    command = shlex.join(['../venv/bin/python', '-m', self.o.module, *flags, '--distributed'])
    run = RUN.format(command=' '.join([*self.o.env, command]))
    self.stop()
    self.run(*self.ssh('all', START.format(run=shlex.quote(run))))

  def stop(self) -> None:
    self.run(*self.ssh('all', STOP.format(grace=self.o.grace)))

  # What a run says

  def follow(self) -> str:
    """Shows the log of worker 0 until the run ends.

    Returns:
      Its exit code; '' if the slice is gone; 'stopped' if --stop has ended the run.
    """
    while True:
      with contextlib.suppress(Failed):  # the connection may be lost, or the slice
        self.run(*self.ssh('0', FOLLOW))
      ended = self.ask(*self.ssh('0', ENDED)).split()
      if ended or self.o.dry_run:
        return ended[-1] if ended else '0'
      if self.state() != 'READY':
        return ''
      time.sleep(self.o.poll)

  def logs(self) -> None:
    self.run(*self.ssh('all', 'hostname; tail -n 100 run.log'))

  def fetch(self, name: str, folder: str) -> None:
    """Copies a run's folder on worker 0: metrics, report, configuration."""
    if not self.o.dry_run:
      os.makedirs(folder, exist_ok=True)
    source = f'{self.o.name}:runs/{name}'
    options = ['--recurse', '--worker=0', *self.inside]
    self.run(*self.gcloud('scp', source, folder, *options))


def names(flags: list, *wanted: str) -> bool:
  """Whether one of the flags is given.

  With --model the command works with a model that no run made, so it has no folders of a run; with
  --workdir it names them itself.
  """
  return any(flag.partition('=')[0] in wanted for flag in flags)


def launch(tpu: Slice, name: str, flags: list) -> int:
  """Sets up the slice and runs, again and again while the slice is preempted.

  Returns:
    The exit code; STOPPED if --stop has ended the run.
  """
  for begun in range(tpu.o.restarts + 1):
    try:
      tpu.provide()
      tpu.copy()
      tpu.install()
      tpu.start(name, flags)
      ended = tpu.follow()
    except Failed:
      # A slice may also be preempted while it is set up, or there may be none for some time.
      state = tpu.state()
      if state == 'READY' or not (state or begun):
        raise
      ended = ''
    if ended == 'stopped':
      return STOPPED
    if ended not in ('', str(SAVED)):
      if ended != '0':
        tpu.logs()
      return int(ended)
    print('beginning again from the last checkpoint', file=sys.stderr, flush=True)
    time.sleep(tpu.o.poll)
  print(f'began again {tpu.o.restarts} times (--restarts)', file=sys.stderr)
  return SAVED


def check(options: argparse.Namespace, flags: list, error) -> None:
  """Refuses a launch that lacks something."""
  if not options.type or not (options.bucket or names(flags, '--model', '--workdir')):
    error('need --type and --bucket')
  if options.bucket and not options.bucket.startswith('/') and '://' not in options.bucket:
    error(f'--bucket={options.bucket}: expected gs://..., or a path from / that all workers reach')
  if not options.version and not options.type.startswith(tuple(VERSIONS)):
    error(f'--type={options.type}: name its --version; known are {", ".join(VERSIONS)}')
  if options.spot and options.reserved:
    error('--spot and --reserved exclude each other')
  if options.module == 'polgrad.train' and not any(f.startswith('--config=') for f in flags):
    error('need --config=... after --')


def main(arguments: list) -> int:
  cut = arguments.index('--') if '--' in arguments else len(arguments)
  own, flags = arguments[:cut], arguments[cut + 1 :]
  made = parser()
  options = made.parse_args(own)
  tpu = Slice(options)
  try:
    if options.follow:
      ended = tpu.follow()
      return 0 if ended == 'stopped' else int(ended or SAVED)
    for name in ('logs', 'stop', 'delete'):
      if getattr(options, name):
        getattr(tpu, name)()
        return 0
    sweeps.check_sweep(made, options, flags)
    runs = sweeps.points(options)
    if options.fetch:
      for name, _ in runs:
        tpu.fetch(name, options.fetch)
      return 0
    check(options, flags, made.error)
    for name, own in runs:
      code = launch(tpu, name, [*flags, *own])
      if code:
        return 0 if code == STOPPED else code
    return 0
  except Failed as failure:
    print(f'failed: {failure}', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print('\nthe run, if it has begun, continues; --follow shows it', file=sys.stderr)
    return 130


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
