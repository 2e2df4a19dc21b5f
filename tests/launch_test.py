"""The launcher: what it asks of gcloud, in which order, with nothing lost in quoting."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SLICE = ('--name=grpo', '--zone=us-central2-b')
NEW = (*SLICE, '--type=v4-32', '--bucket=gs://mine/runs/')
CONFIG = '--config=experiments/run.py:method=grpo,task=addition,model=tiny,smoke'
# A slice has its state in a file. The exit codes of its runs are the lines of another, of which
# PREEMPTED means that the slice is lost, and an empty line that the connection is.
GCLOUD = """#!/usr/bin/env bash
printf '%s\\0' "$@" > "$CALLS/$(ls "$CALLS" | wc -l)"
cd "$CALLS/.."
case "$3 $4 $*" in
  'tpu-vm describe'*) cat state ;;
  'tpu-vm create'*) [[ -z ${CREATE_FAILS:-} ]] && echo READY > state ;;
  *delete*) rm -f state queue ;;
  'queued-resources create'*) echo PROVISIONING > queue ;;
  'queued-resources describe'*) cat queue && echo ACTIVE > queue && echo READY > state ;;
  'tpu-vm scp'*) [[ ! -f $5 ]] || cp "$5" copied.tar.gz; [[ -z ${SCP_FAILS:-} ]] ;;
  *'cat run.code'*)
    code=$(head -n 1 codes); sed -i 1d codes
    [[ $code != PREEMPTED ]] || { echo PREEMPTED > state; exit 1; }
    [[ -n $code ]] && printf '%b\\n' "$code" ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
  """A small repository with the launcher, and a gcloud that only writes down what it is asked."""
  files = {'bin/gcloud': GCLOUD, 'clone/new.py': 'new', 'clone/my file.py': '', 'clone/runs/x': ''}
  files |= {'clone/kept.py': '', 'clone/deleted.py': '', 'clone/.gitignore': 'runs/\n__pycache__/'}
  for name, text in files.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
  (tmp_path / 'bin/gcloud').chmod(0o755)
  (tmp_path / 'calls').mkdir()
  (tmp_path / 'clone/launch').mkdir()
  for name in ('tpu_vm.py', 'sweeps.py'):
    shutil.copy(ROOT / 'launch' / name, tmp_path / 'clone/launch')
  subprocess.run(['git', 'init', '-q', '.'], cwd=tmp_path / 'clone', check=True)
  tracked = ['kept.py', 'deleted.py', 'my file.py', '.gitignore', 'launch']
  subprocess.run(['git', 'add', *tracked], cwd=tmp_path / 'clone', check=True)
  (tmp_path / 'clone/deleted.py').unlink()
  return tmp_path


def bash(clone, *command, **variables):
  return subprocess.run(
    command,
    cwd=clone,
    capture_output=True,
    text=True,
    timeout=60,
    env={
      **os.environ,
      'PATH': f'{clone / "bin"}:{os.environ["PATH"]}',
      'CALLS': str(clone / 'calls'),
      'TMPDIR': str(clone),
      **variables,
    },
  )


def launch(clone, *flags, codes=('0',), **variables):
  """Runs the launcher; `codes` are what the runs end with."""
  (clone / 'codes').write_text(''.join(f'{code}\n' for code in codes))
  command = [sys.executable, 'clone/launch/tpu_vm.py', *flags[:1], '--poll=0', *flags[1:]]
  return bash(clone, *command, **variables)


def calls(clone):
  """The arguments of every gcloud call so far, after `compute tpus tpu-vm`."""
  found = []
  for path in sorted((clone / 'calls').iterdir(), key=lambda p: int(p.name)):
    arguments = path.read_text().split('\0')[:-1]
    assert arguments[:2] == ['compute', 'tpus']
    found.append(arguments[3:] if arguments[2] == 'tpu-vm' else ['queued', *arguments[3:]])
  return found


def paste(clone, printed):
  """Runs the commands that a dry run printed."""
  commands = re.sub(r'^\+ ', '', printed, flags=re.MULTILINE)
  assert bash(clone, 'bash', '-e', '-c', commands).returncode == 0


