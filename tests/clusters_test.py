"""Launchers of several processes: what they ask of the cluster, and what becomes of a lost process."""

import json
import os
import pathlib
import shlex
import socket
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MAIN = """
import os, signal, sys, time
import jax
from absl import app
from polgrad import cli

def main(argv):
  cli.start(argv, needed=[])
  print('is', jax.process_index(), 'of', jax.process_count(), flush=True)
  if os.environ.get('LOST') == str(jax.process_index()):
    os.kill(os.getpid(), signal.SIGKILL)
  if 'LOST' in os.environ:
    time.sleep(60)

app.run(main)
"""
# Records its arguments, one on each line, and then what it reads.
RECORDER = """#!/bin/bash
number=$(ls "$CALLS" | wc -l)
printf '%s\\n' "$@" > "$CALLS/$number"
cat > "$CALLS/../script.$number"
exit "${REFUSED:-0}"
"""


# What follows the options of a launcher.
RUN = ('--', '--config=x')


def launch(kind, folder, *arguments, **variables):
  environment = {**os.environ, **variables, 'JAX_PLATFORMS': 'cpu'}
  environment.pop('XLA_FLAGS', None)
  command = [sys.executable, str(ROOT / 'launch' / f'{kind}.py'), *arguments]
  return subprocess.run(
    command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
  )


def recorded(tmp_path, kind, command):
  """The launcher of a cluster whose command only records what it is asked."""
  (tmp_path / 'bin').mkdir()
  (tmp_path / 'calls').mkdir()
  (tmp_path / 'bin' / command).write_text(RECORDER)
  (tmp_path / 'bin' / command).chmod(0o755)
  path = f'{tmp_path}/bin:{os.environ["PATH"]}'
  return lambda *arguments, **variables: launch(
    kind, tmp_path, *arguments, PATH=path, CALLS=str(tmp_path / 'calls'), **variables
  )


@pytest.fixture
def sbatch(tmp_path):
  return recorded(tmp_path, 'slurm', 'sbatch')


@pytest.fixture
def xpk(tmp_path):
  return recorded(tmp_path, 'xpk', 'xpk')


@pytest.fixture
def kubectl(tmp_path):
  return recorded(tmp_path, 'gke', 'kubectl')


def test_processes_of_one_machine_find_each_other(tmp_path):
  (tmp_path / 'seen.py').write_text(MAIN)
  done = launch('local', tmp_path, '--processes=2', '--module=seen')
  assert done.returncode == 0, done.stdout + done.stderr
  found = {line for line in done.stdout.splitlines() if ' is ' in line}
  assert found == {'[0] is 0 of 2', '[1] is 1 of 2'}


def test_a_killed_process_is_named_and_ends_the_others(tmp_path):
  (tmp_path / 'seen.py').write_text(MAIN)
  started = time.monotonic()
  done = launch('local', tmp_path, '--processes=2', '--module=seen', '--grace=2', LOST='1')
  assert done.returncode == 128 + 9, done.stdout + done.stderr
  assert 'process 1 was killed by signal 9; the others are stopped' in done.stderr
  assert time.monotonic() - started < 50


def test_a_dry_run_of_local_processes_shows_their_commands(tmp_path):
  flags = ('--config=a b.py', '--workdir=r')
  done = launch('local', tmp_path, '--port=1234', '--dry_run', '--', *flags)
  start = f"{sys.executable} -m polgrad.train '--config=a b.py' --workdir=r --distributed"
  assert done.stdout.splitlines() == [
    f'{start} --coordinator=localhost:1234 --num_processes=2 --process_id={i}' for i in range(2)
  ]


def test_a_run_that_no_local_process_could_begin_is_refused(tmp_path):
  with socket.socket() as other:
    other.bind(('', 0))
    other.listen()
    port = other.getsockname()[1]
    for own, rest, said in [
      ([], [], 'need --config=... after --'),
      ([], ['--config=x'], 'need --workdir=... after --'),
      ([], [*RUN[1:], '--workdir=r', '--process_id=1'], '--process_id is added for every process'),
      ([f'--port={port}'], [*RUN[1:], '--workdir=r'], f'--port={port} is taken by another program'),
    ]:
      done = launch('local', tmp_path, *own, '--', *rest)
      assert done.returncode == 2 and said in done.stderr, done.stderr


