#!/usr/bin/env python3
"""Runs a polgrad command on TPU slices of a GKE cluster, as a JobSet that resumes when it was stopped.

  launch/gke.py --name=grpo --topology=v5e:4x4 --image=europe-docker.pkg.dev/mine/images/polgrad \\
    --bucket=gs://mine/runs --sweep=config.seed=0,1,2 -- \\
    --config=experiments/run.py:method=grpo,task=addition,model=tiny --config.mesh.fsdp=16

What follows -- goes to `python -m MODULE` in one container of every host; --workdir=BUCKET/NAME and
--distributed are added (no --workdir if there is one). GKE tells JAX where the other hosts are, also
those of further slices. --sweep, which may be repeated, submits a JobSet for every combination of
values.

A run that was asked to stop saves and ends with exit code 75. That, a preempted or lost host, and a
process that was killed restart all hosts, up to --restarts times; the run resumes from its last
checkpoint in the bucket. Any other error ends the JobSet.

It needs Python 3.8 or newer, and kubectl with a cluster that has JobSet 0.6 or newer.
"""

import json
import math
import re
import shlex
import sys

import sweeps

# Names of node pools of GKE, by the generation of their chips.
ACCELERATORS = {
  'v4': 'tpu-v4-podslice',
  'v5e': 'tpu-v5-lite-podslice',
  'v5p': 'tpu-v5p-slice',
  'v6e': 'tpu-v6e-slice',
}
# Numbers that a shape of each generation has.
AXES = {'v4': 3, 'v5e': 2, 'v5p': 3, 'v6e': 2}
# Exit codes after which a run resumes: it has saved (75), or it or another process was killed
# (134: JAX aborts the others; 137: SIGKILL, as when memory is exhausted; 143: SIGTERM at the start).
RESUMED = [75, 134, 137, 143]


def parse(argv):
  """The options, and what follows --."""
  parser = sweeps.job_set_parser(__doc__)
  parser.add_argument('--topology', required=True, help='generation and shape, such as v5e:4x4')
  parser.add_argument(
    '--chips', type=int, default=0, help='of a host; 0: 4, or all of a smaller slice'
  )
  parser.add_argument('--queue', default='', help="Kueue's local queue")
  parser.add_argument(
    '--service_account', default='', help='of Kubernetes, that may use the bucket'
  )
  parser.add_argument('--namespace', default='default', help='of Kubernetes')
  options, rest = sweeps.parse_job_set(parser, argv)
  kind, _, shape = options.topology.partition(':')
  if kind not in ACCELERATORS or not re.fullmatch(r'[1-9]\d*(x[1-9]\d*){1,2}', shape):
    kinds = ', '.join(ACCELERATORS)
    parser.error(f'--topology={options.topology}: write KIND:SHAPE, as v5e:4x4; kinds: {kinds}')
  if len(shape.split('x')) != AXES[kind]:
    parser.error(f'--topology={options.topology}: a shape of {kind} has {AXES[kind]} numbers')
  options.kind, options.shape = kind, shape
  total = math.prod(map(int, shape.split('x')))
  options.chips = options.chips or min(total, 4)
  if options.chips < 1 or total % options.chips:
    parser.error(f'--chips={options.chips} does not divide the {total} chips of {options.topology}')
  options.hosts = total // options.chips
  flags = ('namespace', 'queue', 'service_account')
  sweeps.check_names(parser, options, flags, needed=['namespace'])
  return options, rest


def pod_of(options, flags):
  """What one host runs, and the nodes that it may run on."""
  node = {
    'cloud.google.com/gke-tpu-accelerator': ACCELERATORS[options.kind],
    'cloud.google.com/gke-tpu-topology': options.shape,
  }
  if options.spot:
    node['cloud.google.com/gke-spot'] = 'true'
  chips = {'google.com/tpu': options.chips}
  variables = [one.split('=', 1) for one in options.env]
  container = {
    'name': 'polgrad',
    'image': options.image,
    'command': ['python', '-m', options.module, *flags, '--distributed'],
    'env': [{'name': key, 'value': value} for key, value in variables],
    # Of libtpu, and of the coordinator of several slices.
    'ports': [{'containerPort': port} for port in (8471, 8080)],
    'resources': {'requests': chips, 'limits': chips},
  }
  pod = {
    'restartPolicy': 'Never',
    'nodeSelector': node,
    'terminationGracePeriodSeconds': options.warn,
    'containers': [container],
  }
  if options.service_account:
    pod['serviceAccountName'] = options.service_account
  if options.spot:
    pod['tolerations'] = [{'key': 'cloud.google.com/gke-spot', 'operator': 'Exists'}]
  return pod


def manifest(options, name, flags):
  """The JobSet of one run."""
  labels = {'kueue.x-k8s.io/queue-name': options.queue} if options.queue else {}
  # A job fails with its first pod: for a reason that the JobSet restarts for, or for another.
  resumed = {'containerName': 'polgrad', 'operator': 'In', 'values': RESUMED}
  job = {
    'parallelism': options.hosts,
    'completions': options.hosts,
    'backoffLimit': 0,
    'podFailurePolicy': {
      'rules': [
        {'action': 'FailJob', 'onPodConditions': [{'type': 'DisruptionTarget', 'status': 'True'}]},
        {'action': 'FailJob', 'onExitCodes': resumed},
      ]
    },
    'template': {'spec': pod_of(options, flags)},
  }
  return {
    'apiVersion': 'jobset.x-k8s.io/v1alpha2',
    'kind': 'JobSet',
    'metadata': {
      'name': sweeps.kubernetes_name(name),
      'namespace': options.namespace,
      'labels': labels,
      # One slice is one node pool.
      'annotations': {
        'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'
      },
    },
    'spec': {
      'failurePolicy': {
        'maxRestarts': options.restarts,
        'rules': [
          {'action': 'RestartJobSet', 'onJobFailureReasons': ['PodFailurePolicy']},
          {'action': 'FailJobSet'},
        ],
      },
      'replicatedJobs': [{'name': 'slice', 'replicas': options.slices, 'template': {'spec': job}}],
    },
  }


def main():
  options, rest = parse(sys.argv[1:])
  made = [
    (name, manifest(options, name, flags))
    for name, flags in sweeps.runs(
      options, rest, options.bucket.rstrip('/'), sweeps.kubernetes_name
    )
  ]
  command = ['kubectl', 'create', '-f', '-']
  for name, one in made:
    text = json.dumps(one, indent=2)
    if options.dry_run:
      print(f"{shlex.join(command)} <<'END'\n{text}\nEND")
      continue
    sweeps.submit(command, text, name)
    known, space = one['metadata']['name'], f'--namespace={options.namespace}'
    print(f'follow: kubectl logs {space} --follow job/{known}-slice-0')
    print(f'stop:   kubectl delete {space} jobset/{known}')


if __name__ == '__main__':
  main()
