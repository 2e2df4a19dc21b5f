#!/usr/bin/env python3
"""Runs a polgrad command in several processes of this machine, as a pod runs it on several hosts.

  launch/local.py --processes=2 -- --config=experiments/quickstart.py --workdir=runs/quickstart

What follows -- goes to `python -m MODULE` in every process; --distributed, --coordinator,
--num_processes and --process_id are added. Each line of output begins with the number of its process.
If a process ends with an error, or is killed, the others get SIGTERM and, after --grace seconds,
SIGKILL; the launcher then ends with the code of the first (128 and the signal, if it was killed).
SIGTERM and Ctrl-C go to all.

--sweep=FLAG=VALUE,VALUE,..., which may be repeated, makes a run for every combination of values, one
after another, in the folders RUNS/NAME-VALUE. A run that fails ends the sweep.
"""

import argparse
import importlib.util
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

import sweeps

ROOT = pathlib.Path(__file__).resolve().parent.parent


def parse(argv):
  """The options, and what follows --."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
  parser.add_argument('--processes', type=int, default=2, help='number of processes')
  parser.add_argument('--module', default='polgrad.train', help='what runs')
  sweeps.add_sweep(parser)
  parser.add_argument('--name', default='run', help='with which the names of a sweep begin')
  parser.add_argument('--runs', default='runs', help='folder of the folders of a sweep')
  parser.add_argument('--port', type=int, default=0, help='of process 0; 0: a free one')
  parser.add_argument('--grace', type=float, default=30, help='seconds between SIGTERM and SIGKILL')
  parser.add_argument('--dry_run', action='store_true', help='print the commands, run none')
  options, rest = sweeps.split(parser, argv)
  given = {flag.split('=')[0] for flag in rest}
  if options.processes < 1:
    parser.error('--processes must be at least 1')
  if options.module == 'polgrad.train' and not options.sweep and '--workdir' not in given:
    parser.error('need --workdir=... after --')
  if added := sorted(given & {'--coordinator', '--num_processes', '--process_id'}):
    parser.error(f'{added[0]} is added for every process; leave it out')
  if not 0 <= options.port < 2**16:
    parser.error(f'--port={options.port}: expected 1 to 65535, or 0 for a free port')
  if options.port and taken(options.port):
    parser.error(f'--port={options.port} is taken by another program')
  return options, rest


def taken(port):
  """Whether a program of this machine listens at the port."""
  with socket.socket() as one:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      one.bind(('', port))
    except OSError:
      return True
  return False


def free_port():
  with socket.socket() as one:
    one.bind(('localhost', 0))
    return one.getsockname()[1]


def python():
  """The Python that runs this program, if it has jax, else that of `make`."""
  made = ROOT / '.venv' / 'bin' / 'python'
  if importlib.util.find_spec('jax'):
    return sys.executable
  if made.exists():
    return str(made)
  raise SystemExit(
    f'{sys.executable} has no jax, and there is no {made}; `make quickstart` makes it'
  )


def commands(options, rest):
  """The command of every process."""
  port = options.port or free_port()
  flags = [
    '--distributed',
    f'--coordinator=localhost:{port}',
    f'--num_processes={options.processes}',
  ]
  start = [python(), '-m', options.module, *rest, *flags]
  return [[*start, f'--process_id={i}'] for i in range(options.processes)]


def copy(number, stream):
  """Prints the lines of a process."""
  for line in stream:
    print(f'[{number}] {line}', end='', flush=True)


def main():
  options, rest = parse(sys.argv[1:])
  found = sweeps.runs(options, rest, options.runs) if options.sweep else [('', rest)]
  for name, flags in found:
    wanted = commands(options, flags)
    if options.dry_run:
      print('\n'.join(map(shlex.join, wanted)))
      continue
    if name:
      print(f'begins: {name}', flush=True)
    if code := run(options, wanted):
      return code
  return 0


def run(options, wanted):
  """Runs the commands side by side until all have ended or one has failed; the exit code."""
  # Modules are found in the folder of the shell, then in this repository.
  path = os.pathsep.join([os.getcwd(), str(ROOT), os.environ.get('PYTHONPATH', '')])
  settings = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  running = [
    subprocess.Popen(one, env={**os.environ, 'PYTHONPATH': path}, **settings) for one in wanted
  ]
  readers = [
    threading.Thread(target=copy, args=(i, one.stdout), daemon=True)
    for i, one in enumerate(running)
  ]
  for reader in readers:
    reader.start()

  def tell(number, _=None):
    for one in running:
      if one.poll() is None:
        one.send_signal(number)

  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, tell)

  # Wait until all have ended, or one has failed.
  first = None
  while first is None and any(one.poll() is None for one in running):
    time.sleep(0.1)
    first = next((i for i, one in enumerate(running) if one.poll()), None)
  if first is None:
    first = next((i for i, one in enumerate(running) if one.poll()), None)
  if first is not None:
    code = running[first].returncode
    how = f'was killed by signal {-code}' if code < 0 else f'ended with code {code}'
    print(f'process {first} {how}; the others are stopped', file=sys.stderr, flush=True)
    tell(signal.SIGTERM)
    ends = time.monotonic() + options.grace
    while any(one.poll() is None for one in running) and time.monotonic() < ends:
      time.sleep(0.1)
    tell(signal.SIGKILL)
  for one, reader in zip(running, readers):
    one.wait()
    reader.join()
  if first is None:
    return 0
  code = running[first].returncode
  return 128 - code if code < 0 else code


if __name__ == '__main__':
  sys.exit(main())