def test_a_sweep_of_local_processes_is_one_run_after_another(tmp_path):
  (tmp_path / 'seen.py').write_text(
    'import sys; print(*sys.argv[1:3]); sys.exit(sys.argv[1] == "--b=2")'
  )
  sweep = ('local', tmp_path, '--processes=1', '--module=seen', '--name=x', '--sweep=b=1,2,3')
  shown = launch(*sweep, '--port=1', '--dry_run').stdout.splitlines()
  assert [line.partition(' -m seen ')[2].partition(' --dist')[0] for line in shown] == [
    f'--b={b} --workdir=runs/x-{b}' for b in (1, 2, 3)
  ]
  done = launch(*sweep, '--runs=r')
  assert done.returncode == 1  # the second one fails, and ends the sweep
  lines = [line for line in done.stdout.splitlines() if 'x-' in line]
  assert lines == [
    *('begins: x-1', '[0] --b=1 --workdir=r/x-1', 'begins: x-2', '[0] --b=2 --workdir=r/x-2')
  ]


def test_every_combination_of_a_sweep_is_submitted(sbatch, tmp_path):
  done = sbatch(
    *('--name=grpo', '--nodes=2', '--gpus=8', '--time=1:00:00', '--partition=long'),
    *('--account=mine', '--sbatch=--exclusive', f'--runs={tmp_path}/runs'),
    *('--sweep=config.seed=0,1', '--sweep=config.phases.train.optimizer.learning_rate=1e-4,1e-5'),
    *('--', "--config=it's.py"),
  )
  assert done.returncode == 0, done.stderr
  names = [f'grpo-{seed}-{rate}' for seed in (0, 1) for rate in ('1e_4', '1e_5')]
  calls = [(tmp_path / f'calls/{i}').read_text().splitlines() for i in range(4)]
  assert len(list((tmp_path / 'calls').iterdir())) == 4
  for name, call in zip(names, calls, strict=True):
    assert call == [
      *(f'--job-name={name}', '--nodes=2', '--ntasks-per-node=8', '--gpus-per-node=8'),
      *('--signal=TERM@300', '--requeue', '--open-mode=append'),
      *(f'--output={tmp_path}/runs/{name}.log', '--time=1:00:00', '--partition=long'),
      *('--account=mine', '--exclusive'),
    ]
  script = (tmp_path / 'script.3').read_text()
  assert f'--workdir={tmp_path}/runs/grpo-1-1e_5 --distributed' in script
  assert '--config.seed=1 --config.phases.train.optimizer.learning_rate=1e-5' in script


@pytest.mark.parametrize(('code', 'requeued'), [(0, False), (1, False), (75, True)])
def test_a_job_that_has_saved_goes_back_into_the_queue(sbatch, tmp_path, code, requeued):
  assert sbatch('--name=x', f'--runs={tmp_path}/runs', *RUN).returncode == 0
  for name, text in {
    'srun': f'printf "%s\\n" "$@" > {tmp_path}/ran; exit {code}',
    'scontrol': f'echo "$@" > {tmp_path}/asked',
  }.items():
    (tmp_path / 'bin' / name).write_text(f'#!/bin/bash\n{text}\n')
    (tmp_path / 'bin' / name).chmod(0o755)
  environment = {'PATH': f'{tmp_path}/bin:{os.environ["PATH"]}', 'SLURM_JOB_ID': '7'}
  done = subprocess.run(['bash', tmp_path / 'script.0'], env=environment)
  assert done.returncode == code
  assert (tmp_path / 'asked').exists() == requeued
  assert not requeued or (tmp_path / 'asked').read_text() == 'requeue 7\n'
  assert (tmp_path / 'ran').read_text().splitlines() == [
    *('--kill-on-bad-exit=1', '.venv/bin/python', '-m', 'polgrad.train', '--config=x'),
    *(f'--workdir={tmp_path}/runs/x', '--distributed'),
  ]


@pytest.mark.parametrize(
  ('arguments', 'says'),
  [
    (['--name=a b'], 'letters'),
    (['--name=..'], 'letters'),
    (['--gpus=0'], 'at least 1'),
    (['--warn=-1'], '--warn must be at least 0'),
    (['--sweep=seed'], 'FLAG=VALUE'),
    (['--sweep=config.seed=0,,1'], 'FLAG=VALUE'),
    (['--sweep=config=a.py:method=grpo,task=addition'], 'one job for every --config'),
    (['--sweep=config.seed=1,2', '--', '--config=x', '--workdir=y'], 'leave --workdir and'),
    (
      ['--sweep=config.x=a/b,a_b'],
      "--config.x=a/b and --config.x=a_b would both be called 'x-a_b'",
    ),
    (['--', '--workdir=y'], 'need --config'),
  ],
)
def test_what_slurm_cannot_run_is_refused(sbatch, tmp_path, arguments, says):
  done = sbatch('--name=x', *arguments, *(() if '--' in arguments else RUN))
  assert done.returncode and says in done.stderr and not list((tmp_path / 'calls').iterdir())


