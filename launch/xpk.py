#!/usr/bin/env python3
"""Runs a polgrad command on TPU slices of a GKE cluster that xpk has made, as a workload that resumes.

  launch/xpk.py --name=grpo --cluster=mine --type=v5litepod-16 --bucket=gs://mine/runs \\
    --image=europe-docker.pkg.dev/mine/images/polgrad --sweep=config.seed=0,1,2 -- \\
    --config=experiments/run.py:method=grpo,task=addition,model=tiny --config.mesh.fsdp=16

What follows -- goes to `python -m MODULE` in one container of every host; --workdir=BUCKET/NAME and
--distributed are added (no --workdir if there is one). --sweep, which may be repeated, makes a workload
for every combination of values. xpk itself chooses node pools, queue and the JobSet.

A run that was asked to stop saves and ends with exit code 75. That, a preempted or lost host, and a
process that was killed restart all hosts, up to --restarts times; the run resumes from its last
checkpoint in the bucket. Any other error ends the workload.

It needs Python 3.8 or newer, and xpk 1.16 or newer with gcloud and kubectl (`pip install xpk`).
"""

import re
import shlex
import sys

import sweeps

SAVED = (
  75  # exit code of a run that was asked to stop and has saved; xpk restarts from 127 on by itself
)


def parse(argv):
  """The options, and what follows --."""
  parser = sweeps.job_set_parser(__doc__)
  parser.add_argument('--cluster', required=True, help='name of the cluster')
  parser.add_argument('--type', required=True, help="xpk's type of a slice, such as v5litepod-16")
  parser.add_argument('--zone', default='', help="such as us-east5-b [gcloud's default]")
  parser.add_argument('--project', default='', help="Google Cloud project [gcloud's default]")
  parser.add_argument('--reservation', default='', help='of the nodes')
  parser.add_argument('--priority', default='', help='very-low, low, medium, high or very-high')
  options, rest = sweeps.parse_job_set(parser, argv)
  if not re.fullmatch(r'[a-z]\w*-\d+(x\d+)*', options.type):
    parser.error(
      f'--type={options.type}: write KIND-NUMBER or KIND-SHAPE, as v5litepod-16, v5p-4x4x8'
    )
  sweeps.check_names(parser, options, ['cluster', 'zone'], needed=['cluster'])
  sweeps.check_names(parser, options, ['project', 'reservation'], also=':/')
  if options.spot and options.reservation:
    parser.error('--spot and --reservation exclude each other')
  if options.priority not in ('', 'very-low', 'low', 'medium', 'high', 'very-high'):
    parser.error(f'--priority={options.priority}: very-low, low, medium, high or very-high')
  # xpk writes both into YAML without quoting what is in them.
  for flag in rest:
    if re.search(r'[\n\r]', flag):
      parser.error(f'{flag!r}: xpk takes no flag with a line break')
  for one in options.env:
    if re.search(r'["\\\n\r]', one):
      parser.error(
        f'--env={one!r}: xpk takes no value with a quotation mark, backslash or line break'
      )
  return options, rest


def workload(options, name, flags):
  """The command that creates the workload of one run."""
  # exec: SIGTERM reaches the run and not a shell around it.
  run = shlex.join(['python', '-m', options.module, *flags, '--distributed'])
  wanted = {
    'workload': sweeps.kubernetes_name(name),
    'cluster': options.cluster,
    'tpu-type': options.type,
    'num-slices': options.slices,
    'docker-image': options.image,
    'command': f'exec {run}',
    'max-restarts': options.restarts,
    'restart-on-exit-codes': SAVED,
    'termination-grace-period-seconds': options.warn,
    'zone': options.zone,
    'project': options.project,
    'reservation': options.reservation,
    'priority': options.priority,
  }
  command = ['xpk', 'workload', 'create']
  command += [f'--{flag}={value}' for flag, value in wanted.items() if value != '']
  command += [f'--env={one}' for one in options.env]
  return command + (['--spot'] if options.spot else [])


def main():
  options, rest = parse(sys.argv[1:])
  found = sweeps.runs(options, rest, options.bucket.rstrip('/'), sweeps.kubernetes_name)
  where = [f'--{k}={getattr(options, k)}' for k in ('zone', 'project') if getattr(options, k)]
  for name, command in [(name, workload(options, name, flags)) for name, flags in found]:
    if options.dry_run:
      print(shlex.join(command))
      continue
    sweeps.submit(command, '', name)
    own = ['--workload', sweeps.kubernetes_name(name), '--cluster', options.cluster, *where]
    print(f'stop: {shlex.join(["xpk", "workload", "delete", *own])}')


if __name__ == '__main__':
  main()
