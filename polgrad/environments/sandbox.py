"""Runs a Python program that nobody has read, such as one that the policy wrote.

With `namespaces` (Linux, where users may make namespaces; no root is needed) the program

* has no network, not even to this machine;
* sees a file system with only the system folders (/usr, /lib, ...) and the Python installation, both
  read-only, and an empty folder in memory (16 MiB) where it may write. It has no home folders, no data
  and no workdir of a run;
* sees no other process, and everything that it started dies with it;
* has no capabilities, runs as the user nobody if root starts it, and sees no environment variables of
  yours;
* has limits: seconds, memory of each process, 128 processes, open files, size of output.

What this does not keep out: it shares the kernel, so a hole in the kernel is a way out; a virtual
machine or gVisor is stronger. Many processes together may take more memory than one may, until the time
is over, and the processors are shared. The program reads what is installed beside Python.

With `limits` there are the limits and an audit hook in the interpreter, which refuses the network, other
programs, ctypes and files to write. That contains accidents of a program. It is no sandbox: a program
that is made to get around the hook does so, and files of yours can be read.
"""

import functools
import os
import selectors
import stat
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

LARGEST_OUTPUT = 1_000_000  # bytes; a program that writes more is killed
START_S = 20.0  # seconds that the process may take to start; the time of the program begins then

# Runs the program of stdin. Arguments: bytes of memory, seconds, whether the hook is set.
RUNNER = r"""
import ast, os, resource, sys, traceback
memory, seconds, hooked = map(int, sys.argv[1:])
code = sys.stdin.buffer.read().decode('utf-8', 'replace')
limits = {'AS': memory, 'CPU': seconds, 'FSIZE': 2**24, 'NOFILE': 64, 'CORE': 0}
if not hooked:
  limits['NPROC'] = 128
for name, limit in limits.items():
  resource.setrlimit(getattr(resource, 'RLIMIT_' + name), (limit, limit))
os.write(1, b'\0')
def hook(event, args, inside=[0]):
  kind = event.partition('.')[0]
  if event == 'open' and not inside[0]:
    inside[0] = 1
    try:
      path, mode, flags = args
      writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    finally:
      inside[0] = 0
    if writes:
      raise PermissionError('this program may not write files')
  names = ('os.system', 'os.exec', 'os.fork', 'os.forkpty', 'os.posix_spawn', 'os.spawn', 'os.kill',
    'os.killpg', 'os.remove', 'os.rename', 'os.rmdir', 'os.mkdir', 'os.truncate', 'os.chmod', 'os.chown',
    'os.link', 'os.symlink', 'resource.setrlimit', 'resource.prlimit', 'ctypes.dlsym')
  if kind in ('socket', 'subprocess', 'shutil', 'urllib', 'ftplib', 'smtplib') or event in names or (
    event == 'ctypes.dlopen' and args[0] is not None):
    raise PermissionError('this program may not use ' + event)
try:
  tree = ast.parse(code, '<program>')
  last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
  scope = {'__name__': '__main__', '__builtins__': __builtins__}
  body = compile(tree, '<program>', 'exec')
  end = last and compile(ast.Expression(last.value), '<program>', 'eval')
  if hooked:
    sys.addaudithook(hook)
  exec(body, scope)
  value = end and eval(end, scope)
  if value is not None:
    print(repr(value))
except Exception as error:
  sys.stdout.flush()
  error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next
  text = ''.join(traceback.format_exception(error))
  sys.stdout.write(text if len(text) < 2000 else text[-2000:])
  sys.stdout.flush()
  os._exit(1)
"""

# Makes the file system of the program, enters it, and gives up all that this needed. Arguments: an empty
# folder, 1 if root runs it, the python to run, the folders that are shown, then -- and the arguments of
# python.
ENTER = r"""
set -e
root=$1 user=$2 python=$3; shift 3
mount --make-rprivate /
mount -t tmpfs -o size=16m,mode=755,nosuid,nodev tmpfs "$root"
while [ "$1" != -- ]; do
  mkdir -p "$root$1"
  mount --bind "$1" "$root$1"
  mount -o remount,bind,ro,nosuid,nodev "$root$1"
  shift
done
shift
for link in bin lib lib64 sbin; do
  [ ! -L /$link ] || [ -e "$root/$link" ] || ln -s "$(readlink /$link)" "$root/$link"
done
mkdir -p "$root/proc" "$root/dev" "$root/tmp" "$root/.old"
chmod 1777 "$root/tmp"
mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
for device in null zero urandom random; do
  : > "$root/dev/$device"
  mount --bind /dev/$device "$root/dev/$device"
done
cd "$root"
pivot_root . .old
umount -l /.old
rmdir /.old
cd /tmp
[ "$user" = 0 ] || become="--reuid=65534 --regid=65534 --clear-groups"
exec setpriv $become --no-new-privs --bounding-set=-all --inh-caps=-all "$python" "$@"
"""
NAMESPACES = ('--net', '--pid', '--ipc', '--uts', '--mount', '--fork', '--kill-child')

# The only variables that a program sees. Without the last ones, libraries of linear algebra would start
# a thread for each processor.
ENVIRONMENT = {
  'PATH': '/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin', 'HOME': '/tmp', 'LANG': 'C.UTF-8',
  'OMP_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1',
}  # fmt: skip


class Ran(NamedTuple):
  """What a program did."""

  output: str  # what it printed, errors included
  error: str  # '' if it ended by itself and without an exception


