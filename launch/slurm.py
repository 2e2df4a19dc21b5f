#!/usr/bin/env python3
"""Submits a polgrad command to Slurm, one process for every GPU, and has it resume when it was stopped.

  launch/slurm.py --name=grpo --nodes=2 --gpus=8 --time=12:00:00 --sweep=config.seed=0,1,2 -- \\
    --config=experiments/run.py:method=grpo,task=addition,model=tiny

What follows -- goes to `python -m MODULE`; --workdir=RUNS/NAME and --distributed are added (no --workdir
if there is one). JAX finds the other processes by Slurm's variables. --sweep, which may be repeated,
submits a job for every combination of values; their names end with the values. Slurm sends SIGTERM
before the time is over: the run then saves and ends with exit code 75, and the job goes back into the
queue.

It needs Python 3.8 or newer and sbatch, on a file system that all nodes share.
"""

import shlex
import sys

import sweeps

SCRIPT = """#!/bin/bash
cd {root} || exit 1
srun --kill-on-bad-exit=1 {command}
code=$?
# 75: the run was asked to stop, and has saved.
if [ "$code" = 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def parse(argv):
  """The options, and what follows --."""
  parser = sweeps.parser(__doc__)
  parser.add_argument('--nodes', type=int, default=1, help='number of nodes')
  parser.add_argument('--gpus', type=int, default=1, help='GPUs, and processes, of a node')
  parser.add_argument('--time', default='', help='limit, such as 12:00:00')
  parser.add_argument('--partition', default='', help="Slurm's partition")
  parser.add_argument('--account', default='', help='that pays')
  parser.add_argument('--runs', default='runs', help='folder of the folders of runs')
  parser.add_argument('--python', default='.venv/bin/python', help='of the nodes')
  parser.add_argument('--sbatch', action='append', default=[], help='further option of sbatch')
  options, rest = sweeps.parse(parser, argv)
  if min(options.nodes, options.gpus) < 1:
    parser.error('--nodes and --gpus must be at least 1')
  return options, rest


def jobs(options, rest):
  """(name, arguments of sbatch, script) of every job."""
  for name, flags in sweeps.runs(options, rest, options.runs):
    command = shlex.join([options.python, '-m', options.module, *flags, '--distributed'])
    wanted = [
      'sbatch',
      f'--job-name={name}',
      f'--nodes={options.nodes}',
      f'--ntasks-per-node={options.gpus}',
      f'--gpus-per-node={options.gpus}',
      f'--signal=TERM@{options.warn}',
      '--requeue',
      '--open-mode=append',
      f'--output={options.runs}/{name}.log',
    ]
    for key in ('time', 'partition', 'account'):
      if getattr(options, key):
        wanted.append(f'--{key}={getattr(options, key)}')
    script = SCRIPT.format(root=shlex.quote(str(sweeps.ROOT)), command=command)
    yield name, wanted + options.sbatch, script


def main():
  options, rest = parse(sys.argv[1:])
  for name, command, script in jobs(options, rest):
    if options.dry_run:
      print(f'{shlex.join(command)} <<"END"\n{script}END')
      continue
    (sweeps.ROOT / options.runs).mkdir(parents=True, exist_ok=True)
    sweeps.submit(command, script, name)


if __name__ == '__main__':
  main()