def remote(call, workers):
  """The command that an ssh call runs on the workers."""
  assert call[:2] == ['ssh', 'grpo'] and f'--worker={workers}' in call
  return next(a for a in call if a.startswith('--command=')).removeprefix('--command=')


def check_steps(create, copy, unpack, install, stop, run, follow):
  """Create, copy, install, run, follow: on all workers, but for the log."""
  assert create[:2] == ['create', 'grpo'] and '--accelerator-type=v4-32' in create
  assert copy[0] == 'scp' and copy[2] == 'grpo:polgrad.tar.gz' and '--worker=all' in copy
  assert 'tar -xzf polgrad.tar.gz' in remote(unpack, 'all')
  assert 'pip install' in remote(install, 'all')
  assert 'kill -TERM' in remote(stop, 'all')
  command = remote(run, 'all')
  assert f'-m polgrad.train {CONFIG} ' in command
  assert '--checkpoints=gs://mine/runs/grpo --distributed' in command
  assert 'tail' in remote(follow, '0')
  for call in (create, copy, unpack, install, stop, run, follow):
    assert '--zone=us-central2-b' in call


STEPS = ['scp', *5 * ['ssh']]  # copy; unpack, install, stop, run, follow


def names(clone):
  """What was asked of gcloud, without the looks at the state and the exit code."""
  looks = ('describe', 'cat run.code')
  asked = [call for call in calls(clone) if not any(look in ' '.join(call) for look in looks)]
  return [' '.join(call[:2]) if call[0] == 'queued' else call[0] for call in asked]


def test_dry_run_calls_nothing_and_prints_every_step_ready_to_paste(clone):
  done = launch(clone, *NEW, '--dry_run', '--', CONFIG)
  assert done.returncode == 0 and not calls(clone)
  paste(clone, done.stderr)
  check_steps(*calls(clone))


def test_new_slice_is_created_after_it_was_looked_for(clone):
  assert launch(clone, *NEW, '--spot', '--project=p', '--', CONFIG).returncode == 0
  describe, *steps, code = calls(clone)
  assert describe[:2] == ['describe', 'grpo'] and 'cat run.code' in remote(code, '0')
  check_steps(*steps)
  assert '--spot' in steps[0] and '--version=tpu-ubuntu2204-base' in steps[0]
  assert all('--project=p' in call for call in (describe, *steps))


def test_existing_slice_is_reused(clone):
  (clone / 'state').write_text('READY')
  done = launch(clone, *NEW, '--', CONFIG)
  assert done.returncode == 0 and 'reusing grpo' in done.stderr
  assert names(clone) == STEPS


@pytest.mark.parametrize(
  ('kind', 'version'),
  [
    ('v2-8', 'tpu-ubuntu2204-base'),
    ('v5litepod-16', 'v2-alpha-tpuv5-lite'),
    ('v5p-8', 'v2-alpha-tpuv5'),
    ('v6e-64', 'v2-alpha-tpuv6e'),
  ],
)
def test_the_runtime_version_follows_from_the_type(clone, kind, version):
  flags = (*SLICE, '--bucket=gs://b', f'--type={kind}', '--dry_run')
  assert f'--version={version} ' in f'{launch(clone, *flags, "--", CONFIG).stderr} '.replace(
    '\n', ' '
  )
  own = launch(clone, *flags, '--version=mine', '--', CONFIG).stderr
  assert '--version=mine' in own and version not in own


def test_the_network_is_that_of_the_options(clone):
  flags = ('--network=n', '--subnetwork=s', '--internal-ip', '--reserved')
  assert launch(clone, *NEW, *flags, '--', CONFIG).returncode == 0
  _, create, *rest = calls(clone)
  assert {'--network=n', '--subnetwork=s', '--internal-ips', '--reserved'} <= {*create}
  assert all('--internal-ip' in call for call in rest if call[0] in ('ssh', 'scp'))


def test_a_queued_resource_is_waited_for(clone):
  done = launch(clone, *NEW, '--queued', '--spot', '--', CONFIG)
  assert done.returncode == 0 and names(clone) == ['queued create', *STEPS]
  create = next(call for call in calls(clone) if call[:2] == ['queued', 'create'])
  assert {'--node-id=grpo', '--runtime-version=tpu-ubuntu2204-base', '--spot'} <= {*create}
  assert 'PROVISIONING' in done.stderr and 'ACTIVE' in done.stderr