def test_a_refusal_of_sbatch_ends_the_sweep(sbatch, tmp_path):
  done = sbatch('--name=x', f'--runs={tmp_path}/runs', '--sweep=config.seed=1,2', *RUN, REFUSED='1')
  assert done.returncode == 1 and 'sbatch refused x-1' in done.stderr
  assert len(list((tmp_path / 'calls').iterdir())) == 1


GKE = (
  '--name=Gspo_run',
  '--topology=v5p:2x2x4',
  '--image=mine/polgrad:1',
  '--bucket=gs://mine/runs/',
)


def test_a_job_set_has_a_pod_for_every_host_of_every_slice(kubectl, tmp_path):
  done = kubectl(
    *(*GKE, '--slices=2', '--spot', '--queue=team', '--service_account=writer', '--restarts=3'),
    *('--env=A=b=c', '--sweep=config.seed=0,1', '--', '--config=a b.py'),
  )
  assert done.returncode == 0, done.stderr
  assert 'kubectl logs --namespace=default --follow job/gspo-run-1-slice-0' in done.stdout
  assert sorted(path.name for path in (tmp_path / 'calls').iterdir()) == ['0', '1']
  assert (tmp_path / 'calls/1').read_text().splitlines() == ['create', '-f', '-']
  made = json.loads((tmp_path / 'script.1').read_text())
  assert (made['apiVersion'], made['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
  assert made['metadata']['name'] == 'gspo-run-1'
  assert made['metadata']['labels'] == {'kueue.x-k8s.io/queue-name': 'team'}
  (slices,) = made['spec']['replicatedJobs']
  job = slices['template']['spec']
  assert (slices['replicas'], job['completions'], job['parallelism']) == (2, 4, 4)
  pod = job['template']['spec']
  assert pod['serviceAccountName'] == 'writer'
  assert pod['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': 'tpu-v5p-slice',
    'cloud.google.com/gke-tpu-topology': '2x2x4',
    'cloud.google.com/gke-spot': 'true',
  }
  (container,) = pod['containers']
  assert container['resources']['limits'] == {'google.com/tpu': 4}
  assert container['env'] == [{'name': 'A', 'value': 'b=c'}]
  assert container['command'] == [
    *('python', '-m', 'polgrad.train', '--config=a b.py', '--config.seed=1'),
    *('--workdir=gs://mine/runs/Gspo_run-1', '--distributed'),
  ]


def test_a_job_set_restarts_after_a_save_or_a_lost_host_and_fails_after_an_error(kubectl, tmp_path):
  assert kubectl(*GKE, '--restarts=3', *RUN).returncode == 0
  spec = json.loads((tmp_path / 'script.0').read_text())['spec']
  job = spec['replicatedJobs'][0]['template']['spec']
  # The first rule that fits decides: a pod's failure becomes the reason of the job's failure.
  lost, codes = job['podFailurePolicy']['rules']
  assert lost['onPodConditions'] == [{'type': 'DisruptionTarget', 'status': 'True'}]
  assert set(codes['onExitCodes']['values']) == {75, 128 + 6, 128 + 9, 128 + 15}
  assert codes['onExitCodes']['operator'] == 'In' and job['backoffLimit'] == 0
  assert spec['failurePolicy'] == {
    'maxRestarts': 3,
    'rules': [
      {'action': 'RestartJobSet', 'onJobFailureReasons': ['PodFailurePolicy']},
      {'action': 'FailJobSet'},
    ],
  }


def test_a_dry_run_of_gke_prints_what_it_would_create(kubectl, tmp_path):
  done = kubectl(*GKE, '--dry_run', *RUN)
  first, *lines, last = done.stdout.splitlines()
  assert first == "kubectl create -f - <<'END'" and last == 'END'
  assert json.loads('\n'.join(lines))['kind'] == 'JobSet' and not list(
    (tmp_path / 'calls').iterdir()
  )


@pytest.mark.parametrize(
  ('changed', 'says'),
  [
    ('--topology=v9:4x4', 'kinds: v4, v5e, v5p, v6e'),
    ('--topology=v5e', 'KIND:SHAPE'),
    ('--topology=v5e:2x2x2', 'a shape of v5e has 2 numbers'),
    ('--namespace=A', '--namespace=A: lower case'),
    ('--bucket=gs://', 'must be gs://'),
    ('--sweep=config.rate=1e-4,1e_4', "both be called 'gspo-run-1e-4'"),
    ('--name=a/../b', 'letters'),
    ('--chips=3', 'does not divide the 16 chips'),
    ('--slices=0', '--slices must be at least 1'),
    ('--bucket=/tmp/x', 'must be gs://'),
    ('--env=A', 'NAME=VALUE'),
    ('--name=8b', 'begins with a letter'),
    (f'--name={"a" * 41}', 'at most 40'),
  ],
)
def test_what_gke_cannot_run_is_refused(kubectl, tmp_path, changed, says):
  done = kubectl(*GKE, changed, *RUN)
  assert done.returncode and says in done.stderr and not list((tmp_path / 'calls').iterdir())


XPK = ('--name=Gspo_run', '--cluster=c', '--type=v5litepod-16', '--image=mine/polgrad:1')
XPK += ('--bucket=gs://mine/runs/',)


def test_xpk_creates_a_workload_for_every_run_of_a_sweep(xpk, tmp_path):
  done = xpk(
    *(*XPK, '--slices=2', '--spot', '--zone=us-east5-b', '--project=p', '--priority=high'),
    *('--restarts=3', '--warn=60', '--env=A=b=c d', '--env=B=', '--sweep=config.seed=0,1'),
    *('--', "--config=it's a.py"),
  )
  assert done.returncode == 0, done.stderr
  assert [(tmp_path / f'script.{i}').read_text() for i in range(2)] == ['', '']
  for seed in (0, 1):
    run = f"""exec python -m polgrad.train '--config=it'"'"'s a.py' --config.seed={seed}"""
    assert (tmp_path / f'calls/{seed}').read_text().splitlines() == [
      *(
        'workload',
        'create',
        f'--workload=gspo-run-{seed}',
        '--cluster=c',
        '--tpu-type=v5litepod-16',
      ),
      *('--num-slices=2', '--docker-image=mine/polgrad:1'),
      f'--command={run} --workdir=gs://mine/runs/Gspo_run-{seed} --distributed',
      *('--max-restarts=3', '--restart-on-exit-codes=75', '--termination-grace-period-seconds=60'),
      *(
        '--zone=us-east5-b',
        '--project=p',
        '--priority=high',
        '--env=A=b=c d',
        '--env=B=',
        '--spot',
      ),
    ]
    where = f'gspo-run-{seed} --cluster c --zone=us-east5-b --project=p'
    assert f'stop: xpk workload delete --workload {where}\n' in done.stdout


def test_a_dry_run_of_xpk_prints_the_command_and_a_refusal_ends_the_sweep(xpk, tmp_path):
  done = xpk(*XPK, '--reservation=r', '--dry_run', *RUN)
  words = shlex.split(done.stdout)
  assert words[:3] == ['xpk', 'workload', 'create'] and '--reservation=r' in words
  assert not [w for w in words if w.startswith(('--zone', '--project', '--priority', '--env'))]
  assert not list((tmp_path / 'calls').iterdir())
  done = xpk(*XPK, '--sweep=config.seed=1,2', *RUN, REFUSED='1')
  assert done.returncode == 1 and 'xpk refused Gspo_run-1' in done.stderr
  assert len(list((tmp_path / 'calls').iterdir())) == 1


@pytest.mark.parametrize(
  ('changed', 'says'),
  [
    (['--cluster='], '--cluster=: lower case, digits, "." and "-" only'),
    (['--reservation=a b'], '--reservation=a b: lower case, digits, ".:/" and "-" only'),
    (['--image=a b'], '--image=a b: must name an image'),
    (['--type=v5e:4x4'], 'write KIND-NUMBER or KIND-SHAPE'),
    (['--spot', '--reservation=r'], '--spot and --reservation exclude each other'),
    (['--priority=top'], '--priority=top: very-low, low'),
    (['--bucket=/tmp/x'], 'must be gs://'),
    (['--env=A="b"'], 'xpk takes no value with a quotation mark'),
    (['--', '--config=x', '--config.note=a\nb'], 'xpk takes no flag with a line break'),
    ([f'--name={"a" * 41}'], 'at most 40'),
  ],
)
def test_what_xpk_cannot_run_is_refused(xpk, tmp_path, changed, says):
  done = xpk(*XPK, *changed, *(() if '--' in changed else RUN))
  assert done.returncode and says in done.stderr and not list((tmp_path / 'calls').iterdir())
