"""The launcher: what it asks of gcloud, in which order, with nothing lost in quoting."""

import os
import pathlib
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
GCLOUD = """#!/usr/bin/env bash
printf '%s\\0' "$@" > "$CALLS/$(ls "$CALLS" | wc -l)"
case "$4" in
  describe) [[ -n ${EXISTS:-} ]] ;;
  scp) cp "$5" "$CALLS/../copied.tar.gz" && [[ -z ${SCP_FAILS:-} ]] ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
  """A small repository with the launcher, and a gcloud that only writes down what it is asked."""
  files = {'bin/gcloud': GCLOUD, 'clone/new.py': 'new', 'clone/my file.py': '', 'clone/runs/x': ''}
  files |= {'clone/kept.py': '', 'clone/deleted.py': '', 'clone/.gitignore': 'runs/'}
  for name, text in files.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
  (tmp_path / 'bin/gcloud').chmod(0o755)
  (tmp_path / 'calls').mkdir()
  (tmp_path / 'clone/launch').mkdir()
  shutil.copy(ROOT / 'launch/tpu_vm.sh', tmp_path / 'clone/launch')
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


def launch(clone, *flags, **variables):
  return bash(clone, 'bash', 'clone/launch/tpu_vm.sh', *flags, **variables)


def calls(clone):
  """The arguments of every gcloud call so far, after `compute tpus tpu-vm`."""
  found = []
  for path in sorted((clone / 'calls').iterdir(), key=lambda p: int(p.name)):
    arguments = path.read_text().split('\0')[:-1]
    assert arguments[:3] == ['compute', 'tpus', 'tpu-vm']
    found.append(arguments[3:])
  return found


def paste(clone, printed):
  """Runs the commands that a dry run printed."""
  lines = [line.removeprefix('+ ') for line in printed.splitlines() if line.startswith('+ ')]
  assert bash(clone, 'bash', '-e', '-c', '\n'.join(lines)).returncode == 0


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
  assert 'pkill' in remote(stop, 'all')
  command = remote(run, 'all')
  assert f'-m polgrad.train {CONFIG}'.replace(',', '\\,') in command
  assert '--checkpoints=gs://mine/runs/grpo --distributed' in command
  assert 'tail' in remote(follow, '0')
  for call in (create, copy, unpack, install, stop, run, follow):
    assert '--zone=us-central2-b' in call


def test_dry_run_calls_nothing_and_prints_every_step_ready_to_paste(clone):
  done = launch(clone, *NEW, '--dry_run', '--', CONFIG)
  assert done.returncode == 0 and not calls(clone)
  paste(clone, done.stderr)
  check_steps(*calls(clone))


def test_new_slice_is_created_after_it_was_looked_for(clone):
  assert launch(clone, *NEW, '--spot', '--project=p', '--', CONFIG).returncode == 0
  describe, *steps = calls(clone)
  assert describe[:2] == ['describe', 'grpo']
  check_steps(*steps)
  assert '--spot' in steps[0] and '--version=tpu-ubuntu2204-base' in steps[0]
  assert all('--project=p' in call for call in (describe, *steps))


def test_existing_slice_is_reused(clone):
  done = launch(clone, *NEW, '--', CONFIG, EXISTS='1')
  assert done.returncode == 0 and 'reusing grpo' in done.stderr
  assert [call[0] for call in calls(clone)] == ['describe', 'scp'] + 5 * ['ssh']


def test_what_is_copied_is_the_working_tree_without_ignored_files(clone):
  assert launch(clone, *NEW, '--', CONFIG).returncode == 0
  with tarfile.open(clone / 'copied.tar.gz') as archive:
    assert set(archive.getnames()) == {
      'kept.py', 'my file.py', 'new.py', '.gitignore', 'launch/tpu_vm.sh'
    }  # fmt: skip
    assert archive.extractfile('new.py').read() == b'new'
  assert not list(clone.glob('tmp*'))  # the archive does not stay behind


def test_failed_step_ends_the_launch(clone):
  assert launch(clone, *NEW, '--', CONFIG, SCP_FAILS='1').returncode != 0
  assert [call[0] for call in calls(clone)] == ['describe', 'create', 'scp']


def test_train_flags_reach_the_worker_unchanged(clone):
  """Runs the command that ssh was given, against a python that writes its arguments down."""
  flags = [CONFIG, '--config.note=a  b; $(touch broken) `x` "q" \'r\' * \\ é', '--config.empty=']
  assert launch(clone, *NEW, '--', *flags).returncode == 0
  python = clone / 'worker/venv/bin/python'
  python.parent.mkdir(parents=True)
  (clone / 'worker/polgrad').mkdir()
  python.write_text('#!/usr/bin/env bash\nprintf "%s\\0" "$@" > ../part && mv ../part ../got\n')
  python.chmod(0o755)
  done = subprocess.run(
    ['bash', '-c', remote(calls(clone)[-2], 'all')], cwd=clone / 'worker', capture_output=True
  )
  assert done.stdout == b'started\n'
  for _ in range(200):  # the run is detached
    if (clone / 'worker/got').exists():
      break
    time.sleep(0.05)
  assert (clone / 'worker/got').read_text().split('\0')[:-1] == [
    '-m',
    'polgrad.train',
    *flags,
    '--workdir=../runs/grpo',
    '--checkpoints=gs://mine/runs/grpo',
    '--distributed',
  ]
  assert not list(clone.rglob('broken'))


@pytest.mark.parametrize(
  ('action', 'expected'),
  [('--delete', 'delete'), ('--follow', 'tail'), ('--stop', 'pkill')],
)
def test_one_action_is_one_command_and_needs_only_the_slice(clone, action, expected):
  done = launch(clone, *SLICE, action, '--dry_run')
  assert done.returncode == 0 and not calls(clone)
  paste(clone, done.stderr)
  [call] = calls(clone)
  assert expected in ' '.join(call) and 'grpo' in call and '--zone=us-central2-b' in call


@pytest.mark.parametrize(
  ('flags', 'why'),
  [
    ((), 'need --name and --zone'),
    (('--name=grpo', '--delete'), 'need --name and --zone'),
    ((*SLICE, '--type=v4-8', '--', CONFIG), 'need --type and --bucket'),
    ((*SLICE, '--bucket=gs://b', '--', CONFIG), 'need --type and --bucket'),
    (NEW, 'need --config=... after --'),
    ((*NEW, CONFIG), f'unknown option: {CONFIG}'),
  ],
)
def test_missing_options_exit_with_the_usage(clone, flags, why):
  done = launch(clone, *flags)
  assert done.returncode == 2 and not calls(clone)
  assert why in done.stderr and 'usage: launch/tpu_vm.sh' in done.stderr


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