def test_a_queued_resource_that_lost_its_slice_is_asked_for_again(clone):
  (clone / 'queue').write_text('SUSPENDED\n')
  done = launch(clone, *NEW, '--queued', '--', CONFIG)
  assert done.returncode == 0 and 'is SUSPENDED: creating it again' in done.stderr
  assert names(clone) == ['queued delete', 'queued create', *STEPS]
  assert '--force' in next(call for call in calls(clone) if call[:2] == ['queued', 'delete'])


def test_what_is_copied_is_the_working_tree_without_ignored_files(clone):
  assert launch(clone, *NEW, '--', CONFIG).returncode == 0
  with tarfile.open(clone / 'copied.tar.gz') as archive:
    assert set(archive.getnames()) == {
      'kept.py', 'my file.py', 'new.py', '.gitignore', 'launch/tpu_vm.py', 'launch/sweeps.py'
    }  # fmt: skip
    assert archive.extractfile('new.py').read() == b'new'
  assert not list(clone.glob('tmp*'))  # the archive does not stay behind


def test_failed_step_ends_the_launch(clone):
  done = launch(clone, *NEW, '--', CONFIG, SCP_FAILS='1')
  assert done.returncode == 1 and 'failed: gcloud' in done.stderr
  assert names(clone) == ['create', 'scp']


def test_a_preempted_slice_is_created_again_and_the_run_resumed(clone):
  done = launch(clone, *NEW, '--', CONFIG, codes=('PREEMPTED', '0'))
  assert done.returncode == 0 and 'grpo is PREEMPTED: creating it again' in done.stderr
  assert names(clone) == ['create', *STEPS, 'delete', 'create', *STEPS]
  runs = [call for call in calls(clone) if 'setsid' in ' '.join(call)]
  assert runs[0] == runs[1]  # the same command resumes


def test_a_run_that_was_asked_to_stop_and_saved_is_started_again(clone):
  done = launch(clone, *NEW, '--', CONFIG, codes=('75', '', '0'))
  assert done.returncode == 0
  assert names(clone) == ['create', *STEPS, *STEPS, 'ssh']  # a lost connection follows again


def test_a_run_that_fails_ends_the_launch_with_its_code_and_all_logs(clone):
  done = launch(clone, *NEW, '--', CONFIG, codes=('3',))
  assert done.returncode == 3 and names(clone) == ['create', *STEPS, 'ssh']
  assert 'tail -n 100 run.log' in remote(calls(clone)[-1], 'all')


def test_a_run_that_someone_stops_is_not_started_again(clone):
  done = launch(clone, *NEW, '--', CONFIG, codes=('75\\nstopped',))
  assert done.returncode == 0 and names(clone) == ['create', *STEPS]


SWEEP = '--sweep=config.seed=0,1'


def test_the_runs_of_a_sweep_follow_each_other_on_one_slice(clone):
  done = launch(clone, *NEW, SWEEP, '--', CONFIG, codes=('0', '0'))
  assert done.returncode == 0 and names(clone) == ['create', *STEPS, *STEPS]
  runs = [remote(call, 'all') for call in calls(clone) if 'setsid' in ' '.join(call)]
  for seed, run in enumerate(runs):
    assert f'{CONFIG} --config.seed={seed} --workdir=../runs/grpo-{seed} ' in run
    assert f'--checkpoints=gs://mine/runs/grpo-{seed} --distributed' in run
  fetched = launch(clone, *SLICE, SWEEP, '--fetch=results', '--dry_run').stderr
  assert 'grpo:runs/grpo-0 results' in fetched and 'grpo:runs/grpo-1 results' in fetched


@pytest.mark.parametrize(('code', 'ends'), [('3', 3), ('75\\nstopped', 0)])
def test_a_run_that_fails_or_is_stopped_ends_the_sweep(clone, code, ends):
  done = launch(clone, *NEW, SWEEP, '--', CONFIG, codes=(code, '0'))
  assert done.returncode == ends
  assert sum('setsid' in ' '.join(call) for call in calls(clone)) == 1