def check(isolation: str) -> None:
  """Runs a small program.

  Raises:
    RuntimeError: it does not run here.
  """
  try:
    ran = run('1 + 1', timeout_s=20.0, memory_gib=1.0, isolation=isolation)
  except (OSError, RuntimeError) as error:
    ran = Ran(str(error), 'it does not start:')
  if ran != ('2\n', ''):
    raise RuntimeError(
      f'toolbox.Python: no program runs with isolation={isolation!r} on this machine: '
      f"{ran.error or 'it prints'} {ran.output[-300:]!r}. 'namespaces' needs Linux with unshare, mount, "
      "pivot_root and setpriv (util-linux), and that users may make namespaces; 'limits' is no sandbox"
    )


def run(code: str, *, timeout_s: float, memory_gib: float, isolation: str = 'namespaces') -> Ran:
  """Runs a program in a new process, and kills it when its time is over.

  Args:
    code: the program; stdin is empty.
    timeout_s: seconds that it may take.
    memory_gib: address space of its process.
    isolation: 'namespaces' or 'limits', see the module.

  Raises:
    RuntimeError: the process does not start.
    OSError: a program that makes namespaces is not there.
  """
  hooked = isolation == 'limits'
  limits = [str(int(memory_gib * 2**30)), str(int(timeout_s) + 1), str(int(hooked))]
  program = ['-I', '-X', 'utf8', '-c', RUNNER, *limits]
  python, folders = _installation()
  root = empty_folder()
  with tempfile.TemporaryFile() as source:
    source.write(code.encode('utf-8', 'replace'))
    source.seek(0)
    # Root needs no user namespace, and becomes nobody: for root there is no limit of processes.
    as_root = os.geteuid() == 0
    user = () if as_root else ('--user', '--map-root-user')
    entering = ['unshare', *user, *NAMESPACES, 'sh', '-c', ENTER, 'sh', root, str(int(as_root))]
    entering += [python, *folders, '--']
    process = subprocess.Popen(
      [python, *program] if hooked else [*entering, *program],
      stdin=source,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      cwd=root,
      env=ENVIRONMENT,
    )
    try:
      return _watched(process, timeout_s)
    finally:
      process.kill()  # with namespaces, all that it started dies too
      process.stdout.close()
      process.wait()


def _watched(process: subprocess.Popen, timeout_s: float) -> Ran:
  """Reads what a process writes, until it ends, its time is over, or it has written too much."""
  end, output, begun, late = time.monotonic() + START_S, b'', False, False
  with selectors.DefaultSelector() as ready:
    ready.register(process.stdout, selectors.EVENT_READ)
    while len(output) <= LARGEST_OUTPUT:
      late = not ready.select(max(end - time.monotonic(), 0))
      piece = b'' if late else os.read(process.stdout.fileno(), 65536)
      if not piece:
        break
      if not begun and piece.startswith(b'\0'):  # the runner has started
        end, piece, begun = time.monotonic() + timeout_s, piece[1:], True
      output += piece
  text = output[:LARGEST_OUTPUT].decode('utf-8', 'replace')
  if not begun:
    raise RuntimeError(f'the sandbox has not started a program: {text[-300:].strip()!r}')
  if len(output) > LARGEST_OUTPUT:
    return Ran(text, f'more than {LARGEST_OUTPUT} bytes of output')
  if late:
    return Ran(text, f'no end within {timeout_s:g} s')
  return _ended(process, text, timeout_s, end)


def _ended(process: subprocess.Popen, text: str, timeout_s: float, end: float) -> Ran:
  try:
    code = process.wait(max(end - time.monotonic(), 0.1))
  except subprocess.TimeoutExpired:
    return Ran(text, f'no end within {timeout_s:g} s')
  if code in (-24, 128 + 24):  # SIGXCPU
    return Ran(text, f'no end within {timeout_s:g} s')
  return Ran(text, '' if code == 0 else 'the program failed')


def empty_folder() -> str:
  """The folder that the file systems of all programs are mounted on; nothing is ever written into it.

  It stays, so that a process which is killed within a call leaves no folder behind.

  Raises:
    RuntimeError: its place is taken by another user.
  """
  folder = os.path.join(tempfile.gettempdir(), f'polgrad-sandbox-{os.geteuid()}')
  os.makedirs(folder, mode=0o700, exist_ok=True)
  found = os.lstat(folder)
  if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
    raise RuntimeError(f'{folder} belongs to another user; name another folder with TMPDIR')
  return folder


@functools.cache
def _installation() -> tuple[str, list[str]]:
  """The python of this process, and the folders that it and the tools of the system are in."""
  python = os.path.join(os.path.realpath(sys.prefix), 'bin', os.path.basename(sys.executable))
  if not os.path.exists(python):
    python = os.path.realpath(sys.executable)
  real = {os.path.realpath(python), sys.base_prefix, sys.prefix, sys.base_exec_prefix}
  real = {p if os.path.isdir(p) else os.path.dirname(os.path.dirname(p)) for p in real}
  wanted = {'/usr', '/bin', '/lib', '/lib64', '/sbin', *real, *map(os.path.realpath, real)}
  wanted = sorted(p for p in wanted if os.path.isdir(p) and not os.path.islink(p) and p != '/')
  inside = lambda p: any(p != q and p.startswith(q + '/') for q in wanted)
  return python, [p for p in wanted if not inside(p)]