def test_it_begins_again_as_often_as_asked(clone):
  done = launch(clone, *NEW, '--restarts=1', '--', CONFIG, codes=('75', '75'))
  assert done.returncode == 75 and 'began again 1 times' in done.stderr
  assert names(clone) == ['create', *STEPS, *STEPS]


def test_without_capacity_a_first_launch_ends(clone):
  done = launch(clone, *NEW, '--', CONFIG, CREATE_FAILS='1')
  assert done.returncode == 1 and names(clone) == ['create']


@pytest.fixture
def worker(clone):
  """A home folder with a python that writes down its arguments and environment, then waits."""
  python = clone / 'worker/venv/bin/python'
  python.parent.mkdir(parents=True)
  (clone / 'worker/polgrad').mkdir()
  python.write_text(
    "#!/usr/bin/env bash\ntrap '[[ -n $DEAF ]] || exit 75' TERM\necho log\n"
    'printf "%s\\0" "$@" "$NOTE" > ../part && mv ../part ../got\n'
    'while [[ -n $WAIT ]]; do sleep 0.05; done; exit 3\n'
  )
  python.chmod(0o755)
  return clone / 'worker'


def on_worker(worker, command):
  return subprocess.run(['bash', '-c', command], cwd=worker, capture_output=True, text=True)


def until(path):
  for _ in range(400):  # the run is detached
    if path.exists() and path.read_text():
      return path.read_text()
    time.sleep(0.05)
  raise AssertionError(path)


def commands(clone, *flags):
  """What stop, run and follow are on the worker."""
  assert launch(clone, *NEW, *flags).returncode == 0
  asked = [call for call in calls(clone) if call[0] == 'ssh']
  return [next(a for a in call if a.startswith('--command='))[10:] for call in asked[-4:-1]]


NASTY = 'a  b; $(touch broken) `x` "q" \'r\' * \\ é'


def test_flags_and_variables_reach_the_worker_unchanged(clone, worker):
  flags = [CONFIG, f'--config.note={NASTY}', '--config.empty=']
  _, run, follow = commands(clone, f'--env=NOTE={NASTY}', '--', *flags)
  assert on_worker(worker, run).stdout == 'started\n'
  assert until(worker / 'run.code') == '3\n'
  assert until(worker / 'got').split('\0')[:-1] == [
    '-m',
    'polgrad.train',
    *flags,
    '--workdir=../runs/grpo',
    '--checkpoints=gs://mine/runs/grpo',
    '--distributed',
    NASTY,
  ]
  assert not list(clone.rglob('broken'))
  assert on_worker(worker, follow).stdout == 'log\n'  # ends, because the run has ended


@pytest.mark.parametrize(('deaf', 'code'), [('', '75'), ('1', '137')])
def test_a_stop_waits_until_the_run_has_saved_and_kills_one_that_does_not(
  clone, worker, deaf, code
):
  env = ('--env=WAIT=1', f'--env=DEAF={deaf}', '--grace=1')
  stop, run, _ = commands(clone, *env, '--', CONFIG)
  assert on_worker(worker, stop).returncode == 0  # nothing runs yet
  on_worker(worker, run)
  until(worker / 'got')
  assert not (worker / 'run.stopped').exists()
  assert on_worker(worker, stop).returncode == 0
  assert until(worker / 'run.code') == f'{code}\n' and (worker / 'run.stopped').exists()
  assert on_worker(worker, stop).returncode == 0  # nothing runs any more


def test_other_modules_get_the_flags_that_they_take(clone):
  module = '--module=polgrad.lm_eval', '--dry_run', '--'
  run = launch(clone, *SLICE, '--type=v4-8', *module, '--model=../m', '--tasks=t').stderr
  assert '-m polgrad.lm_eval --model=../m --tasks=t --distributed' in run
  run = launch(clone, *NEW, *module, CONFIG, '--tasks=t').stderr
  assert '--workdir=../runs/grpo' in run


def test_a_set_up_command_runs_on_all_workers_after_the_installation(clone):
  done = launch(clone, *NEW, '--setup=pip download "a b"', '--', CONFIG)
  assert done.returncode == 0
  asked = [
    remote(call, 'all') for call in calls(clone) if '--worker=all' in call if call[0] == 'ssh'
  ]
  assert 'pip install' in asked[1] and asked[2] == 'cd polgrad && { pip download "a b"\n}'


@pytest.mark.parametrize(
  ('action', 'expected'),
  [
    ('--delete', 'delete'),
    ('--follow', 'tail'),
    ('--stop', 'kill'),
    ('--logs', '--worker=all'),
    ('--fetch=results', 'grpo:runs/grpo results --recurse --worker=0'),
  ],
)
def test_one_action_is_one_command_and_needs_only_the_slice(clone, action, expected):
  done = launch(clone, *SLICE, action, '--dry_run')
  assert done.returncode == 0 and not calls(clone)
  paste(clone, done.stderr)
  [call] = calls(clone)
  assert expected in ' '.join(call) and '--zone=us-central2-b' in call


@pytest.mark.parametrize(
  ('flags', 'why'),
  [
    (('--name=grpo', '--delete'), 'required: --zone'),
    ((*SLICE, '--type=v4-8', '--', CONFIG), 'need --type and --bucket'),
    ((*SLICE, '--bucket=gs://b', '--', CONFIG), 'need --type and --bucket'),
    ((*SLICE, '--bucket=gs://b', '--type=v9-8', '--', CONFIG), '--type=v9-8: name its --version'),
    (NEW, 'need --config=... after --'),
    ((*NEW, CONFIG), f'unrecognized arguments: {CONFIG}'),
    ((*NEW, '--env=A-B=1', '--', CONFIG), "expected NAME=VALUE, got 'A-B=1'"),
    ((*NEW, '--restarts=-1', '--', CONFIG), "expected a number of at least 0, got '-1'"),
    ((*SLICE, '--name=a;ls', '--stop'), "expected letters, digits and hyphens, got 'a;ls'"),
    ((*SLICE, '--type=v4-8', '--bucket=mine', '--', CONFIG), '--bucket=mine: expected gs://'),
    ((*NEW, '--spot', '--reserved', '--', CONFIG), '--spot and --reserved exclude each other'),
    ((*SLICE, '--stop', '--delete'), 'not allowed with argument'),
    ((*NEW, '--sweep=seed', '--', CONFIG), '--sweep=seed: write FLAG=VALUE,VALUE,...'),
  ],
)
def test_wrong_options_exit_with_the_usage(clone, flags, why):
  done = launch(clone, *flags)
  assert done.returncode == 2 and not calls(clone)
  assert why in done.stderr and 'usage: tpu_vm.py' in done.stderr


def test_help_has_every_option(clone):
  said = launch(clone, '--help').stdout
  for option in ('--type', '--queued', '--internal-ip', '--env', '--setup', '--module', '--fetch'):
    assert option in said
  assert 'exit code 75' in said


def test_shell_scripts_are_clean():
  shellcheck = pathlib.Path(sys.executable).parent / 'shellcheck'
  scripts = [*ROOT.glob('launch/*.sh'), ROOT / '.ci/run']
  done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
  ('works', 'asked', 'found'),
  [
    ((), '', ''),
    (('python3.13', 'python3'), '', 'python3.13'),
    (('python3',), 'python3.12', 'python3'),
    (('python3.11', 'python3.12'), 'python3.12', 'python3.12'),
  ],
)
def test_a_python_that_works_is_found_or_asked_for(tmp_path, works, asked, found):
  """Pythons are stand-ins: one that cannot make an environment exits with 1."""
  for name in ('sh', 'cat'):
    (tmp_path / name).symlink_to(shutil.which(name))
  for name in ('python3.12', 'python3.13', 'python3'):
    (tmp_path / name).write_text(f'#!/bin/sh\nexit {int(name not in works)}\n')
    (tmp_path / name).chmod(0o755)
  if 'python3.11' in works:
    (tmp_path / 'python3.11').symlink_to(sys.executable)
  env = {'PATH': str(tmp_path), 'PYTHON': asked}
  done = subprocess.run(
    [ROOT / 'launch/find_python.sh'], env=env, capture_output=True, text=True, check=False
  )
  assert done.stdout.strip() == found and (done.returncode == 0) == bool(found)
  assert ('apt install python3 python3-venv' in done.stderr) == (not found)
  assert ('PYTHON=python3.12 cannot be used' in done.stderr) == (asked not in works and asked != '')
